"""Rows of rounds.csv, evaluation.csv and tables like them, written and read back without loss."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedfms.bounded import read_bytes
from fedfms.contracts.contribution import PHASES

Row = TypeVar("Row")
MAX_TABLE_BYTES = 256 << 20  # a row for each site and round has 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One site in one round; a row of rounds.csv.

    The scores are of the model the site received in this round, that is after `round` rounds of
    training, as means over classes of the means over the site's validation cases.
    """

    round: int  # from 0
    site: str
    role: str  # train, holdout
    accepted: bool
    reason: str | None = None  # why not accepted
    loss: float | None = None  # mean over the round's training steps
    dice: float | None = None  # [0, 1]; over the classes in class_dice
    iou: float | None = None  # [0, 1]
    hd95: float | None = None  # in the unit that evaluation.csv names
    dice_slice: float | None = None  # mean over slices
    iou_slice: float | None = None
    evaluated_cases: int | None = None
    training_slices: int | None = None  # the averaging weight
    training_cases: int | None = None
    bytes_down: int | None = None  # tensor bytes that the site received
    bytes_up: int | None = None  # tensor bytes that the site sent
    micro_batch: int | None = None  # slices in memory at once
    update_norm: float | None = None  # L2 norm of the difference as it came, or as the site says
    time: float | None = None  # seconds since 1970-01-01 UTC, when the answer was recorded
    # by phase, in columns seconds_<phase> and peak_memory_bytes_<phase>
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)  # of the trainer or its GPU
    # of each class with a value, in columns dice_of_<class>
    class_dice: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One score of one class at one site; a row of evaluation.csv.

    A site without an evaluation has one row with neither class nor metric, and the note says why;
    a class that a site does not annotate has one row without a metric.
    """

    site: str
    role: str
    model: str  # final, best
    round: int | None  # rounds that this model had trained
    class_name: str = ""
    metric: str = ""  # one of METRICS
    mean: float | None = None
    std: float | None = None  # over cases (slices for *_slice)
    cases: int = 0  # cases (or slices) with a value
    empty: int = 0  # cases (or slices) without foreground in truth and prediction
    unit: str = ""  # of mean and std: mm or px for hd95, empty for shares in [0, 1]
    worst: bool = False  # the worst site of this model, class, metric and unit
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRow:
    """What the guard of a round measured of one site; a row of guard.csv. See `Verdict`."""

    round: int  # from 0
    site: str
    norm: float  # L2, of the difference as it came
    usual_norm: float  # what the others let expect
    cosine: float | None  # to the mean of the others, [-1, 1]
    slices: int  # that the site says
    counted_slices: int
    factor: float  # of the difference in the average
    findings: str = ""  # separated by semicolons; empty of an answer like the others
    text: str = ""  # the same in words


def write_rounds(path: Path, rows: Sequence[RoundRow]) -> None:
    """Write rounds.csv, as `write_rows`, with a column for each phase and each class."""
    write_rows(path, RoundRow, rows)


def read_rounds(path: Path) -> tuple[RoundRow, ...]:
    """Read rounds.csv back.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    return read_rows(path, RoundRow)


def write_rows(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """Write `rows_text`; a file name that is not UTF-8 stands as its own bytes."""
    path.write_bytes(rows_text(kind, rows).encode(errors="surrogateescape"))


def rows_text(kind: type[Any], rows: Iterable[Any]) -> str:
    """Dataclass rows as CSV, a column for each field; numbers with all their digits, yes or no.

    A field class_name becomes the column class; what has no value (None, NaN) is left empty.
    Several names in one cell are separated by semicolons. A mapping has a column for each key.
    """
    plain, rows = _plain_fields(kind), list(rows)
    mapped = [
        (name, key)
        for name in _field_types(kind)
        if name not in plain
        for key in (PHASES if name in _BY_PHASE else _keys(rows, name))
    ]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*map(_column, plain), *(f"{_PREFIX[name]}{key}" for name, key in mapped)])
    for row in rows:
        values = [getattr(row, name) for name in plain]
        values += [getattr(row, name).get(key) for name, key in mapped]
        writer.writerow(map(_cell, values))
    return text.getvalue()


def _keys(rows: Iterable[Any], name: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in getattr(row, name)))


def read_rows(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    """Read what `write_rows` wrote of the same kind, or `write_rounds`.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    text = read_bytes(path, MAX_TABLE_BYTES).decode("utf-8", errors="surrogateescape")
    table = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for column in map(_column, _plain_fields(kind)):
            if column not in (table.fieldnames or ()):  # also where no row follows
                raise ValueError(f"{path.name} has no column {column}")
        return tuple(_row(kind, cells) for cells in table)
    except csv.Error as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None


def _row(kind: type[Row], cells: Mapping[str, str]) -> Row:
    if None in cells or None in cells.values():  # as the csv module has it
        raise ValueError("a row has more or fewer cells than the table has columns")
    plain = _plain_fields(kind)
    values = {name: _value(type_, cells[_column(name)]) for name, type_ in plain.items()}
    for name in _field_types(kind).keys() - plain.keys():
        prefix, number = _PREFIX[name], int if name == "peak_memory_bytes" else float
        values[name] = {
            column.removeprefix(prefix): number(cell)
            for column, cell in cells.items()
            if column.startswith(prefix) and cell
        }
    return kind(**values)


def _plain_fields(kind: type[Any]) -> dict[str, str]:
    """The fields that are a column each, with their types as they are written."""
    types = _field_types(kind).items()
    return {name: type_ for name, type_ in types if not type_.startswith("Mapping")}


def _field_types(kind: type[Any]) -> dict[str, str]:
    return {one.name: str(one.type) for one in dataclasses.fields(kind)}


def _column(name: str) -> str:
    return "class" if name == "class_name" else name


def _cell(value: Any) -> Any:
    if value is None or value != value:  # NaN is the one value that is not itself
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ";".join(value)
    return repr(value) if isinstance(value, float) else value


def _value(type_: str, cell: str) -> Any:
    if not cell and type_.endswith("| None"):
        return None
    return _FROM_TEXT.get(type_.removesuffix(" | None"), str)(cell)


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda cell: cell == "yes",
}
_BY_PHASE = ("seconds", "peak_memory_bytes")
_PREFIX = {  # of the columns of a field that is a mapping
    "seconds": "seconds_",
    "peak_memory_bytes": "peak_memory_bytes_",
    "class_dice": "dice_of_",
}
