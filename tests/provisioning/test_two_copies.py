"""The same kit on two machines, and a site that is shut out while it runs; real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project_files import COORDINATOR, Made, entry, site, write_project

from fedfms.errors import FederationError, FedfmsError
from fedfms.flare.instance import read_instance
from fedfms.flare.session import Coordinator, connect
from fedfms.flare.simulate import free_port
from fedfms.local.processes import Processes, Supervised
from fedfms.preflight.health import check_flare
from fedfms.provisioning.provision import provision

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def on_this_machine(content: dict) -> None:
    server, admin = content["participants"][0], entry(content, COORDINATOR)
    server.update(name="localhost", fed_learn_port=free_port())
    content["participants"] = [server, site("site-1"), admin]


class Here:
    """A server of two kits, and machines on which a kit may be started."""

    def __init__(self, made: Made, folder: Path, processes: Processes) -> None:
        self.made, self.folder, self.processes = made, folder, processes
        self.server = self.start("server", "localhost", "server")

    def start(self, role: str, name: str, machine: str, log: str = "") -> Supervised:
        kit = self.made.kit(name)
        policy = ["--policy", str(kit.parent / "policy")] if role == "flare" else []
        return self.processes.start(
            log or machine,
            [
                *(sys.executable, "-c", "from fedfms.cli import main; main()", role),
                *("--kit", str(kit), "--workspace", str(self.folder / machine), *policy),
            ],
            folder=self.folder,
            log_file=self.folder / f"{log or machine}.log",
            environment={**os.environ, "SITE_NAME": name, "FEDFMS_EXCHANGE": str(self.folder)},
        )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("two")
    project = write_project(folder / "project.yml", on_this_machine)
    made = Made(project, folder / "out", provision(project, folder / "out"))
    with Processes() as processes:
        here = Here(made, folder, processes)
        wait(lambda: _is_up(made), here.server)
        yield here


def test_a_second_copy_is_refused_in_plain_words_and_a_restart_is_not(here: Here) -> None:
    with connect(here.made.kit(COORDINATOR)) as coordinator:
        first = here.start("flare", "site-1", "machine-a")
        wait(lambda: _there(coordinator), first)

        second = here.start("flare", "site-1", "machine-b")
        wait(lambda: not second.is_running, second)
        said = (here.folder / "machine-b.log").read_text()
        assert "another copy of this site's kit is connected" in said
        assert "fix: stop the FLARE client on the other machine" in said
        told = here.server.log.read_text()
        assert "site-1 is connected" in told
        assert "another copy of its kit asked to join: refused" in told

        assert first.is_running
        assert _there(coordinator)
        assert first.log.read_text().count("Successfully registered") == 1
        assert "Re-login" not in here.server.log.read_text()

        # killed without a farewell and started again, as a container engine does
        assert first.process is not None
        first.process.send_signal(signal.SIGKILL)
        wait(lambda: not first.is_running, first)
        at = time.monotonic()
        again = here.start("flare", "site-1", "machine-a", "again")
        wait(lambda: "Successfully registered" in again.log.read_text(), again)
        assert time.monotonic() - at < 25

        # killed, and nothing of it is left: let in as soon as the old one counts as silent
        assert again.process is not None
        again.process.send_signal(signal.SIGKILL)
        wait(lambda: not again.is_running, again)
        deadline = time.monotonic() + 60
        for attempt in range(20):
            fresh = here.start("flare", "site-1", "machine-d", f"fresh-{attempt}")
            wait(
                lambda fresh=fresh: (
                    not fresh.is_running or "Successfully registered" in fresh.log.read_text()
                ),
                fresh,
            )
            if fresh.is_running:
                break
            assert time.monotonic() < deadline
        assert fresh.is_running
        assert fresh.process is not None
        fresh.process.terminate()
        wait(lambda: not fresh.is_running, fresh)


def test_an_instance_is_that_of_its_workspace_and_says_nothing_of_it(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = read_instance(tmp_path / "one")
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert read_instance(tmp_path / "one") == one
    assert read_instance(tmp_path / "other") != one
    kept = next((tmp_path / "one").iterdir()).read_text()
    assert one not in kept


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"name": "server.invalid"}, ("server.invalid has no address here", "--add-host")),
        (
            {"name": "localhost", "fed_learn_port": 1999},
            ("nothing answers at localhost:1999", "port"),
        ),
    ],
)
def test_a_coordinator_without_a_way_to_the_server_hears_which_step_fails(
    tmp_path: Path, server: dict, words: tuple[str, str]
) -> None:
    def change(content: dict) -> None:
        content["participants"][0].update(server)

    project = write_project(tmp_path / "project.yml", change)
    made = Made(project, tmp_path / "out", provision(project, tmp_path / "out"))
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from fedfms.cli import main; main()"),
            *("status", "--kit", str(made.kit(COORDINATOR))),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    for part in ("cannot connect to the server", *words):
        assert part in done.stderr
    assert len(done.stderr.splitlines()) == 2  # the problem and its fix, and nothing of FLARE's


def test_a_site_that_is_shut_out_while_it_runs_hears_it_and_is_not_healthy(here: Here) -> None:
    kit = here.made.kit("site-1")
    with connect(here.made.kit(COORDINATOR)) as coordinator:
        client = here.start("flare", "site-1", "machine-e")
        workspace = here.folder / "machine-e"
        wait(lambda: _there(coordinator), client)
        assert "connected" in check_flare(kit, workspace)
        coordinator.revoke("site-1")
        wait(lambda: "does not let site-1 take part any more" in client.log.read_text(), client)
        assert "fedfms readmit site-1" in client.log.read_text()
        with pytest.raises(FedfmsError, match="does not let site-1 take part"):
            check_flare(kit, workspace)
        assert "Failed to send heartbeat" not in client.log.read_text()
        coordinator.readmit("site-1")
        wait(lambda: _there(coordinator), client)
        wait(lambda: "lets site-1 take part again" in client.log.read_text(), client)
        assert "connected" in check_flare(kit, workspace)


def wait(what: Callable[[], bool], log: Supervised, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.last_lines(40)
        time.sleep(0.5)


def _is_up(made: Made) -> bool:
    try:
        with connect(made.kit(COORDINATOR)):
            return True
    except FederationError:
        return False


def _there(coordinator: Coordinator) -> bool:
    return coordinator.sites() == ["site-1"]
