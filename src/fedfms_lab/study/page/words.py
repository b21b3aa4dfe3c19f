"""A study's names and numbers as a reader sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedfms.pages.parts import Cell
from fedfms.report import words
from fedfms.report.words import MINUS, NONE
from fedfms_lab.study.analysis.statistics import FEWEST_SEEDS_OF_A_TEST, Interval
from fedfms_lab.study.answer import (
    TARGET_SHARE,
    Answer,
    Asked,
    Communication,
    Gap,
    Role,
    Score,
    Spread,
)

REGIMES = {
    "federated": "federated",
    "central-matched": "centralized with matched steps",
    "central": "centralized",
    "local": "one site alone",
    "ensemble": "ensemble of sites alone",
    "scratch": "centralized from scratch",
    "zero-shot": "zero-shot",
}
ROLES: Mapping[Role, str] = {"train": "training sites", "unseen": "unseen sites"}


def by_class(answer: Answer) -> bool:
    """Whether sites differ in the classes that they scored, so that each is told by itself."""
    return set(answer.common) != set(answer.classes)


def of_common(answer: Answer) -> str:
    """` of disc` where not all classes are in a comparison; else nothing."""
    partly = by_class(answer) and answer.common
    return f" of {words.class_names(answer.common)}" if partly else ""


def method(name: str) -> str:
    """A method's name as it is written, such as FedMSA."""
    return words.method(name)[0]


def p_value(p: float | None) -> str:
    """A p value with three decimals, or that it is smaller than they can say."""
    if p is None:
        return NONE
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def interval(found: Interval | None) -> str:
    """`−0.015 to −0.009`, as differences of scores."""
    return NONE if found is None else f"{words.change(found.low)} to {words.change(found.high)}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f} %".replace("-", MINUS)


def quantity(value: float | None, unit: str) -> str:
    """A value in bytes, seconds, as Dice, or a plain count such as rounds."""
    if value is None:
        return NONE
    if unit == "Dice":
        return words.score(value)
    if unit == "B":
        return words.size(value)
    if unit == "s":
        return words.duration(value)
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def ranged(spread: Spread | None, unit: str) -> Cell:
    """A mean, and its range where the values differ as shown."""
    if spread is None:
        return Cell(NONE)
    low, high = quantity(spread.low, unit), quantity(spread.high, unit)
    return Cell(quantity(spread.mean, unit), small="" if low == high else f"{low} to {high}")


def trained(way: str) -> str:
    """How: `federated`, `federated (prox)`, `centralized`, …"""
    regime, _, strategy = way.partition(" ")
    told = REGIMES.get(regime, regime)
    return f"{told} ({strategy})" if strategy else told


def way(method_name: str, regime: str, best: bool) -> Cell:
    """How a row was trained: the method, and below it federated, centralized or one site alone."""
    how = trained(regime)
    return Cell(method(method_name), small=f"{how}, best" if best else how)


def against(gap: Gap) -> str:
    """What federated training is compared with."""
    special = {
        "local": "own site alone" if gap.role == "train" else "other sites alone",
        "local-best": "best other site alone",
        "strategy": "federated",
        "method": f"federated {method(gap.other)}",
    }
    return special.get(gap.against) or REGIMES[gap.against]


def star(gap: Gap) -> str:
    """A star where there are seeds enough to say so and the interval excludes 0."""
    told = gap.interval is not None and gap.interval.excludes_zero
    return "*" if told and gap.seeds >= FEWEST_SEEDS_OF_A_TEST else ""


def over_seeds(score: Score, metric: str, unit: str = "") -> tuple[str, str]:
    """A score, and what seeds make of it: `0.950 ± 0.004` of three or more, both values of two."""
    text = words.with_spread(score.value, score.spread, metric, unit)
    if score.seeds != 2:
        return text, ""
    return text, words.listing([words.with_spread(v, None, metric) for v in score.by_seed])


def question(study: Asked) -> str:
    """What was compared with what, in one sentence."""
    folds = [holdout for holdout in study.holdouts if holdout is not None]
    parts = [
        words.listing([method(name) for name in study.methods]),
        words.listing([trained(regime) for regime in study.regimes]),
        words.numerals(len(study.sites), "site"),
    ]
    if folds:
        parts.append(
            f"{words.numerals(len(folds), 'fold')}, each with one site unseen"
            + (", and one with all sites" if None in study.holdouts else "")
        )
    parts.append(words.numerals(len(study.seeds), "seed"))
    return "; ".join(parts)


def target(study: Asked, moved: Sequence[Communication]) -> str:
    """Which Dice the federated runs were asked to reach."""
    if study.target_dice is not None:
        return f"The target Dice is {words.score(study.target_dice)}, as the study names it."
    if all(entry.target is None for entry in moved):
        return "There is no target Dice: the study names none and has no centralized run."
    return (
        f"The target Dice of a fold is {TARGET_SHARE:.0%}".replace("%", " %")
        + " of the mean validation Dice that centralized training of the same fold reached at its "
        "end, mean over seeds, of the method with the lower one, so that it is the same for every "
        "method."
    )
