"""A job's records to the results folder: models, recipe, rounds.csv, evaluation.csv, summary.json.

The server's recorder (flare/recorder.py) appends one JSON object a line while the job runs, so what
is here may have ended half way: a missing final evaluation, or a last line cut short, is stated in
the summary and never an error. No score is computed again; what is averaged here are the sites' own
means.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms.contracts.contribution import PHASES
from fedfms.errors import FederationError
from fedfms.files import file_sha256, whole_folder
from fedfms.report.records import (
    NO_VALUE,
    NOT_ANNOTATED,
    RECORDS,
    WITHHELD,
    History,
    mean,
    read_records,
)
from fedfms.report.tables import (
    EvaluationRow,
    RoundRow,
    read_evaluation,
    read_rounds,
    write_evaluation,
    write_rounds,
)

log = logging.getLogger(__name__)

RECIPE, ROUNDS, EVALUATION, SUMMARY = "recipe.json", "rounds.csv", "evaluation.csv", "summary.json"
GLOBAL_MODEL, BEST_MODEL = "global_model.safetensors", "best_model.safetensors"
LOWER_IS_BETTER = ("hd95",)

_FORMAT = 3  # of summary.json; a reader of another number refuses the folder
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PICTURE = 8_000_000  # bytes; they are embedded in the page

MEASURE = (
    "Dice of a site: mean over its validation cases, then over the classes; 3-D for volumes, "
    "at the images' own resolution, in [0, 1]"
)
MEASURE_BY_CLASS = (
    "Dice of a site: mean over its validation cases, each class by itself, since not all scores "
    "are of the same classes; 3-D for volumes, at the images' own resolution, in [0, 1]"
)
_SCORES = ("round_0", "final", "best", "after")


@dataclass(frozen=True, slots=True)
class Result:
    """A results folder in memory."""

    folder: Path
    summary: dict[str, Any]
    recipe: dict[str, Any]
    rounds: tuple[RoundRow, ...]
    evaluation: tuple[EvaluationRow, ...]


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
    if results.is_file() or (results.is_dir() and any(results.iterdir())):
        raise FederationError(
            f"{results} holds something already",
            "name a new folder for the results, or move the old one away",
            code="results-exist",
        )
    source = _find_records(job_folder)
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
    evaluation = _mark_worst(history.evaluation_rows())
    shutil.copyfile(source / RECORDS, folder / RECORDS)
    files = {}
    for name in (GLOBAL_MODEL, BEST_MODEL, RECIPE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            files[name] = _describe_file(folder / name)
    pictures = _copy_pictures(history.pictures, source, folder)
    summary = _summarize(history, recipe, rounds, evaluation, damaged)
    summary["pictures"], summary["files"] = pictures, files
    write_rounds(folder / ROUNDS, rounds)
    write_evaluation(folder / EVALUATION, evaluation)
    text = json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")


def load_result(folder: Path) -> Result:
    """Read a results folder back.

    Raises:
        FederationError: it is no results folder, or one of its files is damaged (`no-results`).
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or summary.get("format") != _FORMAT:
            raise ValueError(f"{SUMMARY} is of another version of fedfms")
        rounds = read_rounds(folder / ROUNDS)
        evaluation = read_evaluation(folder / EVALUATION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise FederationError(
            f"{folder} is no results folder: {what}",
            "name the folder that a finished job's results were written to",
            code="no-results",
        ) from None
    return Result(folder, summary, _read_recipe(folder / RECIPE), rounds, evaluation)


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
    sites, parts = result.summary["sites"], result.summary["parts"]
    return [
        {
            "site": site,
            "class": part["classes"][0] if len(parts) > 1 else "",
            "role": sites[site]["role"],
            "cases": sites[site]["cases"],
            "dice_before": values["round_0"],
            "dice_after": values["after"],
            "change": _change(values["round_0"], values["after"]),
            "dice_best": values["best"],
            "missed": len(sites[site]["missed"]),
            "lowest": site == (part["worst_site"] or {}).get("site"),
            "note": values["note"],
        }
        for part in parts
        for site, values in part["sites"].items()
    ]


# ------------------------------------------------------------------------------ reading records


def _find_records(job_folder: Path) -> Path:
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
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _mark_worst(rows: list[EvaluationRow]) -> list[EvaluationRow]:
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
            pick = max if metric in LOWER_IS_BETTER else min
            worst.add(id(pick(group, key=lambda row: row.mean or 0.0)))
    return [dataclasses.replace(row, worst=id(row) in worst) for row in rows]


# -------------------------------------------------------------------------------------- summary


def _summarize(
    history: History,
    recipe: dict[str, Any],
    rounds: Sequence[RoundRow],
    evaluation: Sequence[EvaluationRow],
    damaged: int,
) -> dict[str, Any]:
    parts = _parts(history, rounds, evaluation)
    alone = parts[0] if len(parts) == 1 else None  # all scores are of the same classes
    nothing = dict.fromkeys((*_SCORES, "after_is"))
    sites = {
        site: _site_summary(history, site, rounds)
        | (alone["sites"][site] if alone else {**nothing, "note": ""})
        for site in history.sites
    }
    down = sum(row.bytes_down or 0 for row in rounds)
    up = sum(row.bytes_up or 0 for row in rounds)
    timed = history.started is not None and history.ended is not None
    return {
        "format": _FORMAT,
        "measure": MEASURE if alone else MEASURE_BY_CLASS,
        "job": {
            "id": history.job.get("job_id"),
            "name": history.job.get("name"),
            "status": history.status,
            "started": history.started,
            "ended": history.ended,
            "seconds": (history.ended or 0) - (history.started or 0) if timed else None,
            "fedfms_version": history.job.get("fedfms_version"),
            "nvflare_version": history.job.get("nvflare_version"),
            "recipe_sha256": history.job.get("recipe_sha256"),
            "backbone_sha256": recipe.get("backbone_sha256"),
        },
        "rounds": {"planned": recipe.get("rounds"), "done": history.rounds_done},
        "parts": parts,  # one of all classes, or one of each class where sites differ in them
        "dice": alone["dice"] if alone else _dice_of({}),
        "unseen": {site: v for site, v in sites.items() if v["role"] != "train"},
        "worst_site": alone["worst_site"] if alone else None,
        "missed": {site: v["missed"] for site, v in sites.items() if v["missed"]},
        "missed_evaluations": [
            {"site": site, "model": model, "reason": reason}
            for site, model, reason in history.missed_evaluations()
        ],
        "bytes": {"down": down, "up": up, "total": down + up},
        "sites": sites,
        "unreadable_records": damaged + history.unreadable,
    }


def _parts(
    history: History, rounds: Sequence[RoundRow], evaluation: Sequence[EvaluationRow]
) -> list[dict[str, Any]]:
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
) -> dict[str, Any]:
    """Dice over these classes of every site, with what can be said of the sites together."""
    sites: dict[str, dict[str, Any]] = {}
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
        sites[site] = {
            "round_0": next((dice for number, dice in scored if number == 0), None),
            "final": final,
            "best": best,
            "after": after,
            "after_is": after_is if after is not None else None,
            "note": "" if final is not None else why,
        }
    most = _most(v["after_is"] for v in sites.values())
    alike = {  # for want of a final evaluation sites may stand with models of different rounds
        site: v if v["after_is"] == most else {**v, "after": None} for site, v in sites.items()
    }
    comparable = {site: v for site, v in alike.items() if v["after"] is not None}
    worst = min(comparable, key=lambda s: comparable[s]["after"]) if len(comparable) > 1 else None
    return {
        "classes": list(classes),
        "after_is": most,  # of what is compared; a site may have another
        "dice": _dice_of({s: v for s, v in alike.items() if history.role(s) == "train"}),
        "worst_site": {"site": worst, "dice": sites[worst]["after"]} if worst else None,
        "sites": sites,
    }


def _most(models: Iterable[str | None]) -> str | None:
    """What most sites have a score of, "final" or "round N"; of as many the later round."""
    counts = Counter(model for model in models if model is not None)
    return max(counts, key=lambda m: (counts[m], int(m.partition(" ")[2] or 0)), default=None)


def over(dice: Mapping[str, float], classes: Sequence[str]) -> float | None:
    """Mean over these classes; None where one of them has no value."""
    return mean(dice[name] for name in classes) if all(name in dice for name in classes) else None


def _site_summary(history: History, site: str, rounds: Sequence[RoundRow]) -> dict[str, Any]:
    own = [row for row in rounds if row.site == site]
    accepted = [row for row in own if row.accepted]
    said = history.evaluations.get((site, "final"), {}).get("parsed")
    in_rounds = [row.evaluated_cases for row in accepted if row.evaluated_cases is not None]
    cases = said.evaluated_cases if said else max(in_rounds, default=None)
    return {
        "role": history.role(site),
        "cases": cases,
        "not_annotated": history.not_annotated(site),
        "evaluated": any(s == site and r["parsed"] for (s, _), r in history.evaluations.items()),
        "reported": history.reported(site),
        "rounds_accepted": len(accepted),
        "missed": [{"round": r.round, "reason": r.reason} for r in own if not r.accepted],
        "bytes_down": sum(row.bytes_down or 0 for row in own),
        "bytes_up": sum(row.bytes_up or 0 for row in own),
        "seconds": _phase_sums(own),
        "peak_memory_bytes": _phase_peaks(own),
        "training_slices": max((row.training_slices or 0 for row in own), default=0) or None,
        "training_cases": max((row.training_cases or 0 for row in own), default=0) or None,
        "micro_batch": min((row.micro_batch for row in own if row.micro_batch), default=None),
    }


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


def _phase_sums(rows: Iterable[RoundRow]) -> dict[str, float]:
    rows = list(rows)
    return {phase: sum(row.seconds.get(phase, 0.0) for row in rows) for phase in PHASES}


def _phase_peaks(rows: Iterable[RoundRow]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for row in rows:
        for phase, size in row.peak_memory_bytes.items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return peaks


def _mean_of_sites(sites: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
    having = {site: values[key] for site, values in sites.items() if values[key] is not None}
    return {"mean": mean(having.values()), "sites": list(having)}


def _dice_of(training: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over training sites, each with its sites; and what is compared, over the same sites."""
    return {
        **{key: _mean_of_sites(training, key) for key in _SCORES},
        "gain": _gain(training),
        "best_against_final": _best_against_final(training),
    }


def _best_against_final(sites: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    both = [s for s, v in sites.items() if v["final"] is not None and v["best"] is not None]
    return {
        "final": mean(sites[site]["final"] for site in both),
        "best": mean(sites[site]["best"] for site in both),
        "sites": both,
    }


def _gain(sites: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Before and after over the same training sites: those with both values."""
    both = [s for s, v in sites.items() if v["round_0"] is not None and v["after"] is not None]
    before = mean(sites[site]["round_0"] for site in both)
    after = mean(sites[site]["after"] for site in both)
    return {"before": before, "after": after, "change": _change(before, after), "sites": both}


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


# ---------------------------------------------------------------------------------------- files


def _copy_pictures(
    pictures: Iterable[tuple[str, str, str]], source: Path, folder: Path
) -> list[dict[str, str]]:
    """Copy the overlays that are PNG files inside the job's pictures/; others are left out."""
    inside = (source / "pictures").resolve()
    copied = []
    for site, model, name in pictures:
        path = (source / name).resolve()
        if not path.is_relative_to(inside) or not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_PICTURE or not path.read_bytes().startswith(_PNG):
            continue
        relative = Path("pictures") / path.relative_to(inside)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
        copied.append({"site": site, "model": model, "file": relative.as_posix()})
    return copied


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as null, which is all that JSON has for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
