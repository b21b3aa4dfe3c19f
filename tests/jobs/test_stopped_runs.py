"""Runs and what people do with them, in one federation: pause, queue, stop, resume, forget, replay.

A run of eight rounds. Meanwhile a second one waits its turn, a site pauses itself for some rounds,
somebody stops the run, the server is killed while it is stopped, and somebody lets it go on. What
the sites' trainers let out is copied as it comes, for a replay without any of it.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from averaging import UNITS
from federations import (
    JOBS,
    STYLES,
    of_kind,
    processes_below,
    read_records,
    wait_until,
    write_sites,
)
from safetensors.numpy import load_file

from fedfms.contracts.pause import Pause, write_pause
from fedfms.errors import FederationError
from fedfms.exchange.round_guard import RoundGuard
from fedfms.flare.run_state import RUNS
from fedfms.flare.runs import FORGOTTEN, RunInfo
from fedfms.flare.session import Coordinator, Forgotten, connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation
from fedfms.local.sites import find_sites
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 8
SETTINGS = (f"rounds={ROUNDS}", "image_size=64", "local_epochs=12", "optimizer_state=keep")


@dataclass
class Story:
    """What was seen."""

    root: Path
    federation: Federation
    job_id: str = ""
    records: list[dict] = field(default_factory=list)
    results: Path = Path()
    queued: str = ""  # the state of the second run while the first was at work
    paused_after: int = 0  # rounds done as the site paused
    stopped: RunInfo | None = None
    after_restart: RunInfo | None = None
    completed: RunInfo | None = None
    refused: list[str] = field(default_factory=list)
    forgotten: Forgotten | None = None
    left: list[str] = field(default_factory=list)  # files that name the run after it was forgotten
    told: list[str] = field(default_factory=list)  # by FEDFMS_NOTIFY

    def rounds_done(self) -> int:
        self.federation._look()
        folder = self.federation.kit(SERVER) / RUNS / self.job_id
        return max((int(path.name[6:]) for path in folder.glob("round-*")), default=0)

    def info(self, coordinator: Coordinator, job_id: str = "") -> RunInfo:
        self.federation._look()
        wanted = job_id or self.job_id
        return next(one for one in coordinator.runs() if one.job_id == wanted)


class Capture(threading.Thread):
    """Copies each site's answers out of its private folder as they are kept there."""

    def __init__(self, sites: Path, job_id: str, into: Path) -> None:
        super().__init__(daemon=True)
        self.sites, self.job_id, self.into = sites, job_id, into
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for folder in self.sites.glob(f"*/runs/{self.job_id}/answer-train"):
                try:
                    said = json.loads((folder / "contribution.json").read_text())
                    place = self.into / f"{said['round']}-{said['site']}.safetensors"
                    if not place.exists():
                        shutil.copyfile(folder / "tensors.safetensors", place)
                except (OSError, ValueError):  # it is being replaced
                    continue


def pause(story: Story, site: str, wanted: bool) -> None:
    """As `fedfms pause` and `fedfms unpause` do."""
    now = datetime.now().astimezone()
    write_pause(story.federation.kit(site), Pause.begin(None, now) if wanted else None)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("runs")
    told = root / "told"
    tell = root / "tell"
    tell.write_text(f'#!/bin/sh\necho "$1" >> {told}\n')
    tell.chmod(0o700)
    sites = find_sites(write_sites(root / "sites", STYLES), None)
    job = prepare_job(JOBS / "fedmsa", root / "first" / "fedmsa", SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFMS_NOTIFY", str(tell))
        federation = Federation(root / "run", sites, job.recipe, None, lambda event: None)
        story = Story(root, federation)
        with federation.running() as coordinator:
            _tell(story, coordinator, job.folder)
    story.told = told.read_text().splitlines()
    yield story


def _tell(story: Story, coordinator: Coordinator, folder: Path) -> None:
    federation = story.federation
    answers = story.root / "answers"
    answers.mkdir()
    story.job_id = federation.submit(coordinator, folder)
    capture = Capture(federation.run / "sites", story.job_id, answers)
    capture.start()
    wait_until(lambda: story.rounds_done() >= 1, 150, "a round")

    second = coordinator.submit_prepared(
        prepare_job(JOBS / "fedmsa", story.root / "second" / "fedmsa", SETTINGS).folder
    )
    story.paused_after = story.rounds_done()
    pause(story, "site-3", True)
    wait_until(lambda: story.rounds_done() >= story.paused_after + 3, 150, "rounds without it")
    story.queued = story.info(coordinator, second).state
    pause(story, "site-3", False)

    def is_back() -> bool:
        story.federation._look()
        kept = federation.kit(SERVER) / RUNS / story.job_id
        return any(one["kind"] == "site_back" for one in of_kind(read_records(kept), "note"))

    wait_until(is_back, 60, "site-3 takes part again")
    coordinator.stop(second)  # its turn would come as soon as the first is stopped
    coordinator.stop(story.job_id)
    wait_until(lambda: story.info(coordinator).state == "stopped", 60, "it is stopped")
    story.stopped = story.info(coordinator)
    for process in processes_below(story.root):
        try:
            if "server.server_train" in " ".join(process.cmdline()):
                process.kill()
        except psutil.NoSuchProcess:
            continue
    again: list[bool] = []

    def reconnected() -> bool:
        federation._look()
        try:
            coordinator.reconnect()
            again.append(len(coordinator.sites()) == len(STYLES))
        except FederationError:
            return False
        return again[-1]

    wait_until(reconnected, 120, "the server and its sites are there again")
    time.sleep(5.0)
    story.after_restart = story.info(coordinator)
    coordinator.resume(story.job_id)
    for ask in (coordinator.resume, coordinator.forget):
        try:
            ask(story.job_id)
        except FederationError as error:
            story.refused.append(error.code)
    assert federation.wait_for_end(coordinator, story.job_id) == "FINISHED:COMPLETED"
    capture.ended.set()
    with connect(federation.kit(ADMIN)) as session:
        story.results = session.download(story.job_id, story.root / "fetched")
    story.records = read_records(story.results)
    wait_until(lambda: story.info(coordinator).state == "completed", 30, "it is completed")
    story.completed = story.info(coordinator)
    story.forgotten = coordinator.forget(story.job_id)
    story.left = [
        str(path.relative_to(federation.run)) for path in federation.run.rglob(f"*{story.job_id}*")
    ]


def test_a_run_in_which_a_site_missed_rounds_equals_a_replay_of_what_was_contributed(
    story: Story,
) -> None:
    """McMahan et al. 2017, Algorithm 1, over the answers that the records call accepted.

    In integers, and with what the guard of a round says of these answers.
    """
    done = {one["round"]: one["sites"] for one in of_kind(story.records, "round_done")}
    assert sorted(done) == list(range(ROUNDS))
    assert any(len(sites) == 2 for sites in done.values())
    slices = {
        (one["round"], one["site"]): one["contribution"]["training_slices"]
        for one in of_kind(story.records, "contribution")
        if one["accepted"]
    }
    recipe = story.federation.recipe
    start = read_travelling(build_model(recipe, find_checkpoint(recipe, None)))
    model = {name: tensor.to(torch.float32).numpy().copy() for name, tensor in start.items()}
    guard = RoundGuard(recipe)
    for number in range(ROUNDS):
        claims = {site: slices[number, site] for site in sorted(done[number])}
        sent = {
            site: load_file(story.root / "answers" / f"{number}-{site}.safetensors")
            for site in claims
        }
        tensors = {site: {k: torch.from_numpy(v) for k, v in sent[site].items()} for site in sent}
        verdicts = {one.site: one for one in guard.judge(claims, tensors)}
        weights = {site: verdicts[site].counted_slices for site in claims}
        total = {name: np.zeros(value.shape, np.int64) for name, value in model.items()}
        for site, weight in weights.items():
            for name in total:
                value = sent[site][name] * np.float32(verdicts[site].factor)
                total[name] += weight * np.rint(value.astype(np.float64) * UNITS).astype(np.int64)
        for name, value in model.items():
            mean = total[name] / (UNITS * sum(weights.values()))
            model[name] = value + mean.astype(np.float32)
    found = load_file(story.results / "global_model.safetensors")
    assert set(found) == set(model)
    assert max(float(np.abs(found[name] - model[name]).max()) for name in model) == 0.0


def test_a_site_that_pauses_itself_is_missing_for_no_more_rounds_than_its_pause(
    story: Story,
) -> None:
    done = {one["round"]: set(one["sites"]) for one in of_kind(story.records, "round_done")}
    without = sorted(number for number, sites in done.items() if "site-3" not in sites)
    first = without[0]
    assert first in (story.paused_after, story.paused_after + 1)
    assert without == list(range(first, first + len(without)))  # and then it is back
    assert {"site-1", "site-2"} <= set.intersection(*done.values())
    notes = of_kind(story.records, "note")
    kinds = [(one["kind"], one["site"]) for one in notes]
    assert kinds.index(("site_paused", "site-3")) < kinds.index(("site_back", "site-3"))
    (said,) = [one["text"] for one in notes if one["kind"] == "site_paused"]
    assert said.startswith("site-3 paused itself at ")
    assert "the run goes on without it" in said
    missed = {one["round"]: one["missed"] for one in of_kind(story.records, "round_done")}
    assert all(missed[number] == {"site-3": "the site paused itself"} for number in without)
    began = {one["round"]: one["time"] for one in of_kind(story.records, "round_started")}
    ended = {one["round"]: one["time"] for one in of_kind(story.records, "round_done")}
    for number in without[1:]:  # a round that begins without it does not wait for it
        assert ended[number] - began[number] < 30.0


def test_a_second_run_waits_its_turn(story: Story) -> None:
    assert story.queued == "queued"


def test_a_stopped_run_stays_stopped_when_the_server_is_started_again(story: Story) -> None:
    assert story.stopped is not None and story.after_restart is not None
    assert (story.stopped.why, story.stopped.is_kept) == (f"by {ADMIN}", True)
    assert story.after_restart == story.stopped


def test_a_resumed_run_counts_its_rounds_on_under_its_id(story: Story) -> None:
    rounds = [one["round"] for one in of_kind(story.records, "round_done")]
    assert rounds == list(range(ROUNDS))
    assert len(of_kind(story.records, "job")) == 1
    (resumed,) = of_kind(story.records, "resumed")
    assert story.stopped is not None and resumed["round"] == story.stopped.round
    assert [one["status"] for one in of_kind(story.records, "job_done")] == ["aborted", "completed"]
    assert story.refused == ["still-running", "still-running"]
    assert story.completed is not None
    assert (story.completed.round, story.completed.starts) == (ROUNDS, 2)


def test_a_forgotten_run_is_nowhere_but_in_one_small_file(story: Story) -> None:
    assert story.forgotten == Forgotten(("site-1", "site-2", "site-3"), (), {})
    assert len(story.left) == 1 and f"/{FORGOTTEN}/" in story.left[0]


def test_the_operators_command_was_told(story: Story) -> None:
    short = story.job_id[:8]
    told = [one.partition(": ")[2] for one in story.told if one.startswith(f"run {short}: ")]
    assert any("stopped it after" in one for one in told)
    assert any("lets it go on" in one for one in told)
    assert told[-1].startswith("it is completed")
