"""Look at all data of a site before the first hour of GPU, and name every problem with its fix.

Training reads with the same code and stops at the first of these problems; here all are collected.
Findings name files: they are for the person at the site and stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedfms.config import SiteConfig
from fedfms.control import Control
from fedfms.data.content import Content, read_bytes
from fedfms.data.dataset import (
    PreparedCase,
    Summary,
    combine,
    problems_together,
    summarize,
    unknown_classes,
)
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.manifest import Case, scan, several_files_a_patient
from fedfms.errors import SiteDataError


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of problem, however many files have it.

    An "error" stops training at this site; a "warning" is worth a look and stops nothing.
    """

    code: str
    problem: str
    fix: str
    severity: Literal["error", "warning"]


def check_data(
    site: SiteConfig, classes: Sequence[str] | None = None, control: Control | None = None
) -> list[Finding]:
    """Everything that is wrong with a site's data, errors first; empty if nothing is.

    Reads every file from its start to its end and never the cache.

    Args:
        site: the site's configuration.
        classes: of the job that is to run here; None: only the site's own are looked at.
        control: told of the progress as phase "prepare".

    Raises:
        TaskAborted: somebody asked to stop. A problem of the data is a finding, never raised.
    """
    found = scan(site)
    errors = [*found.problems, *unknown_classes(site, classes or ())]
    warnings: list[Finding] = []
    bad: list[tuple[Path, SiteDataError]] = []
    summaries: list[Summary] = []
    clipped: list[Path] = []
    for number, case in enumerate(found.cases):
        if control is not None:
            control.report("prepare", number, len(found.cases))
        prepared, is_clipped, problems = _read(case, site)
        bad.extend(problems)
        if prepared is not None:
            summaries.append(summarize(prepared))
        if is_clipped:
            clipped.append(case.image)
    if control is not None:
        control.report("prepare", len(found.cases), len(found.cases))
    if summaries:
        errors.extend(problems_together(summaries, site))
        warnings.extend(_warnings(summaries, clipped, site))
    if site.patient is None:
        # those of DICOM with a PatientID have a name of their own
        warnings.extend(_unnamed_patients([c for c in found.cases if c.patient == c.key]))
    return [
        *(Finding(error.code, error.problem, error.fix, "error") for error in errors),
        *_grouped(bad, site),
        *(warnings if not errors and not bad else ()),  # first things first
    ]


def _read(
    case: Case, site: SiteConfig
) -> tuple[PreparedCase | None, bool, list[tuple[Path, SiteDataError]]]:
    """A case, whether the intensity rule cuts most of its values off, and what is wrong with it."""
    problems: list[tuple[Path, SiteDataError]] = []

    def read(path: Path, reader: Callable[[Path, Content], Stored]) -> Stored | None:
        try:
            return reader(path, read_bytes(path, site))
        except SiteDataError as error:
            problems.append((path, error))
            return None

    image = read(case.image, lambda path, data: read_image(path, data, site))
    if image is None and site.format == "dicom":  # its label says nothing without it
        return None, False, problems
    label = read(case.label, lambda path, data: read_label(path, data, site, image))
    if image is None or label is None:
        return None, False, problems
    try:
        prepared = combine(case, image, label, site)
    except SiteDataError as error:
        return None, False, [(case.image, error)]
    is_clipped = False
    if site.intensity.rule == "range":
        low, high = site.intensity.bounds
        is_clipped = bool(np.mean((image.values < low) | (image.values > high)) > 0.5)
    return prepared, is_clipped, []


def _grouped(bad: Sequence[tuple[Path, SiteDataError]], site: SiteConfig) -> list[Finding]:
    """One finding for each code: the first problem in full, then how many files share it."""

    def name(path: Path) -> str:  # folders of a series are often all called alike
        below = path.relative_to(site.data_root).as_posix()
        return below if site.format == "dicom" else path.name

    by_code: dict[str, list[tuple[Path, SiteDataError]]] = {}
    for path, error in bad:
        by_code.setdefault(error.code, []).append((path, error))
    findings = []
    for code, group in by_code.items():
        problem, fix = group[0][1].problem, group[0][1].fix
        others = [name(path) for path, _ in group[1:]]
        if others:
            some = ", ".join(others[:5]) + (" and more" if len(others) > 5 else "")
            problem += f"; {len(others)} more with the same problem: {some}"
        findings.append(Finding(code, problem, fix, "error"))
    return findings


def _warnings(
    summaries: Sequence[Summary], clipped: Sequence[Path], site: SiteConfig
) -> list[Finding]:
    findings = []
    found = {value for summary in summaries for value in summary.values}
    missing = [name for name, values in site.classes.items() if found.isdisjoint(values)]
    if missing:
        findings.append(
            Finding(
                "class-never-drawn",
                f"no label holds a value of {', '.join(missing)}",
                "if nobody drew it here, move it from classes to not_annotated in site.yml; "
                "otherwise the site teaches that there is none",
                "warning",
            )
        )
    twins: dict[bytes, list[Path]] = {}
    for summary in summaries:
        twins.setdefault(summary.digest, []).append(summary.case.image)
    copies = [paths for paths in twins.values() if len(paths) > 1]
    if copies:
        findings.append(
            Finding(
                "same-image-twice",
                f"{sum(len(paths) - 1 for paths in copies)} images are copies of another: "
                + ", ".join(path.name for path in copies[0][:4]),
                "remove the copies; another split could put them on both sides",
                "warning",
            )
        )
    validation = sum(summary.case.split == "validation" for summary in summaries)
    if validation < site.min_cases:
        findings.append(
            Finding(
                "few-validation-cases",
                f"the validation split has {validation} of the cases, fewer than min_cases "
                f"({site.min_cases}), so no score of this site will be sent",
                "raise validation_fraction in site.yml, or add cases",
                "warning",
            )
        )
    if clipped:
        low, high = site.intensity.bounds
        findings.append(
            Finding(
                "intensity-clipped",
                f"in {len(clipped)} images most values lie outside {low:g} to {high:g} and become "
                f"black or white; the first is {clipped[0].name}",
                "set low and high under intensity in site.yml to the values that matter, or use "
                "rule: percentile",
                "warning",
            )
        )
    return findings


def _unnamed_patients(cases: Sequence[Case]) -> list[Finding]:
    example = several_files_a_patient([case.key for case in cases])
    if example is None:
        return []
    return [
        Finding(
            "patient-not-named",
            "site.yml has no patient, so every file counts as a patient of its own, but names "
            f"such as {', '.join(example)} look like several files of one patient",
            "add patient: with a regular expression whose group 1 is the patient, so that the "
            "split cannot separate one",
            "warning",
        )
    ]
