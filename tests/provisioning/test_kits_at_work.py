"""Kits of every kind with one running server, started by the commands that the image starts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from project_files import COORDINATOR, NAME, Made, certificate, entry, site, write_project

from fedfms.errors import FederationError
from fedfms.flare.session import Coordinator, connect
from fedfms.flare.simulate import free_port
from fedfms.local.processes import Processes, Supervised
from fedfms.provisioning.own_key import approve, install, request
from fedfms.provisioning.provision import provision

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def on_this_machine(content: dict) -> None:
    server, admin = content["participants"][0], entry(content, COORDINATOR)
    server.update(name="localhost", fed_learn_port=free_port())
    content["participants"] = [server, site("site-1"), site("site-2", own_key=True), admin]


def start(
    processes: Processes, role: str, name: str, kit: Path, folder: Path, log: str = ""
) -> Supervised:
    policy = ["--policy", str(kit.parent / "policy")] if role == "flare" else []
    return processes.start(
        log or name,
        [
            *(sys.executable, "-c", "from fedfms.cli import main; main()", role),
            *("--kit", str(kit), "--workspace", str(folder / "workspace" / name), *policy),
        ],
        folder=folder,
        log_file=folder / f"{log or name}.log",
        environment={**os.environ, "SITE_NAME": name, "FEDFMS_EXCHANGE": str(folder)},
    )


def wait(what: Callable[[], bool], log: Supervised, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.last_lines(40)
        time.sleep(0.5)


def test_new_sites_renewed_ones_and_those_with_their_own_key_join_the_running_server(
    tmp_path: Path,
) -> None:
    project, out = write_project(tmp_path / "project.yml", on_this_machine), tmp_path / "out"
    made = Made(project, out, provision(project, out))
    asked = request("site-2", "site_2", NAME, tmp_path / "request")
    approve(asked.file, project, asked.key, out)
    own = install(made.zip("site-2"), asked.folder, made.result.fingerprint, tmp_path / "site-2")

    with Processes() as processes:
        server = start(processes, "server", "localhost", made.kit("localhost"), tmp_path)
        wait(lambda: _is_up(made), server)
        with connect(made.kit(COORDINATOR)) as coordinator:
            first = start(processes, "flare", "site-1", made.kit("site-1"), tmp_path)
            wait(lambda: _there(coordinator, "site-1"), first)
            start_own = start(processes, "flare", "site-2", own / "kit", tmp_path)
            wait(lambda: _there(coordinator, "site-1", "site-2"), start_own)

            # a site that is new in project.yml; the server was made before it
            made.change(lambda content: content["participants"].append(site("site-3")))
            provision(project, out)
            third = start(processes, "flare", "site-3", made.kit("site-3"), tmp_path)
            wait(lambda: _there(coordinator, "site-1", "site-2", "site-3"), third)

            # the first site again, with its new key
            old = certificate(made.kit("site-1")).serial_number
            provision(project, out, renew=["site-1"])
            assert certificate(made.kit("site-1")).serial_number != old
            assert first.process is not None
            first.process.terminate()
            wait(lambda: not first.is_running and not _there(coordinator, "site-1"), first)
            first = start(processes, "flare", "site-1", made.kit("site-1"), tmp_path, "renewed")
            wait(lambda: _there(coordinator, "site-1"), first)


def _is_up(made: Made) -> bool:
    try:
        with connect(made.kit(COORDINATOR)):
            return True
    except FederationError:
        return False


def _there(coordinator: Coordinator, *names: str) -> bool:
    return set(names) <= set(coordinator.sites())
