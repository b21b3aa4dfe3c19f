"""How far federated is from other training: tables with intervals and tests, and figures."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedfms.pages.parts import Cell, Column, Figure, Table, with_note
from fedfms.report import words as shown
from fedfms_lab.study.answer import ALL, FEWEST_PATIENTS, Against, Answer, Gap, Role
from fedfms_lab.study.page import figures, words

_WITHOUT: tuple[Against, ...] = ("local", "ensemble", "local-best")
_WITH_ALL: tuple[Against, ...] = ("central", "central-matched")
_BEFORE: tuple[Against, ...] = ("zero-shot", "scratch")


def gap_tables(found: Answer) -> list[Table]:
    """Differences of federated to other training over all sites, with tests, then site by site."""
    overall = [gap for gap in found.gaps if gap.site == ALL]
    if not overall:
        return []
    tested = sum(gap.p is not None for gap in overall)
    if tested:
        p = (
            f"p: that the same mean is 0, by the same t distributions; of the {tested} questions "
            "that are asked beforehand, against what sites have without federating at training and "
            "at unseen sites (without such runs: against centralized training), and corrected for "
            "them after Holm. All else is described, not tested."
        )
    else:
        p = "There is no p: it takes three seeds."
    tables = [
        Table(
            f"Federated minus other training{words.of_common(found)}",
            [
                Column("Federated", number=False),
                Column("Minus", number=False),
                Column("At", number=False),
                Column("Difference", "Dice"),
                Column("95 % interval", "Dice"),
                Column("p", "t"),
                Column("p", "Holm"),
                Column("Seeds", "n"),
                Column("Patients", "n"),
                Column("Cases", "n"),
            ],
            [
                [
                    Cell(words.method(gap.method), small=gap.strategy),
                    Cell(words.against(gap), tag="tested" if gap.p is not None else ""),
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
                    Cell(shown.count(gap.seeds)),
                    Cell(shown.count(gap.patients)),
                    Cell(shown.count(gap.cases)),
                ]
                for gap in overall
            ],
            note="A difference is taken case by case on the cases that both scored, as mean over "
            "folds, classes and seeds, then as mean over sites, each once. Intervals speak of "
            "other patients of these sites, who count as independent, and of other seeds, and not "
            "of other sites: two t intervals, over the patients within sites and over the seeds, "
            "whose half-widths are added as squares. They take two seeds, and two patients at each "
            "site. Seeds: those that have all runs of these sites; where none has, the difference "
            f"is over what is there. {p}",
        )
    ]
    by_site = [
        table
        for method in found.study.methods
        for kinds in (_WITHOUT, _WITH_ALL, ("strategy",), ("method",))
        if (table := _gaps_by_site(found, method, kinds)) is not None
    ]
    return tables + with_note(
        by_site,
        "Difference of Dice with its 95 % interval, for which a site needs "
        f"{FEWEST_PATIENTS} patients, and two seeds; not tested. A star, from three seeds on: the "
        "interval excludes 0. Other sites alone: mean over their models.",
    )


def _gaps_by_site(found: Answer, method: str, kinds: Sequence[str]) -> Table | None:
    columns: dict[tuple[str, Role], dict[str, Gap]] = {}
    for gap in found.gaps:
        if gap.method == method and gap.site != ALL and gap.against in kinds:
            other = gap.strategy or words.against(gap).removeprefix("federated ")
            columns.setdefault((other, gap.role), {})[gap.site] = gap
    if not columns:
        return None
    others = {
        "method": "other methods",
        "strategy": "its plain average",
        "central": "pooled images",
    }
    other = next((told for kind, told in others.items() if kind in kinds), "sites alone")
    return Table(
        f"Federated {words.method(method)} minus {other}, site by site",
        [
            Column("Site", number=False),
            *(
                Column(
                    other if "strategy" in kinds else f"− {other}",
                    "trained there" if role == "train" else "unseen there",
                )
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
    small = words.interval(gap.interval) if gap.interval else "no interval"
    return Cell(shown.change(gap.difference) + words.star(gap), small=small)


def forests(found: Answer) -> list[Figure]:
    """The differences over all sites with their intervals, drawn."""
    overall = [gap for gap in found.gaps if gap.site == ALL]
    groups = (
        ("Federated minus sites alone", _WITHOUT, "federated is better"),
        ("Federated minus pooled images", _WITH_ALL, "federated is better"),
        ("Federated minus no training, or no SAM", _BEFORE, "federated is better"),
        ("Federated, strategy minus plain average", ("strategy",), "the strategy is better"),
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
        "and others of the same method, fold and seed."
    )
