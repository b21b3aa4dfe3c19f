"""A trainer that the kernel ends for want of memory: what people read, and its successor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_process import Place

from fedfms.contracts.messages import Task
from fedfms.errors import TrainerError
from fedfms.trainer.at_work import AtWork
from fedfms.training.plan import Plan, Way

GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1


@pytest.fixture
def small_group(tmp_path: Path) -> Iterator[Path]:
    group = GROUPS / f"fedfms-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"NOT TRIED, needs the right to make a memory cgroup: {error.strerror}")
    try:
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def test_a_trainer_without_memory_is_killed_said_so_and_its_successor_answers(
    place: Place, start, long_task: Task, train_task: Task, global_model, begin, small_group: Path
) -> None:
    trainer = start()
    thread = begin(place, long_task, global_model)
    thread.wait_for_phase("train")
    (small_group / "cgroup.procs").write_text(str(trainer.pid))
    taken = (small_group / "memory.usage_in_bytes").read_text()
    (small_group / "memory.limit_in_bytes").write_text(str(int(taken) + 4096 * 64))
    assert trainer.process.wait(60) == -9  # the kernel's out-of-memory killer
    thread.wait()
    assert isinstance(thread.error, TrainerError)
    assert thread.error.code == "trainer-died"
    assert "killed" in thread.error.problem and "out of memory" in thread.error.problem
    assert "more memory" in thread.error.fix
    again = begin(place, train_task, global_model, connect_seconds=120)
    start(wait=False)
    again.wait()
    assert again.error is None
    log = (place.root / "trainer.log").read_text()
    assert "was killed in the middle of its work (train of round" in log
    assert "TRAINER_MEMORY" in log


def killed(work: Path, task: Task, plan: Plan) -> None:
    """A process that ends without a word while it trains."""
    child = os.fork()
    if child == 0:
        with AtWork(work).training(task, plan):
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_the_plan_of_who_was_killed_in_training_is_known_in_that_job_alone(
    tmp_path: Path, train_task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(Way(4, False), 3 * 10**9, 4 * 10**9, "the container's limit")
    killed(tmp_path, train_task, plan)
    after = AtWork(tmp_path)
    assert after.say_what_was_killed() and not after.say_what_was_killed()
    assert "(train of round 0 of job job-1)" in caplog.text
    assert "smaller memory plan" in caplog.text
    assert after.killed_plan("job-1") == plan
    assert after.killed_plan("job-2") is None


def test_training_that_ended_by_itself_leaves_no_plan(tmp_path: Path, train_task: Task) -> None:
    plan = Plan(Way(4, False), 3 * 10**9, 4 * 10**9, "the container's limit")
    with pytest.raises(ZeroDivisionError), AtWork(tmp_path).training(train_task, plan):
        raise ZeroDivisionError
    assert not AtWork(tmp_path).say_what_was_killed()
    assert AtWork(tmp_path).killed_plan("job-1") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"job": "job-1"}',
        '{"job": "job-1", "way": 3, "predicted": 1, "limit": 2, "by": ""}',
    ],
)
def test_a_plan_that_cannot_be_read_is_none(tmp_path: Path, train_task: Task, text: str) -> None:
    killed(tmp_path, train_task, Plan(Way(1, True), 1, 2, "x"))
    after = AtWork(tmp_path)
    after.say_what_was_killed()
    (tmp_path / ".killed-plan").write_text(text)
    assert after.killed_plan("job-1") is None
