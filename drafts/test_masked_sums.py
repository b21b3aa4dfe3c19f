"""A run of which the server sees sums only: the same model, and of no site a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from averaging import federated_average, largest_difference
from federations import JOBS, of_kind, processes_below, read_records, wait_until, write_sites
from memory_search import Wanted, found_in_files, found_in_process

from fedfms.contracts.recipe import Recipe
from fedfms.flare.session import Coordinator, prepare_job
from fedfms.flare.simulate import SERVER, Federation
from fedfms.local.sites import find_sites
from fedfms.report.verify import verify_run

pytestmark = pytest.mark.timeout(400)

SITES = ("site-1", "site-2", "site-3")
JOB = "server.runner_process"  # of the server
SETTINGS = ["batch_size=4"]


@dataclass
class Running:
    """A federation, and what each of its sites answers to the first round of its jobs."""

    root: Path
    sites: Path
    federation: Federation
    coordinator: Coordinator
    wanted: Wanted

    def run(self, name: str, *settings: str) -> tuple[Path, list[set[str]]]:
        """A job's result; whose numbers the server had after an answer, after a round, at the end.

        Looked for are those of the first round.
        """
        overrides = [*SETTINGS, *settings]
        job = prepare_job(JOBS / "fedmsa", self.root / name / "fedmsa", overrides)
        job_id = self.federation.submit(self.coordinator, job.folder)
        kit = self.federation.kit(SERVER)
        records = kit / job_id / "fedfms"
        found = []
        for kind in ("contribution", "round_done"):
            wait_until(lambda kind=kind: _has(records, kind), 200, kind)
            found.append(found_in_process(self.wanted, self.process(JOB)))
            found[-1] |= found_in_files(self.wanted, kit)
        assert self.federation.wait_for_end(self.coordinator, job_id) == "FINISHED:COMPLETED"
        found.append(found_in_files(self.wanted, kit))
        return self.coordinator.download(job_id, self.root / f"{name}-result"), found

    def process(self, word: str) -> psutil.Process:
        (found,) = [
            process for process in processes_below(self.root) if word in " ".join(process.cmdline())
        ]
        return found


def _has(records: Path, kind: str) -> bool:
    return (records / "records.jsonl").exists() and bool(of_kind(read_records(records), kind))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("sums")
    sites = write_sites(root / "sites", SITES)
    job = prepare_job(JOBS / "fedmsa", root / "any" / "fedmsa", [*SETTINGS, "secure_sum=true"])
    changes: dict[str, dict[str, np.ndarray]] = {}
    one_round = dataclasses.replace(job.recipe, rounds=1)
    _, slices = federated_average(one_round, sites, SITES, changes)
    numbers = {
        site: np.concatenate([of_site[key].reshape(-1) for key in sorted(of_site)])
        for site, of_site in changes.items()
    }
    federation = Federation(root / "run", find_sites(sites, None), job.recipe, None, print)
    with federation.running() as coordinator:
        yield Running(root, sites, federation, coordinator, Wanted(numbers, slices))


def test_the_server_has_no_sites_numbers_and_the_model_of_the_plain_average(
    running: Running,
) -> None:
    results, found = running.run("masked", "rounds=2", "secure_sum=true")
    assert len(running.wanted) > 50_000
    assert found == [set(), set(), set()]

    recipe = Recipe.from_json(results / "recipe.json")
    expected, slices = federated_average(recipe, running.sites, SITES)
    assert len(set(slices.values())) == 3
    assert largest_difference(results / "global_model.safetensors", expected) == 0.0
    for record in of_kind(read_records(results), "contribution"):
        assert record["accepted"] and record["contribution"]["update_norm"] is None
    assert [problem for check in verify_run(results) for problem in check.problems] == []


def test_without_the_switch_the_same_search_finds_them(running: Running) -> None:
    _, found = running.run("plain", "rounds=1")
    assert found[0]  # of whoever had answered
    assert found[0] | found[1] == set(SITES)
