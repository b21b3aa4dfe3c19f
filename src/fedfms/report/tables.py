"""Rows of rounds.csv and evaluation.csv, written and read back without loss."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfms.contracts.contribution import METRICS, PHASES


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
    update_norm: float | None = None  # L2 norm of the difference as sent
    time: float | None = None  # seconds since 1970-01-01 UTC, when the answer was recorded
    # of each class with a value, in columns dice_of_<class>
    class_dice: Mapping[str, float] = field(default_factory=dict)
    # by phase, in columns seconds_<phase> and peak_memory_bytes_<phase>
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)  # of the trainer or its GPU


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
    class_name: str
    metric: str  # one of METRICS
    mean: float | None
    std: float | None  # over cases (slices for *_slice)
    cases: int  # cases (or slices) with a value
    empty: int  # cases (or slices) without foreground in truth and prediction
    unit: str = ""  # of mean and std: mm or px for hd95, empty for shares in [0, 1]
    worst: bool = False  # the worst site of this model, class, metric and unit
    note: str = ""


def write_rounds(path: Path, rows: Sequence[RoundRow]) -> None:
    """Write rounds.csv; numbers with all their digits, yes or no, empty where there is no value."""
    mapped = (*_BY_PHASE, "class_dice")
    names = [f.name for f in dataclasses.fields(RoundRow) if f.name not in mapped]
    classes = list(dict.fromkeys(name for row in rows for name in row.class_dice))
    columns = [*names, *(f"{name}_{phase}" for name in _BY_PHASE for phase in PHASES)]
    columns += [f"{_DICE_OF}{name}" for name in classes]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [getattr(row, name) for name in names]
            values += [getattr(row, name).get(phase) for name in _BY_PHASE for phase in PHASES]
            values += [row.class_dice.get(name) for name in classes]
            writer.writerow(map(_cell, values))


def read_rounds(path: Path) -> tuple[RoundRow, ...]:
    """Read rounds.csv back.

    Raises:
        OSError, ValueError, KeyError: the file is missing or damaged.
    """
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_round_row(cells) for cells in csv.DictReader(file))


def write_evaluation(path: Path, rows: Sequence[EvaluationRow]) -> None:
    """Write evaluation.csv, in the same manner as rounds.csv."""
    write_rows(path, EvaluationRow, rows)


def write_rows(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    """Write dataclass rows, a column for each field; numbers with all their digits.

    A field class_name becomes the column class; what has no value (None, NaN) is left empty. A file
    name that is not UTF-8 stands as its own bytes.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("class" if name == "class_name" else name for name in names)
        for row in rows:
            writer.writerow(_cell(getattr(row, name)) for name in names)


def read_evaluation(path: Path) -> tuple[EvaluationRow, ...]:
    """Read evaluation.csv back.

    Raises:
        OSError, ValueError, KeyError: the file is missing or damaged.
    """
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_evaluation_row(cells) for cells in csv.DictReader(file))


def _cell(value: Any) -> Any:
    if value is None or value != value:  # NaN is the one value that is not itself
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(value) if isinstance(value, float) else value


_BY_PHASE = ("seconds", "peak_memory_bytes")
_DICE_OF = "dice_of_"
_WHOLE = (
    "evaluated_cases",
    "training_slices",
    "training_cases",
    "bytes_down",
    "bytes_up",
    "micro_batch",
)
_NUMBERS = ("loss", *METRICS, "update_norm", "time")


def _round_row(cells: Mapping[str, str]) -> RoundRow:
    whole: dict[str, Any] = {name: int(cells[name]) if cells[name] else None for name in _WHOLE}
    numbers: dict[str, Any] = {
        name: float(cells[name]) if cells[name] else None for name in _NUMBERS
    }
    return RoundRow(
        round=int(cells["round"]),
        site=cells["site"],
        role=cells["role"],
        accepted=cells["accepted"] == "yes",
        reason=cells["reason"] or None,
        class_dice={
            name.removeprefix(_DICE_OF): float(value)
            for name, value in cells.items()
            if name is not None and name.startswith(_DICE_OF) and value
        },
        seconds={p: float(s) for p in PHASES if (s := cells.get(f"seconds_{p}"))},
        peak_memory_bytes={p: int(b) for p in PHASES if (b := cells.get(f"peak_memory_bytes_{p}"))},
        **whole,
        **numbers,
    )


def _evaluation_row(cells: Mapping[str, str]) -> EvaluationRow:
    return EvaluationRow(
        site=cells["site"],
        role=cells["role"],
        model=cells["model"],
        round=int(cells["round"]) if cells["round"] else None,
        class_name=cells["class"],
        metric=cells["metric"],
        mean=float(cells["mean"]) if cells["mean"] else None,
        std=float(cells["std"]) if cells["std"] else None,
        cases=int(cells["cases"]),
        empty=int(cells["empty"]),
        unit=cells["unit"],
        worst=cells["worst"] == "yes",
        note=cells["note"],
    )
