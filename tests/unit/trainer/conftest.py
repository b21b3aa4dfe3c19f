"""Phantoms, a checkpoint, and trainers that end with the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from trainer_process import SITE, Place, TaskThread, TrainerProcess

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.exchange.tensors import save_tensors
from fedfms.files import file_sha256
from fedfms.local.synthetic import write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vit_demo checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipe = Recipe(
        method="fedsam",
        backbone="vit_demo",
        backbone_sha256="0" * 64,
        classes=("blob",),
        rounds=1,
        image_size=128,
        seed=7,
    )
    model = build_model(recipe, None)
    save_tensors(folder / "random.safetensors", model.state_dict(), None)
    return folder


@pytest.fixture(scope="session")
def recipe(checkpoints: Path, phantoms: Path) -> Recipe:
    """FedMSA on small pictures: a round takes about a second."""
    classes = tuple(yaml.safe_load((phantoms / "site.yml").read_text())["classes"])
    return Recipe(
        method="fedmsa",
        backbone="vit_demo",
        backbone_sha256=file_sha256(checkpoints / "random.safetensors"),
        classes=classes,
        rounds=3,
        image_size=64,
        batch_size=4,
        learning_rate=1e-3,
        optimizer_state="keep",
        seed=11,
    )


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "site"
    write_phantom_site(folder, "bright", cases=8, slices=2, seed=1)
    return folder


@pytest.fixture(scope="session")
def global_model(recipe: Recipe, checkpoints: Path) -> dict[str, torch.Tensor]:
    """Travelling tensors that differ from what a trainer would build by itself."""
    generator = torch.Generator().manual_seed(23)
    model = build_model(recipe, checkpoints / "random.safetensors")
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in read_travelling(model).items()
    }


def make_place(root: Path, phantoms: Path, checkpoints: Path) -> Place:
    """A site of its own with the phantoms of all."""
    place = Place(root, checkpoints)
    place.policy.mkdir(parents=True)
    place.exchange.mkdir()
    for name in ("images", "labels"):
        (place.data / name).symlink_to(phantoms / name)
    for name in ("site.yml", "policy/privacy.json"):
        (place.data / name).write_text((phantoms / name).read_text())
    place.set_policy(min_cases=2, pictures=True)
    place.set_site(min_cases=1)
    return place


@pytest.fixture
def place(tmp_path: Path, phantoms: Path, checkpoints: Path) -> Place:
    return make_place(tmp_path, phantoms, checkpoints)


@pytest.fixture
def start(place: Place) -> Iterator[Callable[..., TrainerProcess]]:
    """Start trainers for this test's own site; they end with the test."""
    started: list[TrainerProcess] = []

    def start_one(**options: bool) -> TrainerProcess:
        started.append(TrainerProcess(place, **options))
        return started[-1]

    yield start_one
    for trainer in started:
        trainer.end()


@pytest.fixture
def begin() -> Iterator[Callable[..., TaskThread]]:
    """Begin tasks beside the test; they are aborted with the test."""
    threads: list[TaskThread] = []

    def begin_one(place: Place, task: Task, tensors: dict, **options: object) -> TaskThread:
        threads.append(TaskThread(place, task, tensors, **options))
        return threads[-1]

    yield begin_one
    for thread in threads:
        thread.abort.set()
        thread.wait()


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory, phantoms: Path, checkpoints: Path) -> Place:
    return make_place(tmp_path_factory.mktemp("shared"), phantoms, checkpoints)


@pytest.fixture(scope="session")
def shared_trainer(shared_place: Place) -> Iterator[TrainerProcess]:
    """One trainer for all tests that leave it alive and its site as it was."""
    trainer = TrainerProcess(shared_place)
    yield trainer
    trainer.end()


@pytest.fixture
def train_task(recipe: Recipe) -> Task:
    return Task(kind="train", site=SITE, job="job-1", round=0, model="round", recipe=recipe)


@pytest.fixture
def long_task(recipe: Recipe) -> Task:
    """A task that nobody waits for."""
    recipe = dataclasses.replace(recipe, local_epochs=5000)
    return Task(kind="train", site=SITE, job="job-long", round=0, model="round", recipe=recipe)
