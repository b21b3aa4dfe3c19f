"""The roles `fedfms server` and `fedfms flare`: check the kit, lay it out, run FLARE in order.

FLARE's main function runs in this process, so that a container's signals arrive. Before it starts,
everything is checked that FLARE would meet with silence: it retries an expired certificate or
another project's CA for ever without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fedfms import __version__
from fedfms.contracts.machine import Machine
from fedfms.errors import ConfigError, FedfmsError
from fedfms.flare.announce import HEARTBEAT
from fedfms.flare.cleaning import AUDIT, bound_log, clean_every_hour, clean_folders
from fedfms.flare.instance import FRESH_SECONDS, SECOND_COPY
from fedfms.flare.internals import process, settings, version
from fedfms.kits.certificates import RENEW_DAYS
from fedfms.kits.kit import Kit
from fedfms.notify import Notifier
from fedfms.preflight.health import note_process, note_refused
from fedfms.preflight.kit import check_kit
from fedfms.preflight.network import reach
from fedfms.preflight.policy import AUTHORIZATION_FILE, check_authorization
from fedfms.user import refuse_root

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # from SIGTERM until this process is gone, whatever FLARE does
UNREGISTERED_SECONDS = 30.0  # a site that is not registered by then hears why
REMINDER_SECONDS = 60.0  # and again after each of these
REFUSED_SECONDS = 20.0  # a site whose signs of life the server does not take for so long hears it
WATCH_SECONDS = 5.0  # between two looks at that

_EXIT_RESTART = 75  # EX_TEMPFAIL: start me again
# how FLARE was told to end, also from its console -> exit code
_CODES: dict[process.Told, int] = {"shutdown": 0, "restart": _EXIT_RESTART, None: 1}

# what the server may not do at a site, whoever it says asks; topic -> what the asker reads
REFUSED = {
    process.SHELL: "shell commands are refused at this site",
    process.SITE_LOG: "this site sets its log level itself",
    process.JOB_LOG: "this site sets its log level itself",
}


def run_server(kit_folder: Path, workspace: Path) -> int:
    """Run the project's FLARE server until it is told to stop; the exit code.

    Args:
        kit_folder: the server's kit, with startup/ and local/; it is not changed.
        workspace: FLARE's workspace; kept between starts.

    Raises:
        FedfmsError: the kit cannot be used, the workspace cannot be written, or the FLARE that is
            installed is not as we need it (FlareChanged).
    """
    refuse_root()
    kit = check_kit(kit_folder, "server")
    _say_hello(kit)
    version.check("process", "server", "settings")
    if (command := Machine.from_environment().notify) is not None:
        Notifier(command)  # a command that is not there is said before anything starts
    lay_out(kit, workspace)
    leave = _Leave()
    main = process.server_main(lambda end: leave.set_in_order(_leave_runs))
    return _run(main, "fed_server", workspace, [f"org={kit.organisation}"], leave)


def run_client(kit_folder: Path, policy: Path, workspace: Path) -> int:
    """Run a site's FLARE client until it is told to stop; the exit code.

    Args:
        kit_folder: the site's kit, with startup/ and local/; it is not changed.
        policy: the site's own policy folder; its authorization.json goes before the kit's.
        workspace: FLARE's workspace; kept between starts.

    Raises:
        FedfmsError: the kit or the policy cannot be used, the workspace cannot be written, or the
            FLARE that is installed is not as we need it (FlareChanged).
    """
    refuse_root()
    kit = check_kit(kit_folder, "client", Machine.from_environment().site_name)
    authorization = check_authorization(policy, kit.organisation)
    _say_hello(kit)
    version.check("process", "settings")
    lay_out(kit, workspace, authorization)
    refuse_requests()
    clean_every_hour(lambda age: _clean_site(workspace, age))
    registered = threading.Event()
    refusals = process.refused_logins()
    leave = _Leave()

    def on_registered(silence: Callable[[], None], end: Callable[[], None]) -> None:
        registered.set()
        leave.set_in_order(lambda: _leave_federation(silence, end))

    flare = process.client_main(on_registered)
    threading.Thread(
        target=_explain_silence, args=(kit, registered, workspace), daemon=True
    ).start()

    def main(args: argparse.Namespace) -> None:
        try:
            flare(args)
        except RuntimeError:  # such as "Login failed."
            if registered.is_set():
                raise
        finally:
            if not registered.is_set():
                why = why_refused(refusals[-1]) if refusals else None
                log.error("never registered at the server: %s", why or why_not_registered(kit))

    options = [f"uid={kit.about.participant}", f"org={kit.organisation}"]
    return _run(main, "fed_client", workspace, options, leave)


def _clean_site(workspace: Path, age: float) -> None:
    """Remove what old jobs left here; not those that have a process of ours."""
    bound_log(workspace / AUDIT)
    running: set[str] = set()
    for job in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            running.update(job.cmdline())
    if removed := clean_folders(workspace, age, running):
        log.info("removed the folders of %d old jobs", len(removed))


def lay_out(kit: Kit, workspace: Path, authorization: bytes | None = None) -> None:
    """Copy a checked kit to where FLARE looks for it, anew at every start.

    Args:
        kit: stays as it is; it may be mounted read-only.
        workspace: gets startup/ and local/; whatever else FLARE keeps there stays.
        authorization: content for local/authorization.json instead of the kit's.

    Raises:
        ConfigError: code workspace.
    """
    os.umask(0o007)  # the volume stays writable for its group, should the user's id change
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        for name in ("startup", "local"):
            target = workspace / name
            if target.is_symlink():
                target.unlink()
            elif target.exists():
                shutil.rmtree(target)
            _copy(kit.folder / name, target)
        if authorization is not None:
            (workspace / "local" / AUTHORIZATION_FILE).write_bytes(authorization)
        process.set_log_level(workspace / "local", _log_level())
        link = Machine.from_environment().link_megabytes_per_second
        settings.write_connection_settings(workspace / "local", link)
        process.remove_stale_notes(workspace)
        note_process(workspace)
        note_refused(workspace, False)
    except OSError as error:
        raise ConfigError(
            f"the workspace {workspace} cannot be set up: {error}",
            "mount a volume there that this container's user may write (group 10001); a volume "
            "that an older version filled may be removed, it holds no images",
            code="workspace",
        ) from None


def refuse_requests() -> None:
    """Let FLARE's client answer certain requests with a refusal; to be called before it starts.

    A site believes what the server says of who asks and whether that must be authorized. What is
    refused here is refused whatever the server says.
    """
    process.refuse_requests(
        REFUSED,
        # without what was asked
        on_refused=lambda topic: log.warning("refused a request of the server: %s", topic),
    )


class _Leave:
    """What SIGTERM and Ctrl-C mean: leave in order, soon, in any case."""

    def __init__(self) -> None:
        # none: FLARE is not that far, and there is nothing to leave
        self.in_order: Callable[[], Any] | None = None
        self._told = False

    def set_in_order(self, in_order: Callable[[], Any]) -> None:
        """From now on there is something to leave, and this leaves it."""
        self.in_order = in_order

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.in_order is None or self._told:
            log.info("told to stop: ending at once")
            _end(0)
        self._told = True
        log.info("told to stop (%s): leaving in order", signal.Signals(number).name)
        hard = threading.Timer(STOP_SECONDS, _end, (0,))
        hard.daemon = True
        hard.start()
        # not in this thread: FLARE's main may hold a lock at this very moment
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        assert self.in_order is not None  # it was there when the signal came
        try:
            self.in_order()
        except Exception:  # whatever it is, we leave
            log.exception("could not leave in order")
            _end(1)


def _leave_runs() -> None:
    """End this server and its jobs' processes, so that runs go on when it is started again.

    FLARE's own order would abort them, and they would have come to their end.
    """
    for job in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            job.kill()
    _end(0)


def _leave_federation(silence: Callable[[], None], end: Callable[[], None]) -> None:
    """End this site's part of running jobs, deregister, and let FLARE's main end.

    In this order the server counts the site as gone, and the job goes on without it. A job process
    that lives on takes the site off the list of the dead again, and then everybody waits for it;
    one whose end is reported ends the job for all sites.
    """
    silence()  # nothing is reported any more
    jobs = psutil.Process().children(recursive=True)
    for job in jobs:
        with contextlib.suppress(psutil.Error):
            job.kill()
    psutil.wait_procs(jobs, timeout=1.0)
    end()


def _end(code: int) -> None:
    """End now: FLARE's threads would keep this process alive."""
    logging.shutdown()
    os._exit(code)


def _run(
    main: Callable[..., Any],
    config: str,
    workspace: Path,
    options: Sequence[str],
    leave: _Leave,
) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    settings.set_stream_settings()  # also for job processes
    return process.run_main(main, config, workspace, options, _CODES)


def _log_level() -> str:
    """FEDFMS_LOG_LEVEL, such as debug, for all that FLARE and its job processes log here."""
    level = (Machine.from_environment().log_level or "info").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(
            f"FEDFMS_LOG_LEVEL is {level.lower()}",
            "set debug, info, warning or error",
            code="log-level",
        )
    return level


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's plain files: contents alone, private keys for this user alone."""
    target.mkdir(mode=0o770)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(mode=0o770)
            continue
        copy.touch(mode=0o600)
        copy.write_bytes(path.read_bytes())
        if copy.suffix != ".key":
            copy.chmod(0o640)


def _say_hello(kit: Kit) -> None:
    # FLARE sets logging up for itself a moment later; until then nobody would hear this
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)
    log.info(
        "fedfms %s, %s of project %s; the server is %s:%d",
        __version__,
        kit.about.participant,
        kit.about.project,
        kit.about.server_host,
        kit.about.server_port,
    )
    if (left := kit.days_left) < RENEW_DAYS:
        log.warning("the certificate ends in %d days: ask the coordinator to renew this kit", left)


def _explain_silence(kit: Kit, registered: threading.Event, workspace: Path) -> None:
    """Say once a minute why this site is not in the federation, as long as it is not.

    A site that is shut out later is told so likewise, and its health check knows.
    """
    wait = UNREGISTERED_SECONDS
    while not registered.wait(wait):
        log.warning("not registered at the server yet: %s", why_not_registered(kit))
        wait = REMINDER_SECONDS
    told_at: float | None = None
    while True:
        time.sleep(WATCH_SECONDS)
        if HEARTBEAT.refused_seconds > REFUSED_SECONDS:
            if told_at is None or time.monotonic() > told_at + REMINDER_SECONDS:
                told_at = time.monotonic()
                note_refused(workspace, True)
                log.warning(
                    "the server does not let %s take part any more; fix: ask the coordinator, who "
                    "can let it in again (fedfms readmit %s). This client goes on asking, and is "
                    "back by itself then",
                    kit.about.participant,
                    kit.about.participant,
                )
        elif told_at is not None:
            told_at = None
            note_refused(workspace, False)
            log.info("the server lets %s take part again", kit.about.participant)


def why_refused(answer: str) -> str | None:
    """A refused login in plain words; None for what has none."""
    if SECOND_COPY not in answer:
        return None
    return (
        f"{answer[answer.index(SECOND_COPY) :]}, so this one may not join; fix: stop the FLARE "
        "client on the other machine, then start this one again; a site that fell over is let in "
        f"{FRESH_SECONDS:.0f} seconds after its last sign of life. If you know of no other "
        "machine, tell the coordinator at once: somebody may have this kit's key"
    )


def why_not_registered(kit: Kit) -> str:
    """The likely cause, as one line with what to do."""
    try:
        check_kit(kit.folder, kit.about.type, Machine.from_environment().site_name)
        reach(kit)
    except FedfmsError as error:
        return f"{error.problem}; fix: {error.fix}"
    return (
        "name, port and certificates are in order; the server may be starting, or may have "
        "disabled this site; fix: ask the coordinator"
    )
