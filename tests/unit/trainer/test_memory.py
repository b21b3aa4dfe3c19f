"""A trainer that the kernel ends for want of memory: what people read, and its successor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_process import Place

from fedfms.contracts.messages import Task
from fedfms.errors import TrainerError

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
