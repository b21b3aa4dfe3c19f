"""A full disk, at the server or at a site, pauses a run or costs nothing; the model is the same.

One federation on small disks of its own, which needs the right to mount. Each run's disk is filled
while sites train and freed half a minute later.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from federations import (
    JOBS,
    STYLES,
    Run,
    of_kind,
    processes_below,
    read_records,
    wait_until,
    write_sites,
)

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import SERVER, Federation
from fedfms.local.sites import find_sites
from small_disk import small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("rounds=4", "image_size=64", "local_epochs=6", "optimizer_state=keep")
FULL_SECONDS = 20.0
SERVER_PROCESSES = ("server.server_train", "server.runner_process")


class OnDisks(Run):
    def records(self, job_id: str) -> list[dict]:
        self.federation._look()
        folder = self.federation.kit(SERVER) / RUNS / job_id
        return read_records(folder) if (folder / "records.jsonl").exists() else []

    def rounds_done(self, job_id: str) -> int:
        return len(of_kind(self.records(job_id), "round_done"))


@pytest.fixture(scope="module")
def disks() -> Iterator[Callable[[Path, str], Path]]:
    with contextlib.ExitStack() as mounted:
        yield lambda folder, size: mounted.enter_context(small_disk(folder, size))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, disks: Callable[[Path, str], Path]
) -> Iterator[OnDisks]:
    root = tmp_path_factory.mktemp("run")
    sites = find_sites(write_sites(root / "sites", STYLES), None)
    place = root / "run"
    disks(place, "300m")  # of the server and the FLARE clients
    disks(place / "exchange", "200m")
    for site in sites:
        disks(place / "sites" / site.name, "100m")  # of its trainer
    recipe = prepare_job(JOBS / "fedmsa", root / "first" / "fedmsa", SETTINGS).recipe
    assert isinstance(recipe, Recipe)
    federation = Federation(place, sites, recipe, None, lambda event: None)
    with federation.running() as coordinator:
        yield OnDisks(root, federation, coordinator, SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(run: OnDisks) -> Path:
    return run.wait_for_end(run.submit("undisturbed"))


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """A disk on which not one byte is free."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    try:
        yield
    finally:
        filler.unlink()


def the_same_models(first: Path, second: Path) -> None:
    for name in ("global_model.safetensors", "best_model.safetensors"):
        one, other = ((folder / name).read_bytes() for folder in (first, second))
        assert hashlib.sha256(one).hexdigest() == hashlib.sha256(other).hexdigest(), name


def no_part_is_left(folder: Path) -> None:
    assert not [path for path in folder.rglob("*.part") if path.is_file()]


def test_a_full_disk_of_the_server_pauses_the_run(run: OnDisks, undisturbed: Path) -> None:
    job_id = run.submit("server-full")
    wait_until(lambda: run.rounds_done(job_id) >= 1, 150, "a round")
    with full(run.federation.run):
        told: list[str] = []

        def is_told() -> bool:
            run.federation._look()
            event = run.coordinator.event(job_id)
            told[:] = event.notes if event is not None else ()
            return any("the run waits: the server's disk" in text for text in told)

        wait_until(is_told, 90, "the run waits")
        assert str(run.federation.run) in told[-1]  # which disk
        done = run.rounds_done(job_id)
        time.sleep(FULL_SECONDS)
        assert run.rounds_done(job_id) == done
    fetched = run.wait_for_end(job_id)
    the_same_models(undisturbed, fetched)
    records = read_records(fetched)
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(4))
    assert not any(r["missed"] for r in of_kind(records, "round_done"))
    kinds = [note["kind"] for note in of_kind(records, "note")]
    assert kinds.index("waits") < kinds.index("goes_on")
    no_part_is_left(run.federation.kit(SERVER))


def test_a_full_disk_of_a_site_costs_nothing(run: OnDisks, undisturbed: Path) -> None:
    work = run.federation.run / "sites" / "site-2"
    job_id = run.submit("site-full")
    wait_until(lambda: run.rounds_done(job_id) >= 1, 150, "a round")
    with full(work):
        wait_until(lambda: run.rounds_done(job_id) >= 3, 150, "two more rounds")
    fetched = run.wait_for_end(job_id)
    the_same_models(undisturbed, fetched)
    records = read_records(fetched)
    assert not any(r["missed"] for r in of_kind(records, "round_done"))
    with (work / "scores" / f"{job_id}.csv").open() as file:
        rounds = [int(row["round"]) for row in csv.DictReader(file)]
    assert sorted(set(rounds)) == list(range(5))  # none is lost
    no_part_is_left(work)
    said = (run.federation.logs / "site-2.trainer.log").read_text()
    assert "this round could not be kept (No space left on device)" in said


def test_a_run_that_is_submitted_to_a_full_server_starts_when_there_is_room(
    run: OnDisks, undisturbed: Path
) -> None:
    filler = run.federation.run / "large"
    with filler.open("wb") as file:
        disk = os.statvfs(run.federation.run)
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - 10 * 2**20)
    job = prepare_job(JOBS / "fedmsa", run.root / "waiting" / "fedmsa", SETTINGS)
    job_id = run.coordinator.submit_prepared(job.folder)

    def why() -> str:
        run.federation._look()
        return run.coordinator.state(job_id).detail

    wait_until(lambda: "the server's disk" in why(), 60, "a reason")
    assert run.coordinator.state(job_id).is_waiting
    filler.unlink()
    the_same_models(undisturbed, run.wait_for_end(job_id))


def test_a_server_that_dies_on_a_full_disk_goes_on_when_there_is_room(
    run: OnDisks, undisturbed: Path
) -> None:
    job_id = run.submit("killed")
    wait_until(lambda: run.rounds_done(job_id) >= 1, 150, "a round")
    with full(run.federation.run):
        time.sleep(1)
        for process in processes_below(run.root):
            with contextlib.suppress(psutil.Error):
                if any(one in " ".join(process.cmdline()) for one in SERVER_PROCESSES):
                    process.kill()

        def answers() -> bool:
            run.federation._look()
            with contextlib.suppress(FederationError):
                run.coordinator.reconnect()
                return len(run.coordinator.sites()) == len(STYLES)
            return False

        wait_until(answers, 120, "the server and its sites are there again")
        [found] = [one for one in run.coordinator.runs() if one.job_id == job_id]
        assert "the server's disk" in found.why and "It goes on when there is room" in found.why
    fetched = run.wait_for_end(job_id)
    the_same_models(undisturbed, fetched)
    records = read_records(fetched)
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(4))
    notes = [note["text"] for note in of_kind(records, "note")]
    assert any("the server's disk" in text for text in notes)
    assert "the server's disk has room again; the run goes on" in notes
