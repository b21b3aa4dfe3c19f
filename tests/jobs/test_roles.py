"""The roles of the containers as processes: server, and for each site FLARE client and trainer, all
started by the commands that the image starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from federations import JOBS, wait_until
from nvflare.private.defs import SysCommandTopic

from fedfms.errors import FedfmsError
from fedfms.flare.session import Coordinator, connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, free_port, provision, server_settings
from fedfms.local.synthetic import write_phantom_site

pytestmark = pytest.mark.slow

FEDFMS = [sys.executable, "-c", "from fedfms.cli import main; main()"]
# The second site is of the coordinator's own organisation: by FLARE's rules and by its own policy
# the coordinator may run shell commands there.
SITES = ("site-1", "coordinator")


@dataclass
class Roles:
    """The commands of an image, each with its folders as a container would have them."""

    root: Path
    kits: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def arguments(self, role: str, site: str = "") -> list[str]:
        places = {
            "--kit": self.kits / (site or SERVER),
            "--workspace": self.root / "workspace" / (site or SERVER),
            "--policy": self.root / "sites" / site / "policy",
            "--exchange": self.root / "exchange" / site,
            "--config": self.root / "sites" / site / "site.yml",
            "--work": self.root / "work" / site,
        }
        wanted = {
            "server": ("--kit", "--workspace"),
            "flare": ("--kit", "--policy", "--workspace"),
            "trainer": ("--config", "--policy", "--exchange", "--work"),
        }[role]
        named = ["--site", site] if role == "trainer" else []
        return [*named, *(text for name in wanted for text in (name, str(places[name])))]

    def start(self, role: str, site: str = "") -> None:
        name = f"{role} {site}".strip()
        with self.log(role, site).open("ab") as output:
            self.running[name] = subprocess.Popen(
                [*FEDFMS, role, *self.arguments(role, site)],
                env=self.environment(site),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, role: str, site: str = "") -> tuple[int, float]:
        """SIGTERM, as `docker stop`; exit code and seconds."""
        process = self.running.pop(f"{role} {site}".strip())
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        return process.wait(30), time.monotonic() - started

    def health(self, role: str, site: str = "") -> subprocess.CompletedProcess[str]:
        arguments = self.arguments(role, site)
        known = ("--kit", "--workspace", "--exchange")
        pairs = zip(arguments[::2], arguments[1::2], strict=True)
        kept = [text for name, value in pairs if name in known for text in (name, value)]
        return subprocess.run(
            [*FEDFMS, "health", role, *kept],
            env=self.environment(site),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def log(self, role: str, site: str = "") -> Path:
        return self.root / f"{role}-{site}.log"

    def environment(self, site: str) -> dict[str, str]:
        return {
            **os.environ,
            "no_proxy": "localhost,127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **({"SITE_NAME": site} if site else server_settings()),
            "FEDFMS_EXCHANGE": str(self.root / "exchange" / site),
        }


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roles]:
    root = tmp_path_factory.mktemp("roles")
    roles = Roles(root, provision(root / "kits", SITES, free_port()))
    for number, site in enumerate(SITES):
        write_phantom_site(root / "sites" / site, ("bright", "noisy")[number], cases=5, slices=2)
        authorization = roles.kits / site / "local" / "authorization.json"
        shutil.copy(authorization, root / "sites" / site / "policy")
        (root / "exchange" / site).mkdir(parents=True)
        (root / "work" / site).mkdir(parents=True)
    try:
        roles.start("server")
        for site in SITES:
            roles.start("trainer", site)
            roles.start("flare", site)
        yield roles
    finally:
        for process in roles.running.values():
            process.send_signal(signal.SIGTERM)
        for process in roles.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def coordinator(roles: Roles) -> Iterator[Coordinator]:
    def answers() -> bool:
        return roles.health("server").returncode == 0

    wait_until(answers, 90, "the server is healthy")
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "localhost,127.0.0.1"
    try:
        with connect(roles.kits / ADMIN, seconds=30) as session:
            wait_until(lambda: set(session.sites()) == set(SITES), 90, "both sites register")
            yield session
    finally:
        del os.environ["no_proxy"]
        if before is not None:
            os.environ["no_proxy"] = before


def test_every_role_is_healthy(roles, coordinator):
    for role, site in (("server", ""), ("flare", SITES[0]), ("trainer", SITES[0])):
        wait_until(lambda r=role, s=site: roles.health(r, s).returncode == 0, 60, f"{role} is well")


def test_a_job_runs_from_its_beginning_to_its_end(roles, coordinator, tmp_path):
    """FLARE starts its job processes from a role as from its own scripts."""
    job = prepare_job(JOBS / "fedmsa", tmp_path / "job", ["rounds=1", "min_clients=2"])
    job_id = coordinator.submit_prepared(job.folder)
    wait_until(lambda: coordinator.state(job_id).is_finished, 240, "the job ends")
    state = coordinator.state(job_id)
    assert state.is_completed, (state, roles.log("server").read_text()[-3000:])


def test_a_site_runs_no_shell_command_whatever_server_and_policy_allow(roles, coordinator):
    policy = json.loads((roles.kits / SITES[1] / "local" / "authorization.json").read_text())
    assert policy["permissions"]["project_admin"]["shell_commands"] == "o:site"
    said = _answer(coordinator._session.cat_target, SITES[1], file="log.txt")
    assert "shell commands are refused at this site" in said
    assert "refused a request" in roles.log("flare", SITES[1]).read_text()


def test_a_site_sets_its_log_level_itself(roles, coordinator):
    """A coordinator may change it by FLARE's rules; FLARE's console drops what the site answers."""
    coordinator._session.configure_site_log("DEBUG", "client")
    for site in SITES:
        said = roles.log("flare", site).read_text()
        assert f"refused a request of the server: {SysCommandTopic.CONFIGURE_SITE_LOG}" in said
        assert " - DEBUG - " not in said


def test_a_site_leaves_in_order_and_comes_back(roles, coordinator):
    code, seconds = roles.stop("flare", SITES[0])
    assert code == 0
    assert seconds < 6
    # by itself the server gives a site up after its heart beat time-out, minutes later
    wait_until(lambda: coordinator.sites() == [SITES[1]], 5, "the server knows that it left")
    assert "left" in roles.log("server").read_text()
    assert roles.health("flare", SITES[0]).returncode == 1
    roles.start("flare", SITES[0])
    wait_until(lambda: set(coordinator.sites()) == set(SITES), 60, "it registers again")


def test_a_site_that_leaves_in_a_job_neither_ends_it_nor_holds_it_up(roles, coordinator, tmp_path):
    job = prepare_job(JOBS / "fedmsa", tmp_path / "job", ["rounds=3", "min_clients=1"])
    job_id = coordinator.submit_prepared(job.folder)

    def training() -> bool:
        return "Round 1 started" in roles.log("server").read_text()

    wait_until(training, 120, "the second round begins")
    assert roles.stop("flare", SITES[0])[0] == 0
    roles.start("flare", SITES[0])  # as a restart policy does; it takes part in the next job
    # by wait_time_after_min_received each round would wait for ten minutes
    wait_until(lambda: coordinator.state(job_id).is_finished, 120, "the job ends")
    assert coordinator.state(job_id).is_completed
    wait_until(lambda: set(coordinator.sites()) == set(SITES), 60, "the site is there again")


def test_a_server_leaves_in_order(roles, coordinator):
    code, seconds = roles.stop("server")
    assert code == 0
    assert seconds < 6
    assert roles.health("server").returncode == 1


def _answer(ask, *arguments, **named) -> str:
    """What the console would show, whether FLARE raises it or returns it."""
    try:
        return str(ask(*arguments, **named))
    except FedfmsError:
        raise
    except Exception as error:
        return str(error)
