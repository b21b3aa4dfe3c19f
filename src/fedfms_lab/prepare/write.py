"""Carry out plans: each site appears as a whole, an interrupted run is taken up, a second changes
nothing.

A site is made in OUTPUT/.unfinished/SITE and then renamed to OUTPUT/SITE, so a site that can be
seen is complete. There a case counts as finished when its record, beside the folder, fits the
download, the options and the SHA-256 of both of its files. A site that is there already is compared
with the plan: if it fits nothing is written, otherwise it is refused; no file is ever replaced.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedfms.bounded import read_json_object
from fedfms.contracts.site import SiteConfig
from fedfms.data.formats import read_image, read_label
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase, combine
from fedfms.data.together import summarize
from fedfms.errors import ConfigError, FedfmsError, SiteDataError, unexpected
from fedfms.files import PART, file_sha256, write_whole
from fedfms_lab.prepare.plan import FORMAT, Item, Made, SitePlan
from fedfms_lab.prepare.source import Source, unexpected_values
from fedfms_lab.prepare.volumes import with_grid_of

log = logging.getLogger(__name__)

_SOURCES = ("source_files", "source_sha256")  # columns that follow those of our own files
UNFINISHED = ".unfinished"  # folder below OUTPUT; never part of a site
Progress = Callable[[str, int, int], None]  # site, done, total

# of a problem that our reader finds in a file of the download: its code here
_CODES = {
    "damaged-file": "truncated-file",
    "empty-file": "truncated-file",
    "wrong-magic": "unexpected-format",
    "shapes-differ": "unexpected-shape",
    "not-3d": "unexpected-shape",
    "too-small": "unexpected-shape",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What became of a site."""

    name: str
    cases: int
    slices: int
    slices_with_foreground: int
    left_out: int  # cases of the download that are not in the site; left-out.csv says why
    state: Literal["prepared", "unchanged"]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """A finished case: its line in the manifest, or why it was left out."""

    fingerprint: str
    row: dict[str, str]
    digest: str = ""  # of the picture as training sees it; alike for copies
    left_out: str = ""


def prepare(
    plans: Sequence[SitePlan], source: Source, output: Path, on_progress: Progress | None = None
) -> list[Prepared]:
    """Make the sites below `output`, or find that they are there already.

    Args:
        plans: the sites.
        source: the download that they were planned from; only read.
        output: folder for the sites; made if it is not there.
        on_progress: told (site, finished cases, cases).

    Raises:
        SiteDataError: a file of the download cannot be used; the finished cases are kept for the
            next run, and no site is half written.
        ConfigError: `output` lies in the download ("output-inside-source"), holds another site
            under one of the names ("output-differs"), or cannot be written ("output-not-writable").
    """
    output = output.resolve()
    if output == source.root or source.root in output.parents:
        raise ConfigError(
            f"{output} lies inside the download {source.root}",
            "name an OUTPUT folder outside of it: the download is never changed",
            code="output-inside-source",
        )
    names = [plan.name for plan in plans]
    if len({name.casefold() for name in names}) < len(names):
        raise ConfigError(
            f"two of the sites are called alike: {', '.join(sorted(names))}", "rename one of them"
        )
    report = on_progress or (lambda _site, _done, _total: None)
    there = {
        plan.name: _check_there(plan, source, output / plan.name, report)
        for plan in plans
        if os.path.lexists(output / plan.name)
    }
    for name in there:  # a run that was stopped right after the site had appeared
        shutil.rmtree(output / UNFINISHED / f"{name}.records", ignore_errors=True)
    try:
        made = [
            there[plan.name] if plan.name in there else _make_site(plan, source, output, report)
            for plan in plans
        ]
    except OSError as error:  # of writing: what reading meets is an error with a name of its own
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}",
            "check its free space and permissions, then run the same command: finished cases are "
            "kept",
            code="output-not-writable",
        ) from None
    finally:
        tidy(output)  # keeps finished cases
    return made


def tidy(output: Path) -> None:
    """Remove the folder for unfinished work where nothing of worth is left in it."""
    unfinished = output / UNFINISHED
    if not unfinished.is_dir():
        return
    for records in unfinished.glob("*.records"):
        if not any(records.iterdir()):
            records.rmdir()
            shutil.rmtree(unfinished / records.name.removesuffix(".records"), ignore_errors=True)
    for folder in (unfinished, output):
        if not any(folder.iterdir()):
            folder.rmdir()


# --------------------------------------------------------------------------------------- one site


def _make_site(plan: SitePlan, source: Source, output: Path, report: Progress) -> Prepared:
    folder = output / UNFINISHED / plan.name
    records_folder = output / UNFINISHED / f"{plan.name}.records"
    for name in ("images", "labels", "policy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records_folder.mkdir(exist_ok=True)
    write_whole(folder / "site.yml", plan.site_yml.encode())
    write_whole(folder / "policy" / "privacy.json", _policy(plan).encode())
    site = SiteConfig.from_yaml(folder / "site.yml")
    wanted = {f"{item.case}.json" for item in plan.items}
    for left in sorted(records_folder.iterdir()):  # of other options, or half written
        if left.name not in wanted:
            left.unlink()
    records: list[_Record] = []
    for number, item in enumerate(plan.items):
        report(plan.name, number, len(plan.items))
        try:
            records.append(_make_case(plan, item, source, folder, records_folder, site))
        except FedfmsError:
            raise
        except Exception as error:  # whatever a library raises at a case is this case's problem
            problem = f"the case {item.case} of {plan.given_name} cannot be prepared"
            raise unexpected(error, problem, SiteDataError) from None
    report(plan.name, len(plan.items), len(plan.items))
    records = _without_copies(records)
    kept = [record for record in records if not record.left_out]
    left_out = [record for record in records if record.left_out]
    if not any(record.row["slices_with_foreground"] != "0" for record in kept):
        raise SiteDataError(
            f"no label of site {plan.given_name} holds a class",
            "check that the download has the label files and not only their names",
            code="empty-masks",
        )
    write_whole(folder / "manifest.csv", _csv([record.row for record in kept]))
    if left_out:
        columns = _identity(plan, plan.items[0], source)
        rows = [
            {**{key: one.row[key] for key in columns}, "reason": one.left_out} for one in left_out
        ]
        write_whole(folder / "left-out.csv", _csv(rows))
    _only(folder, plan, {record.row["case"] for record in kept}, bool(left_out))
    folder.rename(output / plan.name)  # the site appears
    shutil.rmtree(records_folder)
    log.info("prepared a site of %d cases", len(kept))
    return _summary(plan, [r.row for r in kept], [r.left_out for r in left_out], "prepared")


def _make_case(
    plan: SitePlan, item: Item, source: Source, folder: Path, records: Path, site: SiteConfig
) -> _Record:
    """The record of a case; its two files are written unless they are there."""
    image, label = (folder / part / f"{item.case}{plan.ending}" for part in ("images", "labels"))
    record_file = records / f"{item.case}.json"
    fingerprint = _fingerprint(plan, item, source)
    finished = _read_record(record_file)
    if finished is not None and finished.fingerprint == fingerprint:
        if finished.left_out:
            return finished
        row = finished.row
        if _sha_or_none(image) == row["image_sha256"] and (
            _sha_or_none(label) == row["label_sha256"]
        ):
            return finished
    made = item.make()
    identity = _identity(plan, item, source)
    try:
        prepared, made = _as_training_reads(plan, item, made, source, image, label, site)
    except _Constant as constant:
        record = _Record(fingerprint, identity, left_out=str(constant))
    else:
        summary = summarize(prepared)
        if not summary.values <= plan.label_values:
            raise unexpected_values(item.sources[-1], summary.values, plan.label_values)
        row = {
            **{key: value for key, value in identity.items() if key not in _SOURCES},
            "image": f"images/{image.name}",
            "label": f"labels/{label.name}",
            "image_sha256": hashlib.sha256(made.image).hexdigest(),
            "label_sha256": hashlib.sha256(made.label).hexdigest(),
            **{key: identity[key] for key in _SOURCES},
            **_counts(prepared, site),
            "label_values": " ".join(map(str, sorted(summary.values))),
            **{name: str(made.counts.get(name, 0)) for name in plan.count_names},
        }
        write_whole(image, made.image)
        write_whole(label, made.label)
        record = _Record(fingerprint, row, digest=summary.digest.hex())
    write_whole(record_file, json.dumps(dataclasses.asdict(record)).encode())
    return record


class _Constant(Exception):
    """A picture that shows nothing: every pixel has one value."""


def _as_training_reads(
    plan: SitePlan,
    item: Item,
    made: Made,
    source: Source,
    image: Path,
    label: Path,
    site: SiteConfig,
) -> tuple[PreparedCase, Made]:
    """The case through the very code that will read it in training, before it is written.

    Where the provider pairs image and label by index and their headers disagree, the label gets the
    image's header; that is counted as `header_copied`.
    """
    names = {str(image): item.sources[0], str(label): item.sources[-1]}
    try:
        stored = read_image(image, made.image, site)
        drawn = read_label(label, made.label, site, stored)
        case = Case(item.case, item.patient, image, label, "train")
        try:
            return combine(case, stored, drawn, site), made
        except SiteDataError as error:
            if error.code not in ("geometry-differs", "shapes-differ") or not item.index_pairs:
                raise
        moved = with_grid_of(item.sources[0], made.image, item.sources[1], made.label)
        made = Made(made.image, moved, {**made.counts, "header_copied": 1})
        return combine(case, stored, read_label(label, moved, site, stored), site), made
    except SiteDataError as error:
        if error.code in ("constant-image", "intensity-flat") and plan.format == "image":
            raise _Constant("every pixel has the same value") from None
        problem = error.problem
        for ours, theirs in names.items():
            problem = problem.replace(ours, source.relative(theirs))
        code = _CODES.get(error.code, error.code)
        fix = error.fix
        if code in ("truncated-file", "unexpected-format"):
            fix = (
                "download or unpack this file again, then run the same command: cases that were "
                "finished are kept"
            )
        elif code == "unexpected-shape":
            fix = "compare both files with the provider's; one may belong to another case"
        raise SiteDataError(problem, fix, code=code) from None


def _without_copies(records: Sequence[_Record]) -> list[_Record]:
    """Of pictures that are the same for two patients the first stays: a split could part them."""
    first: dict[str, dict[str, str]] = {}
    result = []
    for record in records:
        if record.left_out:
            result.append(record)
            continue
        twin = first.setdefault(record.digest, record.row)
        if twin["patient"] != record.row["patient"]:
            reason = f"the same image as case {twin['case']} of another patient"
            record = _Record(record.fingerprint, record.row, record.digest, reason)
        result.append(record)
    return result


# --------------------------------------------------------------------------- a site that is there


def _check_there(plan: SitePlan, source: Source, folder: Path, report: Progress) -> Prepared:
    """Compare a site with its plan.

    Raises:
        ConfigError: it is not what this command would write ("output-differs").
    """
    rows = _read_csv(folder / "manifest.csv")
    left_out = _read_csv(folder / "left-out.csv") or []
    if rows is None:
        raise _differs(folder, "it has no manifest.csv that this command wrote")
    for name, text in (("site.yml", plan.site_yml), ("policy/privacy.json", _policy(plan))):
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            raise _differs(folder, f"{name} was written with other options, or edited since")
    known = {row.get("case", ""): row for row in (*rows, *left_out)}
    if known.keys() != {item.case for item in plan.items}:
        raise _differs(folder, "it holds other cases than the download")
    kept = {row.get("case", "") for row in rows}
    for number, item in enumerate(plan.items):
        report(plan.name, number, len(plan.items))
        row = known[item.case]
        if any(row.get(key) != value for key, value in _identity(plan, item, source).items()):
            raise _differs(folder, f"case {item.case} was made from other files")
        if item.case not in kept:
            continue
        for part in ("image", "label"):
            path = folder / f"{part}s" / f"{item.case}{plan.ending}"
            if _sha_or_none(path) != row.get(f"{part}_sha256"):
                raise _differs(folder, f"{part}s/{path.name} is missing or was changed")
    for part in ("images", "labels"):
        extra = {path.name for path in (folder / part).iterdir()} - {
            f"{case}{plan.ending}" for case in kept
        }
        if extra:
            raise _differs(folder, f"{part}/ holds a file more: {min(extra)}")
    report(plan.name, len(plan.items), len(plan.items))
    return _summary(plan, rows, [row.get("reason", "") for row in left_out], "unchanged")


def _differs(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder} is there already and is not what this command would write: {why}",
        "keep it and stop here, or move the folder away, or name another OUTPUT",
        code="output-differs",
    )


# ------------------------------------------------------------------------------------- the tables


def _count_column(class_name: str, format: str) -> str:
    return f"{'voxels' if format == 'nifti' else 'pixels'}_{class_name}"


def _counts(prepared: PreparedCase, site: SiteConfig) -> dict[str, str]:
    """Sizes, and how much of each class there is, along the plane in which training cuts."""
    depth, rows, columns = prepared.labels.shape
    masks = {name: np.isin(prepared.labels, values) for name, values in site.classes.items()}
    any_class = np.any(list(masks.values()), axis=0)
    return {
        "slices": str(depth),
        "rows": str(rows),
        "columns": str(columns),
        "slices_with_foreground": str(int(any_class.any(axis=(1, 2)).sum())),
        **{_count_column(name, site.format): str(int(mask.sum())) for name, mask in masks.items()},
    }


def _summary(
    plan: SitePlan,
    rows: Sequence[dict[str, str]],
    reasons: Sequence[str],
    state: Literal["prepared", "unchanged"],
) -> Prepared:
    notices = plan.notices
    for name in plan.count_names:
        numbers = [int(row[name]) for row in rows]
        if sum(numbers):
            cases = sum(number > 0 for number in numbers)
            notices.append(
                f"{name.replace('_', ' ')}: {sum(numbers)} in {cases} of {len(rows)} cases"
            )
    for reason in sorted({reason.split(" as case ")[0] for reason in reasons}):
        count = sum(text.startswith(reason) for text in reasons)
        notices.append(f"{count} left out ({reason}); left-out.csv names them")
    return Prepared(
        name=plan.name,
        cases=len(rows),
        slices=sum(int(row["slices"]) for row in rows),
        slices_with_foreground=sum(int(row["slices_with_foreground"]) for row in rows),
        left_out=len(reasons),
        state=state,
        notices=tuple(notices),
    )


def _csv(rows: Sequence[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def _read_csv(path: Path) -> list[dict[str, str]] | None:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    numbers = ("slices", "slices_with_foreground")
    if path.name == "manifest.csv" and not all(
        (row.get(n) or "").isdigit() for row in rows for n in numbers
    ):
        return None
    return rows


# ------------------------------------------------------------------------------------------ files


def _identity(plan: SitePlan, item: Item, source: Source) -> dict[str, str]:
    """What is known of a case before it is made, in columns of the manifest."""
    files = " ; ".join(source.relative(path) for path in item.sources)
    return {
        "site": plan.name,
        "given_site": plan.given_name,
        "case": item.case,
        "patient": item.patient,
        "source_files": f"{files} {item.part}" if item.part else files,
        "source_sha256": " ".join(source.sha256(path) for path in item.sources),
    }


def _fingerprint(plan: SitePlan, item: Item, source: Source) -> str:
    """SHA-256 over all that decides a case's two files and its line in the manifest."""
    decides = [FORMAT, plan.site_yml, _identity(plan, item, source)]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _policy(plan: SitePlan) -> str:
    methods = ["fedsam", "fedmsa", "lora", "unet"]
    policy = {"methods": methods, "min_cases": 3, "pictures": plan.pictures}
    return json.dumps(policy, indent=2) + "\n"


def _read_record(path: Path) -> _Record | None:
    try:
        record = _Record(**read_json_object(path))
    except (OSError, ValueError, TypeError):
        return None
    keys = ("image_sha256", "label_sha256", "slices_with_foreground")
    return record if record.left_out or all(key in record.row for key in keys) else None


def _only(folder: Path, plan: SitePlan, cases: set[str], left_out: bool) -> None:
    """Remove what an earlier, interrupted run with other options left in an unfinished site."""
    for part in ("images", "labels"):
        wanted = {f"{case}{plan.ending}" for case in cases}
        for path in sorted((folder / part).iterdir()):
            if path.name not in wanted:
                path.unlink()
    if not left_out:
        (folder / "left-out.csv").unlink(missing_ok=True)
    for path in folder.glob(f"*{PART}"):
        path.unlink()


def _sha_or_none(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None
