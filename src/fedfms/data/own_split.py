"""A site's own lists of who trains, validates and is left for a test: in site.yml or in a file.

A file has either of two forms, which people have already: a table (CSV) with the columns `patient`
or `case`, and `split` (train, validation, test) or `fold` (a number); or a list of folds as
nnU-Net's `splits_final.json`, each with the lists `train` and `val`
(github.com/MIC-DKFZ/nnUNet, documentation/manual_data_splits.md).
"""

from __future__ import annotations

import csv
import fnmatch
import io
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedfms.bounded import decode_json
from fedfms.contracts.site import OwnSplit, SiteConfig
from fedfms.data.adopt.names import PARTS
from fedfms.errors import FedfmsError, SiteDataError
from fedfms.files import read_whole

_LARGEST = 64 * 1024**2  # bytes of a list
_LIKE = (
    "a table as CSV with the columns case (or patient) and split, or nnU-Net's splits_final.json"
)


def own_sides(
    site: SiteConfig,
    patients: Mapping[str, str],
    lacking: Mapping[str, str],
    dealt: Callable[[set[str]], set[str]],
) -> tuple[set[str], set[str]]:
    """The patients who validate and those left for a test by the site's own lists.

    Args:
        site: its `split` is given.
        patients: of each case's key.
        lacking: the same of what lacks a file and is no case; the lists may name it.
        dealt: who of the others validates, where the lists only say who is left for a test.

    Raises:
        SiteDataError: "split-file", "case-not-in-split", "patient-on-both-sides",
            "too-few-patients".
    """
    split = site.split
    assert split is not None  # who calls asks
    side_of = (
        _by_lists(split, patients, lacking)
        if split.file is None
        else _by_file(site, split, patients)
    )
    by_patient: dict[str, dict[str, str]] = {}
    for key, side in side_of.items():
        by_patient.setdefault(patients[key], {})[side] = key
    for cases in by_patient.values():
        if len(cases) > 1:
            some = ", ".join(f"{key} is {side}" for side, key in sorted(cases.items()))
            raise SiteDataError(
                f"by split in site.yml one patient is on several sides: {some}",
                "put all cases of a patient on one side; who is a patient, patient: in site.yml "
                "says",
                code="patient-on-both-sides",
            )
    found = {side: {p for p, of in by_patient.items() if side in of} for side in _SIDES}
    only_a_test = split.file is None and not split.validation
    if only_a_test and len(found["train"]) > 1:
        found["validation"] = dealt(found["train"])
        found["train"] -= found["validation"]
    for side in ("train", "validation"):
        if not found[side]:
            raise SiteDataError(
                f"by split in site.yml no patient is on the side {side}",
                "put at least one there",
                code="too-few-patients",
            )
    return found["validation"], found["test"]


_SIDES = ("train", "validation", "test")


def _by_lists(
    split: OwnSplit, patients: Mapping[str, str], lacking: Mapping[str, str]
) -> dict[str, str]:
    side_of = dict.fromkeys(patients, "train")
    for side, names in (("validation", split.validation), ("test", split.test)):
        for name in names:
            plain = unicodedata.normalize("NFC", name)
            hits = [
                key
                for key, patient in {**lacking, **patients}.items()
                if plain in (key, patient)
                or fnmatch.fnmatchcase(key, plain)
                or fnmatch.fnmatchcase(patient, plain)
            ]
            if not hits:
                raise SiteDataError(
                    f"split in site.yml names {name} under {side}, and there is no such patient or "
                    "case",
                    f"correct the name; {_examples(patients)}",
                    code="case-not-in-split",
                )
            side_of.update((key, side) for key in hits if key in patients)
    return side_of


def _examples(patients: Mapping[str, str]) -> str:
    return f"cases here are {', '.join(sorted(patients)[:3])}"


def _by_file(site: SiteConfig, split: OwnSplit, patients: Mapping[str, str]) -> dict[str, str]:
    assert split.file is not None
    path = site.data_root / split.file
    try:
        data = read_whole(path, _LARGEST)
        text = data.decode("utf-8-sig")
        listed = (
            _of_json(decode_json(text, str(path)), split.fold)
            if split.file.lower().endswith(".json")
            else _of_table(text, split.fold)
        )
    except SiteDataError as error:
        raise SiteDataError(f"{path}: {error.problem}", error.fix, code=error.code) from None
    except (OSError, ValueError, FedfmsError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or "no UTF-8"
        raise _unusable(f"{path} cannot be read: {reason}") from None
    listed = {unicodedata.normalize("NFC", name): side for name, side in listed.items()}
    named: set[str] = set()
    side_of: dict[str, str] = {}
    alone: list[str] = []
    for key, patient in patients.items():
        # a name of a case is often that of its file
        names = [n for n in (key, key.rpartition("/")[2], patient) if n in listed]
        if names:
            side_of[key] = listed[names[0]]
            named.update(names)
        else:
            alone.append(key)
    strangers = sorted(set(listed) - named)
    if alone or (strangers and len(named) == 0):
        some = ", ".join(alone[:3])
        raise SiteDataError(
            f"{len(alone)} of {len(patients)} cases are not in {path}: {some}",
            f"add them, as train, validation or test; it names {', '.join(sorted(listed)[:3])}",
            code="case-not-in-split",
        )
    return side_of


def _unusable(problem: str) -> SiteDataError:
    return SiteDataError(problem, f"write it as {_LIKE}", code="split-file")


def _of_json(values: Any, fold: int | None) -> dict[str, str]:
    folds: Sequence[Any] = values if isinstance(values, list) else [values]
    if fold is None and len(folds) == 1:
        fold = 0
    if fold is None or fold >= len(folds):
        raise SiteDataError(
            f"it has {len(folds)} folds, and split in site.yml "
            + ("says none" if fold is None else f"says {fold}"),
            "write fold: and its number, from 0, under split",
            code="split-file",
        )
    one = folds[fold]
    listed: dict[str, str] = {}
    if not isinstance(one, dict):
        raise _unusable("it holds no lists of cases")
    for key, names in one.items():
        side = PARTS.get(str(key).lower())
        if side is None or not isinstance(names, list):
            raise _unusable(f"it holds {key!r}, which is no list of train, val or test")
        _add(listed, (str(name) for name in names), side)
    return listed


def _of_table(text: str, fold: int | None) -> dict[str, str]:
    lines = text.splitlines()
    mark = max(",;\t", key=lines[0].count) if lines else ","
    rows = csv.DictReader(io.StringIO(text), delimiter=mark)
    columns = {str(name).strip().lower(): name for name in rows.fieldnames or ()}
    who = columns.get("case", columns.get("patient"))
    what = columns.get("split") if fold is None else columns.get("fold")
    if who is None or what is None:
        wanted = "split" if fold is None else "fold"
        raise _unusable(
            f"it has the columns {', '.join(columns) or 'none'}, and not case (or patient) and "
            f"{wanted}"
        )
    listed: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, value = (str(row[column] or "").strip() for column in (who, what))
        if not name:
            continue
        side = PARTS.get(value.lower())
        if fold is not None and side is None:
            side = "validation" if value == str(fold) else "train" if value.isdigit() else None
        if side is None:
            raise _unusable(f"line {number} says {value!r}")
        _add(listed, [name], side)
    return listed


def _add(listed: dict[str, str], names: Iterable[str], side: str) -> None:
    for name in names:
        if listed.setdefault(name, side) != side:
            raise SiteDataError(
                f"{name} is {listed[name]} and {side}",
                "name each case once",
                code="split-file",
            )
