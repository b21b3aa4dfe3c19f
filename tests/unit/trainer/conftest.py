"""Real trainer processes on phantoms, and the means to talk to them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from fedfms.config import Recipe
from fedfms.data.synthetic import write_phantom_site
from fedfms.errors import TrainerError
from fedfms.exchange.payload import read_travelling, save_tensors
from fedfms.models.build import build_model
from fedfms.models.sam import file_sha256
from fedfms.trainer.client import TaskResult, ping, run_task
from fedfms.trainer.messages import Task

SITE = "site-1"


@dataclasses.dataclass
class Place:
    """The folders of one site."""

    root: Path
    checkpoints: Path

    @property
    def exchange(self) -> Path:
        return self.root / "exchange"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def data(self) -> Path:
        return self.root / "site"

    @property
    def policy(self) -> Path:
        return self.data / "policy"

    def set_policy(self, **values: object) -> None:
        (self.policy / "privacy.json").write_text(json.dumps(values))

    def set_site(self, **values: object) -> None:
        path = self.data / "site.yml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


class TrainerProcess:
    """`python -m fedfms.trainer` as its supervisor sees it."""

    def __init__(self, place: Place, *, wait: bool = True) -> None:
        self.place = place
        self.log = (place.root / "trainer.log").open("ab")
        arguments = {
            "--site": SITE,
            "--config": place.data / "site.yml",
            "--policy": place.policy,
            "--exchange": place.exchange,
            "--checkpoints": place.checkpoints,
            "--work": place.work,
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fedfms.trainer",
                *(str(x) for p in arguments.items() for x in p),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        if wait:
            self.wait_until_ready()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                ping(self.place.exchange, 1.0)
                return
            except TrainerError:
                assert self.process.poll() is None, (self.place.root / "trainer.log").read_text()
                time.sleep(0.1)
        raise AssertionError("the trainer did not start")

    def wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while ping(self.place.exchange, 5.0).busy:
            assert time.monotonic() < deadline, "the trainer is still busy"
            time.sleep(0.05)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


class TaskThread(threading.Thread):
    """`run_task` beside the test; keeps its result or its error."""

    def __init__(self, place: Place, task: Task, tensors: dict, **options: object) -> None:
        super().__init__(daemon=True)
        self.place, self.task, self.tensors, self.options = place, task, tensors, options
        self.phases: list[str] = []
        self.result: TaskResult | None = None
        self.error: Exception | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        def note(phase: str, done: int, total: int) -> None:
            self.phases.append(phase)

        try:
            self.result = run_task(
                self.place.exchange, self.task, self.tensors, on_progress=note, **self.options
            )
        except Exception as error:
            self.error = error
        self.ended_at = time.monotonic()

    def wait_for_phase(self, phase: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while phase not in self.phases:
            assert self.is_alive(), f"the task ended before {phase}: {self.error}"
            assert time.monotonic() < deadline, f"no {phase} yet, but {self.phases[-1:]}"
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> None:
        self.join(seconds)
        assert not self.is_alive()


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
