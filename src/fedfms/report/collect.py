"""A job's records to the results folder: models, recipe, rounds.csv, evaluation.csv, guard.csv,
summary.json.

The server's recorder (flare/recorder.py) appends one JSON object a line while the job runs, so what
is here may have ended half way: a missing final evaluation, or a last line cut short, is stated in
the summary and never an error. No score is computed again; what is averaged here are the sites' own
means.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms.bounded import read_json
from fedfms.contracts.contribution import PHASES
from fedfms.errors import FederationError
from fedfms.files import file_sha256, whole_folder
from fedfms.pages.parts import is_embeddable
from fedfms.records.history import NO_VALUE, NOT_ANNOTATED, WITHHELD, History
from fedfms.records.layout import (
    BEST_MODEL,
    EVALUATION,
    GLOBAL_MODEL,
    GUARD,
    PICTURES,
    RECIPE,
    RECORDS,
    ROUNDS,
    SUMMARY,
)
from fedfms.records.read import read_records
from fedfms.records.rows import (
    EvaluationRow,
    GuardRow,
    RoundRow,
    read_rounds,
    read_rows,
    write_rounds,
    write_rows,
)
from fedfms.records.scores import over
from fedfms.report.summary import (
    MAX_SUMMARY_BYTES,
    Bytes,
    FileFacts,
    JobFacts,
    MissedEvaluation,
    MissedRound,
    Part,
    PictureFile,
    Rounds,
    SiteDice,
    SiteFacts,
    Summary,
    WorstSite,
    change,
    dice_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """A results folder in memory."""

    folder: Path
    summary: Summary
    recipe: dict[str, Any]
    rounds: tuple[RoundRow, ...]
    evaluation: tuple[EvaluationRow, ...]
    guard: tuple[GuardRow, ...] = ()  # none of a run before there was one


def collect(
    job_folder: Path, results: Path, finish: Callable[[Path], None] | None = None
) -> Result:
    """Write the results folder of a finished or interrupted job.

    Args:
        job_folder: holds records.jsonl, in itself or in one folder below; beside that file
            recipe.json, *.safetensors and pictures/.
        results: a folder that does not exist yet, or is empty. It appears complete or not at all.
        finish: does what else belongs into the folder, before it appears.

    Raises:
        FederationError: no usable records (`no-records`), or `results` holds something already
            (`results-exist`).
    """
    source = find_records(job_folder)
    records, damaged = read_records(source / RECORDS)
    recipe = _read_recipe(source / RECIPE)
    history = History(records, recipe)
    try:
        with whole_folder(results) as folder:
            _write_folder(folder, source, history, recipe, damaged)
            if finish is not None:
                finish(folder)
    except OSError as error:
        raise FederationError(
            f"the results cannot be written to {results}: {error}",
            "name a new folder for the results, on a disk that has room",
            code="results-exist",
        ) from None
    log.info("results of %d rounds and %d sites", history.rounds_done, len(history.sites))
    return load_result(results)


def _write_folder(
    folder: Path, source: Path, history: History, recipe: dict[str, Any], damaged: int
) -> None:
    rounds = history.round_rows()
    evaluation = mark_worst(history.evaluation_rows())
    shutil.copyfile(source / RECORDS, folder / RECORDS)
    files = {}
    for name in (GLOBAL_MODEL, BEST_MODEL, RECIPE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            size = (folder / name).stat().st_size
            files[name] = FileFacts(size, file_sha256(folder / name))
    parts = _parts(history, rounds, evaluation)
    classes = "then over the classes"
    if len(parts) > 1:
        classes = "each class by itself, since not all scores are of the same classes"
    down = sum(row.bytes_down or 0 for row in rounds)
    up = sum(row.bytes_up or 0 for row in rounds)
    job, started, ended = history.job, history.started, history.ended
    planned, backbone = recipe.get("rounds"), recipe.get("backbone_sha256")
    summary = Summary(
        measure=f"Dice of a site: mean over its validation cases, {classes}; 3-D for volumes, at "
        "the images' own resolution, in [0, 1]",
        job=JobFacts(
            id=job.job_id,
            name=job.name,
            status=history.status,
            started=started,
            ended=ended,
            seconds=None if started is None or ended is None else ended - started,
            fedfms_version=job.fedfms_version,
            nvflare_version=job.nvflare_version,
            recipe_sha256=job.recipe_sha256,
            backbone_sha256=backbone if isinstance(backbone, str) else None,
            fedfms_revision=job.fedfms_revision,
            image=job.image,
        ),
        rounds=Rounds(planned if isinstance(planned, int) else None, history.rounds_done),
        parts=parts,
        missed_evaluations=[MissedEvaluation(*one) for one in history.missed_evaluations()],
        bytes=Bytes(down, up, down + up),
        sites={site: _site_facts(history, site, rounds) for site in history.sites},
        unreadable_records=damaged + history.unreadable,
        pictures=_copy_pictures(history.pictures, source, folder),
        files=files,
    )
    write_rounds(folder / ROUNDS, rounds)
    write_rows(folder / EVALUATION, EvaluationRow, evaluation)
    if judged := history.guard_rows():
        write_rows(folder / GUARD, GuardRow, judged)
    text = json.dumps(summary.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")


def load_result(folder: Path) -> Result:
    """Read a results folder back.

    Raises:
        FederationError: it is no results folder, or one of its files is damaged (`no-results`).
    """
    try:
        summary = Summary.from_dict(read_json(folder / SUMMARY, MAX_SUMMARY_BYTES))
        rounds = read_rounds(folder / ROUNDS)
        evaluation = read_rows(folder / EVALUATION, EvaluationRow)
        there = (folder / GUARD).is_file()
        guard = read_rows(folder / GUARD, GuardRow) if there else ()
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise FederationError(
            f"{folder} is no results folder: {what}",
            "name the folder that a finished job's results were written to",
            code="no-results",
        ) from None
    recipe = _read_recipe(folder / RECIPE)
    return Result(folder, summary, recipe, rounds, evaluation, guard)


def summary_table(results: Path | Result) -> list[dict[str, Any]]:
    """One row a site for a terminal: training sites first, then those that never trained.

    Returns:
        dictionaries with site, class ("": mean over the classes, the same at every site; else a
        row for each class and site), role, cases (validation cases of the last evaluation),
        dice_before (round 0), dice_after (final, or the last round with a value where there is no
        final), change, dice_best, missed (number of rounds), lowest (bool), note. Scores are in
        [0, 1] or None; nothing is rounded.
    """
    result = load_result(results) if isinstance(results, Path) else results
    sites, parts = result.summary.sites, result.summary.parts
    return [
        {
            "site": site,
            "class": part.classes[0] if len(parts) > 1 else "",
            "role": sites[site].role,
            "cases": sites[site].cases,
            "dice_before": dice.round_0,
            "dice_after": dice.after,
            "change": change(dice.round_0, dice.after),
            "dice_best": dice.best,
            "missed": len(sites[site].missed),
            "lowest": part.worst_site is not None and site == part.worst_site.site,
            "note": dice.note,
        }
        for part in parts
        for site, dice in part.sites.items()
    ]


# ------------------------------------------------------------------------------ reading records


def find_records(job_folder: Path) -> Path:
    """The folder that holds records.jsonl: `job_folder` itself or the only one below it."""
    if (job_folder / RECORDS).is_file():
        return job_folder
    found = sorted(job_folder.rglob(RECORDS)) if job_folder.is_dir() else []
    if len(found) == 1:
        return found[0].parent
    raise FederationError(
        f"{job_folder} holds {len(found) or 'no'} {RECORDS}",
        "name the folder of one job's result, as downloaded from the server",
        code="no-records",
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def mark_worst(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    """Mark the worst site of each model, class and metric, where at least two can be compared.

    Distances in millimetres and in pixels are not compared.
    """
    groups: dict[tuple[str, str, str, str], list[EvaluationRow]] = {}
    for row in rows:
        if row.mean is not None:
            groups.setdefault((row.model, row.class_name, row.metric, row.unit), []).append(row)
    worst = set()
    for (_, _, metric, _), group in groups.items():
        if len(group) > 1:
            pick = max if metric == "hd95" else min  # a distance: the lower the better
            worst.add(id(pick(group, key=lambda row: row.mean or 0.0)))
    return [dataclasses.replace(row, worst=id(row) in worst) for row in rows]


# -------------------------------------------------------------------------------------- summary


def _parts(
    history: History, rounds: Sequence[RoundRow], evaluation: Sequence[EvaluationRow]
) -> list[Part]:
    """The scores that may be compared with each other.

    Where every score of the job, at whatever site and round, is of the same classes, that is one
    part with the mean over these. Otherwise a mean over classes here and there would be a mean of
    other things, so each class is a part of its own.
    """
    final: dict[tuple[str, str], dict[str, float]] = {}
    for row in evaluation:
        if row.metric == "dice" and row.mean is not None:
            final.setdefault((row.site, row.model), {})[row.class_name] = row.mean
    found = [row.class_dice for row in rounds if row.accepted] + list(final.values())
    sets = {frozenset(dice) for dice in found if dice}
    classes = [name for name in history.classes if not sets or any(name in one for one in sets)]
    groups = [[name] for name in history.classes] if len(sets) > 1 else [classes]
    return [_part(history, group, rounds, evaluation, final) for group in groups]


def _part(
    history: History,
    classes: Sequence[str],
    rounds: Sequence[RoundRow],
    evaluation: Sequence[EvaluationRow],
    models: Mapping[tuple[str, str], Mapping[str, float]],
) -> Part:
    """Dice over these classes of every site, with what can be said of the sites together."""
    sites: dict[str, SiteDice] = {}
    for site in history.sites:
        own = [row for row in rounds if row.site == site and row.accepted]
        scored = [(r.round, dice) for r in own if (dice := over(r.class_dice, classes)) is not None]
        final, best = (over(models.get((site, m), {}), classes) for m in ("final", "best"))
        rows = [row for row in evaluation if (row.site, row.model) == (site, "final")]
        after, after_is = final, "final"
        if not rows and scored:
            after, after_is = scored[-1][1], f"round {scored[-1][0]}"
        absent = set(classes) <= set(history.not_annotated(site))
        why = NOT_ANNOTATED if absent else _why_no_final(rows, classes, history, site)
        sites[site] = SiteDice(
            round_0=next((dice for number, dice in scored if number == 0), None),
            final=final,
            best=best,
            after=after,
            after_is=after_is if after is not None else None,
            note="" if final is not None else why,
        )
    most = _most(dice.after_is for dice in sites.values())
    alike = {  # for want of a final evaluation sites may stand with models of different rounds
        site: dice if dice.after_is == most else dataclasses.replace(dice, after=None)
        for site, dice in sites.items()
    }
    comparable = {site: d.after for site, d in alike.items() if d.after is not None}
    worst = min(comparable, key=lambda site: comparable[site]) if len(comparable) > 1 else None
    return Part(
        classes=list(classes),
        after_is=most,
        dice=dice_of({s: dice for s, dice in alike.items() if history.role(s) == "train"}),
        worst_site=WorstSite(worst, comparable[worst]) if worst is not None else None,
        sites=sites,
    )


def _most(models: Iterable[str | None]) -> str | None:
    """What most sites have a score of, "final" or "round N"; of as many the later round."""
    counts = Counter(model for model in models if model is not None)
    return max(counts, key=lambda m: (counts[m], int(m.partition(" ")[2] or 0)), default=None)


def _site_facts(history: History, site: str, rounds: Sequence[RoundRow]) -> SiteFacts:
    own = [row for row in rounds if row.site == site]
    accepted = [row for row in own if row.accepted]
    of_models = [record for (s, _), record in history.evaluations.items() if s == site]
    final = history.evaluations.get((site, "final"))
    in_rounds = [row.evaluated_cases for row in accepted if row.evaluated_cases is not None]
    said = final.said if final else None
    answers = [one.said for (_, s), one in sorted(history.answers.items()) if s == site]
    last = said or next((one for one in reversed(answers) if one is not None), None)
    return SiteFacts(
        role=history.role(site),
        cases=said.evaluated_cases if said else max(in_rounds, default=None),
        not_annotated=history.not_annotated(site),
        evaluated=any(record.said is not None for record in of_models),
        reported=history.reported(site),
        rounds_accepted=len(accepted),
        missed=[MissedRound(row.round, row.reason) for row in own if not row.accepted],
        bytes_down=sum(row.bytes_down or 0 for row in own),
        bytes_up=sum(row.bytes_up or 0 for row in own),
        seconds={phase: sum(row.seconds.get(phase, 0.0) for row in own) for phase in PHASES},
        peak_memory_bytes=_phase_peaks(own),
        training_slices=max((row.training_slices or 0 for row in own), default=0) or None,
        training_cases=max((row.training_cases or 0 for row in own), default=0) or None,
        micro_batch=min((row.micro_batch for row in own if row.micro_batch), default=None),
        left_out=last.left_out if last else 0,
        left_out_by_reason=last.left_out_by_reason if last else {},
    )


def _why_no_final(
    rows: Sequence[EvaluationRow], classes: Sequence[str], history: History, site: str
) -> str:
    if not rows:
        return WITHHELD if history.withholds(site) else "no final evaluation"
    notes = [
        row.note
        for row in rows
        if row.note and row.metric in ("", "dice") and row.class_name in ("", *classes)
    ]
    return notes[0] if notes else NO_VALUE


def _phase_peaks(rows: Iterable[RoundRow]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for row in rows:
        for phase, size in row.peak_memory_bytes.items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return peaks


# ---------------------------------------------------------------------------------------- files


def _copy_pictures(
    pictures: Iterable[tuple[str, str, str]], source: Path, folder: Path
) -> list[PictureFile]:
    """Copy the overlays that are PNG files inside the job's pictures/; others are left out."""
    inside = (source / PICTURES).resolve()
    copied = []
    for site, model, name in pictures:
        path = (source / name).resolve()
        if not path.is_relative_to(inside) or not path.is_file() or not is_embeddable(path):
            continue
        relative = Path(PICTURES) / path.relative_to(inside)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
        copied.append(PictureFile(site, model, relative.as_posix()))
    return copied
