"""Tables and report made again from a run's records, beside those that are there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms import __version__
from fedfms.bounded import read_json
from fedfms.errors import ConfigError, FedfmsError, unexpected
from fedfms.files import read_whole
from fedfms.records.layout import (
    EVALUATION,
    GUARD,
    RECORDS,
    REPORT_HTML,
    REPORT_MD,
    ROUNDS,
    SUMMARY,
)
from fedfms.report.collect import Result, collect, load_result
from fedfms.report.render import render
from fedfms.report.summary import FORMAT, MAX_SUMMARY_BYTES
from fedfms.report.writer import said_writer, without_writer, written_by

DERIVED = (ROUNDS, EVALUATION, GUARD, SUMMARY, REPORT_HTML, REPORT_MD)
_LARGEST_REPORT = 1 << 30  # bytes; it holds pictures
_NONE = (
    "there are no tables and no report here: this is a job's result as it was fetched, or all of "
    "them were taken out"
)


@dataclass(frozen=True, slots=True)
class Compared:
    """What came of it: problems, or why nothing was compared."""

    problems: tuple[str, ...] = ()
    note: str = ""
    looked: bool = True


def check_derived(source: Path, version: str | None) -> tuple[Compared, Compared]:
    """Tables and summary, and the report, each as the records have it.

    Args:
        source: the folder with the records.
        version: of the server that wrote the records, as they say it. Where it is this one, no
            older version made the folder, and what cannot be compared is no longer excused by that.
    """
    if not any((source / name).exists() for name in DERIVED):
        return Compared(note=_NONE, looked=False), Compared(note=_NONE, looked=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            again = collect(source, Path(scratch) / "again", finish=render)
            tables = _caught(_tables, source, again, version)
            return tables, _caught(_report, source, again.folder, version)
    except Exception as error:  # files that were changed are anything
        failed = Compared((_problem(error),))
        return failed, failed


def _caught(look: Any, *about: Any) -> Compared:
    try:
        found: Compared = look(*about)
    except Exception as error:  # files that were changed are anything
        return Compared((_problem(error),))
    return found


def _problem(error: Exception) -> str:
    if isinstance(error, FedfmsError):
        return error.problem
    return unexpected(error, "what it reads cannot be used", ConfigError).problem


# --------------------------------------------------------------------------------------- tables


def _tables(source: Path, again: Result, version: str | None) -> Compared:
    if not (source / SUMMARY).is_file():
        there = ", ".join(name for name in DERIVED if (source / name).exists())
        return Compared((f"{SUMMARY} is missing, and {there} without it cannot be used",))
    said = read_json(source / SUMMARY, MAX_SUMMARY_BYTES)
    number = said.get("format") if isinstance(said, dict) else None
    if version != __version__ and type(number) is int and number != FORMAT:
        note = f"{SUMMARY} is of format {number}, and this version makes and compares {FORMAT}"
        return Compared(note=f"{note}: verify it with the version that wrote it", looked=False)
    kept = load_result(source)
    problems = [
        *_other_rows(ROUNDS, kept.rounds, again.rounds),
        *_other_rows(EVALUATION, kept.evaluation, again.evaluation),
        *_other_rows(GUARD, kept.guard, again.guard),
        *_other_values(said, again.summary.to_dict()),
        *_other_files(source, kept, again),
    ]
    return Compared(tuple(problems))


def _other_values(said: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """What stands in the summary as a file, other keys with it; not what a reader makes of it."""
    for key in sorted({*said, *ours} - {"files"}):
        if key not in ours:
            yield f"{SUMMARY}: {key} is nothing that a summary has"
        elif not _is_same(said.get(key), ours[key]):
            yield f"{SUMMARY}: {key} is not what {RECORDS} comes to"


def _is_same(said: Any, ours: Any) -> bool:
    """Whether two JSON values are; what an earlier version did not write yet is nothing here."""
    if isinstance(said, dict) and isinstance(ours, dict):
        return said.keys() <= ours.keys() and all(
            _is_same(said[key], value) if key in said else not value for key, value in ours.items()
        )
    if isinstance(said, list) and isinstance(ours, list):
        return len(said) == len(ours) and all(map(_is_same, said, ours))
    return bool(said == ours)


def _other_files(source: Path, kept: Result, again: Result) -> Iterator[str]:
    for name, facts in kept.summary.files.items():
        now = again.summary.files.get(name)
        if now is None and not (source / name).is_file():
            yield f"{SUMMARY}: files names {name}, which is not there"
        elif now is None:
            yield f"{SUMMARY}: files names {name}, which is no file of a result"
        elif now.sha256 != facts.sha256:
            yield f"{name} is not the file whose hash {SUMMARY} names"
        elif now != facts:
            yield f"{SUMMARY}: files says of {name} what it is not"
    for name in again.summary.files:
        if name not in kept.summary.files:
            yield f"{SUMMARY}: files does not name {name}, which is there"


def _other_rows(name: str, kept: Sequence[Any], again: Sequence[Any]) -> Iterator[str]:
    if len(kept) != len(again):
        yield f"{name} has {len(kept)} rows, and the records have {len(again)}"
        return
    for number, (one, other) in enumerate(zip(kept, again, strict=True), start=2):
        for field in dataclasses.fields(one):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            if isinstance(mine, Mapping):
                mine, theirs = dict(mine), dict(theirs)
            if mine != theirs:
                where = f"{name}, line {number}, {one.site}"
                yield f"{where}: {field.name} is {mine}, and {theirs} in {RECORDS}"


# --------------------------------------------------------------------------------------- report


def _report(source: Path, again: Path, version: str | None) -> Compared:
    problems, notes = [], []
    for name in (REPORT_HTML, REPORT_MD):
        if not (source / name).is_file():
            problems.append(f"{name} is missing")
            continue
        there = read_whole(source / name, _LARGEST_REPORT).decode("utf-8", "replace")
        ours = (again / name).read_bytes().decode()
        writer = said_writer(there)
        if there == ours or there == without_writer(ours):
            continue
        if writer == written_by():
            problems.append(f"{name} is not what {RECORDS} comes to: it was changed")
        elif writer is not None:
            notes.append(f"{name} was written by {writer}, and this is {written_by()}")
        elif version == __version__:
            problems.append(
                f"{name} is not what {RECORDS} comes to, and does not say which fedfms wrote it: "
                f"it was changed, or made before {__version__} was finished"
            )
        else:
            notes.append(
                f"{name} does not say which fedfms wrote it, as those of earlier versions do not"
            )
    if problems or not notes:
        return Compared(tuple(problems), "; ".join(notes))
    note = f"{'; '.join(notes)}: not compared. Verify it with that one, or write it again with "
    return Compared(note=f"{note}fedfms report", looked=False)
