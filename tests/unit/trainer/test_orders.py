"""What a trainer is told besides tasks: to forget a run, to give memory back; and cases that go."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import TaskAborted, TrainerError
from fedfms.trainer.connection import forget, release
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner


@pytest.fixture
def quick(recipe: Recipe) -> Recipe:
    """Without scores, and with moments that outlive a round."""
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds, optimizer_state="keep")


def train(
    trainer: TaskRunner, recipe: Recipe, number: int, sent: dict[str, Tensor], job: str = "job"
) -> Outcome:
    """A round, each of a model of its own."""
    model = {name: tensor + 0.001 * number for name, tensor in sent.items()}
    task = Task(kind="train", site=SITE, job=job, round=number, model="round", recipe=recipe)
    return trainer.run(task, lambda: model, Control())


def test_a_run_is_forgotten_and_others_and_the_prepared_images_stay(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place)
    for job in ("other", "job"):
        train(trainer, recipe, 0, global_model, job)
    errors = place.work / "errors.log"
    entry = "2026-01-01 10:00:00 job {} round 0 train: a file\n  fix: it\n"
    errors.write_text("".join(entry.format(job) for job in ("job", "other", "job")))
    prepared = sorted(path for path in place.work.rglob("*.case"))
    trainer.forget("job")
    named = [str(path) for path in place.work.rglob("*")]
    assert not any("/job" in name for name in named)
    assert any(name.endswith("runs/other") for name in named)
    assert any(name.endswith("scores/other.csv") for name in named)
    assert errors.read_text() == entry.format("other")
    assert sorted(path for path in place.work.rglob("*.case")) == prepared
    trainer.forget("never-heard-of")


def test_after_memory_was_given_back_a_run_goes_on_as_if_nothing_had_been(
    place: Place, quick: Recipe, global_model: dict[str, Tensor], tmp_path: Path
) -> None:
    first, second = task_runner(place), task_runner(place, tmp_path / "second")
    for trainer in (first, second):
        train(trainer, quick, 0, global_model)
    first.release()
    assert first._job is None
    one, other = (train(trainer, quick, 1, global_model) for trainer in (first, second))
    assert all((one.tensors[name] == other.tensors[name]).all() for name in other.tensors)


def test_runs_beside_each_other_each_come_to_what_they_come_to_alone(
    place: Place, quick: Recipe, global_model: dict[str, Tensor], tmp_path: Path
) -> None:
    beside = task_runner(place)
    alone = {job: task_runner(place, tmp_path / job) for job in ("first", "second")}
    other = {name: tensor + 0.01 for name, tensor in global_model.items()}
    for number in range(3):
        for job, model in (("first", global_model), ("second", other)):
            mixed = train(beside, quick, number, model, job)
            plain = train(alone[job], quick, number, model, job)
            assert mixed.contribution.update_norm == plain.contribution.update_norm
            assert all((mixed.tensors[name] == plain.tensors[name]).all() for name in model)


def test_a_trainer_does_so_when_it_is_told_and_not_in_the_middle_of_a_task(
    place: Place, start, long_task: Task, train_task: Task, global_model, begin
) -> None:
    trainer = start()
    task = begin(place, train_task, global_model)
    task.wait()
    assert task.error is None
    kept = place.work / "runs" / train_task.job
    assert kept.is_dir()
    busy = begin(place, long_task, global_model)
    busy.wait_for_phase("train")
    with pytest.raises(TrainerError, match="silent"):  # it waits for its turn
        forget(place.exchange, train_task.job, timeout_seconds=0.5)
    busy.abort.set()
    release(place.exchange)
    busy.wait()
    assert isinstance(busy.error, TaskAborted)
    forget(place.exchange, train_task.job)
    assert not kept.exists()
    assert trainer.process.poll() is None


@pytest.fixture
def own_images(place: Place, phantoms: Path) -> Place:
    """Images that a test may take away."""
    for name in ("images", "labels"):
        (place.data / name).unlink()
        shutil.copytree(phantoms / name, place.data / name)
    return place


def withdraw(place: Place) -> str:
    """Take one patient's files out of the site's folders; the name that they had."""
    image = sorted((place.data / "images").iterdir())[0]
    gone = image.name.split(".")[0]
    for folder in ("images", "labels"):
        for path in (place.data / folder).iterdir():
            if path.name.split(".")[0] == gone:
                path.unlink()
    return gone


@pytest.mark.parametrize("restarted", [False, True])
def test_a_patient_who_withdraws_is_no_part_of_the_next_round_nor_of_the_cache(
    own_images: Place, quick: Recipe, global_model: dict[str, Tensor], restarted: bool
) -> None:
    trainer = task_runner(own_images)
    train(trainer, quick, 0, global_model)
    before = {path.name for path in own_images.work.rglob("*.case")}
    withdraw(own_images)
    if restarted:
        trainer = task_runner(own_images)
    train(trainer, quick, 1, global_model)
    after = {path.name for path in own_images.work.rglob("*.case")}
    assert after < before and len(before) - len(after) == 1
    assert trainer._job is not None and trainer._job.cases is not None
    assert len(trainer._job.cases) == len(after)


def test_folders_that_cannot_be_listed_cost_no_round(
    own_images: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(own_images)
    first = train(trainer, quick, 0, global_model)
    shutil.move(own_images.data / "images", own_images.data / "away")  # the share is gone
    second = train(trainer, quick, 1, global_model)
    assert second.contribution.training_cases == first.contribution.training_cases
