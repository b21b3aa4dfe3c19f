"""A results folder to report.html, one page that needs nothing else, and report.md."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedfms.contracts.contribution import PHASES
from fedfms.contracts.recipe import NO_BACKBONE
from fedfms.files import write_together
from fedfms.pages.parts import (
    Cell,
    Column,
    Figure,
    Picture,
    Table,
    Tile,
    embed_png,
    environment,
    picture_key,
    with_note,
)
from fedfms.records.history import NOT_ANNOTATED, NOTHING_RECORDED, WITHHELD
from fedfms.records.layout import (
    BEST_MODEL,
    EVALUATION,
    GLOBAL_MODEL,
    GUARD,
    RECIPE,
    REPORT_HTML,
    REPORT_MD,
    ROUNDS,
    SUMMARY,
)
from fedfms.records.rows import EvaluationRow
from fedfms.report import figures, words
from fedfms.report.collect import Result, load_result
from fedfms.report.summary import Mean, Part, SiteFacts, Summary, change
from fedfms.report.writer import written_by

log = logging.getLogger(__name__)

LIMITS = [
    "Research software. Not a medical device, and not for decisions about a patient.",
    "Each site is scored on its own validation cases. Sites differ in scanners, patients and "
    "annotators, so a difference between two sites is not a difference of the model alone.",
    "A score of few cases moves a lot with one case; the spread and the number of cases stand "
    "beside each mean.",
    "No image leaves a site, but averaging alone does not prove that nothing about the training "
    "images can be inferred from what travels. A site's policy can clip its contribution and add "
    "noise to it.",
]


_ROLES = {"train": "trains", "holdout": "unseen"}
_MODELS = {"final": "Final model", "best": "Best model"}
_METRIC_COLUMNS = {
    "dice": ("Dice", "over cases"),
    "iou": ("IoU", "over cases"),
    "hd95": ("HD95", "over cases"),
    "dice_slice": ("Dice", "over slices"),
    "iou_slice": ("IoU", "over slices"),
}

_BEST_NOTE = (
    " The best model is the one with the highest validation score of the training sites during "
    "training, each model compared with the best before it over the sites that scored both; so "
    "its own score here is on the optimistic side."
)
_EVALUATION_NOTE = (
    "Mean ± standard deviation over each site's validation cases, or over their slices, at the "
    "images' own resolution; over cases in 3-D for volumes. HD95 is the 95th percentile of the "
    "distances between the two outlines (mm; px where files have no voxel size), lower is better. "
    "n is given where it is not the number of cases. Empty counts cases without foreground in both "
    "annotation and prediction; they are left out of every mean. Where one of "
    "the two is empty, Dice and IoU are 0 and HD95 is the diagonal of the image."
)


def render(results: Path) -> None:
    """Write report.html and report.md into a results folder, replacing earlier ones.

    Raises:
        FederationError: `results` is no results folder (`no-results`).
    """
    page = _page(load_result(results))
    templates = environment("fedfms.report", "fedfms.pages")
    write_together(
        {
            results / name: templates.get_template(f"{name}.j2").render(page)
            for name in (REPORT_HTML, REPORT_MD)
        }
    )
    log.info("report of %d sites written", len(page["legend"]))


def _page(result: Result) -> dict[str, Any]:
    """Everything that the two templates show, already in words."""
    summary, recipe = result.summary, result.recipe
    job = summary.job
    method = str(recipe.get("method", ""))
    name, explained = words.method(method, recipe.get("adapter_blocks"))
    backbone = words.BACKBONES.get(str(recipe.get("backbone")), str(recipe.get("backbone", "")))
    on_sam = "" if recipe.get("backbone") == NO_BACKBONE else f" on SAM {backbone}".rstrip()
    classes = words.class_names(recipe.get("classes", ()))
    return {
        "title": _title(summary) + (f": {classes}" if classes else ""),
        "subtitle": name + on_sam + (f": {explained}" if explained else ""),
        "job": str(job.name or job.id or "job"),
        "when": words.moment(job.started),
        "status": "stopped on request" if job.status == "aborted" else job.status,
        "notices": _notices(summary) + _left_out(summary) + _guard_notices(result),
        "tiles": _tiles(summary),
        "overview": _overview(summary),
        "legend": figures.styles(result),
        "curves": _curves(result),
        "evaluations": _evaluations(result),
        "pictures": _pictures(result),
        "picture_key": picture_key(recipe.get("classes") or ()),
        "costs": [_communication(result), _training(summary)],
        "missed": _missed(summary),
        "guarded": _guarded(result),
        "guard_said": _guard_said(result),
        "recipe": [
            (key, _plain(value)) for key, value in recipe.items() if key != "backbone_sha256"
        ],
        "versions": _versions(summary),
        "method": method,
        "files": [
            name
            for name in (GLOBAL_MODEL, BEST_MODEL, RECIPE, ROUNDS, EVALUATION, GUARD, SUMMARY)
            if (result.folder / name).is_file()
        ],
        "limits": LIMITS,
        "writer": written_by(),
    }


def _title(summary: Summary) -> str:
    sites = summary.sites.values()
    training = [values for values in sites if values.role == "train"]
    if summary.rounds.done or any(values.rounds_accepted for values in sites):
        took_part = sum(values.rounds_accepted > 0 for values in training)
        return f"Segment Anything fine-tuned by {_of(took_part, len(training))}"
    evaluated = sum(values.evaluated for values in sites)
    return f"Segment Anything evaluated at {_of(evaluated, len(sites))}"


def _left_out(summary: Summary) -> list[str]:
    """How many cases sites left out, by reason where a site tells it."""
    said = []
    for site, values in summary.sites.items():
        if values.left_out:
            by_reason = [f"{count} {reason}" for reason, count in values.left_out_by_reason.items()]
            reasons = f" ({', '.join(by_reason)})" if by_reason else ""
            said.append(f"{site} left out {words.numerals(values.left_out, 'case')}{reasons}")
    if not said:
        return []
    return [f"Of cases that cannot be used {words.listing(said)}; which, only the site knows."]


def _of(some: int, sites: int) -> str:
    """`3 sites`, or `2 of 3 sites`."""
    return words.numerals(sites, "site") if some == sites else f"{some} of {sites} sites"


def _notices(summary: Summary) -> list[str]:
    notices = []
    several = len(summary.parts) > 1
    done, planned = summary.rounds.done, summary.rounds.planned
    rounds = f"{done} of {planned} rounds were completed" if planned else f"{done} rounds"
    if summary.job.status != "completed":
        what = {
            "aborted": "The job was stopped on request",
            "failed": "The job failed",
        }.get(summary.job.status, "The records end before the job did")
        notices.append(f"{what}: {rounds}.")
    elif planned and 0 < done < planned:
        notices.append(f"{rounds}.")
    if stale := _stale(summary):
        notices.append(
            f"There is no final evaluation of {words.listing(stale)}; the scores shown instead are "
            "of the last round in which each was scored, before that round's training. Means and "
            "the lowest site are of sites that stand with the same round."
        )
    if several:
        notices.append("Not all scores are of the same classes, so each class is told by itself.")
    for part in summary.parts:
        if not part.dice.after.sites:
            of_what = f" of {words.class_names(part.classes)}" if several else ""
            notices.append(f"No training site reported a Dice{of_what} after training.")
    for site in words.silent_sites(summary):
        what = "never answered a round"
        if summary.sites[site].reported:
            what = "answered, and none of its answers was accepted"
        notices.append(f"{site} {what}; nothing of it is in this model.")
    if count := summary.unreadable_records:
        notices.append(
            f"{words.numerals(count, 'record')} of this job could not be read and "
            f"{'is' if count == 1 else 'are'} left out."
        )
    return notices


def _stale(summary: Summary) -> list[str]:
    """Sites whose last known score is of a round, for want of a final evaluation."""
    return [
        site
        for site in summary.sites
        if any(p.sites[site].after_is not in (None, "final") for p in summary.parts)
    ]


def _of_class(summary: Summary, part: Part) -> str:
    """`, anterior` where each class is told by itself."""
    return f", {words.class_names(part.classes)}" if len(summary.parts) > 1 else ""


def _part_tiles(summary: Summary, part: Part) -> list[Tile]:
    sites, of_class = summary.sites, _of_class(summary, part)
    after, gain = part.dice.after, part.dice.gain

    def cases(names: Sequence[str], what: str) -> str:
        return words.numerals(sum(sites[name].cases or 0 for name in names), what)

    tiles = []
    if after.sites:
        before = (
            f"{words.score(gain.before)} before training; " if gain.sites == after.sites else ""
        )
        who = _of(len(after.sites), len(summary.training))
        caption = f"{before}{who}, {cases(after.sites, 'validation case')}"
        tiles.append(Tile(f"Mean Dice, training sites{of_class}", words.score(after.mean), caption))
    unseen = [site for site, values in sites.items() if values.role != "train"]
    for site in unseen[:2]:
        dice = part.sites[site]
        if dice.after is not None:
            has_before = dice.round_0 is not None
            before = f"{words.score(dice.round_0)} before training; " if has_before else ""
            which = "" if dice.after_is == "final" else f"; {dice.after_is}"
            caption = f"{before}{site}, {cases([site], 'case')}, never trained{which}"
            tiles.append(Tile(f"Dice, unseen site{of_class}", words.score(dice.after), caption))
    if worst := part.worst_site:
        caption = f"{worst.site}, {cases([worst.site], 'validation case')}"
        tiles.append(Tile(f"Lowest Dice of a site{of_class}", words.score(worst.dice), caption))
    return tiles


def _tiles(summary: Summary) -> list[Tile]:
    sites, moved = summary.sites, summary.bytes
    tiles = [tile for part in summary.parts for tile in _part_tiles(summary, part)]
    if moved.total:
        caption = f"{words.size(moved.down)} to the sites, {words.size(moved.up)} back"
        tiles.append(Tile("Moved in all rounds", words.size(moved.total), caption))
    if summary.job.seconds is not None:
        took_part = sum(v.rounds_accepted > 0 or v.evaluated for v in sites.values())
        rounds = words.numerals(summary.rounds.done, "round")
        caption = f"{rounds}, {_of(took_part, len(sites))}, start to last record"
        tiles.append(Tile("Duration", words.duration(summary.job.seconds), caption))
    return tiles


def _overview(summary: Summary) -> list[Table]:
    """Dice by site: one table, or one of each class where scores are not of the same classes."""
    has_best = any(v.best is not None for p in summary.parts for v in p.sites.values())
    tables = [_part_overview(summary, part, has_best) for part in summary.parts]
    note = (
        f"{summary.measure}. An unseen site evaluates and never trains. Withheld: a site does "
        "not let out the score of too few cases. The mean counts each site once, whatever its "
        "number of cases; where it is over fewer than all training sites their number stands below "
        "it." + (_BEST_NOTE if has_best else "")
    )
    return with_note(tables, note)


def _part_overview(summary: Summary, part: Part, has_best: bool) -> Table:
    worst = part.worst_site.site if part.worst_site else None
    rows = []
    for site, values in part.sites.items():
        about = summary.sites[site]
        after = values.after
        remark, shown = "", words.score(after)
        if after is None and values.note == WITHHELD:
            shown = "withheld"
        elif after is None and values.note == NOT_ANNOTATED:
            shown = "not annotated"
        elif after is None:
            remark = words.plain_reason(values.note)
        elif values.after_is != "final":
            remark = str(values.after_is)
        partly = [name for name in about.not_annotated if name not in part.classes]
        rows.append(
            [
                Cell(
                    site,
                    tag="lowest" if site == worst else "",
                    small=f"does not annotate {words.class_names(partly)}"
                    if partly and len(summary.parts) == 1
                    else "",
                ),
                Cell(_ROLES[about.role]),
                Cell(words.count(about.cases)),
                Cell(words.score(values.round_0)),
                Cell(shown, small=remark),
                Cell(words.change(change(values.round_0, after))),
                *([Cell(words.score(values.best))] if has_best else []),
                Cell(words.count(len(about.missed))),
            ]
        )
    of_class = _of_class(summary, part)
    return Table(
        f"Dice by site{of_class}",
        [
            Column("Site", number=False),
            Column("Role", number=False),
            Column("Cases", "validation"),
            Column("Before training", "Dice"),
            Column("Last known" if _stale(summary) else "Final model", "Dice"),
            Column("Change", "Dice"),
            *([Column("Best model", "Dice")] if has_best else []),
            Column("Missed", "rounds"),
        ],
        rows,
        _total(summary, part, has_best),
    )


def _total(summary: Summary, part: Part, has_best: bool) -> list[Cell]:
    """Means over training sites; a column that is over fewer of them says over how many."""
    training = len(summary.training)
    dice = part.dice
    gain, both = dice.gain, dice.best_against_final

    def over_sites(having: Sequence[str]) -> str:
        return _of(len(having), training) if 0 < len(having) < training else ""

    def over_training(mean: Mean) -> Cell:
        return Cell(words.score(mean.mean), small=over_sites(mean.sites))

    cells = [
        Cell("Mean of the training sites", span=3),
        over_training(dice.round_0),
        over_training(dice.after),
        Cell(
            words.change(gain.change),
            small=""
            if gain.sites == dice.after.sites == dice.round_0.sites or not gain.sites
            else f"of {words.listing(gain.sites)}",
        ),
    ]
    if has_best:
        best = over_training(dice.best)
        if both.sites and dice.best.sites != dice.after.sites:
            said = f"final model there {words.score(both.final)}"
            if both.sites != dice.best.sites:
                said = (
                    f"at {words.listing(both.sites)}, best {words.score(both.best)}, final "
                    f"{words.score(both.final)}"
                )
            best = dataclasses.replace(best, small="; ".join(filter(None, [best.small, said])))
        cells.append(best)
    return [*cells, Cell("")]


def _curves(result: Result) -> list[Figure]:
    stale = bool(_stale(result.summary))
    drawn: list[tuple[str, str, str]] = []
    for number, part in enumerate(result.summary.parts):
        of_class = _of_class(result.summary, part)
        drawn += [
            (
                f"Dice before and after{of_class}",
                "Dice of each site's validation cases before training (open) and "
                f"{'in its last recorded round' if stale else 'with the final model'} (filled). "
                "Dashed: a site that never trained.",
                figures.before_and_after(result, number),
            ),
            (
                f"Dice by round{of_class}",
                "Dice of each site's validation cases after that many rounds of training"
                + ("" if stale else "; the last point is the final evaluation")
                + f". A gap is a round that a site missed.{_evaluated(result.recipe)}",
                figures.dice_by_round(result, number),
            ),
            (
                f"Dice by data moved{of_class}",
                "The same scores against the tensor bytes that all sites together had received and "
                "sent until that model existed.",
                figures.dice_by_bytes(result, number),
            ),
        ]
    sites = result.summary.sites.values()
    unlike = len({tuple(v.not_annotated) for v in sites if v.role == "train"}) > 1
    annotated = ", over the classes that it annotates" if unlike else ""
    losses = {
        "bce": "binary cross-entropy",
        "dice_bce": "sum of Dice loss and binary cross-entropy",
    }
    caption = (
        f"Mean of the {losses.get(str(result.recipe.get('loss')), 'loss')} over the steps of a "
        f"round, at each site on its own training slices{annotated}. Rounds are counted from 0."
    )
    drawn.append(("Training loss by round", caption, figures.loss_by_round(result)))
    return [Figure(title, caption, Markup(svg)) for title, caption, svg in drawn if svg]


def _evaluated(recipe: dict[str, Any]) -> str:
    """In which rounds sites evaluate, where these are not all."""
    first, every = figures.evaluated_rounds(recipe)
    if first:
        after = words.numerals(first, "round")
        return f" Sites evaluate after {after} and then every {words.numerals(every, 'round')}."
    return "" if every == 1 else f" Sites evaluate before training and every {every} rounds."


def _evaluations(result: Result) -> list[Table]:
    tables = []
    for model in dict.fromkeys(row.model for row in result.evaluation):
        rows = [row for row in result.evaluation if row.model == model]
        trained = next((row.round for row in rows if row.round is not None), None)
        if model != "final" and trained == result.summary.rounds.done:
            trained = None  # this says how long the job ran, not when the model was best
        tables.append(_evaluation(model, rows, trained))
    note = _EVALUATION_NOTE
    if result.recipe.get("paper_compat"):
        note += " The scores over slices follow FedFMS (paper_compat), where an empty slice counts."
    if len(tables) == 2 and tables[0].rows == tables[1].rows:
        del tables[1]
        note += " The best model has exactly these scores as well."
    return with_note(tables, note)


def _evaluation(model: str, rows: Sequence[EvaluationRow], trained: int | None) -> Table:
    metrics = [m for m in _METRIC_COLUMNS if any(row.metric == m for row in rows)]
    several = len({row.class_name for row in rows if row.class_name}) > 1
    body = []
    for site, role in dict.fromkeys((row.site, row.role) for row in rows):
        own = [row for row in rows if row.site == site]
        for class_name in dict.fromkeys(row.class_name for row in own):
            scores = {row.metric: row for row in own if row.class_name == class_name}
            cells = [Cell(site, tag="unseen" if role != "train" else "")]
            if several:
                cells.append(Cell(class_name.replace("_", " ") or words.NONE))
            if not class_name:
                cells.append(Cell(words.plain_reason(own[0].note), span=len(metrics) + 2))
            elif not scores.keys() - {""}:
                cells.append(Cell(scores[""].note, span=len(metrics) + 2))
            else:
                cells += _scores(scores, metrics)
            body.append(cells)
    columns = [Column("Site", number=False)]
    if several:
        columns.append(Column("Class", number=False))
    columns += [Column("Cases", "with a Dice"), Column("Empty", "no mask")]
    columns += [Column(*_METRIC_COLUMNS[metric]) for metric in metrics]
    after = f" after {words.numerals(trained, 'round')} of training" if trained else ""
    return Table(
        f"{_MODELS.get(model, model)}{after}",
        columns,
        body,
    )


def _scores(scores: dict[str, EvaluationRow], metrics: Sequence[str]) -> list[Cell]:
    dice = scores.get("dice")
    cases = dice.cases if dice else None
    cells = [Cell(words.count(cases)), Cell(words.count(dice.empty if dice else None))]
    for metric in metrics:
        row = scores.get(metric)
        if row is None:
            cells.append(Cell(words.NONE))
        elif row.mean is None:
            cells.append(Cell("withheld" if row.note.startswith("withheld") else "no value"))
        else:
            cells.append(
                Cell(
                    words.with_spread(row.mean, row.std, metric, row.unit),
                    small=", ".join(_remarks(row, cases)),
                )
            )
    return cells


def _remarks(row: EvaluationRow, cases: int | None) -> list[str]:
    of_few = [f"n = {words.count(row.cases)}"] if row.cases != cases else []
    return (["worst site"] if row.worst else []) + of_few


def _pictures(result: Result) -> dict[tuple[str, str], list[Picture]]:
    groups: dict[tuple[str, str], list[Picture]] = {}
    for entry in result.summary.pictures:
        path = (result.folder / entry.file).resolve()
        if path.is_relative_to(result.folder.resolve()) and path.is_file():
            key = entry.site, _MODELS.get(entry.model, entry.model).lower()
            picture = Picture(entry.file, embed_png(path))
            groups.setdefault(key, []).append(picture)
    return groups


def _communication(result: Result) -> Table:
    summary = result.summary
    rows = []
    for site, values in summary.sites.items():
        own = [row for row in result.rounds if row.site == site]
        asked = len(own)
        rows.append(
            [
                Cell(site),
                Cell(f"{values.rounds_accepted} of {asked}" if asked else words.NONE),
                Cell(_range([row.bytes_down for row in own])),
                Cell(_range([row.bytes_up for row in own])),
                Cell(words.size(values.bytes_down)),
                Cell(words.size(values.bytes_up)),
                Cell(words.size(values.bytes_down + values.bytes_up)),
            ]
        )
    moved = summary.bytes
    return Table(
        "Communication",
        [
            Column("Site", number=False),
            Column("Rounds", "answered"),
            Column("Received", "per round"),
            Column("Sent", "per round"),
            Column("Received", "all rounds"),
            Column("Sent", "all rounds"),
            Column("Both", "all rounds"),
        ],
        rows,
        [
            Cell("All sites", span=4),
            Cell(words.size(moved.down)),
            Cell(words.size(moved.up)),
            Cell(words.size(moved.total)),
        ],
        "Bytes of the tensors in the rounds whose answer was recorded, without protocol and "
        "encryption, and without the evaluations after the last round. 1 MB is 1 000 000 bytes.",
    )


def _range(values: Sequence[int | None]) -> str:
    present = [value for value in values if value]
    if not present:
        return words.NONE
    low, high = words.size(min(present)), words.size(max(present))
    return low if low == high else f"{low} to {high}"


def _training(summary: Summary) -> Table:
    sites = summary.sites
    phases = [p for p in PHASES if any(v.seconds.get(p) for v in sites.values())]
    rows = []
    for site, values in sites.items():
        rows.append(
            [
                Cell(site),
                Cell(words.count(values.training_cases)),
                Cell(words.count(values.training_slices)),
                *(_phase(values, phase) for phase in phases),
                Cell(words.count(values.micro_batch)),
            ]
        )
    return Table(
        "Training",
        [
            Column("Site", number=False),
            Column("Cases", "for training"),
            Column("Slices", "per epoch"),
            *(Column(phase.capitalize(), "time, memory") for phase in phases),
            Column("Micro-batch", "slices"),
        ],
        rows,
        note="Time at the site by phase, added over its rounds: prepare reads and slices the "
        "images, evaluate scores the received model, exchange reads and writes tensors. Below "
        "it the peak memory of the phase: of the training process, or of its GPU where it has one.",
    )


def _phase(values: SiteFacts, phase: str) -> Cell:
    seconds, peak = values.seconds.get(phase), values.peak_memory_bytes.get(phase)
    text = words.duration(seconds) if seconds else words.NONE
    return Cell(text, small=words.size(peak) if peak else "")


def _missed(summary: Summary) -> Table | None:
    missed = [(e.round, site, e.reason) for site, all_ in summary.missed.items() for e in all_]
    rows = [
        [Cell(str(number)), *_why(site, reason)]
        for number, site, reason in sorted(missed, key=lambda one: one[0])
    ]
    rows += [
        [Cell(f"{one.model} model", small="evaluation"), *_why(one.site, one.reason)]
        for one in summary.missed_evaluations
    ]
    if not rows:
        return None
    return Table(
        "Missed rounds",
        [Column("Round", number=False), Column("Site", number=False), Column("Why", number=False)],
        rows,
        note="Rounds are counted from 0, as in the logs and in rounds.csv. The round was averaged "
        "without this site's contribution; the site receives the global model again in the next. A "
        "model's evaluation that a site missed is missing in every mean over sites.",
    )


def _guarded(result: Result) -> Table | None:
    """What the guard of a round found of whom, a row each."""
    rows = [
        [Cell(str(one.round)), Cell(one.site), Cell(one.text)]
        for one in result.guard
        if one.findings
    ]
    if not rows:
        return None
    return Table(
        "What the guard found",
        [Column("Round", number=False), Column("Site", number=False), Column("What", number=False)],
        rows,
        note="Rounds are counted from 0. The server compares the differences of a round with one "
        f"another before it averages them; the figures of every answer are in {GUARD}.",
    )


def _guard_said(result: Result) -> str:
    """One sentence on all answers; empty where none was judged."""
    rows = result.guard
    if not rows:
        return ""
    times = [one.norm / one.usual_norm for one in rows if one.usual_norm > 0]
    cosines = [one.cosine for one in rows if one.cosine is not None]
    said = f"The server compared {words.numerals(len(rows), 'answer')} with the others of its round"
    if times:
        said += f"; the longest was {max(times):.2g} times as long as they let expect"
    if cosines:
        said += f"; the lowest cosine to their mean was {min(cosines):.2f}"
    return f"{said}."


def _guard_notices(result: Result) -> list[str]:
    sites = sorted({one.site for one in result.guard if one.findings})
    if not sites:
        return []
    rounds = len({one.round for one in result.guard if one.findings})
    return [
        f"The guard found answers of {words.listing(sites)} that stand out, in "
        f"{words.numerals(rounds, 'round')}; what it found and did is told below."
    ]


def _why(site: str, reason: str | None) -> list[Cell]:
    """The site, and in plain words why; below it what was recorded, where that says more."""
    plain = words.plain_reason(reason)
    recorded = "" if reason in (None, plain, NOTHING_RECORDED) else reason
    return [Cell(site), Cell(plain, small=recorded or "")]


def _versions(summary: Summary) -> list[tuple[str, str]]:
    job = summary.job
    lines = [
        ("job", str(job.id or words.NONE)),
        ("fedfms", str(job.fedfms_version or words.NONE)),
        ("fedfms, commit", job.fedfms_revision or "unknown"),
        ("container image, digest", job.image or "unknown"),
        ("NVIDIA FLARE", str(job.nvflare_version or words.NONE)),
        ("recipe, SHA-256 of its values", str(job.recipe_sha256 or words.NONE)),
        ("SAM checkpoint, SHA-256", str(job.backbone_sha256 or words.NONE)),
    ]
    for name, about in summary.files.items():
        lines.append((f"{name}, {words.size(about.bytes)}, SHA-256", str(about.sha256)))
    return lines


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)
