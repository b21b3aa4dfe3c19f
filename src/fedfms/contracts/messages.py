"""The few messages between the FLARE client and the trainer, typed and checked on both sides.

One JSON object a line over a Unix stream socket. No message holds a file name: the files of a task
are named after its id, in the folder that both sides share. No message holds free text either: what
goes from the trainer to the client is counts, phases, codes and the report that passed the door.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, StringConstraints

from fedfms.bounded import decode_json
from fedfms.contracts.announcement import Announcement
from fedfms.contracts.contribution import MAX_PICTURES as MAX_PICTURES
from fedfms.contracts.contribution import Contribution, ModelName
from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.receipt import SignedReceipt
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.contracts.wire import Code, Count, Name, Word
from fedfms.errors import ConfigError, TrainerError, Undecodable

PROTOCOL = 3  # 3: an answer has a receipt; 2: the answer to a ping says what the site can do
SOCKET_NAME = "trainer.sock"
MAX_LINE_BYTES = 256 * 1024

Kind = Literal["train", "evaluate"]
TaskId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the FLARE client asks of the trainer."""

    kind: Kind
    site: Name  # whom the task is for; the trainer refuses another site's
    job: Name  # FLARE's id of the job; the trainer keeps its work by it
    round: Count  # from 0; for "evaluate" the number of rounds trained
    model: ModelName  # which model the tensors are: of this round, the last, the best
    recipe: Recipe
    # as the server says it, for the site's own people: who submitted the job, and what it is called
    submitter: Name | None = None
    job_name: Name | None = None


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Client to trainer: do this; its tensors lie in the shared folder."""

    task_id: TaskId
    task: Task


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Client to trainer: stop. To close the connection means the same."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Anybody to trainer: are you there?"""


@dataclass(frozen=True, slots=True)
class Forget:
    """Client to trainer: remove what is kept of a job."""

    job: Name


@dataclass(frozen=True, slots=True)
class Release:
    """Client to trainer: give the GPU and the memory back, until a task comes."""


@dataclass(frozen=True, slots=True)
class Done:
    """Trainer to client: it is so."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Trainer to client, about twice a second, as a sign of life and of how far it is."""

    phase: Word  # waiting, exchange, prepare, evaluate, train
    done: Count
    total: Count  # 0 where it is not known


@dataclass(frozen=True, slots=True)
class Reply:
    """Trainer to client: done; what leaves lies in the shared folder."""

    contribution: Contribution
    has_tensors: bool
    pictures: Annotated[int, Field(ge=0, le=MAX_PICTURES)]
    receipt: SignedReceipt | None = None  # of the trainer; none is a mistake, as the server sees it


@dataclass(frozen=True, slots=True)
class Failure:
    """Trainer to client: not done, and the public part of why."""

    error: Word  # class in fedfms.errors
    code: Code
    exception: Word | None = None  # class of an exception that nobody foresaw


Request = TaskRequest | AbortRequest | Ping | Forget | Release | SumsAsk
Answer = Announcement | Progress | Reply | Failure | Done | SumsAnswer


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Where the numbers of one task lie; every name comes from the task's id."""

    exchange: Path
    task_id: str

    @property
    def received(self) -> Path:
        """Tensors from the client to the trainer."""
        return self.exchange / f"{self.task_id}.in.safetensors"

    @property
    def result(self) -> Path:
        """Tensors from the trainer to the client."""
        return self.exchange / f"{self.task_id}.out.safetensors"

    def picture(self, index: int) -> Path:
        """A picture from the trainer to the client."""
        return self.exchange / f"{self.task_id}.{index}.png"

    def remove(self) -> None:
        """Delete whatever there is of this task; a folder that is gone is no error."""
        for path in _of_tasks(self.exchange, re.escape(self.task_id)):
            path.unlink(missing_ok=True)


def remove_leftovers(exchange: Path) -> None:
    """Delete the files of all tasks, after a crash; nothing else in the folder is touched."""
    for path in _of_tasks(exchange, "[0-9a-f]{16}"):
        path.unlink(missing_ok=True)


def _of_tasks(exchange: Path, task_id: str) -> list[Path]:
    pattern = re.compile(
        rf"\.?{task_id}\.(in\.safetensors|out\.safetensors|\d+\.png)(\.[0-9a-f]+\.part)?"
    )
    try:
        return [path for path in exchange.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


_REQUESTS: dict[str, type] = {
    "task": TaskRequest,
    "abort": AbortRequest,
    "ping": Ping,
    "forget": Forget,
    "release": Release,
    "sums": SumsAsk,
}
_ANSWERS: dict[str, type] = {
    "pong": Announcement,
    "progress": Progress,
    "reply": Reply,
    "failure": Failure,
    "done": Done,
    "summed": SumsAnswer,
}
_VERSIONED = ("task", "ping", "pong")  # say the protocol


def encode(message: Request | Answer) -> bytes:
    """The message as one line."""
    types = {**_REQUESTS, **_ANSWERS}
    kind = next(name for name, cls in types.items() if isinstance(message, cls))
    values: dict[str, Any] = {"type": kind}
    if kind in _VERSIONED:
        values["protocol"] = PROTOCOL
    values.update(dataclasses.asdict(message))
    if kind == "task":
        values.update(values.pop("task"))  # the wire is flat
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode_request(line: bytes) -> Request:
    """What a client wrote.

    Raises:
        TrainerError: code nonsense, or other-protocol for a client of another version, or recipe
            for one that cannot be used.
    """
    return cast(Request, _read(line, _REQUESTS))


def decode_answer(line: bytes) -> Answer:
    """What a trainer wrote.

    Raises:
        TrainerError: code nonsense, or other-protocol for a trainer of another version.
    """
    return cast(Answer, _read(line, _ANSWERS))


def public_code(code: str) -> str:
    """An error's code, if it is one: a short fixed word and no name of anything."""
    return code if _CODE.fullmatch(code) else "error"


@contextlib.contextmanager
def socket_address(exchange: Path) -> Iterator[str]:
    """The address of the trainer's socket, for bind or connect inside the `with`.

    The address of a Unix socket holds 107 bytes. A folder with a longer path is opened and named by
    its descriptor, which Linux understands.
    """
    address = os.fspath(exchange / SOCKET_NAME)
    if len(os.fsencode(address)) <= 107:
        yield address
        return
    folder = os.open(exchange, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET_NAME}"
    finally:
        os.close(folder)


def is_socket(path: Path) -> bool:
    """Whether a socket lies at this path, whoever listens."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


# ------------------------------------------------------------------------------------ reading

_CODE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def _read(line: bytes, types: dict[str, type]) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise _nonsense("a line that is too long")
    try:
        values = decode_json(line, "the line", max_bytes=MAX_LINE_BYTES)
    except Undecodable:
        raise _nonsense("a line that is no JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("type"), str):
        raise _nonsense("a line without a type")
    kind = values.pop("type")
    if kind in _VERSIONED and values.pop("protocol", None) != PROTOCOL:
        raise TrainerError(
            f"the other process does not speak protocol {PROTOCOL} of the trainer",
            "start the same version of fedfms in both containers of the site",
            code="other-protocol",
        )
    if kind not in types:
        raise _nonsense("a message of an unknown type")
    if kind == "task":
        _check_recipe(values.get("recipe"))
        values = {"task_id": values.pop("task_id", None), "task": values}
    try:
        # a site may be newer than who asks it: docs of contracts/announcement.py
        return validate(types[kind], values, unknown="ignore" if kind == "pong" else "forbid")
    except Misfits as misfits:
        if misfits.kind != "unusable":
            raise _nonsense("a message with an unknown or a missing entry") from None
        named = [part for part in misfits.loc if part != "task"] or ["whole"]
        raise _nonsense(f"a message whose {named[0]} cannot be used") from None


def _check_recipe(values: Any) -> None:
    if not isinstance(values, dict):
        raise _nonsense("a message whose recipe cannot be used")
    try:
        Recipe.from_dict(values, "the job's recipe")
    except ConfigError as error:
        raise TrainerError(error.problem, error.fix, code="recipe") from None


def _nonsense(what: str) -> TrainerError:
    return TrainerError(
        f"the other process of this site sent {what}",
        "start the same version of fedfms in both containers of the site",
        code="nonsense",
    )
