"""A run's rows to its scores: which cases and classes count, and a site's score over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from fedfms_lab.study.answer import ALL, METRICS, SLICE_METRICS, Metric, Role
from fedfms_lab.study.record import Run, ScoreRow


def counted(run: Run) -> Iterator[ScoreRow]:
    """The rows that count: validation cases where the run trained, all cases elsewhere.

    A class that none of the sites draws at which the run trained was never taught: its rows do not
    count anywhere.
    """
    taught = {row.class_name for row in run.scores if row.role == "train"}
    for row in run.scores:
        of_class = not taught or row.class_name in taught
        if of_class and (row.role == "unseen" or row.split == "validation"):
            yield row


def classes_in_common(runs: Sequence[Run], classes: Sequence[str]) -> tuple[str, ...]:
    """The classes over which means may be taken and compared: those that every site scored.

    A class is one of them where it has a Dice in every run and at every site that has any. A mean
    over other classes here and there would be a mean of other things.
    """
    common = set(classes)
    for run in runs:
        at_site: dict[tuple[str, Role], set[str]] = defaultdict(set)
        for row in counted(run):
            if row.dice is not None:
                at_site[row.site, row.role].add(row.class_name)
        for with_value in at_site.values():
            common &= with_value
    return tuple(name for name in classes if name in common)


def run_scores(run: Run, common: Sequence[str]) -> dict[tuple[str, Role, Metric, str, str], float]:
    """A run's score of each (site, role, metric, unit, class), where a case has a value.

    Cases count alike; in the scores of slices the slices do, as at the site. The class ALL is the
    mean over the classes in `common`, from `classes_in_common`.
    """
    values: dict[tuple[str, Role, Metric, str, str], list[tuple[float, int]]] = defaultdict(list)
    for row in counted(run):
        for metric in METRICS:
            value = getattr(row, metric)
            if value is not None:
                unit = row.unit if metric == "hd95" else ""
                count = max(1, row.slices) if metric in SLICE_METRICS else 1
                found = values[row.site, row.role, metric, unit, row.class_name]
                found.append((value, count))
    scores = {
        key: sum(value * count for value, count in found) / sum(count for _, count in found)
        for key, found in values.items()
    }
    for key in dict.fromkeys(key[:4] for key in scores):
        of_site = [scores[(*key, name)] for name in common if (*key, name) in scores]
        if of_site and len(of_site) == len(common):
            scores[(*key, ALL)] = sum(of_site) / len(of_site)
    return scores
