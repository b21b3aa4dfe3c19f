"""A run's rows to its scores: which cases count, and a site's score over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from fedfms.study.answer import ALL, METRICS, Metric, Role
from fedfms.study.record import Run, ScoreRow


def counted(run: Run) -> Iterator[ScoreRow]:
    """The rows that count: validation cases where the run trained, all cases elsewhere."""
    return (row for row in run.scores if row.role == "unseen" or row.split == "validation")


def run_scores(run: Run) -> dict[tuple[str, Role, Metric, str, str], float]:
    """A run's score of each (site, role, metric, unit, class), where a case has a value.

    The class ALL is the mean over the classes with a value.
    """
    values: dict[tuple[str, Role, Metric, str, str], list[float]] = defaultdict(list)
    for row in counted(run):
        for metric in METRICS:
            value = getattr(row, metric)
            if value is not None:
                unit = row.unit if metric == "hd95" else ""
                values[row.site, row.role, metric, unit, row.class_name].append(value)
    of_class = {key: sum(found) / len(found) for key, found in values.items()}
    of_site: dict[tuple[str, Role, Metric, str], list[float]] = defaultdict(list)
    for key, value in of_class.items():
        of_site[key[:4]].append(value)
    return of_class | {(*key, ALL): sum(v) / len(v) for key, v in of_site.items()}
