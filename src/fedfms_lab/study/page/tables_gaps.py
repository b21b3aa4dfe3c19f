"""How far federated is from other training: tables with intervals and tests, and figures."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedfms.pages.parts import Cell, Column, Figure, Table, with_note
from fedfms.report import words as shown
from fedfms_lab.study.analysis.statistics import RESAMPLES
from fedfms_lab.study.answer import ALL, FEWEST_PATIENTS, Answer, Gap, Role
from fedfms_lab.study.page import figures, words


def gap_tables(found: Answer) -> list[Table]:
    """Differences of federated to other training over all sites, with tests, then site by site."""
    overall = [gap for gap in found.gaps if gap.site == ALL]
    if not overall:
        return []
    tested = sum(gap.p is not None for gap in overall)
    tables = [
        Table(
            f"Federated minus other training{words.of_common(found)}",
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
    return tables + with_note(
        by_site,
        "Difference of Dice with its 95 % interval, for which a site needs "
        f"{FEWEST_PATIENTS} patients; not tested. A star: the interval excludes 0. Other sites "
        "alone: mean over their models.",
    )


def _gaps_by_site(found: Answer, method: str, kinds: Sequence[str]) -> Table | None:
    columns: dict[tuple[str, Role], dict[str, Gap]] = {}
    for gap in found.gaps:
        if gap.method == method and gap.site != ALL and gap.against in kinds:
            other = words.against(gap).removeprefix("federated ")
            columns.setdefault((other, gap.role), {})[gap.site] = gap
    if not columns:
        return None
    return Table(
        f"Federated {words.method(method)} minus other "
        f"{'methods' if 'method' in kinds else 'training'}, site by site",
        [
            Column("Site", number=False),
            *(
                Column(f"− {other}", "trained there" if role == "train" else "unseen there")
                for other, role in columns
            ),
        ],
        [
            [Cell(site), *(_gap_cell(gaps.get(site)) for gaps in columns.values())]
            for site in found.study.sites
            if any(site in gaps for gaps in columns.values())
        ],
    )


def _gap_cell(gap: Gap | None) -> Cell:
    if gap is None:
        return Cell(shown.NONE)
    star = "*" if gap.interval is not None and gap.interval.excludes_zero else ""
    small = words.interval(gap.interval) if gap.interval else "no interval"
    return Cell(shown.change(gap.difference) + star, small=small)


def forests(found: Answer) -> list[Figure]:
    """The differences over all sites with their intervals, drawn."""
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


def why_no_gaps(found: Answer) -> str:
    """Why nothing can be compared yet."""
    if not found.runs:
        return "No run has finished yet."
    return (
        "No two ways to train have scored the same cases yet: a comparison needs federated runs "
        "and centralized or local runs of the same method, fold and seed."
    )
