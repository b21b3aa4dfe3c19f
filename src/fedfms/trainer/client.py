"""The end of the socket in the FLARE client's job process, which sees no image.

Whatever happens to the trainer (not there, killed, hung, out of its mind) becomes an error here;
nothing outside the exchange folder is opened.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import fedfms.errors
from fedfms.contracts.contribution import MAX_PICTURE_BYTES, Contribution
from fedfms.contracts.messages import Failure, Progress, Reply, Task, TaskFiles, TaskRequest
from fedfms.contracts.receipt import SignedReceipt
from fedfms.errors import CheckpointError, FedfmsError, TrainerError
from fedfms.exchange.tensors import load_tensors, save_tensors
from fedfms.files import read_whole
from fedfms.trainer.connection import (
    POLL_SECONDS,
    AbortAsked,
    Connection,
    connected,
    not_understood,
    stopped_on_request,
)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What the trainer let out."""

    contribution: Contribution
    tensors: dict[str, Tensor]  # the difference, as stored: fp32 or fp16; none if evaluated only
    pictures: list[bytes]  # PNG
    receipt: SignedReceipt  # as the trainer's log has it


def run_task(
    exchange: Path,
    task: Task,
    tensors: Mapping[str, Tensor],
    *,
    aborted: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, int, int], None] | None = None,
    stall_seconds: float = 120.0,
    connect_seconds: float = 60.0,
) -> TaskResult:
    """Let the trainer do one task and wait for the answer.

    Args:
        exchange: the folder that both processes share.
        task: what to do.
        tensors: the model it is about, all travelling tensors.
        aborted: asked several times a second; once true the trainer is told to stop.
        on_progress: called with (phase, done, total) about twice a second.
        stall_seconds: a trainer that is silent for so long counts as hung; it speaks about twice
            a second while it computes.
        connect_seconds: how long to wait for a trainer, which may be starting again.

    Raises:
        TaskAborted: `aborted` said so, or the trainer was told to stop by its own side.
        TrainerError: code no-trainer, trainer-died, trainer-hung, trainer-stalled, too-slow,
            nonsense, other-protocol, exchange-full, or unexpected for an exception in the trainer
            that nobody foresaw.
        FedfmsError: the public part of whatever else the trainer reports (SiteDataError,
            DoorClosed, …), with its code and no name from the site.
    """
    heard: list[str] = []

    def note(phase: str, done: int, total: int) -> None:
        heard.append(phase)
        if on_progress is not None:
            on_progress(phase, done, total)

    deadline = time.monotonic() + connect_seconds
    while True:
        files = TaskFiles(exchange, secrets.token_hex(8))
        left = max(0.0, deadline - time.monotonic())
        try:
            with _handed_over(files, tensors, left, aborted) as connection:
                return _follow(connection, files, task, tensors, note, stall_seconds, aborted)
        except TrainerError as error:
            if error.code != "trainer-died" or heard or time.monotonic() > deadline:
                raise
        # one that is dying may still take a connection, but begins nothing: wait for its successor
        time.sleep(POLL_SECONDS)


def _follow(
    connection: Connection,
    files: TaskFiles,
    task: Task,
    tensors: Mapping[str, Tensor],
    on_progress: Callable[[str, int, int], None],
    stall_seconds: float,
    aborted: Callable[[], bool],
) -> TaskResult:
    """Ask for the task on a connection, and follow it to its end."""
    try:
        connection.send(TaskRequest(files.task_id, task), stall_seconds)
        while True:
            answer = connection.next_answer(stall_seconds, aborted)
            if isinstance(answer, Progress):
                on_progress(answer.phase, answer.done, answer.total)
            elif isinstance(answer, Failure):
                raise _as_error(answer)
            elif isinstance(answer, Reply):
                return _take(files, task, tensors, answer)
            else:
                raise not_understood("it answered a question that nobody asked")
    except AbortAsked:
        connection.abort()
        raise stopped_on_request() from None


@contextlib.contextmanager
def _handed_over(
    files: TaskFiles,
    tensors: Mapping[str, Tensor],
    connect_seconds: float,
    aborted: Callable[[], bool],
) -> Iterator[Connection]:
    """A connection to a trainer for whom the model lies ready; nothing of the task is left.

    The model is written first, however long that takes: who connects is expected to speak.
    """
    try:
        while True:
            if not _put(files, tensors):
                continue
            with connected(files.exchange, connect_seconds, aborted) as connection:
                # a trainer that starts clears the folder before it listens
                if files.received.exists():
                    yield connection
                    return
    finally:
        files.remove()


def _put(files: TaskFiles, tensors: Mapping[str, Tensor]) -> bool:
    """Write the model; whether it lies there, and no trainer that started cleared it away."""
    try:
        save_tensors(files.received, tensors, None, checksum=False)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and files.exchange.is_dir():
            return False
        raise TrainerError(
            f"the model could not be handed to the trainer: {error.strerror}",
            "give the exchange volume more room: three times the model's size",
            code="exchange-full",
        ) from None
    return True


def _take(files: TaskFiles, task: Task, sent: Mapping[str, Tensor], reply: Reply) -> TaskResult:
    """Read what the reply announces, and check that it is about this task."""
    report = reply.contribution
    got = (report.site, report.kind, report.round, report.model, report.recipe_sha256)
    if got != (task.site, task.kind, task.round, task.model, task.recipe.sha256):
        raise not_understood("its report is about another task")
    if reply.has_tensors != (report.kind == "train" and report.role == "train"):
        raise not_understood("its tensors and its report contradict each other")
    receipt = reply.receipt
    if receipt is not None and (receipt.receipt.job, receipt.receipt.site) != (task.job, task.site):
        raise not_understood("its receipt is about another task")
    bytes_each = 8 if task.recipe.sums_only else 4
    largest = sum(bytes_each * t.numel() + 1024 for t in sent.values()) + 1024 * 1024
    tensors: dict[str, Tensor] = {}
    try:
        if reply.has_tensors:
            tensors = load_tensors(files.result, max_bytes=largest)
        pictures = [
            read_whole(files.picture(index), MAX_PICTURE_BYTES) for index in range(reply.pictures)
        ]
    except (OSError, CheckpointError):
        raise not_understood("the files that it announced cannot be read") from None
    if receipt is None:
        raise not_understood("it gave no receipt of what leaves")
    return TaskResult(report, tensors, pictures, receipt)


def _as_error(failure: Failure) -> FedfmsError:
    kind = getattr(fedfms.errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, FedfmsError)):
        return not_understood("it reported an unknown kind of error")
    why = f", {failure.exception}" if failure.exception else ""
    return kind(
        f"the trainer reports {failure.error} ({failure.code}{why})",
        _FIXES.get(failure.code, "the trainer's own log at the site has the details"),
        code=failure.code,
    )


_FIXES = {  # of what has to do with the trainer itself and not with its files
    "too-slow": "look what else keeps the site's machine busy; the next round tries again",
    "trainer-stalled": "look in the trainer's log for what it waited; if the machine is only slow, "
    "set a larger stall_seconds in site.yml",
    "trainer-stopped": "start the trainer at the site again; somebody stopped it",
}
