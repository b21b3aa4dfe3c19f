"""One real FLARE server for the checks of a site, started by its own role from a real kit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_kits import FEDFMS, Made, copy_places, make_kits

from fedfms.flare.simulate import SERVER, free_port
from fedfms.preflight.site import FlarePlaces

SITES = ["site-1", "site-2", "other-clock", "other-version", "no-greeting", "disabled"]
MEASURED = ["line-1", "line-2"]  # whose budget of measurements one test each uses up


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Kits of one project."""
    return make_kits(tmp_path_factory.mktemp("kits") / "project", [*SITES, *MEASURED], free_port())


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Made:
    """Kits of another project, with the same names and the same server's address."""
    return make_kits(tmp_path_factory.mktemp("foreign") / "project", SITES, made.port)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Iterator[Path]:
    """A running `fedfms server`; yields its workspace."""
    kit, workspace = made.kit(SERVER), tmp_path_factory.mktemp("server")
    resources = kit / "local" / "resources.json"
    values = json.loads(resources.read_text())
    for component in values["components"]:
        if component["id"] == "greeting":
            component["path"] = "crooked_greeting.CrookedGreeting"
    resources.write_text(json.dumps(values))
    made.sign(kit)
    (workspace / "disabled_clients.json").write_text(json.dumps({"disabled_clients": ["disabled"]}))
    with (workspace / "out.log").open("wb") as output:
        process = subprocess.Popen(
            [*FEDFMS, "server", "--kit", str(kit), "--workspace", str(workspace)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_port(process, made.port)
        yield workspace
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 180  # beside other tests on two cores
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)


@pytest.fixture
def places(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> FlarePlaces:
    """A copy of site-1's kit and policy, a workspace and an exchange, for a test to break."""
    for name in ("SITE_NAME", "grpc_proxy", "https_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return copy_places(made, "site-1", tmp_path)
