"""Without internet: an engine on a network with no route out, and nothing but the archive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from containers import Project, checkout, docker, wait_until
from hospitals import fedfms
from offline import Engine, engine_without_a_way_out

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1200)]

IMAGE = "fedfms:offline"  # a tag that no other test uses
# an address outside (of a block for documentation), a name, and how long it took to fail
LOOK_OUTSIDE = """
import socket, time
for ask in (
    lambda: socket.create_connection(("192.0.2.1", 443), 20),
    lambda: socket.getaddrinfo("example.org", 443),
):
    started = time.monotonic()
    try:
        ask()
        print("reached")
    except OSError as error:
        print(f"{type(error).__name__} {error.strerror}; {time.monotonic() - started:.0f} s")
"""


@pytest.fixture(scope="module")
def archive(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The archive as a coordinator makes it, on the machine with the image."""
    docker("tag", image, IMAGE)
    folder = tmp_path_factory.mktemp("archive") / "fedfms"
    try:
        started = time.monotonic()
        fedfms("archive", folder, "--image", IMAGE)
        print(f"the archive was made in {time.monotonic() - started:.0f} s")
        yield folder
    finally:
        docker("rmi", "--no-prune", IMAGE, check=False)
        shutil.rmtree(folder, ignore_errors=True)  # 400 MB


@pytest.fixture(scope="module")
def offline(engine: None) -> Iterator[Engine]:
    """An engine without images, from which no route leads out."""
    if os.geteuid() != 0:
        pytest.skip("a second engine needs root")
    with engine_without_a_way_out() as second:
        yield second


def load(archive: Path, offline: Engine) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", archive / "load.sh"],
        cwd="/",
        env={**os.environ, **offline.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def images(offline: Engine) -> list[str]:
    listed = docker(
        "images", "-a", "--format", "{{.Repository}}:{{.Tag}}", environment=offline.environment
    )
    return listed.split()


def test_the_second_engine_is_alone(offline: Engine) -> None:
    assert images(offline) == []
    assert "default" not in offline.inside("ip", "route")
    links = offline.inside("ip", "-brief", "link").splitlines()
    assert {line.split()[0] for line in links} == {"lo", "docker0"}


def test_a_damaged_archive_loads_nothing(archive: Path, offline: Engine) -> None:
    [path] = (archive / "images").iterdir()
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        right = file.read(1)
        file.seek(middle)
        file.write(bytes([right[0] ^ 1]))
    done = load(archive, offline)
    assert done.returncode == 65
    assert "nothing was loaded" in done.stderr and "fix:" in done.stderr
    assert images(offline) == []
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(right)


def test_an_image_that_the_checksums_do_not_name_is_not_loaded(
    archive: Path, offline: Engine
) -> None:
    added = archive / "images" / "added.tar.gz"
    added.write_bytes(b"not ours")
    done = load(archive, offline)
    added.unlink()
    assert done.returncode == 65
    assert "images/added.tar.gz" in done.stderr and "fix:" in done.stderr
    assert images(offline) == []


@pytest.fixture(scope="module")
def loaded(archive: Path, offline: Engine) -> Engine:
    """The second engine, with the image from the archive."""
    started = time.monotonic()
    done = load(archive, offline)
    print(f"the archive was loaded in {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Loaded image: {IMAGE}" in done.stdout
    return offline


def test_the_image_is_the_one_that_was_packed(loaded: Engine) -> None:
    ids = [
        docker("image", "inspect", "-f", "{{.Id}}", IMAGE, environment=environment)
        for environment in ({}, loaded.environment)
    ]
    assert ids[0] == ids[1]


def test_no_container_has_a_way_out(loaded: Engine) -> None:
    for network in ("bridge", "host"):
        said = docker(
            *("run", "--rm", "--network", network, "--entrypoint", "python", IMAGE),
            *("-c", LOOK_OUTSIDE),
            environment=loaded.environment,
        ).splitlines()
        assert said[0] == "OSError Network is unreachable; 0 s", (network, said)
        assert said[1].startswith("gaierror "), (network, said)


@dataclass
class Run:
    """The federation's run there."""

    project: Project
    code: int | None = None
    said: str = ""
    seen: list[str] = field(default_factory=list)  # services


@pytest.fixture(scope="module")
def run(loaded: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = checkout(tmp_path_factory.mktemp("offline") / "fedfms")
    (folder / "results").chmod(0o777)  # root made this clone; its user is not the container's
    chosen = {"FEDFMS_IMAGE": IMAGE, "FEDFMS_ARGS": "--set rounds=2"}
    project = Project(folder, "fedfms-offline", {**loaded.environment, **chosen})
    try:
        started = time.monotonic()
        done = project.run(
            "up", "--no-build", "--exit-code-from", "coordinator", check=False, seconds=400
        )
        print(f"docker compose up took {time.monotonic() - started:.0f} s without internet")
        yield Run(project, done.returncode, done.stdout, sorted(project.containers()))
    finally:
        project.down()
        assert project.left() == []


def test_the_same_run_ends_well(run: Run) -> None:
    assert run.code == 0, run.said[-6000:]
    assert "coordinator-1 exited with code 0" in run.said
    assert {"server", "site-1-flare", "site-4-trainer"} <= set(run.seen)


def test_results_are_there(run: Run) -> None:
    [results] = (run.project.folder / "results").glob("fedmsa-*")
    names = {path.name for path in results.iterdir()}
    assert names >= {"global_model.safetensors", "evaluation.csv", "report.html", "rounds.csv"}
    scores = (results / "evaluation.csv").read_text()
    assert "site-1,train,final,2,lesion,dice," in scores  # after both rounds
    assert "site-4,holdout,final,2,lesion,dice," in scores


# ---------------------------------------------------------------------- the whole engine restarts

WAIT_SECONDS = 90.0  # beyond the repeated training, from the engine being up again


@dataclass
class Restarted:
    """A run through two restarts of the engine with everything in it."""

    records: list[dict[str, Any]]
    up: list[float]  # when the engine answered again


@pytest.fixture(scope="module")
def restarted(loaded: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    folder = checkout(tmp_path_factory.mktemp("restarted") / "fedfms")
    (folder / "results").chmod(0o777)
    chosen = {"FEDFMS_IMAGE": IMAGE, "FEDFMS_ARGS": "--set rounds=6 --set local_epochs=4"}
    project = Project(folder, "fedfms-restarted", {**loaded.environment, **chosen})

    def runs() -> list[Path]:
        return list(project.volume("server-workspace").glob("runs/*"))

    def rounds_done() -> int:
        kept = [path.name for run in runs() for path in run.glob("round-*")]
        return max((int(name[6:]) for name in kept), default=0)

    try:
        project.run("up", "--no-build", "-d", check=True, seconds=400)
        up = []
        for rounds, fall in ((2, loaded.stop), (4, loaded.lose_power)):
            wait_until(lambda rounds=rounds: rounds_done() >= rounds, 400, f"{rounds} rounds")
            job_id = runs()[0].name
            fall()
            loaded.start()
            up.append(time.time())
        fetch = ("fetch", job_id, "--results", "/results/restarted")

        def ended() -> bool:
            return "completed" in project.run("run", "--rm", "coordinator", "runs").stdout

        wait_until(ended, 400, "the run ended")
        project.run("run", "--rm", "coordinator", *fetch)
        lines = (folder / "results/restarted/records.jsonl").read_text().splitlines()
        yield Restarted([json.loads(line) for line in lines], up)
    finally:
        project.down()
        assert project.left() == []


def test_a_run_goes_on_after_a_restart_of_the_engine_and_after_a_power_cut(
    restarted: Restarted,
) -> None:
    records = restarted.records
    (done,) = [record for record in records if record["record"] == "job_done"]
    assert done["status"] == "completed"
    rounds = {r["round"]: r for r in records if r["record"] == "round_done"}
    assert sorted(rounds) == list(range(6))
    assert sum(r["record"] == "resumed" for r in records) == 2
    assert rounds[5]["sites"] == ["site-1", "site-2", "site-3", "site-4"]


def test_it_waits_little_after_the_engine_is_up_again(restarted: Restarted) -> None:
    for up in restarted.up:
        goes_on = next(
            r["time"] for r in restarted.records if r["record"] == "resumed" and r["time"] > up
        )
        print(f"the run went on {goes_on - up:.0f} s after the engine answered again")
        assert goes_on - up < WAIT_SECONDS
