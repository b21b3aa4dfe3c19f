"""A real trainer process and tasks for it, as its supervisor and its client see them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml
from torch import Tensor

from fedfms.contracts.contribution import Metric
from fedfms.contracts.messages import Kind, ModelName, Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import TrainerError
from fedfms.trainer.client import TaskResult, run_task
from fedfms.trainer.connection import ping
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import SiteFolders, TaskRunner

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
        """A policy with these values, and bounds that eight phantoms in small pictures keep."""
        small = {
            "min_batch_size": 2,
            "min_steps": 2,
            "min_training_patients": 2,
            "max_local_epochs": 5000,
            "min_cases_for_spread": 1,
        }
        (self.policy / "privacy.json").write_text(json.dumps({**small, **values}))

    def set_site(self, **values: object) -> None:
        path = self.data / "site.yml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def task_runner(place: Place, work: Path | None = None) -> TaskRunner:
    """What a trainer process does with a task, without the process."""
    return TaskRunner(
        SiteFolders(
            name=SITE,
            config=place.data / "site.yml",
            policy=place.policy,
            data_root=None,
            checkpoints=place.checkpoints,
            work=work or place.work,
            order_from_seed=True,
        )
    )


def in_three_decimals(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """As means leave."""

    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    return tuple(
        dataclasses.replace(one, mean=short(one.mean), std=short(one.std)) for one in metrics
    )


class TrainerProcess:
    """`python -m fedfms.trainer` as its supervisor sees it."""

    def __init__(
        self, place: Place, *, wait: bool = True, request_seconds: float | None = None
    ) -> None:
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
        program = ["-m", "fedfms.trainer"]
        if request_seconds is not None:  # shorter than in earnest
            program = [
                "-c",
                f"import sys, fedfms.trainer.server as s; s.REQUEST_SECONDS = {request_seconds}; "
                "from fedfms.trainer.__main__ import main; sys.exit(main())",
            ]
        self.process = subprocess.Popen(
            [
                sys.executable,
                *program,
                *(str(x) for p in arguments.items() for x in p),
                "--order-from-seed",
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

    def wait_until_ready(self, seconds: float = 60) -> None:
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
    """`run_task` beside the test, until `abort`; keeps its result or its error."""

    def __init__(self, place: Place, task: Task, tensors: dict, **options: object) -> None:
        super().__init__(daemon=True)
        self.place, self.task, self.tensors, self.options = place, task, tensors, options
        self.phases: list[str] = []
        self.steps = 0  # of training, that are done
        self.result: TaskResult | None = None
        self.error: Exception | None = None
        self.ended_at = 0.0
        self.abort = threading.Event()
        self.start()

    def run(self) -> None:
        def note(phase: str, done: int, total: int) -> None:
            self.phases.append(phase)
            self.steps = done if phase == "train" else 0

        try:
            self.result = run_task(
                self.place.exchange,
                self.task,
                self.tensors,
                aborted=self.abort.is_set,
                on_progress=note,
                **self.options,
            )
        except Exception as error:
            self.error = error
        self.ended_at = time.monotonic()

    def wait_for_phase(self, phase: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while phase not in self.phases:
            assert self.is_alive(), f"the task ended before {phase}: {self.error}"
            assert time.monotonic() < deadline, f"no {phase} yet, but {self.phases[-1:]}"
            time.sleep(0.02)

    def wait_for_step(self, seconds: float = 60) -> None:
        """Until a step of training is done."""
        deadline = time.monotonic() + seconds
        while not self.steps:
            assert self.is_alive(), f"the task ended before a step: {self.error}"
            assert time.monotonic() < deadline, "no step yet"
            time.sleep(0.02)

    def wait(self, seconds: float = 60) -> None:
        self.join(seconds)
        assert not self.is_alive()


def ask(
    trainer: TaskRunner,
    recipe: Recipe,
    number: int,
    model: dict[str, Tensor],
    *,
    job: str = "job",
    kind: Kind = "train",
    which: ModelName = "round",
) -> Outcome:
    """Have a trainer do a task, without its process."""
    task = Task(kind=kind, site=SITE, job=job, round=number, model=which, recipe=recipe)
    return trainer.run(task, lambda: model, Control())
