"""Tables of scores: methods by sites, by class, and of models of one site; and learning curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from markupsafe import Markup

from fedfms.pages.parts import SHADES, Cell, Column, Figure, Table, with_note
from fedfms.report import words as shown
from fedfms_lab.study.answer import (
    ALL,
    FAILS_BELOW,
    ROLES,
    SLICE_METRICS,
    Answer,
    LocalCell,
    Metric,
    Role,
    Score,
    ScoreLine,
)
from fedfms_lab.study.page import figures, words

_ROLE_NOTES: dict[Role, str] = {
    "train": "Only validation cases: no run trained on them. One site alone: the model that this "
    "site trained.",
    "unseen": "All cases of a site, by models that never trained there. One site alone: mean over "
    "the models of the other sites; best: the one model of these that does best there, chosen "
    "with hindsight.",
}

_METRICS: dict[Metric, str] = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "dice_slice": "Dice of slices",
    "iou_slice": "IoU of slices",
}


def score_tables(found: Answer, metric: Metric) -> list[Table]:
    """Tables of one score: over the classes, or class by class where sites differ in them."""
    groups = [ALL]
    if words.by_class(found):
        groups = [*found.classes, *([ALL] if len(found.common) > 1 else [])]
    tables = [
        table
        for name in groups
        for role in ROLES
        if (table := _score_table(found, role, metric, name))
    ]
    if metric == "hd95":
        return with_note(
            tables,
            "Scores, cases and spread as in the tables of Dice. HD95 is the 95th percentile of the "
            "distances between the two outlines, the larger of the two directions, lower is "
            "better; mm and px are never averaged together. Where one of annotation and prediction "
            "is empty it is the diagonal of the image.",
        )
    return tables


def slice_tables(found: Answer) -> list[Table]:
    """The scores of slices, where they are not those of the cases again."""
    paper = any(run.recipe.get("paper_compat") for run in found.runs)
    if not paper and all(row.slices <= 1 for run in found.runs for row in run.scores):
        return []  # of pictures
    note = "Mean over all slices with a value, each slice once; sites, folds and seeds as above."
    if paper:
        note += (
            " These runs score slices as FedFMS does (paper_compat): at mask size, five thresholds "
            "on logits, and an empty slice counts, as 1 where nothing was found and as 0 where "
            "anything was."
        )
    tables = [table for metric in SLICE_METRICS for table in score_tables(found, metric)]
    return with_note(tables, note)


def _score_table(found: Answer, role: Role, metric: Metric, class_name: str) -> Table | None:
    """Methods by sites with mean and worst site; None where no run has such a score."""
    wanted = (role, metric, class_name)
    lines = [line for line in found.scores if (line.role, line.metric, line.class_name) == wanted]
    if not lines:
        return None
    cases = {entry.site: entry for entry in found.cases if entry.role == role}
    sites = [site for site in found.study.sites if site in cases]
    rows = []
    for line in lines:
        worst = line.sites[line.worst] if line.worst else None
        rows.append(
            [
                words.way(line.method, line.regime, line.best),
                *(
                    Cell("not annotated")
                    if class_name in found.not_annotated.get(site, ())
                    else _score(found, line.sites.get(site), metric, line.unit)
                    for site in sites
                ),
                _mean(found, line, len(sites)),
                Cell(
                    shown.with_spread(worst.value if worst else None, None, metric, line.unit),
                    small=line.worst or "",
                ),
            ]
        )
    note = _how_averaged(found) + _ROLE_NOTES[role] if metric == "dice" else ""
    empty = [
        f"{entry.without_value} at {entry.site}" for entry in cases.values() if entry.without_value
    ]
    if empty and metric == "dice":
        note += (
            " Without a score, because nothing is drawn in them: "
            f"{shown.listing(empty)}; what was found there stands under False alarms."
        )
    title = f"{_METRICS[metric]} at {words.ROLES[role]}"
    if class_name != ALL:
        title += f", {shown.class_names([class_name])}"
    elif words.by_class(found):
        title += f", mean over {shown.class_names(found.common)}"
    return Table(
        title,
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
    spread = {
        1: "There is one seed, so no spread over seeds.",
        2: "Mean over folds, then over two seeds, whose own values stand below.",
    }.get(
        seeds,
        f"Mean over folds, then mean ± sample standard deviation over {seeds} seeds, or over as "
        "many as are named; of two seeds both values.",
    )
    return f"{spread} The last columns take each site once. Cases are counted below a site's name. "


def _score(found: Answer, score: Score | None, metric: Metric, unit: str) -> Cell:
    if score is None:
        return Cell(shown.NONE)
    few = score.seeds < len(found.study.seeds)
    text, both = words.over_seeds(score, metric, unit)
    named = shown.numerals(score.seeds, "seed") if few else ""
    return Cell(text, small=", ".join(filter(None, [both, named])))


def _mean(found: Answer, line: ScoreLine, sites: int) -> Cell:
    text, both = words.over_seeds(line.mean, line.metric, line.unit)
    remarks = [both] if both else []
    if len(line.sites) < sites:
        remarks.append(f"{len(line.sites)} of {shown.numerals(sites, 'site')}")
    if line.mean.spread is not None and line.mean.seeds < len(found.study.seeds):
        remarks.append(f"± of {shown.numerals(line.mean.seeds, 'seed')}")
    return Cell(text, small=", ".join(remarks))


def false_alarm_tables(found: Answer) -> list[Table]:
    """Of the cases in which nothing is drawn, the share in which something was found."""
    tables = []
    for role in ROLES:
        here = [alarm for alarm in found.false_alarms if alarm.role == role]
        cases = {alarm.site: alarm.cases for alarm in here}
        sites = [site for site in found.study.sites if site in cases]
        ways = dict.fromkeys((alarm.method, alarm.regime) for alarm in here)
        shares = {(alarm.method, alarm.regime, alarm.site): alarm.share.value for alarm in here}
        if here:
            tables.append(
                Table(
                    f"False alarms at {words.ROLES[role]}",
                    [
                        Column("Method", "trained", number=False),
                        *(Column(site, shown.numerals(cases[site], "case")) for site in sites),
                    ],
                    [
                        [
                            words.way(*way, False),
                            *(Cell(words.share(shares.get((*way, site)))) for site in sites),
                        ]
                        for way in ways
                    ],
                )
            )
    return with_note(
        tables,
        "Of the cases of a site in which nothing is drawn, the share in which something was found, "
        "mean over folds and seeds; a case counts once for each class. They are in no Dice.",
    )


def class_tables(found: Answer) -> list[Table]:
    """Mean Dice of each class; nothing where there is one, or the first tables are by class."""
    if len(found.classes) < 2 or words.by_class(found):
        return []
    tables = []
    for role in ROLES:
        sites = len({entry.site for entry in found.cases if entry.role == role})
        rows = []
        study = found.study
        for way in itertools.product(study.methods, study.regimes, (False, True)):
            method, regime, best = way
            lines = [
                found.line(method, regime, role, class_name=name, best=best)
                for name in found.classes
            ]
            if any(lines):
                cells = (_mean(found, line, sites) if line else Cell(shown.NONE) for line in lines)
                rows.append([words.way(*way), *cells])
        if rows:
            tables.append(
                Table(
                    f"Dice of each class, {words.ROLES[role]}",
                    [
                        Column("Method", "trained", number=False),
                        *(Column(n.replace("_", " "), "mean of sites") for n in found.classes),
                    ],
                    rows,
                )
            )
    return with_note(
        tables,
        "Mean over sites, each once, ± sample standard deviation over seeds. Each site's value is "
        "in study.csv.",
    )


def local_tables(found: Answer) -> list[Table]:
    """Models of one site by the site that they are scored at, federated below."""
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
        for role in ROLES:
            line = found.line(method, "federated", role)
            label = "Federated, trained there" if role == "train" else "Federated, unseen"
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
    return with_note(
        tables,
        f"Mean Dice{words.of_common(found)} over seeds: validation cases at the model's own site, "
        "all cases elsewhere. Below it how far federated training is ahead (+) or behind (−) on "
        "the same cases: at the own site where it trained, elsewhere in runs where that site is "
        "unseen if there are any. "
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


def curves(found: Answer) -> list[Figure]:
    """Dice by round and by bytes moved."""
    drawn = []
    for place, method in enumerate(found.study.methods):
        own = [curve for curve in found.curves if curve.method == method]
        svg = figures.dice_by_round(own, f"rounds-{place}")
        if svg:
            drawn.append(
                Figure(
                    f"{words.method(method)}: Dice by round",
                    f"Mean validation Dice{words.of_common(found)} of the training sites after so "
                    "many rounds of training, mean over folds and seeds; the last point is the "
                    "final model. Band: lowest to highest fold and seed (one site alone: seed, "
                    "each over the models of all sites).",
                    Markup(svg),
                )
            )
    svg = figures.dice_by_bytes(found, "bytes")
    if svg:
        drawn.append(
            Figure(
                "Federated: Dice by data moved",
                "The same scores against the tensor bytes that all sites together had received and "
                "sent until that model existed; the untrained model is left out. "
                "Where the axis is not even it is logarithmic.",
                Markup(svg),
            )
        )
    return drawn
