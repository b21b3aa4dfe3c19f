"""Whether a finished run still is what it says: its files, its images, and its scores once more."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError, ConfigError, FedfmsError, unexpected
from fedfms.files import file_sha256
from fedfms.local.sites import Site, find_sites
from fedfms.records.history import History
from fedfms.records.layout import RECORDS
from fedfms.records.read import read_records
from fedfms.report.verify import Check, OtherRuns
from fedfms_lab.study.data import ManifestRow, read_manifest, read_site, site_config
from fedfms_lab.study.record import (
    JOB_FOLDER,
    MANIFEST_FILE,
    RECIPE_FILE,
    ROUNDS_FILE,
    RUN_FILE,
    SCORES_FILE,
    STUDY_FILE,
    Run,
    ScoreRow,
    read_run,
    seal_of,
)
from fedfms_lab.study.runner import PHANTOMS_FOLDER
from fedfms_lab.study.score import AtSites, score_site

TOLERANCE = 1e-6  # of a score computed again, relative and absolute


class StudyRuns(OtherRuns):
    """What `fedfms verify` does with a run of a study."""

    name = "study"

    def is_one(self, folder: Path) -> bool:
        """Whether it has the file that every finished run of a study has."""
        return (folder / RUN_FILE).is_file()

    def verify(self, folder: Path, **options: Any) -> list[Check]:
        """See `verify_run`; `sites` and `data` are folders here, or None."""
        sites, data = options.pop("sites"), options.pop("data")
        found = find_sites(sites, data) if sites is not None else None
        return verify_run(folder, found, **options)


def verify_run(
    folder: Path,
    sites: Sequence[Site] | None = None,
    *,
    checkpoints: Path | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Check]:
    """Look at everything that a run's folder claims.

    Args:
        folder: of the run, below runs/ in a study's folder.
        sites: where the images are now; None: where the study had them.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.
        tolerance: of scores computed again; on another processor the last digits differ.
        on_progress: told ("score", sites done, sites).

    Returns:
        one entry for each kind of check; what cannot be computed because an earlier check failed is
        left out.

    Raises:
        FedfmsError: it is no finished run, or the images are nowhere.
    """
    run = read_run(folder)
    sites = sites if sites is not None else sites_of(folder)
    checks = [
        Check("run.json as it was written", _found(_seal_problems, folder)),
        Check("the recipe as it ran", _found(_recipe_problems, run)),
        Check("the other files as they were written", _found(_file_problems, run)),
        Check(f"{ROUNDS_FILE} and the bytes, from the records", _found(_round_problems, run)),
    ]
    data = _found(_data_problems, run, sites)
    checks.append(Check("the images, labels and site.yml of each site", data))
    recipe_holds = not checks[1].problems
    if recipe_holds and not data:
        scores = _found(_score_problems, run, sites, checkpoints, tolerance, on_progress)
        checks.append(Check(f"{SCORES_FILE}, computed again from the model", scores))
    return checks


def sites_of(run: Path) -> list[Site]:
    """The sites of the study that a run belongs to, where that study had them.

    Raises:
        ConfigError: the study's own file is not beside runs/ ("no-study").
    """
    study = run.resolve().parent.parent
    try:
        asked: dict[str, Any] = json.loads((study / STUDY_FILE).read_text())["asked"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"there is no {STUDY_FILE} beside the folder that {run} lies in, to say where the "
            "images are",
            "name the folder of the sites with --sites, and their images with --data",
            code="no-study",
        ) from None
    if asked["sites"] is None:
        return find_sites(study / PHANTOMS_FOLDER, None)
    return find_sites(Path(asked["sites"]), Path(asked["data"]) if asked["data"] else None)


def _found(look: Callable[..., Iterable[str]], *about: object) -> tuple[str, ...]:
    """The problems that a check finds; one that cannot read its files has found one."""
    try:
        return tuple(look(*about))
    except FedfmsError:
        raise
    except Exception as error:  # files that were changed are anything
        return (unexpected(error, "what it reads cannot be used", FedfmsError).problem,)


def _seal_problems(folder: Path) -> list[str]:
    values = json.loads((folder / RUN_FILE).read_text())
    if values.get("seal") == seal_of(values):
        return []
    return [f"{RUN_FILE} was changed after the run: its seal does not fit its other values"]


def _recipe_problems(run: Run) -> list[str]:
    kept, written = dict(run.record.recipe), dict(run.recipe)
    found = [
        f"{name} is {written.get(name)!r} in {RECIPE_FILE}, and {kept.get(name)!r} in {RUN_FILE}"
        for name in sorted({*kept, *written})
        if kept.get(name) != written.get(name)
    ]
    if found:
        return found
    try:
        same = Recipe.from_dict(written, RECIPE_FILE).sha256 == run.record.recipe_sha256
    except ConfigError as error:
        return [error.problem]
    return [] if same else [f"{RECIPE_FILE} is not the recipe whose SHA-256 {RUN_FILE} names"]


def _file_problems(run: Run) -> list[str]:
    found = []
    for name, expected in run.record.files.items():
        path = run.folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif file_sha256(path) != expected:
            found.append(f"{name} was changed after the run")
    return found


def _round_problems(run: Run) -> list[str]:
    found = []
    for name in ("bytes_down", "bytes_up"):
        kept, total = getattr(run.record, name), sum(getattr(row, name) or 0 for row in run.rounds)
        if kept != total:
            found.append(f"{name} is {kept} in {RUN_FILE}, and {total} in {ROUNDS_FILE}")
    records = run.folder / JOB_FOLDER / RECORDS
    if records.is_file():
        again = History(read_records(records)[0], dict(run.recipe)).round_rows()
        by_place = {(row.round, row.site): row for row in again}
        for row in run.rounds:
            where = f"{ROUNDS_FILE}, round {row.round}, {row.site}"
            other = by_place.get((row.round, row.site))
            if other is None:
                found.append(f"{where}: nothing was recorded")
                continue
            for name, one, two in _differing(row, other):
                found.append(f"{where}: {name} is {one}, and {two} in {RECORDS}")
    return found


def _differing(row: Any, other: Any, tolerance: float = 0.0) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each field in which two rows differ, numbers beyond the tolerance."""
    for field in dataclasses.fields(row):
        one, two = getattr(row, field.name), getattr(other, field.name)
        if isinstance(one, float) and isinstance(two, float):
            same = math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)
        else:
            same = one == two
        if not same:
            yield field.name, one, two


def _data_problems(run: Run, sites: Sequence[Site]) -> list[str]:
    kept = read_manifest(run.folder / MANIFEST_FILE)
    there = {site.name: site for site in sites}
    found = [
        f"{name}: no case is in {MANIFEST_FILE}"
        for name in sorted(set(run.record.sites) - set(kept))
    ]
    for name in sorted(kept):
        if name not in there:
            found.append(f"{name}: there is no such site any more")
            continue
        try:
            facts, rows = read_site(there[name])
        except FedfmsError as error:
            found.append(f"{name}: {error.problem}")
            continue
        except Exception as error:
            found.append(unexpected(error, f"{name} cannot be read", FedfmsError).problem)
            continue
        if facts.config_sha256 != run.record.sites[name].config_sha256:
            found.append(f"{name}: site.yml was changed after the run")
        found += _differing_data(name, kept[name], rows)
    return found


def _differing_data(
    site: str, kept: Sequence[ManifestRow], rows: Sequence[ManifestRow]
) -> list[str]:
    found = []
    now = {row.case: row for row in rows}
    for row in kept:
        other = now.pop(row.case, None)
        if other is None:
            found.append(f"{site}: {row.image} is missing")
            continue
        for what in ("image", "label"):
            if getattr(row, f"{what}_sha256") != getattr(other, f"{what}_sha256"):
                found.append(f"{site}: {getattr(row, what)} was changed after the run")
        if (row.split, row.patient) != (other.split, other.patient):
            found.append(f"{site}: {row.image} has another patient or side of the split")
    found += [f"{site}: {row.image} is new" for row in now.values()]
    return found


def _score_problems(
    run: Run,
    sites: Sequence[Site],
    checkpoints: Path | None,
    tolerance: float,
    on_progress: Callable[[str, int, int], None] | None,
) -> list[str]:
    again: list[ScoreRow] = []
    ours = [site for site in sites if site.name in run.record.sites]
    try:
        at_sites = AtSites(run.folder, checkpoints)
        for number, site in enumerate(ours):
            if on_progress is not None:
                on_progress("score", number, len(ours))
            trained_here = site.name in run.record.key.trained_on
            config = site_config(site)
            at_sites.be_at(site.name)
            again += score_site(
                at_sites.model, at_sites.recipe, site.name, config, trained_here=trained_here
            )[2]
    except CheckpointError as error:
        return [error.problem]
    return _differing_scores(run.scores, again, tolerance)


def _differing_scores(
    kept: Sequence[ScoreRow], again: Sequence[ScoreRow], tolerance: float
) -> list[str]:
    """How two tables of scores differ, a sentence for each number; empty if they do not."""
    found = []
    by_case = {(row.site, row.case, row.class_name): row for row in again}
    for row in kept:
        other = by_case.pop((row.site, row.case, row.class_name), None)
        where = f"{row.site}, case {row.case}, {row.class_name}"
        if other is None:
            found.append(f"{where}: the run has a score for a case that is not scored")
            continue
        for name, one, two in _differing(row, other, tolerance):
            found.append(f"{where}: {name} is {one} in {SCORES_FILE}, and {two} computed again")
    found += [f"{site}, case {case}, {name}: no score" for site, case, name in by_case]
    return found
