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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedfms.contracts.contribution import MAX_PICTURES as MAX_PICTURES
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.errors import ConfigError, ContributionRefused, TrainerError

PROTOCOL = 2  # 2: a Pong says what the site can do
SOCKET_NAME = "trainer.sock"
MAX_LINE_BYTES = 256 * 1024

Kind = Literal["train", "evaluate"]
ModelName = Literal["round", "final", "best"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the FLARE client asks of the trainer."""

    kind: Kind
    site: str  # whom the task is for; the trainer refuses another site's
    job: str  # FLARE's id of the job; the trainer keeps its work by it
    round: int  # from 0; for "evaluate" the number of rounds trained
    model: ModelName  # which model the tensors are: of this round, the last, the best
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Client to trainer: do this; its tensors lie in the shared folder."""

    task_id: str  # 16 hexadecimal digits
    task: Task


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Client to trainer: stop. To close the connection means the same."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Anybody to trainer: are you there?"""


@dataclass(frozen=True, slots=True)
class Slicing:
    """How a site makes pictures of its images: what sites should agree on and no recipe says."""

    plane: str | None  # axial, coronal, sagittal; None where the files are pictures, not volumes
    channels: str  # gray, rgb, neighbours
    intensity: str  # the rule and its numbers, as `Intensity.from_text` reads them
    # mm between slices, rows and columns: the median over some cases, of two digits. None: too few
    # cases to tell, not known yet, or files without a voxel size
    spacing_mm: tuple[float, float, float] | None = None

    @classmethod
    def of(cls, site: SiteConfig, spacing_mm: tuple[float, float, float] | None = None) -> Slicing:
        """What a site.yml says."""
        rule = site.intensity
        numbers = (rule.center, rule.width) if rule.rule == "window" else rule.bounds
        return cls(
            plane=None if site.format == "image" else site.plane,  # pictures lie in no plane
            channels=site.channels,
            intensity=":".join([rule.rule, *(f"{number:g}" for number in numbers)]),
            spacing_mm=spacing_mm,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        values = dataclasses.asdict(self)
        return {**values, "spacing_mm": list(self.spacing_mm) if self.spacing_mm else None}


@dataclass(frozen=True, slots=True)
class Pong:
    """Trainer: I am, and this is what the site can do, by its site.yml and policy as they are now.

    It goes on to the server. Where one of the two files cannot be used, all it would say is empty.
    """

    site: str
    version: str  # of the package
    busy: bool  # with a task
    fault: str | None = None  # code of what keeps this site from taking part
    classes: tuple[str, ...] = ()  # that the site annotates
    not_annotated: tuple[str, ...] = ()  # that it knows and never drew
    methods: tuple[str, ...] = ()  # that its policy allows, known to the reader or not
    max_rounds: int = 0  # that its policy allows
    device: Device | None = None  # what torch computes on here
    slicing: Slicing | None = None  # None: not told, as by a trainer of an older version
    overlapping: tuple[tuple[str, str], ...] = ()  # classes that have a label value in common here

    @property
    def ready(self) -> bool:
        """Whether a task can begin."""
        return self.fault is None


@dataclass(frozen=True, slots=True)
class Progress:
    """Trainer to client, about twice a second, as a sign of life and of how far it is."""

    phase: str  # waiting, exchange, prepare, evaluate, train
    done: int
    total: int  # 0 where it is not known


@dataclass(frozen=True, slots=True)
class Reply:
    """Trainer to client: done; what leaves lies in the shared folder."""

    contribution: Contribution
    has_tensors: bool
    pictures: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Trainer to client: not done, and the public part of why."""

    error: str  # class in fedfms.errors
    code: str
    exception: str | None = None  # class of an exception that nobody foresaw


Request = TaskRequest | AbortRequest | Ping
Answer = Pong | Progress | Reply | Failure


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
        rf"{task_id}\.(in\.safetensors|out\.safetensors|\d+\.png)(\.[0-9a-f]+\.part)?"
    )
    try:
        return [path for path in exchange.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def encode(message: Request | Answer) -> bytes:
    """The message as one line."""
    values: dict[str, Any]
    match message:
        case TaskRequest(task_id, task):
            values = {
                "type": "task",
                "protocol": PROTOCOL,
                "task_id": task_id,
                "kind": task.kind,
                "site": task.site,
                "job": task.job,
                "round": task.round,
                "model": task.model,
                "recipe": task.recipe.to_dict(),
            }
        case AbortRequest():
            values = {"type": "abort"}
        case Ping():
            values = {"type": "ping", "protocol": PROTOCOL}
        case Pong():
            values = {
                "type": "pong",
                "protocol": PROTOCOL,
                "site": message.site,
                "version": message.version,
                "busy": message.busy,
                "fault": message.fault,
                "classes": list(message.classes),
                "not_annotated": list(message.not_annotated),
                "methods": list(message.methods),
                "max_rounds": message.max_rounds,
                "device": message.device,
                "slicing": message.slicing.to_dict() if message.slicing else None,
                "overlapping": [list(pair) for pair in message.overlapping],
            }
        case Progress(phase, done, total):
            values = {"type": "progress", "phase": phase, "done": done, "total": total}
        case Reply(contribution, has_tensors, pictures):
            values = {
                "type": "reply",
                "contribution": contribution.to_dict(),
                "has_tensors": has_tensors,
                "pictures": pictures,
            }
        case Failure(error, code, exception):
            values = {"type": "failure", "error": error, "code": code, "exception": exception}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode_request(line: bytes) -> Request:
    """What a client wrote.

    Raises:
        TrainerError: code nonsense, or other-protocol for a client of another version.
    """
    kind, values = _read(line)
    if kind == "task":
        _check(values, {"protocol": _count, **_TASK})
        return TaskRequest(
            values["task_id"],
            Task(
                kind=values["kind"],
                site=values["site"],
                job=values["job"],
                round=values["round"],
                model=values["model"],
                recipe=_recipe(values["recipe"]),
            ),
        )
    if kind == "abort":
        _check(values, {})
        return AbortRequest()
    if kind == "ping":
        _check(values, {"protocol": _count})
        return Ping()
    raise _nonsense("a message of an unknown type")


def decode_answer(line: bytes) -> Answer:
    """What a trainer wrote.

    Raises:
        TrainerError: code nonsense, or other-protocol for a trainer of another version.
    """
    kind, values = _read(line)
    if kind == "progress":
        _check(values, {"phase": _word, "done": _count, "total": _count})
        return Progress(**values)
    if kind == "reply":
        _check(
            values,
            {
                "contribution": lambda value: isinstance(value, dict),
                "has_tensors": _flag,
                "pictures": lambda value: _count(value) and value <= MAX_PICTURES,
            },
        )
        try:
            contribution = Contribution.from_dict(values["contribution"])
        except ContributionRefused as error:
            raise _nonsense(error.problem) from None
        return Reply(contribution, values["has_tensors"], values["pictures"])
    if kind == "failure":
        _check(values, {"error": _word, "code": _code, "exception": _word_or_none})
        return Failure(**values)
    if kind == "pong":
        # an older trainer does not tell the first two
        values = {"slicing": None, "overlapping": [], **values}
        _check(values, _PONG)
        del values["protocol"]
        values["overlapping"] = tuple((one, other) for one, other in values["overlapping"])
        if (told := values["slicing"]) is not None:
            spacing = told["spacing_mm"]
            values["slicing"] = Slicing(**{**told, "spacing_mm": spacing and tuple(spacing)})
        for key in ("classes", "not_annotated", "methods"):
            values[key] = tuple(values[key])
        return Pong(**values)
    raise _nonsense("a message of an unknown type")


def public_code(code: str) -> str:
    """An error's code, if it is one: a short fixed word and no name of anything."""
    return code if _code(code) else "error"


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

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_CODE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TASK_ID = re.compile(r"[0-9a-f]{16}")
_RULE = re.compile(r"[a-z]{1,20}(:-?[0-9.e+-]{1,20}){2}")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _name(value: Any) -> bool:
    return _text(value, _NAME)


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_CLASSES and all(map(_name, value))


def _code(value: Any) -> bool:
    return _text(value, _CODE)


def _word(value: Any) -> bool:
    return _text(value, _WORD)


def _word_or_none(value: Any) -> bool:
    return value is None or _word(value)


def _slicing(value: Any) -> bool:
    if value is None:
        return True
    keys = {field.name for field in dataclasses.fields(Slicing)}
    if not isinstance(value, dict) or set(value) != keys:
        return False
    spacing = value["spacing_mm"]
    return (
        (value["plane"] is None or _word(value["plane"]))
        and _word(value["channels"])
        and _text(value["intensity"], _RULE)
        and (spacing is None or (isinstance(spacing, list) and len(spacing) == 3))
        and all(isinstance(mm, int | float) and 0 < mm < 1e4 for mm in spacing or ())
    )


_TASK: dict[str, Callable[[Any], bool]] = {
    "task_id": lambda value: _text(value, _TASK_ID),
    "kind": lambda value: value in ("train", "evaluate"),
    "site": _name,
    "job": _name,
    "round": _count,
    "model": lambda value: value in ("round", "final", "best"),
    "recipe": lambda value: isinstance(value, dict),
}

MAX_CLASSES = 1000

_PONG: dict[str, Callable[[Any], bool]] = {
    "protocol": _count,
    "site": _name,
    "version": _name,
    "busy": _flag,
    "fault": lambda value: value is None or _code(value),
    "classes": lambda value: _names(value),
    "not_annotated": lambda value: _names(value),
    "methods": lambda value: _names(value),
    "max_rounds": _count,
    "device": lambda value: value is None or value in get_args(Device),
    "slicing": _slicing,
    "overlapping": lambda value: (
        isinstance(value, list)
        and len(value) <= MAX_CLASSES
        and all(_names(pair) and len(pair) == 2 for pair in value)
    ),
}


def _read(line: bytes) -> tuple[str, dict[str, Any]]:
    if len(line) > MAX_LINE_BYTES:
        raise _nonsense("a line that is too long")
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _nonsense("a line that is no JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("type"), str):
        raise _nonsense("a line without a type")
    kind = values.pop("type")
    if kind in ("task", "ping", "pong") and values.get("protocol") != PROTOCOL:
        raise TrainerError(
            f"the other process does not speak protocol {PROTOCOL} of the trainer",
            "start the same version of fedfms in both containers of the site",
            code="other-protocol",
        )
    return kind, values


def _refuse_constant(text: str) -> float:
    raise ValueError(text)


def _check(values: dict[str, Any], checks: dict[str, Callable[[Any], bool]]) -> None:
    if set(values) != set(checks):
        raise _nonsense("a message with an unknown or a missing entry")
    for key, fits in checks.items():
        if not fits(values[key]):
            raise _nonsense(f"a message whose {key} cannot be used")


def _recipe(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.from_dict(values, "the job's recipe")
    except ConfigError as error:
        raise TrainerError(error.problem, error.fix, code="recipe") from None
    except Exception:
        raise _nonsense("a recipe that cannot be read") from None


def _nonsense(what: str) -> TrainerError:
    return TrainerError(
        f"the other process of this site sent {what}",
        "start the same version of fedfms in both containers of the site",
        code="nonsense",
    )
