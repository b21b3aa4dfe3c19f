"""A study's names and numbers as a reader sees them, and its answer in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedfms.pages.parts import Cell
from fedfms.report import words
from fedfms.report.words import MINUS, NONE
from fedfms_lab.study.analysis.statistics import Interval
from fedfms_lab.study.answer import (
    ALL,
    FAILS_BELOW,
    TARGET_SHARE,
    Answer,
    Asked,
    Communication,
    Gap,
    LocalCell,
    Spread,
)

REGIMES = {"federated": "federated", "central": "centralized", "local": "one site alone"}
ROLES = {"train": "training sites", "unseen": "unseen sites"}


def by_class(answer: Answer) -> bool:
    """Whether sites differ in the classes that they scored, so that each is told by itself."""
    return set(answer.common) != set(answer.classes)


def of_common(answer: Answer) -> str:
    """` of disc` where not all classes are in a comparison; else nothing."""
    partly = by_class(answer) and answer.common
    return f" of {words.class_names(answer.common)}" if partly else ""


def method(name: str) -> str:
    """A method's name as it is written, such as FedMSA."""
    if name == ALL:
        return "All methods"
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


def way(method_name: str, regime: str, best: bool) -> Cell:
    """How a row was trained: the method, and below it federated, centralized or one site alone."""
    how = REGIMES.get(regime, regime)
    return Cell(method(method_name), small=f"{how}, best" if best else how)


def against(gap: Gap) -> str:
    """What federated training is compared with."""
    return {
        "central": "centralized",
        "local": "own site alone" if gap.role == "train" else "other sites alone",
        "local-best": "best other site alone",
        "method": f"federated {method(gap.other)}",
    }[gap.against]


def question(study: Asked) -> str:
    """What was compared with what, in one sentence."""
    folds = [holdout for holdout in study.holdouts if holdout is not None]
    parts = [
        words.listing([method(name) for name in study.methods]),
        words.listing([REGIMES.get(regime, regime) for regime in study.regimes]),
        words.numerals(len(study.sites), "site"),
    ]
    if folds:
        parts.append(
            f"{words.numerals(len(folds), 'fold')}, each with one site unseen"
            + (", and one with all sites" if None in study.holdouts else "")
        )
    parts.append(words.numerals(len(study.seeds), "seed"))
    return "; ".join(parts)


def verdicts(answer: Answer) -> dict[str, list[str]]:
    """What the tables come to, sentences under headings: differences, and where local fails."""
    found = {
        method(name): [*_against_central(answer, name), *_against_local(answer, name)]
        for name in answer.study.methods
    }
    return {title: sentences for title, sentences in found.items() if sentences}


def _against_central(answer: Answer, name: str) -> Iterator[str]:
    parts = [
        f"{_difference(answer, gap)} at {ROLES[gap.role]} ({_evidence(gap)})"
        for gap in answer.gaps
        if (gap.method, gap.against, gap.site) == (name, "central", ALL)
    ]
    if parts:
        yield f"Federated minus centralized: {'; '.join(parts)}."


def _against_local(answer: Answer, name: str) -> Iterator[str]:
    for gap in answer.gaps:
        if (gap.method, gap.against, gap.role, gap.site) == (name, "local", "train", ALL):
            yield (
                "Federated minus a model of the own site alone, at that site: "
                f"{_difference(answer, gap)} ({_evidence(gap)})."
            )
    away = answer.away(name)
    if not away:
        return
    fails = [cell for cell in away if cell.fails]
    behind = [cell for cell in away if _behind(cell) > 0]
    told = (
        "Trained at one site alone and scored at another, a model fails (more than "
        f"{FAILS_BELOW:.2f} Dice{of_common(answer)} below federated training on the same cases) in "
        f"{len(fails) or 'none'} of {words.numerals(len(away), 'pair')} of sites"
    )
    if fails:
        at = [site for site in answer.study.sites if any(cell.scored_at == site for cell in fails)]
        told += f", at {words.listing(at)}"
    elif behind:
        told += f" and is behind in {len(behind)}"
    if behind:
        worst = max(behind, key=_behind)
        told += (
            f"; worst: trained at {worst.trained_at} and scored at {worst.scored_at}, "
            f"{words.score(worst.dice.value)}, which is {words.score(_behind(worst))} below"
        )
    yield f"{told}."


def _behind(cell: LocalCell) -> float:
    return cell.behind or 0.0


def _difference(answer: Answer, gap: Gap) -> str:
    return f"{words.change(gap.difference)} Dice{of_common(answer)}"


def _evidence(gap: Gap) -> str:
    patients = words.numerals(gap.patients, "patient")
    p = "" if gap.p_holm is None else f"p {p_value(gap.p_holm)} after Holm; "
    if gap.interval is None:
        return f"no interval; {p}{patients}"
    zero = "excludes" if gap.interval.excludes_zero else "includes"
    return f"95 % interval {interval(gap.interval)}, which {zero} 0; {p}{patients}"


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
