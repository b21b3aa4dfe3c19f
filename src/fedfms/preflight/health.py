"""Is a role of this container well? Asks its process; cheap enough for once every few seconds.

Nothing here imports torch or FLARE: a probe costs a fraction of a second of one core, and half as
much as `python -m fedfms.preflight.health ROLE` as it does as `fedfms health ROLE`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from fedfms.bounded import read_json
from fedfms.contracts.machine import Machine
from fedfms.errors import FedfmsError
from fedfms.kits.kit import read_kit
from fedfms.preflight.network import NetworkError, connect, proxy_for, shake_hands
from fedfms.trainer.connection import ping
from fedfms.training.gpu_there import why_lost

PROCESS_FILE = "fedfms.pid"  # in the workspace: process id and its start, of the role's process
REFUSED_FILE = "fedfms.refused"  # in the workspace, while the server refuses the client
TIMEOUT_SECONDS = 5.0
_ROLES = ("server", "flare", "trainer")


class NotHealthy(FedfmsError):
    """The role's process is not there, or does not do its work."""

    default_code = "not-healthy"


def note_process(workspace: Path) -> None:
    """Write down which process runs the role in this workspace."""
    me = psutil.Process()
    note = {"pid": me.pid, "started": me.create_time()}
    (workspace / PROCESS_FILE).write_text(json.dumps(note))


def note_refused(workspace: Path, refused: bool) -> None:
    """Write down whether the server refuses this workspace's FLARE client."""
    if refused:
        (workspace / REFUSED_FILE).touch()
    else:
        (workspace / REFUSED_FILE).unlink(missing_ok=True)


def check_server(kit_folder: Path) -> str:
    """A TLS handshake on the server's own port, against the kit's CA; what was seen.

    Raises:
        FedfmsError: with why the server is not well.
    """
    kit = read_kit(kit_folder)
    port = kit.about.server_port
    # the role listens at every address; where the kit's host is this machine alone, on loopback
    stream = connect("127.0.0.1", port, TIMEOUT_SECONDS)
    # without the kit's own certificate, which is a server's and none of a client
    shake_hands(stream, kit, identify=False).close()
    return f"the server answers on port {port} with the kit's certificate"


def check_flare(kit_folder: Path, workspace: Path) -> str:
    """The FLARE client's process holds a connection to a server that lets it take part.

    Returns:
        what was seen.

    Raises:
        FedfmsError: with why the client is not well.
    """
    kit = read_kit(kit_folder)
    process = _noted_process(workspace)
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.Error as error:
        raise NotHealthy(
            f"the FLARE client's process cannot be looked at ({type(error).__name__})",
            "run the probe as the same user as the role",
        ) from None
    if (workspace / REFUSED_FILE).exists():
        raise NotHealthy(
            f"the server does not let {kit.about.participant} take part any more",
            f"ask the coordinator, who can let it in again: fedfms readmit {kit.about.participant}",
        )
    host, port = kit.about.server_host, kit.about.server_port
    way, through = f"port {port}", ""
    with contextlib.suppress(NetworkError):  # such a proxy, gRPC leaves aside
        if proxy := proxy_for(host):
            way, through, port = (
                f"{host} through the proxy {proxy}",
                f" through {proxy}",
                proxy.port,
            )
    if not any(_is_to(connection, port) for connection in connections):
        raise NotHealthy(
            f"the FLARE client has no connection to {host}:{kit.about.server_port}{through}",
            "its log says why once a minute; or run: fedfms check-site",
        )
    return f"the FLARE client is connected to {way}"


def check_trainer(exchange: Path) -> str:
    """The trainer answers on its socket; what it says.

    Raises:
        FedfmsError: with why the trainer is not well.
    """
    pong = ping(exchange, TIMEOUT_SECONDS)
    if pong.gpu == "lost":
        raise NotHealthy(
            f"the trainer of {pong.site} has lost its GPU: "
            + (why_lost() or "torch cannot use it any more"),
            "look at nvidia-smi and at the kernel's log (dmesg, Xid) on the host. Where nvidia-smi "
            "works there, this container lost its access, as happens when systemd reloads: "
            f"docker compose up --detach --force-recreate {pong.site}-trainer",
            code="gpu-lost",
        )
    gpu = ", with its GPU" if pong.gpu == "present" else ""
    return f"the trainer of {pong.site} answers{gpu}, {'busy' if pong.busy else 'waiting'}"


def role_of_container(command: Path = Path("/proc/1/cmdline")) -> str | None:
    """What this container was started to do, such as trainer or dry-run; None where it is none.

    `docker compose run` gives a container that does one thing and ends the health check of the
    role whose service it is.
    """
    try:
        words = command.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if Path(word).name in ("entrypoint", "fedfms"):
            return following or None
    return None


def _noted_process(workspace: Path) -> psutil.Process:
    try:
        note = read_json(workspace / PROCESS_FILE)
        process = psutil.Process(note["pid"])
        if abs(process.create_time() - note["started"]) < 1.0:
            return process
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        pass
    raise NotHealthy(
        f"no FLARE client runs in {workspace}", "read the end of its log: docker compose logs"
    )


def _is_to(connection: Any, port: int) -> bool:
    return (
        connection.status == psutil.CONN_ESTABLISHED
        and bool(connection.raddr)
        and connection.raddr.port == port
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Probe one role; the exit code is 0 or 1, and one line says what was seen or what to do."""
    parser = argparse.ArgumentParser(
        prog="fedfms health",
        description="Ask a role's process in this container whether it is well; exit code 0 or 1.",
    )
    add = parser.add_argument
    add("role", choices=_ROLES)
    add("--kit", type=Path, metavar="FOLDER", default=Path("/kit"))
    add("--workspace", type=Path, metavar="FOLDER", default=Path("/workspace"))
    exchange = Machine.from_environment().exchange or Path("/exchange")
    add("--exchange", type=Path, metavar="FOLDER", default=exchange, help="FEDFMS_EXCHANGE")
    given = parser.parse_args(argv)
    started_for = role_of_container()
    try:
        if started_for not in (None, *_ROLES):
            said = f"this container was started for one thing, {started_for}: nothing to ask"
        elif given.role == "server":
            said = check_server(given.kit)
        elif given.role == "flare":
            said = check_flare(given.kit, given.workspace)
        else:
            said = check_trainer(given.exchange)
    except FedfmsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
