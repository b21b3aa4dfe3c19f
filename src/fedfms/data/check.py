"""Look at all data of a site before the first hour of GPU, and name every problem with its fix.

Training reads with the same code and stops at the first of these problems; here all are collected,
with the numbers of what was read (data/numbers.py) and what is unlikely (data/unlikely.py).
Findings name files: they are for the person at the site and stay there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.classes import shared_values, unknown_classes, unknown_contrasts
from fedfms.data.content import read_bytes
from fedfms.data.formats import Notice, Stored
from fedfms.data.left_out import Bad, LeftOut, too_many
from fedfms.data.manifest import (
    Case,
    Scan,
    below,
    ending_of,
    not_whole,
    scan,
    several_files_a_patient,
    untaken,
)
from fedfms.data.numbers import (
    CaseNumbers,
    DataSummary,
    MaskGrid,
    count_of,
    disk_of,
    numbers_of,
    summarize_numbers,
)
from fedfms.data.prepared import combine, values_of
from fedfms.data.several import read_case_image, read_case_label
from fedfms.data.together import Summary, check_not_empty, problems_together, summarize
from fedfms.data.unlikely import Finding, unlikely, warning
from fedfms.errors import FedfmsError, SiteDataError, unexpected

_FEWEST_GREYS = 16  # images span a larger part of the range than one of so many


@dataclass(frozen=True, slots=True)
class Examination:
    """What was read of a site, and what is wrong with it, errors first."""

    summary: DataSummary
    findings: list[Finding]


def check_data(
    site: SiteConfig, classes: Sequence[str] | None = None, control: Control | None = None
) -> list[Finding]:
    """The findings of `examine`; empty if nothing is wrong with a site's data."""
    return examine(site, classes, control).findings


def examine(
    site: SiteConfig,
    classes: Sequence[str] | None = None,
    control: Control | None = None,
    recipe: Recipe | None = None,
) -> Examination:
    """Read all data of a site: its numbers, and everything that is wrong with it.

    Reads every file from its start to its end and never the cache.

    Args:
        site: the site's configuration.
        classes: of the job that is to run here; None: the recipe's, without one only the site's
            own are looked at.
        control: told of the progress as phase "prepare".
        recipe: of the job that is to run here; None: SAM's own sizes count.

    Raises:
        TaskAborted: somebody asked to stop. A problem of the data is a finding, never raised.
    """
    if classes is None and recipe is not None:
        classes = recipe.classes
    grid = MaskGrid.of(recipe)
    found = scan(site)
    errors = [*found.problems, *unknown_classes(site, classes or ())]
    if recipe is not None and recipe.exclusive_classes:
        errors += shared_values(site, classes or ())
    if recipe is not None:
        errors += unknown_contrasts(site, recipe)
    reading = _Reading(site, grid)
    control = control or Control()
    for number, case in enumerate(found.cases):
        control.report("prepare", number, len(found.cases))
        reading.add(case)
    control.report("prepare", len(found.cases), len(found.cases))
    if reading.summaries:
        errors.extend(problems_together(reading.summaries, site))
    disk = disk_of(reading.numbers, site, grid, classes or tuple(site.classes))
    left = untaken(site, found)
    summary = summarize_numbers(
        found.cases,
        reading.numbers,
        site,
        Counter(ending_of(path, site) for path in left),
        below(site, found),
        disk,
        unlabelled=found.unlabelled,
        left_for_test=found.left_for_test,
    )
    of_cases: list[Finding] = []  # of cases that the site leaves out
    left_out = _left_out(found, reading, site)
    if 0 < len(left_out.found) <= left_out.most:
        lacking = [error for error in errors if error.files]
        errors = [error for error in errors if not error.files]
        of_cases = [
            *(Finding(one.code, one.problem, one.fix, "warning") for one in lacking),
            *_grouped(reading.bad, site, "warning"),
            _are_left_out(left_out),
        ]
    elif left_out.found and left_out.most:
        errors.append(too_many(left_out.found, left_out.total, left_out.most))
    findings = [
        *(Finding(error.code, error.problem, error.fix, "error") for error in errors),
        *([] if of_cases else _grouped(reading.bad, site, "error")),
    ]
    if not findings:  # first things first
        findings = [
            *of_cases,
            *_grouped(reading.doubtful, site, "warning"),
            *_warnings(reading.summaries, reading.clipped, reading.flat, site),
            *unlikely(summary, reading.numbers, site, grid, recipe),
        ]
        if site.patient is None:
            # those of DICOM with a PatientID have a name of their own
            findings += _unnamed_patients([c for c in found.cases if c.patient == c.key])
    findings += _other_endings(left, site)  # which may explain an error
    return Examination(summary, findings)


class _Reading:
    """Reads cases one after another and keeps of each what is needed to judge them together."""

    def __init__(self, site: SiteConfig, grid: MaskGrid) -> None:
        self._site = site
        self._grid = grid
        self.bad: list[tuple[Path, SiteDataError]] = []
        self.bad_cases: dict[str, tuple[Case, SiteDataError]] = {}  # by key, with the first problem
        self.doubtful: list[tuple[Path, Notice]] = []
        self.summaries: list[Summary] = []
        self.numbers: list[CaseNumbers] = []
        self.clipped: list[Path] = []  # the intensity rule cuts most of their values off
        self.flat: list[Path] = []  # it leaves them few grey levels

    def add(self, case: Case) -> None:
        """Read a case; whatever a library raises at it is this case's problem."""
        before = len(self.bad)
        self._try(case)
        if len(self.bad) > before:
            self.bad_cases[case.key] = (case, self.bad[before][1])

    def _try(self, case: Case) -> None:
        try:
            self._add(case)
        except FedfmsError:
            raise
        except Exception as error:
            told = unexpected(error, f"{case.image} cannot be checked", SiteDataError)
            self.bad.append((case.image, told))

    def _add(self, case: Case) -> None:
        site = self._site
        image = self._read(case.image, lambda: self._image(case))
        if image is None and site.format == "dicom":  # its label says nothing without it
            return
        label = self._read(case.label, lambda: self._label(case, image))
        if image is None or label is None:
            return
        try:
            prepared = combine(case, image, label, site)
            if not site.may_be_empty:
                check_not_empty(case, values_of(prepared.labels), site)
        except SiteDataError as error:
            self.bad.append((case.image, error))
            return
        self.summaries.append(summarize(prepared))
        self.numbers.append(numbers_of(case, image, label, site, self._grid))
        for path, stored in ((case.image, image), (case.label, label)):
            self.doubtful.extend((path, notice) for notice in stored.notices)
        if site.intensity.rule == "range":
            low, high = site.intensity.bounds
            if np.mean((image.values < low) | (image.values > high)) > 0.5:
                self.clipped.append(case.image)
            elif (float(image.values.max()) - float(image.values.min())) * _FEWEST_GREYS < (
                high - low
            ):
                self.flat.append(case.image)

    def _image(self, case: Case) -> Stored:
        paths = case.contrasts or (case.image,)
        contents = tuple(None if path is None else read_bytes(path, self._site) for path in paths)
        return read_case_image(case, contents, self._site)

    def _label(self, case: Case, image: Stored | None) -> Stored:
        contents = [read_bytes(path, self._site) for path in case.labels]
        return read_case_label(case, contents, self._site, image)

    def _read(self, path: Path, reader: Callable[[], Stored]) -> Stored | None:
        try:
            return reader()
        except SiteDataError as error:
            self.bad.append((path, error))
            return None


def _left_out(found: Scan, reading: _Reading, site: SiteConfig) -> LeftOut:
    """All cases that cannot be used; the site's own limit counts, and none where it has none."""
    lacking = not_whole(found)
    left_out = LeftOut(site, len(found.cases) + len(lacking), site.leave_out or 0.0)
    left_out.found = [
        *(Bad(_name(path, site), problem) for path, problem in lacking.items()),
        *(Bad(_name(case.image, site), error) for case, error in reading.bad_cases.values()),
    ]
    return left_out


def _are_left_out(left_out: LeftOut) -> Finding:
    return warning(
        "left-out",
        f"{left_out}; leave_out in site.yml allows {left_out.most}",
        "mend them if they are worth it; a job goes on without them, and tells how many there are",
    )


def _name(path: Path, site: SiteConfig) -> str:
    return path.relative_to(site.data_root).as_posix()


def _grouped(
    bad: Sequence[tuple[Path, SiteDataError | Notice]],
    site: SiteConfig,
    severity: Literal["error", "warning"],
) -> list[Finding]:
    """One finding for each code: the first problem in full, then how many files share it."""

    def name(path: Path) -> str:  # folders of a series are often all called alike
        below = path.relative_to(site.data_root).as_posix()
        return below if site.format == "dicom" else path.name

    by_code: dict[str, list[tuple[Path, SiteDataError | Notice]]] = {}
    for path, error in bad:
        by_code.setdefault(error.code, []).append((path, error))
    findings = []
    for code, group in by_code.items():
        problem, fix = group[0][1].problem, group[0][1].fix
        others = [name(path) for path, _ in group[1:]]
        if others:
            some = ", ".join(others[:5]) + (" and more" if len(others) > 5 else "")
            problem += f"; {len(others)} more with the same problem: {some}"
        findings.append(Finding(code, problem, fix, severity))
    return findings


def _warnings(
    summaries: Sequence[Summary], clipped: Sequence[Path], flat: Sequence[Path], site: SiteConfig
) -> list[Finding]:
    findings = []
    found = {value for summary in summaries for value in summary.values}
    missing = [name for name, values in site.classes.items() if found.isdisjoint(values)]
    if missing:
        findings.append(
            warning(
                "class-never-drawn",
                f"no label holds a value of {', '.join(missing)}",
                "if nobody drew it here, move it from classes to not_annotated in site.yml; "
                "otherwise the site teaches that there is none",
            )
        )
    twins: dict[bytes, list[Path]] = {}
    for summary in summaries:
        twins.setdefault(summary.digest, []).append(summary.case.image)
    copies = [paths for paths in twins.values() if len(paths) > 1]
    if copies:
        findings.append(
            warning(
                "same-image-twice",
                f"{sum(len(paths) - 1 for paths in copies)} images are copies of another: "
                + ", ".join(path.name for path in copies[0][:4]),
                "remove the copies; another split could put them on both sides",
            )
        )
    validation = sum(summary.case.split == "validation" for summary in summaries)
    if validation < site.min_cases:
        findings.append(
            warning(
                "few-validation-cases",
                f"the validation split has {validation} of the cases, fewer than min_cases "
                f"({site.min_cases}), so no score of this site will be sent",
                "raise validation_fraction in site.yml, or add cases",
            )
        )
    if clipped:
        low, high = site.intensity.bounds
        findings.append(
            warning(
                "intensity-clipped",
                f"in {len(clipped)} images most values lie outside {low:g} to {high:g} and become "
                f"black or white; the first is {clipped[0].name}",
                "set low and high under intensity in site.yml to the values that matter, or use "
                "rule: percentile",
            )
        )
    if flat:
        low, high = site.intensity.bounds
        findings.append(
            warning(
                "few-grey-levels",
                f"in {count_of(len(flat), 'image')} all values lie so close together that of "
                f"{low:g} to {high:g} fewer than {256 // _FEWEST_GREYS} of 256 grey levels are "
                f"left; the first is {flat[0].name}",
                "set low and high under intensity in site.yml to the values that images have (0 "
                "and 1 for fractions), or use rule: percentile",
            )
        )
    return findings


def _other_endings(left: Sequence[Path], site: SiteConfig) -> list[Finding]:
    """Files whose ending no glob has; others of a glob's ending are often another contrast."""
    others = [
        path
        for path in left
        if not site.images.endswith(ending_of(path, site))
        and not site.labels.endswith(ending_of(path, site))
    ]
    if not others:
        return []
    counts = Counter(ending_of(path, site) for path in others)
    some = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
    usual = {pattern[-len(ending) :] for pattern in (site.images, site.labels) for ending in counts}
    renames = sorted(
        f"{ending} to {ending.lower()}" for ending in counts if ending.lower() in usual
    )
    cure = [f"rename {', '.join(renames)}"] if renames else []
    if len(renames) < len(counts):
        cure.append("convert them to the kind that the globs in site.yml name")
    return [
        warning(
            "files-not-taken",
            f"no glob takes {count_of(len(others), 'file')} in the folders of images and labels "
            f"({some}); the first is {others[0]}",
            f"if these are cases, {' or '.join(cure)}; else move them away",
        )
    ]


def _unnamed_patients(cases: Sequence[Case]) -> list[Finding]:
    example = several_files_a_patient([case.key for case in cases])
    if example is None:
        return []
    return [
        warning(
            "patient-not-named",
            "site.yml has no patient, so every file counts as a patient of its own, but names "
            f"such as {', '.join(example)} look like several files of one patient",
            "add patient: with a regular expression whose group 1 is the patient, so that the "
            "split cannot separate one",
        )
    ]
