"""The trainer process: waits on a Unix socket and runs one task at a time; no network anywhere.

Two threads. The main one listens, speaks about twice a second and watches; the other computes. A
computation that does not stop when asked, or shows no sign of life, ends the process: whoever
supervises it (the container engine, `fedfms simulate`) starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import fcntl
import logging
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fedfms import __version__
from fedfms.contracts.messages import (
    MAX_LINE_BYTES,
    SOCKET_NAME,
    AbortRequest,
    Answer,
    Done,
    Failure,
    Forget,
    Ping,
    Progress,
    Release,
    Reply,
    TaskFiles,
    TaskRequest,
    decode_request,
    encode,
    is_socket,
    public_code,
    remove_leftovers,
    socket_address,
)
from fedfms.contracts.receipt import SignedReceipt
from fedfms.contracts.sums import SumsAsk
from fedfms.control import Control
from fedfms.errors import FedfmsError, TaskAborted, TrainerError
from fedfms.exchange.tensors import EXCHANGE_MODE, load_tensors, save_tensors
from fedfms.files import NO_ROOM, append_whole, write_whole
from fedfms.trainer.announce import Announcer
from fedfms.trainer.at_work import AtWork
from fedfms.trainer.errors import ERRORS
from fedfms.trainer.kept import Outcome
from fedfms.trainer.ledger import Ledger
from fedfms.trainer.receipts import Began, Receipts
from fedfms.trainer.site_page import render
from fedfms.trainer.tasks import SiteFolders, TaskRunner
from fedfms.training.device import GPU_FAILED, gpu_is_in_use

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.5  # between two signs of life to the client
ABORT_GRACE_SECONDS = 4.0  # for a computation to stop by itself
REQUEST_SECONDS = 60.0  # for a client that connected to say what it wants: one line
LOCK = "trainer.lock"  # in its private folder
OTHERS_END_SECONDS = 20.0  # for a trainer before it, or what is left of one
MAX_ERRORS_BYTES = 5 * 2**20  # of errors.log; one older part is kept
MAX_UNREAD_BYTES = 1024 * 1024  # of signs of life that a client did not take

# exit codes; a supervisor starts the trainer again after any of them but 0
EXIT_ABORT_IGNORED = 70  # the computation did not stop when asked
EXIT_STALLED = 71  # the computation showed no sign of life
EXIT_GPU_FAILED = 72  # CUDA refuses everything in a process after most of its errors
EXIT_RELEASED = 73  # the site pauses, and only the end of a process gives all of a GPU back

RELEASE_SECONDS = 20.0  # for a task that was aborted to end

# errors of a disk at the site: code, and what to do
_FAILS = ("disk-fails", "look at that disk: is it mounted read-only, does it report errors?")
_OF_A_DISK = {
    **dict.fromkeys(NO_ROOM, ("disk-full", "free room on that disk; the next round tries again")),
    **dict.fromkeys((errno.EIO, errno.EROFS), _FAILS),
}


def serve(folders: SiteFolders, exchange: Path) -> None:
    """Answer on `<exchange>/trainer.sock` until SIGTERM or SIGINT.

    Args:
        folders: of the site; its files are read anew for each task.
        exchange: folder shared with the FLARE client; small, best in memory.

    Raises:
        TrainerError: code trainer-running; another one works in the same private folder, or answers
            on the socket; or exchange-folder, the socket could not be made.
    """
    with alone_in(folders.work):
        server = TrainerServer(TaskRunner(folders), exchange)
        asyncio.run(server.run())
    logging.shutdown()


@contextlib.contextmanager
def alone_in(work: Path, seconds: float = OTHERS_END_SECONDS) -> Iterator[None]:
    """Keep other trainers out of a private folder: two would count what leaves each for itself.

    Args:
        work: the private folder.
        seconds: how long to wait for one that ends, or for processes of one that was killed.

    Raises:
        TrainerError: code trainer-running.
    """
    with contextlib.ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((work / LOCK).open("ab"))
            _take(lock.fileno(), work, time.monotonic() + seconds)
        except OSError as error:  # a disk without locks, or one that the first task will name
            log.warning("nothing keeps a second trainer out of %s: %s", work, error.strerror)
        yield


def _take(lock: int, work: Path, until: float) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TrainerError(
                    f"another trainer works in {work}",
                    "stop it first, or give this one another private folder: each site has its own",
                    code="trainer-running",
                ) from None
        time.sleep(0.1)


class _Running:
    """One task and how far it is; written by the computing thread, read by the main one."""

    def __init__(self) -> None:
        self.control = Control(self._note)
        self.progress = Progress("waiting", 0, 0)
        self.started = False

    def start(self) -> None:
        """Its turn has come: from now on the watchdog looks."""
        self.progress = Progress("prepare", 0, 0)
        self.control.last_sign_of_life = time.monotonic()
        self.started = True

    def _note(self, phase: str, done: int, total: int) -> None:
        self.progress = Progress(phase, done, total)


class TrainerServer:
    """The main thread's side: connections, signs of life, abort, watchdog."""

    def __init__(self, runner: TaskRunner, exchange: Path) -> None:
        self._runner = runner
        self._exchange = exchange
        self._announcer = Announcer(runner.folders)
        folders = runner.folders
        self._ledger = Ledger(
            folders.work, lambda entries: render(entries, folders.name, runner.policy)
        )
        self._receipts = Receipts(folders.work, folders.policy)
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="task")
        self._connections: set[asyncio.Task[None]] = set()
        self._gpu_failed = False
        self._at_work = AtWork(runner.folders.work)

    async def run(self) -> None:
        """Serve until a signal; see `serve`."""
        loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # one task at a time, in the order of their arrival
        self._stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        listener = listen(self._exchange)
        self._receipts.have_key()
        server = await asyncio.start_unix_server(
            self._connected, sock=listener, limit=MAX_LINE_BYTES
        )
        self._at_work.say_what_was_killed()
        log.info("trainer of %s is ready (fedfms %s)", self._runner.folders.name, __version__)
        await self._stopping.wait()
        log.info("trainer stops")
        server.close()
        (self._exchange / SOCKET_NAME).unlink(missing_ok=True)
        if self._connections:
            await asyncio.wait(self._connections, timeout=ABORT_GRACE_SECONDS + 1)
        self._compute.shutdown(wait=False, cancel_futures=True)
        self._at_work.end()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None  # this coroutine always runs as a task of the server
        self._connections.add(me)
        files: TaskFiles | None = None
        try:
            request = await _first_request(reader)
            if isinstance(request, TaskRequest):
                files = TaskFiles(self._exchange, request.task_id)
                answer = await self._do(request, files, reader, writer)
            elif isinstance(request, Ping):
                answer = await self._announcer.pong(self._turn.locked)
            elif isinstance(request, Forget | Release):
                answer = await self._order(request)
            elif isinstance(request, SumsAsk):  # beside a task: others wait for its shares
                answer = await asyncio.to_thread(self._step_of_a_sum, request)
            else:
                answer = request
            writer.write(encode(answer))
            if isinstance(request, Release) and isinstance(answer, Done) and gpu_is_in_use():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_closed(reader), ABORT_GRACE_SECONDS)
                self._end_hard(EXIT_RELEASED, "the site pauses, and its GPU is free now")
            if isinstance(answer, Failure) and answer.code == GPU_FAILED:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_closed(reader), ABORT_GRACE_SECONDS)
                self._end_hard(EXIT_GPU_FAILED, "its GPU failed; a new process can use it again")
            await _closed(reader)
        except (OSError, ValueError):
            log.info("a client went away in the middle of a message")
        finally:
            if files is not None:
                files.remove()  # if the client did not live to do it
            self._connections.discard(me)
            writer.close()

    async def _do(
        self,
        request: TaskRequest,
        files: TaskFiles,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> Answer:
        """One task from its turn to its answer."""
        running = _Running()
        stop = asyncio.create_task(self._stop_asked(reader))
        beat = asyncio.create_task(self._beat(running, writer))
        turn = asyncio.create_task(self._turn.acquire())
        try:
            await asyncio.wait({turn, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                return self._stopped()
            if self._gpu_failed:
                return Failure("TrainingError", GPU_FAILED)
            running.start()
            self._push_back_timer()
            work = asyncio.get_running_loop().run_in_executor(
                self._compute, self._compute_answer, request, files, running
            )
            both: list[asyncio.Future[Any]] = [work, stop]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                log.info("the task is asked to stop")
                running.control.abort()
                await asyncio.wait({work}, timeout=ABORT_GRACE_SECONDS)
                if not work.done():
                    self._end_hard(EXIT_ABORT_IGNORED, "the task did not stop when asked")
            answer = work.result()
            self._gpu_failed = isinstance(answer, Failure) and answer.code == GPU_FAILED
            if self._gpu_failed:
                self._announcer.gpu_failed()
            return self._stopped() if running.control.aborted else answer
        finally:
            faulthandler.cancel_dump_traceback_later()
            if turn.done():
                self._turn.release()
            await _cancelled(stop, beat, turn)

    async def _order(self, request: Forget | Release) -> Done | Failure:
        """What is no task, in the turn of one."""
        try:
            await asyncio.wait_for(self._turn.acquire(), RELEASE_SECONDS)
        except asyncio.TimeoutError:
            return Failure("TrainerError", "still-running")
        try:
            if isinstance(request, Forget):
                self._runner.forget(request.job)
            else:
                self._runner.release()
                log.info("the site pauses: memory is given back until a task comes")
            return Done()
        except OSError as error:
            log.error("not all of it could be removed: %s", error.strerror)
            return Failure("TrainerError", "unusable-file")
        finally:
            self._turn.release()

    def _step_of_a_sum(self, ask: SumsAsk) -> Answer:
        try:
            return self._runner.sums.answer(ask)
        except FedfmsError as error:
            log.error("no part in the sum of round %d: %s", ask.round, error.public)
            return Failure(type(error).__name__, public_code(error.code))
        except OSError as error:
            log.error("no part in the sum of round %d: %s", ask.round, error.strerror)
            return Failure("TrainerError", "unusable-file")

    def _stopped(self) -> Failure:
        if self._stopping.is_set():
            return Failure("TrainerError", "trainer-stopped")
        return Failure("TaskAborted", "aborted")

    async def _stop_asked(self, reader: asyncio.StreamReader) -> None:
        """Return when the client wants no answer any more, or this process has to stop."""
        said = asyncio.create_task(reader.readline())
        signalled = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({said, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if said.done() and said.exception() is None and said.result():
                try:
                    asked = isinstance(decode_request(said.result()), AbortRequest)
                except FedfmsError:
                    asked = False
                log.info("the client %s", "aborts" if asked else "sent nonsense in a task")
        finally:
            await _cancelled(said, signalled)

    async def _beat(self, running: _Running, writer: asyncio.StreamWriter) -> None:
        """Tell the client how far the task is, and watch that it goes on."""
        timer_set_at = -math.inf
        while True:
            if writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
                log.warning("a client does not listen to its task, which is stopped")
                writer.transport.abort()  # ends `_stop_asked` too
                return
            writer.write(encode(running.progress))
            if running.started:
                silent = time.monotonic() - running.control.last_sign_of_life
                limit = self._runner.stall_seconds
                if silent > limit:
                    writer.write(encode(Failure("TrainerError", "trainer-stalled")))
                    self._end_hard(EXIT_STALLED, f"no sign of life for {silent:.0f} s")
                if time.monotonic() - timer_set_at > 10:
                    self._push_back_timer()
                    timer_set_at = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)

    def _push_back_timer(self) -> None:
        """The watch over a computation that keeps Python's lock, so that `_beat` never runs.

        A timer outside Python ends the process, with exit code 1, unless it is pushed back.
        """
        faulthandler.dump_traceback_later(self._runner.stall_seconds + 60, exit=True)

    def _compute_answer(self, request: TaskRequest, files: TaskFiles, running: _Running) -> Answer:
        """The computing thread's side: run the task, write what leaves, say so."""

        began = Began()

        def received() -> dict[str, Tensor]:
            tensors = load_tensors(files.received)
            self._receipts.begin(began, tensors)
            files.received.unlink(missing_ok=True)  # room in memory for the result
            return tensors

        task = request.task
        holdout = self._runner.folders.name in task.recipe.holdout
        self._ledger.asked(task, holdout)
        self._at_work.begin(task)
        try:
            outcome = self._runner.run(task, received, running.control)
            receipt = self._receipts.give(task, outcome, began)  # before anything is handed out
            reply = _put(files, outcome, receipt)
            self._ledger.left(task, holdout, outcome)
            return reply
        except TaskAborted as error:
            log.info("the task was stopped")
            self._ledger.not_left(task, holdout, error)
            return Failure(type(error).__name__, public_code(error.code))
        except FedfmsError as error:
            self._ledger.not_left(task, holdout, error)
            self._tell_the_site(request, error.public, _in_full(error))
            return Failure(type(error).__name__, public_code(error.code))
        except OSError as error:
            self._ledger.not_left(task, holdout, error)
            if error.errno not in _OF_A_DISK:
                return self._unexpected(request, error)
            full = f"{error}\n  fix: {_OF_A_DISK[error.errno][1]}\n{traceback.format_exc()}"
            code = _OF_A_DISK[error.errno][0]
            self._tell_the_site(request, f"TrainerError ({code})", full)
            return Failure("TrainerError", code)
        except Exception as error:
            self._ledger.not_left(task, holdout, error)
            return self._unexpected(request, error)
        finally:
            self._at_work.end()

    def _unexpected(self, request: TaskRequest, error: Exception) -> Failure:
        name = type(error).__name__
        self._tell_the_site(request, f"unexpected {name}", traceback.format_exc())
        return Failure("TrainerError", "unexpected", name)

    def _tell_the_site(self, request: TaskRequest, public: str, full: str) -> None:
        """The code into the log, which may be passed on; the full text, with names, beside it."""
        path = self._runner.folders.work / ERRORS
        task = request.task
        log.error("%s of round %d failed: %s; see %s", task.kind, task.round, public, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > MAX_ERRORS_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
            when = f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {task.job} round {task.round}"
            entry = f"{when} {task.kind}: {full}\n".encode(errors="surrogateescape")
            append_whole(path, entry, mode=0o600)
        except OSError as error:
            log.error("%s cannot be written: %s", path, error.strerror)

    def _end_hard(self, code: int, why: str) -> None:
        log.error("trainer ends itself: %s", why)
        self._at_work.end()
        logging.shutdown()
        os._exit(code)


def listen(exchange: Path) -> socket.socket:
    """The socket, for this user and group only; a stale one is removed if nobody answers on it.

    Raises:
        TrainerError: code trainer-running or exchange-folder.
    """
    path = exchange / SOCKET_NAME
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        exchange.mkdir(parents=True, exist_ok=True)
        with socket_address(exchange) as address:
            if is_socket(path):
                if _answers(address):
                    raise TrainerError(
                        f"another trainer answers on {path}",
                        "stop it first, or give this one another exchange folder",
                        code="trainer-running",
                    )
                path.unlink()
            remove_leftovers(exchange)
            listener.bind(address)
            path.chmod(0o660)  # before listen: nobody can have connected yet
            listener.listen(16)
    except OSError as error:
        listener.close()
        raise TrainerError(
            f"the trainer cannot listen at {path}: {error.strerror or error}",
            "give the trainer an exchange folder that its user can write to",
            code="exchange-folder",
        ) from None
    except BaseException:
        listener.close()
        raise
    return listener


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended: then nobody reads the stream any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _first_request(
    reader: asyncio.StreamReader,
) -> TaskRequest | Ping | Forget | Release | SumsAsk | Failure:
    """What a new connection asks for, or the answer to what cannot be understood.

    Raises:
        OSError: the client went away before it had said it.
    """
    try:
        line = await asyncio.wait_for(reader.readline(), REQUEST_SECONDS)
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        request = decode_request(line)
    except asyncio.TimeoutError:
        log.warning("a client connected and did not ask for anything in %g s", REQUEST_SECONDS)
        return Failure("TrainerError", "too-slow")
    except ValueError:  # a line beyond the limit
        return Failure("TrainerError", "nonsense")
    except FedfmsError as error:
        log.warning("a request was refused: %s", error.public)
        return Failure(type(error).__name__, public_code(error.code))
    if isinstance(request, AbortRequest):  # with nothing to abort
        return Failure("TrainerError", "nonsense")
    return request


async def _closed(reader: asyncio.StreamReader) -> None:
    """Return when the client has closed: it has taken its files."""
    while await reader.read(MAX_LINE_BYTES):
        pass


def _in_full(error: FedfmsError) -> str:
    """For the site's own file: also the error of a library that it was made of."""
    if error.__cause__ is None:
        return f"{error}\n{error.details}".rstrip()
    return f"{error}\n{''.join(traceback.format_exception(error.__cause__))}"


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full queue or a time-out: somebody listens, however slowly
            return True
        return True


def _put(files: TaskFiles, outcome: Outcome, receipt: SignedReceipt) -> Reply:
    """Write what leaves into the shared folder, whole or not at all."""
    try:
        if outcome.tensors:
            save_tensors(files.result, outcome.tensors, None, checksum=False)
        for index, picture in enumerate(outcome.pictures):
            write_whole(files.picture(index), picture, mode=EXCHANGE_MODE)
    except OSError as error:
        files.remove()
        raise TrainerError(
            f"the result could not be written: {error.strerror}",
            "give the exchange volume more room: three times the model's size",
            code="exchange-full",
        ) from None
    return Reply(outcome.contribution, bool(outcome.tensors), len(outcome.pictures), receipt)
