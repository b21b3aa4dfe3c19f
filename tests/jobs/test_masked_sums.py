"""A run of which the server sees sums only: the same model, and of no site a difference.

One federation over FLARE, with TLS opened between the sites and the server. Searched are the
memory of the server's two processes, its disk, and what crossed the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from averaging import federated_average, largest_difference
from federations import JOBS, of_kind, processes_below, read_records, wait_until, write_sites
from memory_search import RUN, VARIED, Wanted, files_below, memory_of
from open_line import FederationOverOpenLines

import fedfms.flare.simulate
from fedfms.contracts.recipe import Recipe
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import Coordinator, prepare_job
from fedfms.flare.simulate import SERVER
from fedfms.local.sites import find_sites
from fedfms.report.verify import verify_run

pytestmark = pytest.mark.timeout(600)

SITES = ("site-1", "site-2", "site-3")
GONE, IN_ROUND = "site-3", 1  # whose FLARE client is killed after it gave its shares
# in fp32, so that the numbers that no one may have are those that were computed
SETTINGS = ("rounds=2", "batch_size=4", "image_size=64", "transfer_precision=fp32")
OF_SERVER = ("server.server_train", "server.runner_process")


@dataclass
class Job:
    """What a job left, and what was copied of the server while it ran."""

    results: Path
    memory: list[Path]  # after an answer had arrived, and after the last round; some gigabytes
    disk: list[bytes]  # the same, and after the end
    line: list[bytes]


@dataclass
class Running:
    """A federation, the weights of its sites, and what its sites answer in two rounds."""

    root: Path
    sites: Path
    federation: FederationOverOpenLines
    coordinator: Coordinator
    wanted: Wanted

    def run(self, name: str, *settings: str, kill: str | None = None) -> Job:
        job = prepare_job(JOBS / "fedmsa", self.root / name / "fedmsa", [*SETTINGS, *settings])
        sent_before = {id(kept): len(kept) for kept in self.federation.sent}
        job_id = self.federation.submit(self.coordinator, job.folder)
        kit = self.federation.kit(SERVER)
        copies, disk = list[bytes](), list[bytes]()

        def copy() -> None:
            for word in OF_SERVER:
                copies.extend(memory_of(self.process(word), self.wanted.longest))
            for folder in (kit, kit.parents[1] / "storage"):
                disk.extend(files_below(folder))

        records = kit / job_id / "fedfms"
        wait_until(lambda: _answers(records), 200, "an answer")
        copy()
        if kill is not None:
            settled = kit / RUNS / job_id / "sums.json"
            wait_until(lambda: _round_of(settled) == IN_ROUND, 100, "shares of the second round")
            self.kill(kill)
        wait_until(lambda: len(_rounds(records)) == 2, 200, "two rounds")
        copy()
        assert self.federation.wait_for_end(self.coordinator, job_id) == "FINISHED:COMPLETED"
        memory = [self.root / f"{name}-{number}.memory" for number in range(len(copies))]
        for file in reversed(memory):
            file.write_bytes(copies.pop())
        results = self.coordinator.download(job_id, self.root / f"{name}-result")
        disk.extend(files_below(kit))
        line = [bytes(kept[sent_before.get(id(kept), 0) :]) for kept in self.federation.sent]
        return Job(results, memory, disk, line)

    def process(self, word: str) -> psutil.Process:
        (found,) = [one for one in processes_below(self.root) if word in " ".join(one.cmdline())]
        return found

    def kill(self, site: str) -> None:
        """`kill -9` a site's FLARE client and its job's process; neither comes back."""
        for one in self.federation._flare:
            one.restarts &= not one.name.startswith(f"{site}'")
        killed = 0
        for process in processes_below(self.root):
            command = " ".join(process.cmdline())
            if f"uid={site}" in command or (site in command and "worker_process" in command):
                process.kill()
                killed += 1
        assert killed == 2


def contents(files: Iterable[Path]) -> Iterator[bytes]:
    """Of each file; it goes, since together they are gigabytes."""
    for file in files:
        yield file.read_bytes()
        file.unlink()


def _rounds(records: Path) -> list[dict]:
    return _of_kind(records, "round_done")


def _answers(records: Path) -> list[dict]:
    return _of_kind(records, "contribution")


def _of_kind(records: Path, kind: str) -> list[dict]:
    there = (records / "records.jsonl").exists()
    return of_kind(read_records(records), kind) if there else []


def _round_of(settled: Path) -> int | None:
    return json.loads(settled.read_text())["round"] if settled.exists() else None


def recipe_of(folder: Path) -> Recipe:
    """What both jobs are asked to do; sums change nothing of it."""
    return prepare_job(JOBS / "fedmsa", folder / "fedmsa", [*SETTINGS, "secure_sum=true"]).recipe


def secret(changes: dict[tuple[str, int], np.ndarray], site: str, number: int) -> np.ndarray:
    """What a sum does not tell of a site: other numbers where the other sites of it sent zeros.

    A unit of the network that nothing excites at two small sites learns at the third alone, and
    what they sent in all is there what it sent.
    """
    others = [
        of
        for (other, when), of in changes.items()
        if when == number and other != site and (number, other) != (IN_ROUND, GONE)
    ]
    alone = np.all([of == 0 for of in others], axis=0)
    drawn = np.random.default_rng(number).normal(size=alone.shape) * 1e-3
    own = changes[site, number]
    return np.where(alone, drawn, own).astype(own.dtype)


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Recipe, dict[str, np.ndarray], Wanted]:
    """Sites, their recipe, the model of a plain loop, and the numbers that no one may have."""
    root = tmp_path_factory.mktemp("expected")
    sites = write_sites(root / "sites", SITES)
    recipe = recipe_of(root)
    changes: dict[tuple[str, int], np.ndarray] = {}
    average, slices = federated_average(
        recipe, sites, SITES, gone={IN_ROUND: GONE}, changes=changes
    )
    assert len(set(slices.values())) == 3
    numbers = {f"{site}, round {number}": secret(changes, site, number) for site, number in changes}
    weights = {f"{site}, round {number}": slices[site] for site, number in changes}
    return sites, recipe, average, Wanted(numbers, weights)


@pytest.fixture(scope="module")
def running(
    expected: tuple[Path, Recipe, dict[str, np.ndarray], Wanted],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    sites, recipe, _, wanted = expected
    root = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedfms.flare.simulate, "SILENCE_SECONDS", 20)  # who is gone is gone sooner
        federation = FederationOverOpenLines(
            root / "run", find_sites(sites, None), recipe, None, print
        )
        with federation.running() as coordinator:
            yield Running(root, sites, federation, coordinator, wanted)


@pytest.fixture(scope="module")
def masked(running: Running) -> Job:
    return running.run("masked", "secure_sum=true", kill=GONE)


@pytest.fixture(scope="module")
def plain(running: Running, masked: Job) -> Job:
    """Without the switch, by the two sites that are left; last, not to be found in the other."""
    return running.run("plain")


def test_the_model_is_that_of_the_plain_average_also_where_a_site_drops_out(
    masked: Job, expected: tuple[Path, Recipe, dict[str, np.ndarray], Wanted]
) -> None:
    assert [one["sites"] for one in _rounds(masked.results)] == [
        list(SITES),
        [site for site in SITES if site != GONE],
    ]
    average = expected[2]
    assert largest_difference(masked.results / "global_model.safetensors", average) == 0.0
    for record in _answers(masked.results):
        assert record["accepted"] and record["contribution"]["update_norm"] is None
    assert [problem for check in verify_run(masked.results) for problem in check.problems] == []


def test_the_search_finds_64_values_wherever_they_lie(running: Running) -> None:
    chance, tried, found = np.random.default_rng(0), 0, 0
    while tried < 500:
        row = running.wanted.rows[chance.integers(len(running.wanted.rows))]
        first = int(chance.integers(0, len(row.values) - RUN))
        if len(np.unique(row.values[first : first + RUN])) <= VARIED:
            continue
        size = row.values.itemsize
        before, after = (chance.bytes(int(chance.integers(0, 700))) for _ in range(2))
        for length, is_there in ((RUN, True), (RUN - 2, False)):
            data = before + row.data[first * size : (first + length) * size] + after
            whose = running.wanted.found_in(data)
            found += is_there and (row.name, row.form) in whose
            assert is_there or whose == set()
        tried += 1
    assert found >= 0.99 * tried


def test_neither_memory_nor_disk_nor_line_has_64_values_of_a_site(
    masked: Job, running: Running
) -> None:
    assert sum(part.stat().st_size for part in masked.memory) > 2**27
    assert sum(map(len, masked.line)) > 5 * 8 * len(running.wanted.rows[0].values)
    for parts in (contents(masked.memory), masked.disk, masked.line):
        assert running.wanted.found_in_all(parts) == set()


def test_without_the_switch_the_same_search_finds_them_in_each(
    plain: Job, running: Running
) -> None:
    first = {f"{site}, round 0" for site in SITES if site != GONE}
    for parts, of in ((contents(plain.memory), first), (plain.disk, None), (plain.line, first)):
        found = running.wanted.found_in_all(parts)
        whose = {name for name, form in found if form == "<f4"}
        assert whose >= of if of is not None else whose & first
