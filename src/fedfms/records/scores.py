"""Means over classes, cases and sites: the one place where scores are averaged unweighted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedfms.contracts.contribution import Metric


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there and finite; None where there is none."""
    present = [value for value in values if value is not None and math.isfinite(value)]
    return sum(present) / len(present) if present else None


def over_classes(metrics: Iterable[Metric], name: str) -> float | None:
    """Mean over classes of a score's means; None where no class has one.

    Args:
        metrics: of one site.
        name: of the score, one of METRICS.
    """
    return mean(metric.mean for metric in metrics if metric.metric == name)


def class_dice(metrics: Iterable[Metric]) -> dict[str, float]:
    """Dice of each class that has one."""
    return {m.class_name: m.mean for m in metrics if m.metric == "dice" and m.mean is not None}


def over(dice: Mapping[str, float], classes: Sequence[str]) -> float | None:
    """Mean over these classes; None where one of them has no value."""
    return mean(dice[name] for name in classes) if all(name in dice for name in classes) else None
