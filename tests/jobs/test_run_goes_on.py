"""A run goes on, whatever process of it is killed, and comes to the same model byte for byte.

One federation: a job that nobody disturbs, then the same job with a kill in each of its rounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
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

from fedfms.flare.run_state import RUNS
from fedfms.flare.session import PreparedJob, prepare_job
from fedfms.flare.simulate import SERVER, Federation
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# what a round leaves has to reach the next one: moments, schedule, warm-up, best model, and what
# eight bits took from a site's difference
SETTINGS = (
    *("rounds=6", "image_size=64", "local_epochs=12", "optimizer_state=keep"),
    *("schedule=cosine", "warmup_steps=5", "transfer_precision=int8"),
)


class Restarting(Run):
    """A federation whose FLARE processes are started again, as a container engine does."""

    def rounds_done(self, job_id: str) -> int:
        folder = self.federation.kit(SERVER) / RUNS / job_id
        return max((int(path.name[6:]) for path in folder.glob("round-*")), default=0)

    def find(self, *words: str, site: str = "") -> list[psutil.Process]:
        """What carries one of the words in its command, of one site or of the server."""
        found = []
        for process in processes_below(self.root):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if any(word in command for word in words) and site in command:
                    found.append(process)
        return found

    def kill(self, *words: str, site: str = "") -> int:
        """`kill -9` what `find` finds; how many of it were there."""
        killed = 0
        for process in self.find(*words, site=site):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed += 1
        return killed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarting]:
    root = tmp_path_factory.mktemp("run")
    sites = find_sites(write_sites(root / "sites", STYLES), None)
    job: PreparedJob = prepare_job(JOBS / "fedmsa", root / "first" / "fedmsa", SETTINGS)
    told: list[str] = []
    federation = Federation(root / "run", sites, job.recipe, None, lambda e: told.append(e.text))
    with federation.running() as coordinator:
        yield Restarting(root, federation, coordinator, SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(run: Restarting) -> Path:
    return run.wait_for_end(run.submit("undisturbed"))


@pytest.fixture(scope="module")
def disturbed(run: Restarting, undisturbed: Path) -> Path:
    """The same job; a second into each round something is killed."""
    job_id = run.submit("disturbed")
    kills = (
        lambda: run.kill("client.worker_process", site="site-1"),  # a site's job process
        lambda: run.kill("client.client_train", "client.worker_process", site="site-2"),
        lambda: run.kill("fedfms trainer", "fedfms.trainer", site="site-3"),
        lambda: run.kill("server.runner_process"),  # the job's process at the server
        lambda: run.kill("server.server_train", "server.runner_process"),
    )
    for number, kill in enumerate(kills, start=1):
        wait_until(lambda number=number: look(run, job_id) >= number, 150, f"{number} rounds")
        time.sleep(1.0)
        assert kill(), number
    return run.wait_for_end(job_id)


def look(run: Restarting, job_id: str) -> int:
    """How far it is; meanwhile what ended is started again."""
    run.federation._look()
    return run.rounds_done(job_id)


def test_the_model_is_the_same_byte_for_byte(undisturbed: Path, disturbed: Path) -> None:
    for name in ("global_model.safetensors", "best_model.safetensors"):
        first, second = ((folder / name).read_bytes() for folder in (undisturbed, disturbed))
        assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest(), name


def test_every_round_is_done_once_and_only_the_trainers_death_costs_an_answer(
    disturbed: Path,
) -> None:
    records = read_records(disturbed)
    rounds = [record["round"] for record in of_kind(records, "round_done")]
    assert rounds == list(range(6))
    assert [record["round"] for record in of_kind(records, "resumed")] == [4, 5]
    (done,) = of_kind(records, "job_done")
    assert done["status"] == "completed"


def test_who_watches_reads_which_site_it_was(disturbed: Path) -> None:
    notes = [(note["kind"], note["site"]) for note in of_kind(read_records(disturbed), "note")]
    assert notes.index(("site_died", "site-1")) < notes.index(("site_back", "site-1"))
    assert ("site_back", "site-2") in notes


def test_with_too_few_sites_a_run_waits_and_says_for_whom_until_enough_are_back(
    run: Restarting,
) -> None:
    job_id = run.submit("waiting")
    wait_until(lambda: look(run, job_id) >= 1, 150, "a round")
    away = [one for one in run.federation._flare if one.name.startswith(("site-2'", "site-3'"))]
    for one in away:
        one.restarts = False
    for site in ("site-2", "site-3"):
        assert run.kill("client.client_train", "client.worker_process", site=site)

    def notes() -> list[dict]:
        run.federation._look()
        return of_kind(read_records(run.federation.kit(SERVER) / RUNS / job_id), "note")

    wait_until(lambda: any(note["kind"] == "waits" for note in notes()), 120, "the run waits")
    said = next(note["text"] for note in notes() if note["kind"] == "waits")
    assert "it needs 2 sites" in said and ("site-2" in said or "site-3" in said)
    time.sleep(20.0)  # longer than FLARE's grace period
    assert not run.coordinator.state(job_id).is_finished
    back, stays_away = away
    back.restarts = True
    wait_until(lambda: any(note["kind"] == "goes_on" for note in notes()), 120, "it goes on")
    starting = run.find("client.worker_process", site=back.name.partition("'")[0])
    assert starting
    for process in starting:
        process.suspend()
    time.sleep(20.0)  # as on a busy machine: its new process starts for longer than that period
    for process in starting:
        process.resume()
    records = read_records(run.wait_for_end(job_id))
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(6))
    (goes_on,) = [n for n in of_kind(records, "note") if n["kind"] == "goes_on"]
    without = stays_away.name.partition("'")[0]
    assert goes_on["text"].endswith((f"goes on without {without}", "the run goes on"))
    last = of_kind(records, "round_done")[-1]
    assert without not in last["sites"] and len(last["sites"]) == 2
    stays_away.restarts = True


def test_a_round_that_too_few_sites_can_answer_is_tried_again(run: Restarting) -> None:
    job_id = run.submit("again")
    wait_until(lambda: look(run, job_id) >= 1, 150, "a round")
    trainers = [
        run.federation._processes._all[f"{site}'s trainer"] for site in ("site-2", "site-3")
    ]
    for one in trainers:
        one.restarts = False
    for site in ("site-2", "site-3"):
        assert run.kill("fedfms.trainer", site=site)

    def waits() -> bool:
        run.federation._look()
        records = read_records(run.federation.kit(SERVER) / RUNS / job_id)
        return any("could answer round" in note["text"] for note in of_kind(records, "note"))

    wait_until(waits, 120, "the run waits")
    for one in trainers:
        one.restarts = True
    records = read_records(run.wait_for_end(job_id))
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(6))
    assert of_kind(records, "resumed")
