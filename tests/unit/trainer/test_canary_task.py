"""A canary goes the way of a round, and zeros leave; nothing of it stays."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task, TaskFiles, TaskRequest
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_whole_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import DoorClosed, FedfmsError, SiteDataError, TrainerError, TrainingError
from fedfms.exchange.coding import SCALES
from fedfms.models.segmenter import Segmenter
from fedfms.trainer.canary import MadeUp, memory_refused
from fedfms.trainer.ledger import PAGE
from fedfms.trainer.server import TrainerServer, _Running

JOB = "job"


def task_of(recipe: Recipe, **changes: object) -> Task:
    task = Task(kind="train", site=SITE, job=JOB, round=0, model="round", recipe=recipe)
    return dataclasses.replace(task, **changes)


@pytest.fixture
def canary(recipe: Recipe) -> Recipe:
    # of two epochs: by two cases it is sure that a round has enough steps
    return dataclasses.replace(recipe, canary=True, local_epochs=2)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def leave(place: Place, work: Path, task: Task, sent: dict[str, Tensor]) -> tuple[bytes, dict]:
    """What a trainer hands to the process with the network: the file's bytes, and its message."""
    from fedfms.contracts.messages import encode
    from fedfms.exchange.tensors import save_tensors

    server = TrainerServer(task_runner(place, work), place.exchange)
    files = TaskFiles(place.exchange, "0123456789abcdef")
    save_tensors(files.received, sent, None)
    answer = server._compute_answer(TaskRequest(files.task_id, task), files, _Running())
    return files.result.read_bytes(), json.loads(encode(answer))


def parts(data: bytes) -> tuple[bytes, bytes]:
    """Header and values of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_zeros_of_the_same_names_shapes_types_and_bytes_leave(
    place: Place, work: Path, recipe: Recipe, global_model: dict[str, Tensor], precision: str
) -> None:
    place.set_policy(min_cases=1, clip_norm=1.0, noise_std=0.1)  # noise is no zero either
    recipe = dataclasses.replace(recipe, transfer_precision=precision)
    real, _ = leave(place, work, task_of(recipe), global_model)
    rehearsed, said = leave(
        place, work, task_of(dataclasses.replace(recipe, canary=True)), global_model
    )
    assert len(rehearsed) == len(real)
    assert parts(rehearsed)[0] == parts(real)[0]
    assert any(parts(real)[1])
    assert not any(parts(rehearsed)[1])
    names = set(global_model) | ({SCALES} if precision == "int8" else set())
    assert {name for name, _ in safetensors.deserialize(rehearsed)} == names
    assert said["type"] == "reply" and said["pictures"] == 0


def test_the_sites_own_page_says_that_it_was_one(
    place: Place, work: Path, recipe: Recipe, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    leave(place, work, task_of(recipe), global_model)
    assert "all of them 0" not in (work / PAGE).read_text()
    leave(place, work, task_of(canary), global_model)
    page = (work / PAGE).read_text()
    assert page.count("all of them 0") == 1
    assert "a canary: train round 1 of 1" in page


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_no_figure_of_an_image_leaves(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor], kind: str
) -> None:
    place.set_policy(min_cases=1, pictures=True)
    model, number = ("round", 0) if kind == "train" else ("final", 1)
    task = task_of(canary, kind=kind, model=model, round=number)
    outcome = task_runner(place, work).run(task, lambda: global_model, Control())
    assert not outcome.pictures
    said = outcome.contribution.to_dict()
    pace = said.pop("rehearsal")
    assert set(pace) == {"seconds", "seconds_per_step", "seconds_per_round", "peak_memory_bytes"}
    assert not any(said[key] for key in ("metrics", "loss", "update_norm", "evaluated_cases"))
    assert not any(said[key] for key in ("seconds", "peak_memory_bytes"))
    assert said["training_slices"] == said["training_cases"] == (1 if kind == "train" else 0)


def test_its_pace_is_that_of_full_batches_and_of_all_cases(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    outcome = task_runner(place, work).run(task_of(canary), lambda: global_model, Control())
    pace = outcome.contribution.rehearsal
    assert pace is not None and pace.seconds_per_step is not None
    assert outcome.contribution.micro_batch == canary.batch_size
    assert 0 < pace.seconds_per_step < pace.seconds
    many = dataclasses.replace(canary, local_epochs=100)
    longer = task_runner(place, work).run(task_of(many), lambda: global_model, Control())
    assert longer.contribution.rehearsal.seconds < 20 * pace.seconds  # not a hundred epochs
    steps = 100 * 3  # six cases of two slices, four a step
    per_step = longer.contribution.rehearsal.seconds_per_step
    assert longer.contribution.rehearsal.seconds_per_round > steps * per_step


def test_nothing_of_it_stays_but_prepared_cases(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place, work)
    trainer.run(task_of(canary), lambda: global_model, Control())
    trainer.run(
        task_of(canary, kind="evaluate", model="final", round=1), lambda: global_model, Control()
    )
    assert {path.name for path in work.iterdir()} == {"prepared", "prepared.json"}
    assert len(list((work / "prepared").glob("*.case"))) == 2
    assert trainer._job is None


def test_the_run_after_it_is_the_run_without_it(
    place: Place, tmp_path: Path, recipe: Recipe, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1)
    alone, after = task_runner(place, tmp_path / "a"), task_runner(place, tmp_path / "b")
    after.run(task_of(canary), lambda: global_model, Control())
    for number in (0, 1):
        model = {name: tensor + 0.001 * number for name, tensor in global_model.items()}
        one, other = (
            trainer.run(task_of(recipe, round=number), lambda model=model: model, Control())
            for trainer in (alone, after)
        )
        assert all(one.tensors[n].equal(other.tensors[n]) for n in one.tensors)
        assert one.contribution.metrics == other.contribution.metrics


def test_the_policy_sees_the_run_that_it_goes_before(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(max_rounds=canary.rounds - 1)
    with pytest.raises(DoorClosed, match="rounds") as caught:
        task_runner(place, work).run(task_of(canary), lambda: global_model, Control())
    assert caught.value.code == "too-many-rounds"


def test_it_has_one_round(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    with pytest.raises(TrainerError) as caught:
        task_runner(place, work).run(task_of(canary, round=1), lambda: global_model, Control())
    assert caught.value.code == "round"


def test_labels_without_foreground_are_told_only_when_all_were_looked_at(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place, work)
    place.set_site(classes={"lesion": [9]}, background=[0, *range(1, 9), *range(10, 256)])
    with pytest.raises(SiteDataError) as caught:
        trainer.run(task_of(canary), lambda: global_model, Control())
    assert caught.value.code == "empty-masks"
    # the largest of the validation cases, and all training cases
    assert len(list((work / "prepared").glob("*.case"))) == 7


def test_a_site_that_only_scores_rehearses_its_scores(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    task = task_of(dataclasses.replace(canary, holdout=(SITE,)))
    outcome = task_runner(place, work).run(task, lambda: global_model, Control())
    assert outcome.tensors == {}
    assert outcome.contribution.training_slices == 0
    pace = outcome.contribution.rehearsal
    assert pace is not None and pace.seconds_per_step is None
    assert pace.seconds_per_round > 0
    assert len(list((work / "prepared").glob("*.case"))) == 2


IN_300_MIB = """
import resource, sys
from pathlib import Path

import psutil
import torch

import fedfms.data.memory
from fedfms.trainer.canary import MadeUp, memory_refused
from fedfms.training.device import is_out_of_memory

fedfms.data.memory._V2 = Path(sys.argv[1])  # as a container's
limit = Path(sys.argv[1], "memory.max")
used = psutil.Process().memory_info()
limit.write_text(str(used.rss - used.shared + 300 * 1024**2))
before = resource.getrlimit(resource.RLIMIT_DATA)
cpu = torch.device("cpu")


def is_refused(values):
    try:
        with memory_refused(cpu):
            torch.ones(values)
    except RuntimeError as error:
        return is_out_of_memory(error)
    return False


assert not is_refused(10 * 1024**2)  # 40 MiB
assert is_refused(68 * 1024**2)  # 272 MiB: nine tenths of what is left are too much
assert is_refused(150 * 1024**2)
assert resource.getrlimit(resource.RLIMIT_DATA) == before
assert torch.ones(150 * 1024**2).numel()
"""


def test_memory_that_is_not_there_is_refused_and_afterwards_as_before(tmp_path: Path) -> None:
    """In a process of its own: one that other tests filled has free memory of its own to give."""
    command = [sys.executable, "-c", IN_300_MIB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_library_that_gets_no_memory_for_itself_is_understood() -> None:
    with pytest.raises(TrainingError) as caught, memory_refused(torch.device("cpu")):
        raise RuntimeError("could not create a primitive")
    assert caught.value.code == "out-of-memory"


def test_what_fits_only_in_smaller_parts_is_said_before_a_run_is_killed_for_it(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    """On a machine on which three slices are too many to train on."""

    def short_of_memory(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, Segmenter) and torch.is_grad_enabled() and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(short_of_memory)
    try:
        with pytest.raises(TrainingError) as caught:
            task_runner(place, work).run(task_of(canary), lambda: global_model, Control())
    finally:
        hook.remove()
    assert caught.value.code == "out-of-memory"
    assert "micro_batch: 2" in caught.value.fix


def test_what_was_prepared_before_stays_and_who_withdraws_after_it_is_forgotten(
    place: Place, work: Path, recipe: Recipe, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place, work)
    trainer.run(task_of(recipe), lambda: global_model, Control())
    before = (work / "prepared.json").read_bytes()
    assert len(json.loads(before)) == 8
    trainer.run(task_of(canary), lambda: global_model, Control())
    assert (work / "prepared.json").read_bytes() == before
    assert len(list((work / "prepared").glob("*.case"))) == 8
    (work / "prepared.json").unlink()
    trainer.run(task_of(canary), lambda: global_model, Control())
    assert len(json.loads((work / "prepared.json").read_bytes())) == 2  # what it read is known


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_nothing_of_it_hangs_on_what_is_in_a_picture_or_a_mask(
    place: Place, tmp_path: Path, canary: Recipe, global_model: dict[str, Tensor], kind: str
) -> None:
    """Else whether a model's output is finite says of one patient what whoever made it asks."""
    model, number = ("round", 0) if kind == "train" else ("final", 1)
    task = task_of(canary, kind=kind, model=model, round=number)
    strong = [one for one in global_model if "hypernetwork" in one]
    given: list[Tensor] = []

    def answers(name: str) -> list[str]:
        codes = []
        for factor in [1.0, 1e11, 1e12, 1e13, 1e20]:
            sent = {n: one.float().clone() for n, one in global_model.items()}
            for one in strong:
                sent[one] *= factor
            try:
                task_runner(place, tmp_path / name).run(task, lambda sent=sent: sent, Control())
                codes.append("")
            except FedfmsError as error:
                codes.append(error.code)
        return codes

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, Segmenter):
            given.append(inputs[0].clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        one = answers("one")
        assert one[0] == "" and one[-1].startswith("non-finite")  # of the model, on anything
        seen = [*given]
        given.clear()
        for folder in ("images", "labels"):
            real = (place.data / folder).resolve()
            (place.data / folder).unlink()
            shutil.copytree(real, place.data / folder)
            for path in (place.data / folder).iterdir():
                file = nibabel.load(path)
                array = np.asarray(file.dataobj)[::-1]
                array = array if folder == "labels" else array.max() - array
                nibabel.save(nibabel.Nifti1Image(array, file.affine), path)
        assert answers("other") == one
    finally:
        hook.remove()
    assert len(given) == len(seen) > 0
    assert all(a.equal(b) for a, b in zip(given, seen, strict=True))


def test_what_is_made_up_in_the_place_of_a_case_has_its_size_and_goes_to_workers(
    place: Place, work: Path, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    site = SiteConfig.from_yaml(place.data / "site.yml", None)
    cases, left_out = find_whole_cases(site)
    (real,) = prepare_cases(cases[:1], site, Control(), folder=work, left_out=left_out)
    made = MadeUp.of(real, site, canary)
    for one in (made, pickle.loads(pickle.dumps(made))):
        assert one.images.shape == real.images.shape and one.images.dtype == np.uint8
        assert one.labels.shape == real.labels.shape and one.labels.dtype == real.labels.dtype
        assert {*np.unique(one.labels).tolist()} == {0, *site.classes["lesion"]}
        assert not np.array_equal(one.images, real.images)
        assert one.slice_values() == real.slice_values()
