"""The end of the socket in the FLARE client's job process, which sees no image.

Whatever happens to the trainer (not there, killed, hung, out of its mind) becomes an error here;
nothing outside the exchange folder is opened.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import fedfms.errors
from fedfms.errors import CheckpointError, FedfmsError, TaskAborted, TrainerError
from fedfms.exchange.contribution import MAX_PICTURE_BYTES as MAX_PICTURE_BYTES
from fedfms.exchange.contribution import Contribution
from fedfms.exchange.payload import load_tensors, read_whole, save_tensors
from fedfms.trainer.messages import (
    MAX_LINE_BYTES,
    AbortRequest,
    Answer,
    Failure,
    Ping,
    Pong,
    Progress,
    Reply,
    Request,
    Task,
    TaskFiles,
    TaskRequest,
    decode_answer,
    encode,
    socket_address,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # between two looks at `aborted`
ABORT_SECONDS = 5.0  # the trainer has this long to confirm that it stopped


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What the trainer let out."""

    contribution: Contribution
    tensors: dict[str, Tensor]  # the difference, as stored: fp32 or fp16; none if evaluated only
    pictures: list[bytes]  # PNG


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
        TrainerError: code no-trainer, trainer-died, trainer-hung, nonsense, other-protocol,
            exchange-full, or unexpected for an exception in the trainer that nobody foresaw.
        FedfmsError: the public part of whatever else the trainer reports (SiteDataError,
            DoorClosed, …), with its code and no name from the site.
    """
    files = TaskFiles(exchange, secrets.token_hex(8))
    with _connected(exchange, connect_seconds, aborted) as connection:
        try:
            _put(files, tensors)
            connection.send(TaskRequest(files.task_id, task), stall_seconds)
            while True:
                answer = connection.next_answer(stall_seconds, aborted)
                if isinstance(answer, Progress):
                    if on_progress is not None:
                        on_progress(answer.phase, answer.done, answer.total)
                elif isinstance(answer, Failure):
                    raise _as_error(answer)
                elif isinstance(answer, Reply):
                    return _take(files, task, tensors, answer)
                else:
                    raise _nonsense("it answered a question that nobody asked")
        except _Abort:
            connection.abort()
            raise _aborted() from None
        finally:
            files.remove()


def ping(exchange: Path, timeout_seconds: float = 5.0) -> Pong:
    """Ask the trainer whether it is there, for health checks.

    Raises:
        TrainerError: code no-trainer, trainer-died, trainer-hung or nonsense.
    """
    with _connected(exchange, 0.0, lambda: False) as connection:
        connection.send(Ping(), timeout_seconds)
        answer = connection.next_answer(timeout_seconds, lambda: False)
    if not isinstance(answer, Pong):
        raise _nonsense("it did not answer the question whether it is there")
    return answer


class _Abort(Exception):
    """`aborted` said so."""


class _Connection:
    """One stream socket to the trainer, read line by line."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._unread = bytearray()

    def send(self, message: Request, timeout_seconds: float) -> None:
        self._stream.settimeout(timeout_seconds)
        try:
            self._stream.sendall(encode(message))
        except TimeoutError:
            raise _hung(timeout_seconds) from None
        except OSError:
            raise _died() from None

    def next_answer(self, stall_seconds: float, aborted: Callable[[], bool]) -> Answer:
        """The next message; raises _Abort as soon as `aborted` says so."""
        self._stream.settimeout(POLL_SECONDS)
        deadline = time.monotonic() + stall_seconds
        while True:
            if aborted():
                raise _Abort
            if (end := self._unread.find(b"\n")) >= 0:
                break
            if len(self._unread) > MAX_LINE_BYTES:
                raise _nonsense("it sent a line without end")
            try:
                chunk = self._stream.recv(64 * 1024)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise _hung(stall_seconds) from None
                continue
            except OSError:
                raise _died() from None
            if not chunk:
                raise _died()
            self._unread += chunk
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return decode_answer(line)

    def abort(self) -> None:
        """Tell the trainer to stop; return when it has, when it is gone, or after ABORT_SECONDS."""
        deadline = time.monotonic() + ABORT_SECONDS
        with contextlib.suppress(FedfmsError):
            self.send(AbortRequest(), 1.0)
            while (left := deadline - time.monotonic()) > 0:
                if isinstance(self.next_answer(left, lambda: False), Failure | Reply):
                    return


@contextlib.contextmanager
def _connected(
    exchange: Path, connect_seconds: float, aborted: Callable[[], bool]
) -> Iterator[_Connection]:
    with _connect(exchange, connect_seconds, aborted) as stream:
        yield _Connection(stream)


def _connect(exchange: Path, connect_seconds: float, aborted: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + connect_seconds
    told = False
    while True:
        if aborted():
            raise _aborted()
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(1.0)
        try:
            with socket_address(exchange) as address:
                stream.connect(address)
            return stream
        except OSError as error:
            stream.close()
            if time.monotonic() > deadline:
                raise TrainerError(
                    f"no trainer answers at this site ({type(error).__name__})",
                    "start the trainer, or look in its log for why it does not start",
                    code="no-trainer",
                ) from None
            if not told:
                log.info("waiting for the trainer")
                told = True
        time.sleep(POLL_SECONDS)


def _put(files: TaskFiles, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_tensors(files.received, tensors, None)
    except OSError as error:
        raise TrainerError(
            f"the model could not be handed to the trainer: {error.strerror}",
            "give the exchange volume more room: three times the model's size",
            code="exchange-full",
        ) from None


def _take(files: TaskFiles, task: Task, sent: Mapping[str, Tensor], reply: Reply) -> TaskResult:
    """Read what the reply announces, and check that it is about this task."""
    report = reply.contribution
    got = (report.site, report.kind, report.round, report.model, report.recipe_sha256)
    if got != (task.site, task.kind, task.round, task.model, task.recipe.sha256):
        raise _nonsense("its report is about another task")
    if reply.has_tensors != (report.kind == "train" and report.role == "train"):
        raise _nonsense("its tensors and its report contradict each other")
    largest = sum(4 * t.numel() + 1024 for t in sent.values()) + 1024 * 1024
    tensors: dict[str, Tensor] = {}
    try:
        if reply.has_tensors:
            tensors = load_tensors(files.result, max_bytes=largest)
        pictures = [
            read_whole(files.picture(index), MAX_PICTURE_BYTES) for index in range(reply.pictures)
        ]
    except (OSError, CheckpointError):
        raise _nonsense("the files that it announced cannot be read") from None
    return TaskResult(report, tensors, pictures)


def _as_error(failure: Failure) -> FedfmsError:
    kind = getattr(fedfms.errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, FedfmsError)):
        return _nonsense("it reported an unknown kind of error")
    why = f", {failure.exception}" if failure.exception else ""
    return kind(
        f"the trainer reports {failure.error} ({failure.code}{why})",
        "the trainer's own log at the site has the details",
        code=failure.code,
    )


def _aborted() -> TaskAborted:
    return TaskAborted("the task was stopped on request", "nothing; submit the job again")


def _died() -> TrainerError:
    return TrainerError(
        "the trainer ended in the middle of a task",
        "look in the trainer's log at the site; it may have run out of memory",
        code="trainer-died",
    )


def _hung(seconds: float) -> TrainerError:
    return TrainerError(
        f"the trainer has been silent for {seconds:.0f} seconds",
        "start the trainer at the site again",
        code="trainer-hung",
    )


def _nonsense(what: str) -> TrainerError:
    return TrainerError(
        f"the trainer cannot be understood: {what}",
        "start the same version of fedfms in both containers of the site",
        code="nonsense",
    )
