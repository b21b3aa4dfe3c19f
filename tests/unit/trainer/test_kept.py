"""A round that is asked for again: the same bytes without training, or the same training anew."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import CheckpointError, DoorClosed
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling
from fedfms.trainer.at_work import AtWork
from fedfms.trainer.kept import KEPT_RUNS, RUNS, Outcome
from small_disk import small_disk


@pytest.fixture
def kept_recipe(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, optimizer_state="keep", rounds=4)


@pytest.fixture
def sent(kept_recipe: Recipe, checkpoints: Path) -> dict[str, Tensor]:
    return read_travelling(build_model(kept_recipe, checkpoints / "random.safetensors"))


class Site:
    """A trainer that can be asked for rounds, and replaced by a new process."""

    def __init__(self, place: Place, work: Path, recipe: Recipe) -> None:
        self.args = (place, work)
        self.recipe = recipe
        self.restart()

    def restart(self) -> None:
        self.trainer = task_runner(*self.args)

    def train(self, number: int, sent: dict[str, Tensor], job: str = "run") -> Outcome:
        """A round, each of a model of its own."""
        model = {name: tensor + 0.001 * number for name, tensor in sent.items()}
        task = Task(
            kind="train", site=SITE, job=job, round=number, model="round", recipe=self.recipe
        )
        return self.trainer.run(task, lambda: model, Control())


def equal(first: Outcome, second: Outcome) -> bool:
    names = first.tensors.keys() | second.tensors.keys()
    return all(torch.equal(first.tensors[name], second.tensors[name]) for name in names)


@pytest.fixture
def site(place: Place, kept_recipe: Recipe, tmp_path: Path) -> Site:
    return Site(place, tmp_path / "work", kept_recipe)


@pytest.mark.parametrize("restarts", [False, True])
def test_the_same_request_gets_the_same_answer_without_training(
    site: Site, sent: dict[str, Tensor], place: Place, restarts: bool
) -> None:
    place.set_policy(min_cases=1, noise_std=0.01, clip_norm=1.0)  # noise is not drawn anew
    first = site.train(0, sent)
    if restarts:
        site.restart()
    second = site.train(0, sent)
    assert equal(first, second)
    assert second.contribution == first.contribution  # seconds included: nothing was computed


def test_a_round_is_computed_again_from_what_the_round_before_left(
    site: Site, sent: dict[str, Tensor], tmp_path: Path
) -> None:
    site.train(0, sent)
    first = site.train(1, sent)
    answers = tmp_path / "work" / RUNS / "run" / "answer-train"
    for restarts in (False, True):  # the answer is lost: the moments of round 0 are there
        shutil.rmtree(answers)
        if restarts:
            site.restart()
        assert equal(site.train(1, sent), first)
    site.restart()
    forgetful = site.train(1, sent, job="other")  # no round before
    assert not equal(forgetful, first)


def test_a_trainer_that_was_replaced_between_rounds_goes_on_as_if_it_had_not(
    site: Site, sent: dict[str, Tensor], place: Place, tmp_path: Path
) -> None:
    other = Site(place, tmp_path / "other", site.recipe)
    for number in range(3):
        first = site.train(number, sent)
        other.restart()
        second = other.train(number, sent)
        assert equal(first, second), number


def test_another_model_policy_or_site_file_is_another_request(
    site: Site, sent: dict[str, Tensor], place: Place
) -> None:
    place.set_policy(min_cases=1)
    first = site.train(0, sent)
    changed = {name: tensor * 1.01 for name, tensor in sent.items()}
    assert not equal(site.train(0, changed), first)
    site.train(0, sent)
    place.set_policy(min_cases=1, methods=["nothing"])  # what was given before is not given again
    with pytest.raises(DoorClosed):
        site.train(0, sent)
    place.set_policy(min_cases=1, clip_norm=1e-3)
    assert not equal(site.train(0, sent), first)


def test_a_damaged_answer_is_computed_again(
    site: Site, sent: dict[str, Tensor], tmp_path: Path
) -> None:
    first = site.train(0, sent)
    answer = tmp_path / "work" / RUNS / "run" / "answer-train"
    (answer / "tensors.safetensors").write_bytes(b"no tensors")
    assert equal(site.train(0, sent), first)
    (answer / "contribution.json").write_text(json.dumps({"site": SITE}))
    assert equal(site.train(0, sent), first)


def test_only_the_last_rounds_and_runs_are_kept(
    site: Site, sent: dict[str, Tensor], tmp_path: Path
) -> None:
    for number in range(3):
        site.train(number, sent)
    runs = tmp_path / "work" / RUNS
    learnt = sorted(path.name for path in (runs / "run").glob("learnt-*"))
    assert learnt == ["learnt-0001", "learnt-0002"]
    for number in range(KEPT_RUNS + 1):
        site.train(0, sent, job=f"later-{number}")
    assert len(list(runs.iterdir())) == KEPT_RUNS
    assert not (runs / "run").exists()


def test_what_a_disk_damaged_is_one_error_and_the_next_round_goes_on(
    site: Site, sent: dict[str, Tensor], tmp_path: Path
) -> None:
    for number in range(2):
        site.train(number, sent)
    moments = tmp_path / "work" / RUNS / "run" / "learnt-0001" / "optimizer.pt"
    data = bytearray(moments.read_bytes())
    data[len(data) // 2] ^= 1
    moments.write_bytes(data)
    site.restart()
    with pytest.raises(CheckpointError, match=r"round 1 .* is damaged"):
        site.train(2, sent)
    assert site.train(3, sent).tensors


def test_a_run_that_was_put_back_goes_on_from_what_its_rounds_left_then(
    site: Site, sent: dict[str, Tensor], tmp_path: Path
) -> None:
    for number in range(3):
        site.train(number, sent)
    site.train(1, {name: tensor + 1 for name, tensor in sent.items()})
    left = {path.name for path in (tmp_path / "work" / RUNS / "run").glob("learnt-*")}
    assert left == {"learnt-0001"}


def test_a_trainer_that_was_killed_is_called_so_by_the_next_one(
    tmp_path: Path, kept_recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    task = Task(kind="train", site=SITE, job="run", round=3, model="round", recipe=kept_recipe)
    at_work = AtWork(tmp_path)
    at_work.begin(task)
    at_work.end()
    assert not AtWork(tmp_path).say_what_was_killed()
    at_work.begin(task)
    assert AtWork(tmp_path).say_what_was_killed()
    assert "train of round 3" in caplog.text and "out of memory; fix: give it more" in caplog.text
    assert not AtWork(tmp_path).say_what_was_killed()  # once


def test_a_full_disk_costs_no_round_and_no_score(
    site: Site, sent: dict[str, Tensor], place: Place, tmp_path: Path
) -> None:
    place.set_policy(min_cases=1)
    expected = [site.train(number, sent) for number in range(3)]
    with small_disk(tmp_path / "disk", "40m") as disk:
        other = Site(place, disk, site.recipe)
        assert equal(other.train(0, sent), expected[0])
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        assert equal(other.train(1, sent), expected[1])
        assert not list(disk.rglob("*.part"))
        (disk / "filler").unlink()
        assert equal(other.train(2, sent), expected[2])
        with (disk / "scores" / "run.csv").open() as table:
            rounds = [row["round"] for row in csv.DictReader(table)]
        assert sorted(set(rounds)) == ["0", "1", "2"]
