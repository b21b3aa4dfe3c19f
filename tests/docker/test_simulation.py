"""`docker compose up` from a clean clone: the demo, looked at while it runs and afterwards."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from containers import (
    REPOSITORY,
    Project,
    checkout,
    docker,
    files_that_name,
    wait_until,
)

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1200)]

SITES = ("site-1", "site-2", "site-3", "site-4")
LONGEST_SECONDS = 480
PAGE_PORT = 18090


def _read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=5) as page:
        return page.read().decode()


@dataclass
class Run:
    """One `docker compose up`."""

    project: Project
    seconds: float = 0.0
    code: int | None = None
    said: str = ""
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)  # containers while it ran

    page: str = ""  # what a browser of this machine got of it
    without_token: int | None = (
        None  # HTTP status, without the part that the page's log alone tells
    )

    def look_at_page(self) -> bool:
        """Whether the page shows a run; what it says is kept."""
        said = self.project.run("logs", "page").stdout
        address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32,}/", said)
        if address is not None:
            with contextlib.suppress(OSError):
                run = re.search(r'<a href="(run/[0-9a-f-]{36}/)">', _read(address[0]))
                if run is not None:
                    self.page = _read(address[0] + run[1])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PAGE_PORT}/", timeout=5)
            except OSError as error:
                self.without_token = getattr(error, "code", None)
        return "Round" in self.page and 'scope="row">site-3' in self.page

    @property
    def results(self) -> Path:
        """The newest results folder."""
        return max((self.project.folder / "results").glob("fedmsa-*"), key=os.path.getmtime)


@pytest.fixture(scope="module")
def project(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A clone whose image is not there yet: `up` builds it, from the packages of the other one."""
    folder = checkout(tmp_path_factory.mktemp("clone") / "fedfms")
    (folder / "results").chmod(0o777)  # root made this clone; its user is not the container's
    environment = {
        "FEDFMS_IMAGE": "fedfms:clone",
        "FEDFMS_WHEELS": str(REPOSITORY / "workspace/docker/wheels"),
        # what the tests then look for must not even be in the wordiest log
        "FEDFMS_LOG_LEVEL": "debug",
        "COMPOSE_PROFILES": "page",
        "FEDFMS_PAGE_PORT": str(PAGE_PORT),
    }
    files = ("docker-compose.yml", "tests/docker/compose.build.yml")
    demo = Project(folder, "fedfms-test", environment, files)
    demo.down()
    docker("rmi", "-f", environment["FEDFMS_IMAGE"], check=False)
    yield demo
    demo.down()
    docker("rmi", "-f", environment["FEDFMS_IMAGE"], check=False)


@pytest.fixture(scope="module")
def first(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(project)
    log = tmp_path_factory.mktemp("log") / "up.log"
    started = time.monotonic()
    process = project.start("up", "--exit-code-from", "coordinator", log=log)
    wait_until(
        lambda: (
            process.poll() is not None
            or project.containers().get("coordinator", {}).get("State", {}).get("Running")
        ),
        180,
        "the coordinator runs",
    )
    run.seen = project.containers()
    with contextlib.suppress(AssertionError):  # the test of the page says it
        wait_until(lambda: run.look_at_page(), 120, "the page shows the run")
    run.code = process.wait(timeout=LONGEST_SECONDS)
    run.seconds, run.said = time.monotonic() - started, log.read_text()
    print(f"docker compose up took {run.seconds:.0f} s, with a cached build of the image")
    return run


def test_up_exits_with_the_runs_code_and_in_time(first: Run) -> None:
    assert first.code == 0, first.said[-6000:]
    assert first.seconds < LONGEST_SECONDS
    assert "round 5 (6 of 6): 4 of 4 sites" in first.said


def test_results_are_there_and_fedmsa_has_learnt_as_in_the_demo(first: Run) -> None:
    names = {path.name for path in first.results.iterdir()}
    assert names >= {
        "global_model.safetensors",
        "best_model.safetensors",
        "recipe.json",
        "rounds.csv",
        "evaluation.csv",
        "report.html",
        "report.md",
    }
    with (first.results / "evaluation.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    final = {row["site"]: float(row["mean"]) for row in rows if row["model"] == "final"}
    assert set(final) == set(SITES)
    # make demo: 0.561, 0.595, 0.551 and, unseen, 0.495; before training 0.128 and 0.170
    trained = [final[site] for site in ("site-1", "site-2", "site-3")]
    assert sum(trained) / 3 == pytest.approx(0.569, abs=0.01)
    assert final["site-4"] == pytest.approx(0.495, abs=0.02)
    recipe = json.loads((first.results / "recipe.json").read_text())
    assert (recipe["method"], recipe["holdout"]) == ("fedmsa", ["site-4"])


def test_every_container_is_confined(first: Run) -> None:
    services = {f"{site}-{part}" for site in SITES for part in ("trainer", "flare")}
    others = {"server", "coordinator", "page", "provision", "phantoms"}
    assert set(first.seen) == services | others
    for service, container in first.seen.items():
        host, config = container["HostConfig"], container["Config"]
        user = config["User"].partition(":")[0]
        assert user.isdecimal() and int(user) != 0, service
        assert host["ReadonlyRootfs"] is True, service
        assert host["CapDrop"] == ["ALL"] and not host["CapAdd"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Privileged"] is False and host["PidMode"] == "", service
        assert host["NetworkMode"] != "host", service
        assert host["Memory"] > 0 and host["PidsLimit"] > 0, service
        mounts = [mount["Source"] for mount in container["Mounts"]]
        assert not [source for source in mounts if "docker.sock" in source], service


def test_a_browser_of_this_machine_and_of_no_other_sees_the_run(first: Run) -> None:
    published = first.seen["page"]["HostConfig"]["PortBindings"]
    assert published == {f"{PAGE_PORT}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(PAGE_PORT)}]}
    assert 'scope="row">site-3' in first.page and "of 6" in first.page
    assert first.without_token == 404


def test_images_are_read_only_and_only_where_no_network_is(first: Run) -> None:
    for service, container in first.seen.items():
        data = [mount for mount in container["Mounts"] if mount["Destination"] == "/data"]
        if service.endswith("-trainer"):
            assert [mount["RW"] for mount in data] == [False], service
            assert container["HostConfig"]["NetworkMode"] == "none", service
            assert set(container["NetworkSettings"]["Networks"]) <= {"none"}, service
        else:
            assert not data, service
            named = {mount.get("Name", "") for mount in container["Mounts"]}
            if service != "phantoms":  # which writes them and has no network either
                assert not {name for name in named if name.endswith("-data")}, service
    assert first.seen["phantoms"]["HostConfig"]["NetworkMode"] == "none"


def test_no_site_publishes_a_port_or_reaches_another_site(first: Run) -> None:
    for site in SITES:
        for part in ("trainer", "flare"):
            assert not first.seen[f"{site}-{part}"]["HostConfig"]["PortBindings"]
        networks = first.seen[f"{site}-flare"]["NetworkSettings"]["Networks"]
        assert set(networks) == {f"{first.project.name}_{site}"}


def test_the_ca_key_is_in_one_volume_that_only_provisioning_mounts(first: Run) -> None:
    users = [
        service
        for service, container in first.seen.items()
        if any(m.get("Name") == f"{first.project.name}_provisioning" for m in container["Mounts"])
    ]
    assert users == ["provision"]


def test_no_file_name_of_any_site_is_outside_its_trainer(first: Run) -> None:
    project = first.project
    names = {path.name.split(".")[0] for path in project.volume("site-1-data").rglob("*.nii.gz")}
    assert len(names) == 22
    places = [project.volume("server-workspace"), project.volume("coordinator-workspace")]
    places += [project.volume(f"{site}-workspace") for site in SITES]
    places.append(project.folder / "results")
    for service in ("server", "coordinator", *(f"{site}-flare" for site in SITES)):
        log = project.folder / f"{service}.container.log"
        log.write_text(project.logs(service))
        places.append(log)
    assert "DEBUG" in (project.folder / "site-1-flare.container.log").read_text()
    assert files_that_name(names, *places) == {}
    # the search finds what is there to be found
    assert files_that_name(names, project.volume("site-1-work"))


def test_up_once_more_works_and_down_leaves_nothing(first: Run, tmp_path: Path) -> None:
    project = first.project
    (project.folder / "results").chmod(0o755)  # as git leaves it; then they stay in the volume
    project.environment["FEDFMS_ARGS"] = "--set rounds=1"
    process = project.start("up", "--exit-code-from", "coordinator", log=tmp_path / "up.log")
    assert process.wait(timeout=LONGEST_SECONDS) == 0
    said = (tmp_path / "up.log").read_text()
    assert "docker compose cp coordinator:" in said
    project.run("cp", "coordinator:/workspace/results/.", tmp_path / "fetched")
    assert list((tmp_path / "fetched").glob("fedmsa-*/report.html"))

    project.down()
    assert project.left() == []
    assert docker("ps", "-aq", "--filter", f"name={project.name}") == ""
