"""A study's finished runs to study.html, study.md, study.csv and study.tex.

study.html is one page that needs nothing else; its links lead to the runs' folders beside it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedfms.report import words as shown
from fedfms.report.parts import (
    PICTURE_KEY,
    SHADES,
    Cell,
    Column,
    Figure,
    Picture,
    Table,
    Tile,
    embed_png,
    environment,
)
from fedfms.study import figures, words
from fedfms.study.answer import (
    ALL,
    FAILS_BELOW,
    FEWEST_PATIENTS,
    Answer,
    Communication,
    Gap,
    LocalCell,
    Metric,
    Role,
    Score,
    ScoreLine,
    Training,
    read_study,
)
from fedfms.study.latex import document
from fedfms.study.numbers import csv_text, numbers
from fedfms.study.record import JOB_FOLDER, PICTURES_FOLDER, RUNS_FOLDER, Run, read_runs
from fedfms.study.statistics import RESAMPLES
from fedfms.study.tables import answer as answer_of

log = logging.getLogger(__name__)

STUDY_HTML, STUDY_MD, STUDY_CSV, STUDY_TEX = "study.html", "study.md", "study.csv", "study.tex"

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PICTURE = 8_000_000  # bytes; they are embedded in the page
_HASH_DIGITS = 12  # of a hash in a table; run.json has all 64
_RUNS_NAMED = 12  # in a notice

LIMITS = [
    "Research software. Not a medical device, and not for decisions about a patient.",
    "A study runs where the images of all its sites can be read. It tells what federated training "
    "would come to at these sites; it is no test of the network or of the people between them.",
    "Sites differ in scanners, patients and annotators, so a difference between two sites is not a "
    "difference of the model alone. Compare the rows of one column.",
    "Few seeds say little about the spread over seeds, and few patients make an interval too "
    "narrow.",
    "All runs take their recipe as it is: nothing was tuned for one way to train, which is no "
    "proof that each had its best.",
]

_MEASURE = (
    "A site's score is the mean over its cases, then over the classes; 3-D for volumes, at the "
    "images' own resolution; Dice and IoU in [0, 1]."
)
_ROLE_NOTES: dict[Role, str] = {
    "train": "Only validation cases: no run trained on them. One site alone: the model that this "
    "site trained.",
    "unseen": "All cases of a site, by models that never trained there. One site alone: mean over "
    "the models of the other sites; best: the one model of these that does best there, chosen "
    "with hindsight.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that the two templates show, already in words."""

    title: str
    subtitle: str
    meta: str
    notices: list[str]
    verdicts: dict[str, list[str]]
    tiles: list[Tile]
    measure: str
    scores: list[Table]
    gaps: list[Table]
    forests: list[Figure]
    no_gaps: str
    curves: list[Figure]
    local: list[Table]
    classes: list[Table]
    further: list[Table]
    costs: list[Table]
    pictures: dict[str, list[Picture]]  # by "FedMSA, site-4, unseen"
    picture_key: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    data: Table | None
    runs: Table | None
    files: list[str]
    limits: list[str]


def write_answer(study_folder: Path) -> None:
    """Write study.html, study.md, study.csv and study.tex from the runs that have finished.

    Earlier ones are replaced. All four are there in full before the first is put in its place.

    Raises:
        FederationError: the folder is no study (`no-study`), or a run in it is damaged (`no-run`).
    """
    found = answer_of(read_study(study_folder), read_runs(study_folder))
    page = _page(found)
    templates = environment("fedfms.study", "fedfms.report")
    texts = {
        name: templates.get_template(f"{name}.j2").render(page=page)
        for name in (STUDY_HTML, STUDY_MD)
    }
    texts[STUDY_CSV] = csv_text(numbers(found))
    texts[STUDY_TEX] = document(page.title, _for_paper(page))
    _write_together(study_folder, texts)
    log.info(
        "answer of %d of %d runs written", len(found.runs), len(found.runs) + len(found.missing)
    )


def _write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Write all files beside their places, then put them there."""
    scratch = {name: folder / f".{name}.{os.getpid()}" for name in texts}
    try:
        for name, text in texts.items():
            scratch[name].write_text(text, encoding="utf-8", newline="")
        for name, path in scratch.items():
            path.replace(folder / name)
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)


def _page(found: Answer) -> Page:
    study = found.study
    return Page(
        title=study.title or study.name,
        subtitle=words.question(study),
        meta=_meta(found),
        notices=list(_notices(found)),
        verdicts=words.verdicts(found),
        tiles=_tiles(found),
        measure=_MEASURE,
        scores=[t for role in ("train", "unseen") if (t := _scores(found, role, "dice"))],
        gaps=_gap_tables(found),
        forests=_forests(found),
        no_gaps="" if found.gaps else _why_no_gaps(found),
        curves=_curves(found),
        local=_local(found),
        classes=_classes(found),
        further=[
            table
            for metric in ("iou", "hd95")
            for role in ("train", "unseen")
            if (table := _scores(found, role, metric))
        ],
        costs=_costs(found),
        pictures=_pictures(found),
        picture_key=PICTURE_KEY,
        facts=_facts(found),
        data=_data(found),
        runs=_runs(found),
        files=[STUDY_CSV, STUDY_TEX, STUDY_MD],
        limits=LIMITS,
    )


def _for_paper(page: Page) -> list[tuple[str, Table]]:
    groups = {
        "dice": page.scores,
        "difference": page.gaps,
        "local": page.local,
        "class": page.classes,
        "further": page.further,
        "cost": page.costs,
    }
    return [
        (f"{name}-{place}", table)
        for name, tables in groups.items()
        for place, table in enumerate(tables, start=1)
    ]


# ------------------------------------------------------------------------------------ the summary


def _meta(found: Answer) -> str:
    done, planned = len(found.runs), len(found.study.planned)
    parts = [f"Study {found.study.name}", f"{done} of {shown.numerals(planned, 'run')}"]
    if found.runs:
        parts.append(shown.moment(min(run.record.started for run in found.runs)))
    return " · ".join(parts)


def _notices(found: Answer) -> Iterator[str]:
    if found.missing:
        named = ", ".join(found.missing[:_RUNS_NAMED])
        rest = len(found.missing) - _RUNS_NAMED
        more = f" and {rest} more" if rest > 0 else ""
        done = len(found.runs)
        yield (
            f"This study is incomplete: {done} of "
            f"{shown.numerals(len(found.study.planned), 'planned run')} "
            f"{'has' if done == 1 else 'have'} finished, and what is shown is of those. "
            f"Missing: {named}{more}."
        )
    if found.strangers:
        yield (
            f"{shown.numerals(len(found.strangers), 'run')} below {RUNS_FOLDER}/ "
            "are not in the study's plan and count nowhere: "
            f"{', '.join(found.strangers[:_RUNS_NAMED])}."
        )
    for site in found.study.sites:
        facts = [run.record.sites[site] for run in found.runs if site in run.record.sites]
        for what, values in (
            ("images or labels", {fact.manifest_sha256 for fact in facts}),
            ("site.yml", {fact.config_sha256 for fact in facts}),
        ):
            if len(values) > 1:
                yield (
                    f"The {what} of {site} changed between runs ({len(values)} states), so its "
                    "scores are not of the same data. Remove the runs of the old state and start "
                    "the study again."
                )
    for what, count in (
        ("SAM checkpoint", len({run.record.backbone_sha256 for run in found.runs})),
        ("set of versions", len({tuple(sorted(r.record.versions.items())) for r in found.runs})),
    ):
        if count > 1:
            yield f"The runs did not all use the same {what}: there are {count}. See What ran."


def _tiles(found: Answer) -> list[Tile]:
    tiles = []
    for method in found.study.methods[:2]:
        for role, where in (("unseen", "unseen sites"), ("train", "training sites")):
            line = found.line(method, "federated", role)  # type: ignore[arg-type]
            if line is not None:
                others = []
                for regime in ("central", "local"):
                    other = found.line(method, regime, role)  # type: ignore[arg-type]
                    if other is not None:
                        same = set(other.sites) == set(line.sites)
                        over = "" if same else f" over {shown.numerals(len(other.sites), 'site')}"
                        others.append(
                            f"{words.REGIMES[regime]} {shown.score(other.mean.value)}{over}"
                        )
                sites = f"mean of {shown.numerals(len(line.sites), 'site')}"
                tiles.append(
                    Tile(
                        f"Dice, {words.method(method)}, {where}",
                        shown.score(line.mean.value),
                        "; ".join([*others, sites]),
                    )
                )
                break
    for saving in found.savings[:1]:
        there = words.quantity(saving.other_needs, saving.unit)
        tiles.append(
            Tile(
                f"{words.method(saving.method)}, a site and round",
                words.quantity(saving.needs, saving.unit),
                f"{words.method(saving.other)} {there}; both ways",
            )
        )
    if not found.savings and found.communication:
        moved = found.communication[0]
        total = moved.total_down.mean + moved.total_up.mean
        caption = f"{words.method(moved.method)}, all sites and rounds, mean of runs"
        tiles.append(Tile("Moved by a federated run", shown.size(total), caption))
    if found.runs:
        seconds = sum(run.record.seconds for run in found.runs)
        caption = f"{shown.numerals(len(found.runs), 'run')}, one after the other"
        tiles.append(Tile("Time of all runs", shown.duration(seconds), caption))
    return tiles


# ----------------------------------------------------------------------------------------- scores


def _ways(found: Answer, role: Role) -> list[tuple[str, str, bool]]:
    """(method, regime, best) of the rows, in order."""
    ways = [
        (method, regime, best)
        for method in found.study.methods
        for regime in found.study.regimes
        for best in (False, True)
    ]
    return [way for way in ways if not way[2] or (way[1] == "local" and role == "unseen")]


def _way(method: str, regime: str, best: bool) -> Cell:
    how = words.REGIMES.get(regime, regime)
    return Cell(words.method(method), small=f"{how}, best" if best else how)


def _lines(found: Answer, role: Role, metric: Metric, class_name: str) -> list[ScoreLine]:
    """The lines of one table; of HD95 a line for each unit."""
    return [
        line
        for way in _ways(found, role)
        for line in found.scores
        if (line.method, line.regime, line.best) == way
        and (line.role, line.metric, line.class_name) == (role, metric, class_name)
    ]


_METRICS: dict[Metric, str] = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}


def _scores(found: Answer, role: Role, metric: Metric) -> Table | None:
    lines = _lines(found, role, metric, ALL)
    if not lines:
        return None
    cases = {entry.site: entry for entry in found.cases if entry.role == role}
    sites = [site for site in found.study.sites if site in cases]
    rows = []
    for line in lines:
        scores = [line.sites.get(site) for site in sites]
        worst = line.sites[line.worst] if line.worst else None
        rows.append(
            [
                _way(line.method, line.regime, line.best),
                *(_score(found, score, metric, line.unit) for score in scores),
                _mean(found, line, len(sites)),
                Cell(_plain_score(worst, metric, line.unit), small=line.worst or ""),
            ]
        )
    note = _how_averaged(found) + _ROLE_NOTES[role] if metric == "dice" else ""
    if metric == "hd95" and role == "unseen":
        note = (
            "Scores, cases and spread as in the tables of Dice. HD95 is the 95th percentile of the "
            "distances between the two outlines, lower is better; mm and px are never averaged "
            "together. Where one of annotation and prediction is empty it is the diagonal of the "
            "image."
        )
    empty = [
        f"{entry.without_value} at {entry.site}" for entry in cases.values() if entry.without_value
    ]
    if empty and metric == "dice":
        note += (
            " Without a score, because nothing was drawn and nothing found: "
            f"{shown.listing(empty)}."
        )
    return Table(
        f"{_METRICS[metric]} at {words.ROLES[role]}",
        [
            Column("Method", "trained", number=False),
            *(Column(site, shown.numerals(cases[site].cases, "case")) for site in sites),
            Column("Mean", "of sites"),
            Column("Worst site"),
        ],
        rows,
        note=note,
    )


def _how_averaged(found: Answer) -> str:
    seeds = len(found.study.seeds)
    spread = (
        "There is one seed, so no spread over seeds."
        if seeds == 1
        else f"Mean over folds, then mean ± sample standard deviation over {seeds} seeds, or over "
        "as many as are named."
    )
    return f"{spread} The last columns take each site once. Cases are counted below a site's name. "


def _score(found: Answer, score: Score | None, metric: Metric, unit: str) -> Cell:
    if score is None:
        return Cell(shown.NONE)
    few = score.seeds < len(found.study.seeds)
    return Cell(
        shown.with_spread(score.value, score.spread, metric, unit),
        small=shown.numerals(score.seeds, "seed") if few else "",
    )


def _mean(found: Answer, line: ScoreLine, sites: int) -> Cell:
    remarks = []
    if len(line.sites) < sites:
        remarks.append(f"{len(line.sites)} of {shown.numerals(sites, 'site')}")
    if line.mean.spread is not None and line.mean.seeds < len(found.study.seeds):
        remarks.append(f"± of {shown.numerals(line.mean.seeds, 'seed')}")
    text = shown.with_spread(line.mean.value, line.mean.spread, line.metric, line.unit)
    return Cell(text, small=", ".join(remarks))


def _plain_score(score: Score | None, metric: Metric, unit: str) -> str:
    return shown.NONE if score is None else shown.with_spread(score.value, None, metric, unit)


def _classes(found: Answer) -> list[Table]:
    if len(found.classes) < 2:
        return []
    tables = []
    roles: tuple[Role, ...] = ("train", "unseen")
    for role in roles:
        by_class = {name: _lines(found, role, "dice", name) for name in found.classes}
        if not any(by_class.values()):
            continue
        rows = []
        for way in _ways(found, role):
            cells = []
            sites = len({entry.site for entry in found.cases if entry.role == role})
            for lines in by_class.values():
                line = next((x for x in lines if (x.method, x.regime, x.best) == way), None)
                cells.append(Cell(shown.NONE) if line is None else _mean(found, line, sites))
            if any(cell.text != shown.NONE for cell in cells):
                rows.append([_way(*way), *cells])
        tables.append(
            Table(
                f"Dice of each class, {words.ROLES[role]}",
                [
                    Column("Method", "trained", number=False),
                    *(Column(name.replace("_", " "), "mean of sites") for name in found.classes),
                ],
                rows,
            )
        )
    return _with_note(
        tables,
        "Mean over sites, each once, ± sample standard deviation over seeds. Each site's value is "
        "in study.csv.",
    )


# ------------------------------------------------------------------------------------------- gaps


def _gap_tables(found: Answer) -> list[Table]:
    overall = [gap for gap in found.gaps if gap.site == ALL]
    if not overall:
        return []
    tested = sum(gap.p is not None for gap in overall)
    tables = [
        Table(
            "Federated minus other training",
            [
                Column("Federated", number=False),
                Column("Minus", number=False),
                Column("At", number=False),
                Column("Difference", "Dice"),
                Column("95 % interval", "Dice"),
                Column("p", "Wilcoxon"),
                Column("p", "Holm"),
                Column("Patients", "n"),
                Column("Cases", "n"),
            ],
            [
                [
                    Cell(words.method(gap.method)),
                    Cell(words.against(gap)),
                    Cell(
                        words.ROLES[gap.role],
                        small=f"{gap.sites} of {shown.numerals(len(found.study.sites), 'site')}"
                        if gap.sites < len(found.study.sites)
                        else "",
                    ),
                    Cell(shown.change(gap.difference)),
                    Cell(words.interval(gap.interval)),
                    Cell(words.p_value(gap.p)),
                    Cell(words.p_value(gap.p_holm)),
                    Cell(shown.count(gap.patients)),
                    Cell(shown.count(gap.cases)),
                ]
                for gap in overall
            ],
            note="A difference is taken case by case on the cases that both scored, as mean over "
            "classes, folds and seeds, then as mean over sites, each once; so intervals and p "
            "values speak of other patients of these sites, who count as independent, and not of "
            "other seeds, folds or sites. Interval: percentile bootstrap, "
            f"{shown.count(RESAMPLES)} times, seeded, patients drawn within each site; with few "
            "patients a site it is too narrow, and with a single one there is none. p: two-sided "
            "Wilcoxon signed-rank test over the patients of all sites, each patient once and zero "
            f"differences left out. Holm: corrected for the {tested} tests of this table.",
        )
    ]
    by_site = [
        table
        for method in found.study.methods
        for kinds in (("central", "local", "local-best"), ("method",))
        if (table := _gaps_by_site(found, method, kinds)) is not None
    ]
    return tables + _with_note(
        by_site,
        "Difference of Dice with its 95 % interval, for which a site needs "
        f"{FEWEST_PATIENTS} patients; not tested. A star: the interval excludes 0. Other sites "
        "alone: mean over their models.",
    )


def _gaps_by_site(found: Answer, method: str, kinds: Sequence[str]) -> Table | None:
    own = [
        gap
        for gap in found.gaps
        if gap.method == method and gap.site != ALL and gap.against in kinds
    ]
    columns = list(dict.fromkeys((gap.against, gap.other, gap.role) for gap in own))
    if not columns:
        return None
    by_place = {((gap.against, gap.other, gap.role), gap.site): gap for gap in own}
    heads = [
        words.against(next(g for g in own if _column(g) == column)).removeprefix("federated ")
        for column in columns
    ]
    rows = []
    for site in found.study.sites:
        gaps = [by_place.get((column, site)) for column in columns]
        if any(gaps):
            rows.append([Cell(site), *(_gap_cell(gap) for gap in gaps)])
    return Table(
        f"Federated {words.method(method)} minus other "
        f"{'methods' if 'method' in kinds else 'training'}, site by site",
        [
            Column("Site", number=False),
            *(
                Column(f"− {head}", "trained there" if column[2] == "train" else "unseen there")
                for head, column in zip(heads, columns, strict=True)
            ),
        ],
        rows,
    )


def _with_note(tables: Sequence[Table], note: str) -> list[Table]:
    """The same tables, the note below the last."""
    return [*tables[:-1], *(dataclasses.replace(table, note=note) for table in tables[-1:])]


def _column(gap: Gap) -> tuple[str, str, Role]:
    return gap.against, gap.other, gap.role


def _gap_cell(gap: Gap | None) -> Cell:
    if gap is None:
        return Cell(shown.NONE)
    star = "*" if gap.interval is not None and gap.interval.excludes_zero else ""
    small = words.interval(gap.interval) if gap.interval else "no interval"
    return Cell(shown.change(gap.difference) + star, small=small)


def _forests(found: Answer) -> list[Figure]:
    overall = [gap for gap in found.gaps if gap.site == ALL]
    groups = (
        ("Federated minus centralized", ("central",), "federated is better"),
        ("Federated minus one site alone", ("local", "local-best"), "federated is better"),
        ("Federated, method minus method", ("method",), "the first is better"),
    )
    drawn = []
    for title, kinds, better in groups:
        gaps = [gap for gap in overall if gap.against in kinds]
        svg = figures.forest(found, gaps, better, f"forest-{kinds[0]}")
        if svg:
            caption = (
                "Mean difference of Dice over sites and its 95 % interval. Circle: at sites that "
                "trained; diamond: at unseen sites."
            )
            drawn.append(Figure(title, caption, Markup(svg)))
    return drawn


def _why_no_gaps(found: Answer) -> str:
    if not found.runs:
        return "No run has finished yet."
    return (
        "No two ways to train have scored the same cases yet: a comparison needs federated runs "
        "and centralized or local runs of the same method, fold and seed."
    )


# ------------------------------------------------------------------------------ learning and local


def _curves(found: Answer) -> list[Figure]:
    drawn = []
    for place, method in enumerate(found.study.methods):
        own = [curve for curve in found.curves if curve.method == method]
        svg = figures.dice_by_round(own, f"rounds-{place}")
        if svg:
            drawn.append(
                Figure(
                    f"{words.method(method)}: Dice by round",
                    "Mean validation Dice of the training sites after so many rounds of training, "
                    "mean over folds and seeds; the last point is the final model. Band: lowest to "
                    "highest fold and seed (one site alone: seed, each over the models of all "
                    "sites).",
                    Markup(svg),
                )
            )
    svg = figures.dice_by_bytes(found, "bytes")
    if svg:
        drawn.append(
            Figure(
                "Federated: Dice by data moved",
                "The same scores against the tensor bytes that all sites together had received and "
                "sent until that model existed; the untrained model is left out.",
                Markup(svg),
            )
        )
    return drawn


def _local(found: Answer) -> list[Table]:
    values = [cell.dice.value for cell in found.local]
    tables = []
    for method in found.study.methods:
        own = {(c.trained_at, c.scored_at): c for c in found.local if c.method == method}
        if not own:
            continue
        scored = [site for site in found.study.sites if any(at == site for _, at in own)]
        rows = []
        for trained in found.study.sites:
            cells = [own.get((trained, site)) for site in scored]
            if any(cells):
                rows.append([Cell(trained), *(_local_cell(cell, values) for cell in cells)])
        for role, label in (("train", "Federated, trained there"), ("unseen", "Federated, unseen")):
            line = found.line(method, "federated", role)  # type: ignore[arg-type]
            if line is not None:
                scores = [line.sites.get(site) for site in scored]
                rows.append([Cell(label), *(_shaded(score, values) for score in scores)])
        tables.append(
            Table(
                f"{words.method(method)}, trained at one site alone",
                [
                    Column("Trained at", number=False),
                    *(Column(site, "scored there") for site in scored),
                ],
                rows,
            )
        )
    return _with_note(
        tables,
        "Mean Dice over seeds: validation cases at the model's own site, all cases elsewhere. "
        "Below it how far federated training is ahead (+) or behind (−) on the same cases: at the "
        "own site where it trained, elsewhere in runs where that site is unseen if there are any. "
        f"Fails: federated is more than {FAILS_BELOW:.2f} ahead at another site.",
    )


def _local_cell(cell: LocalCell | None, values: Sequence[float]) -> Cell:
    if cell is None:
        return Cell(shown.NONE)
    small = "" if cell.behind is None else f"federated {shown.change(cell.behind)}"
    tag = "fails" if cell.fails else ""
    shade = _shade(cell.dice.value, values)
    return Cell(shown.score(cell.dice.value), small=small, tag=tag, shade=shade)


def _shaded(score: Score | None, values: Sequence[float]) -> Cell:
    if score is None:
        return Cell(shown.NONE)
    return Cell(shown.score(score.value), shade=_shade(score.value, values))


def _shade(value: float, values: Sequence[float]) -> int:
    """0 for the lowest of the values to SHADES - 1 for the highest."""
    low, high = min(values), max(values)
    place = (value - low) / (high - low) if high > low else 1.0
    return round(min(1.0, max(0.0, place)) * (SHADES - 1))


# ------------------------------------------------------------------------------------------ costs


def _costs(found: Answer) -> list[Table]:
    tables = []
    if found.communication:
        tables.append(_communication(found))
    if found.savings:
        tables += _savings(found)
    if found.training:
        tables.append(_training(found.training))
    return tables


def _communication(found: Answer) -> Table:
    return Table(
        "Communication of federated runs",
        [
            Column("Method", number=False),
            Column("To a site", "a round"),
            Column("From a site", "a round"),
            Column("All sites", "both ways, a run"),
            Column("Rounds", "a run"),
            Column("Target", "Dice"),
            Column("Reached", "runs"),
            Column("Rounds", "to the target"),
            Column("Moved", "to the target"),
        ],
        [_communication_row(moved) for moved in found.communication],
        note=words.target(found.study, found.communication)
        + " Reached: the first model whose mean validation Dice over the training sites is not "
        "below it. Tensor bytes of training sites in a round, and of all sites in a run, without "
        "protocol and encryption; mean over runs, with the range where they differ. 1 MB is "
        "1 000 000 bytes. Centralized and local training move no tensors.",
    )


def _communication_row(moved: Communication) -> list[Cell]:
    def ranged(cell: tuple[str, str]) -> Cell:
        return Cell(cell[0], small=cell[1])

    total = moved.total_down.mean + moved.total_up.mean
    aims = moved.target
    low_high = ("", "") if aims is None else (shown.score(aims.low), shown.score(aims.high))
    return [
        Cell(words.method(moved.method)),
        ranged(words.ranged(moved.down, "B")),
        ranged(words.ranged(moved.up, "B")),
        Cell(
            shown.size(total),
            small=f"{shown.size(moved.total_down.mean)} to, {shown.size(moved.total_up.mean)} from",
        ),
        ranged(words.ranged(moved.rounds, "rounds")),
        Cell(
            shown.score(aims.mean if aims else None),
            small="" if low_high[0] == low_high[1] else " to ".join(low_high),
        ),
        Cell(f"{len(moved.reached)} of {aims.n}" if aims else shown.NONE),
        ranged(words.ranged(moved.rounds_to_target, "rounds")),
        ranged(words.ranged(moved.bytes_to_target, "B")),
    ]


def _savings(found: Answer) -> list[Table]:
    tables = []
    for pair in dict.fromkeys((saving.method, saving.other) for saving in found.savings):
        name, other = (words.method(method) for method in pair)
        rows = [
            [
                Cell(_capital(saving.what)),
                Cell(words.quantity(saving.needs, saving.unit)),
                Cell(words.quantity(saving.other_needs, saving.unit)),
                Cell(words.share(saving.share)),
            ]
            for saving in found.savings
            if (saving.method, saving.other) == pair
        ]
        tables.append(
            Table(
                f"What federated {name} saves against {other}",
                [
                    Column("What", number=False),
                    Column(name),
                    Column(other),
                    Column("Saved", "share"),
                ],
                rows,
            )
        )
    return _with_note(
        tables,
        "Means over runs; to the target Dice over the runs that reached it. Below 0: it needs "
        "more. Memory: the largest of any run.",
    )


def _training(costs: Sequence[Training]) -> Table:
    phases = list(dict.fromkeys(phase for cost in costs for phase in cost.seconds))
    rows = []
    for cost in costs:
        cells = []
        for phase in phases:
            seconds, peak = cost.seconds.get(phase), cost.peak_memory_bytes.get(phase)
            text = shown.duration(seconds.mean) if seconds else shown.NONE
            cells.append(Cell(text, small=shown.size(peak) if peak else ""))
        wall = shown.duration(cost.wall_seconds.mean)
        name = _way(cost.method, cost.regime, False)
        rows.append([name, *cells, Cell(wall), Cell(shown.count(cost.wall_seconds.n))])
    return Table(
        "Time and peak memory of a run",
        [
            Column("Method", "trained", number=False),
            *(Column(_capital(phase), "time, memory") for phase in phases),
            Column("Wall clock", "a run"),
            Column("Runs", "n"),
        ],
        rows,
        note="Time of a phase: summed over the processes that did it (federated: all sites), mean "
        "over runs. Memory: the largest of one process, or of its GPU, in any run. A run of one "
        "site alone trains one site, the others all training sites.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --------------------------------------------------------------------------------------- pictures


def _pictures(found: Answer) -> dict[str, list[Picture]]:
    groups = {}
    for method in found.study.methods:
        for site in found.study.sites:
            run = _representative(found, method, site)
            if run is None:
                continue
            unseen = site not in run.record.key.trained_on
            where = "unseen" if unseen else "trained there"
            pictures = list(_site_pictures(found, run, site))
            if pictures:
                seed = run.record.key.seed
                groups[f"{words.method(method)}, {site}, {where}, seed {seed}"] = pictures
    return groups


def _representative(found: Answer, method: str, site: str) -> Run | None:
    """The federated run of the lowest seed where the site is unseen, else where it trained."""
    runs = [
        run
        for run in found.runs
        if (run.record.key.method, run.record.key.regime) == (method, "federated")
        and any(_picture_files(run, site))
    ]
    return min(
        runs,
        key=lambda run: (
            site in run.record.key.trained_on,
            run.record.key.seed,
            run.record.key.name,
        ),
        default=None,
    )


def _picture_files(run: Run, site: str) -> list[Path]:
    """The run's overlays of a site, in the order of their numbers: best, median, worst."""
    numbered = re.compile(re.escape(site) + r"-(\d+)\.png")
    found = []
    for path in (run.folder / PICTURES_FOLDER).glob("*.png"):
        match = numbered.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def _site_pictures(found: Answer, run: Run, site: str) -> Iterator[Picture]:
    for path in _picture_files(run, site):
        if path.stat().st_size <= _LARGEST_PICTURE and path.read_bytes().startswith(_PNG):
            name = f"{RUNS_FOLDER}/{run.record.key.name}/{PICTURES_FOLDER}/{path.name}"
            yield Picture(name, embed_png(path))


# -------------------------------------------------------------------------------------- what ran


def _facts(found: Answer) -> list[tuple[str, str]]:
    facts = []
    for versions in sorted({tuple(run.record.versions.items()) for run in found.runs}):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions)))
    for sha in sorted({run.record.backbone_sha256 for run in found.runs}):
        facts.append(("SAM checkpoint, SHA-256", sha))
    engines = sorted({run.record.engine for run in found.runs if run.record.engine})
    if engines:
        facts.append(("engine of federated runs", ", ".join(engines)))
    machines = {
        ", ".join(f"{name} {value}" for name, value in sorted(run.record.machine.items()))
        for run in found.runs
    }
    facts += [("training processes", machine) for machine in sorted(machines)]
    return facts


def _data(found: Answer) -> Table | None:
    rows = []
    for site in found.study.sites:
        facts = [run.record.sites[site] for run in found.runs if site in run.record.sites]
        for fact in dict.fromkeys(facts):
            rows.append(
                [
                    Cell(site),
                    Cell(shown.count(fact.cases)),
                    Cell(shown.count(fact.validation_cases)),
                    Cell(shown.count(facts.count(fact))),
                    Cell(fact.manifest_sha256, code=True),
                    Cell(fact.config_sha256, code=True),
                ]
            )
    if not rows:
        return None
    return Table(
        "Data of each site",
        [
            Column("Site", number=False),
            Column("Cases", "in all"),
            Column("Cases", "for validation"),
            Column("Runs", "that read them"),
            Column("Images and labels", "SHA-256", number=False),
            Column("site.yml", "SHA-256", number=False),
        ],
        rows,
        note="The first hash is over the names and SHA-256 of all image and label files.",
    )


def _runs(found: Answer) -> Table | None:
    if not found.runs:
        return None
    rows = []
    for run in found.runs:
        record = run.record
        manifests = ", ".join(
            f"{site} {facts.manifest_sha256[:_HASH_DIGITS]}"
            for site, facts in sorted(record.sites.items())
        )
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        report = f"{RUNS_FOLDER}/{record.key.name}/{JOB_FOLDER}/report.html"
        has_job = (run.folder / JOB_FOLDER / "report.html").is_file()
        rows.append(
            [
                Cell(record.key.name, link=f"{RUNS_FOLDER}/{record.key.name}/"),
                Cell("job report", link=report) if has_job else Cell(record.engine or shown.NONE),
                Cell(record.recipe_sha256[:_HASH_DIGITS], code=True),
                Cell(manifests, small=versions),
                Cell(shown.duration(record.seconds)),
            ]
        )
    return Table(
        "Runs",
        [
            Column("Run", "its folder", number=False),
            Column("Report", "or engine", number=False),
            Column("Recipe", f"SHA-256, {_HASH_DIGITS} of 64 digits", number=False),
            Column("Data of the sites", "SHA-256; versions below", number=False),
            Column("Time", "wall clock"),
        ],
        rows,
        note="Each folder's run.json has the hashes in full, and one of every other file there.",
    )
