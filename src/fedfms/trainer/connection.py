"""A connection to the trainer's socket: find it, send, read line by line; needs no torch.

Whatever happens to the trainer (not there, killed, hung, out of its mind) becomes an error here.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.messages import (
    MAX_LINE_BYTES,
    AbortRequest,
    Answer,
    Done,
    Failure,
    Forget,
    Ping,
    Release,
    Reply,
    Request,
    decode_answer,
    encode,
    socket_address,
)
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.errors import DoorClosed, FedfmsError, TaskAborted, TrainerError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # between two looks at `aborted`
ABORT_SECONDS = 5.0  # the trainer has this long to confirm that it stopped


def ping(exchange: Path, timeout_seconds: float = 5.0) -> Announcement:
    """Ask the trainer whether it is there, for health checks.

    Raises:
        TrainerError: code no-trainer, trainer-died, trainer-hung or nonsense.
    """
    answer = _answer(exchange, Ping(), timeout_seconds)
    if not isinstance(answer, Announcement):
        raise not_understood("it did not answer the question whether it is there")
    return answer


def forget(exchange: Path, job: str, timeout_seconds: float = 10.0) -> None:
    """Have the trainer remove what it keeps of a job.

    Raises:
        TrainerError: as `ping`, or code still-running.
    """
    _order(exchange, Forget(job), timeout_seconds)


def release(exchange: Path, timeout_seconds: float = 30.0) -> None:
    """Have the trainer give its GPU and memory back; once no task runs there.

    Raises:
        TrainerError: as `ping`, or code still-running.
    """
    _order(exchange, Release(), timeout_seconds)


def ask_sums(exchange: Path, ask: SumsAsk, timeout_seconds: float = 30.0) -> SumsAnswer:
    """Have the trainer do a step of a secure sum; also while a task runs there.

    Raises:
        TrainerError: as `ping`.
        DoorClosed: it does not; with the trainer's code.
    """
    answer = _answer(exchange, ask, timeout_seconds)
    if isinstance(answer, Failure):
        raise DoorClosed(
            f"the trainer does not take part in this sum ({answer.code})",
            "look in the trainer's log",
            code=answer.code,
        )
    if not isinstance(answer, SumsAnswer):
        raise not_understood("it answered a question that nobody asked")
    return answer


def _order(exchange: Path, request: Request, timeout_seconds: float) -> None:
    answer = _answer(exchange, request, timeout_seconds)
    if isinstance(answer, Failure):
        raise TrainerError(
            f"the trainer did not do it ({answer.code})",
            "look in the trainer's log",
            code=answer.code,
        )
    if not isinstance(answer, Done):
        raise not_understood("it did not say that it has done what it was asked")


def _answer(exchange: Path, request: Request, timeout_seconds: float) -> Answer:
    with connected(exchange, 0.0, lambda: False) as connection:
        connection.send(request, timeout_seconds)
        return connection.next_answer(timeout_seconds, lambda: False)


class AbortAsked(Exception):
    """`aborted` said so."""


class Connection:
    """One stream socket to the trainer, read line by line."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._unread = bytearray()

    def send(self, message: Request, timeout_seconds: float) -> None:
        """Send one message; raises TrainerError (trainer-died, trainer-hung)."""
        self._stream.settimeout(timeout_seconds)
        try:
            self._stream.sendall(encode(message))
        except TimeoutError:
            raise _hung(timeout_seconds) from None
        except OSError:
            raise _died() from None

    def next_answer(self, stall_seconds: float, aborted: Callable[[], bool]) -> Answer:
        """The next message; raises AbortAsked as soon as `aborted` says so."""
        self._stream.settimeout(POLL_SECONDS)
        deadline = time.monotonic() + stall_seconds
        while True:
            if aborted():
                raise AbortAsked
            if (end := self._unread.find(b"\n")) >= 0:
                break
            if len(self._unread) > MAX_LINE_BYTES:
                raise not_understood("it sent a line without end")
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
def connected(
    exchange: Path, connect_seconds: float, aborted: Callable[[], bool]
) -> Iterator[Connection]:
    """A connection; raises TrainerError (no-trainer), or TaskAborted where `aborted` says so."""
    with _connect(exchange, connect_seconds, aborted) as stream:
        yield Connection(stream)


def _connect(exchange: Path, connect_seconds: float, aborted: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + connect_seconds
    told = False
    while True:
        if aborted():
            raise stopped_on_request()
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


def stopped_on_request() -> TaskAborted:
    """The error of a task that was told to stop."""
    return TaskAborted("the task was stopped on request", "nothing; submit the job again")


def _died() -> TrainerError:
    return TrainerError(
        "the trainer was killed in the middle of a task, most likely because it ran out of memory",
        "give it more memory at the site, or set a smaller micro_batch in site.yml; its log says "
        "what it was at",
        code="trainer-died",
    )


def _hung(seconds: float) -> TrainerError:
    return TrainerError(
        f"the trainer has been silent for {seconds:.0f} seconds",
        "start the trainer at the site again",
        code="trainer-hung",
    )


def not_understood(what: str) -> TrainerError:
    """The error of an answer that makes no sense."""
    return TrainerError(
        f"the trainer cannot be understood: {what}",
        "start the same version of fedfms in both containers of the site",
        code="nonsense",
    )
