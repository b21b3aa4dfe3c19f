"""Scores of each way to train at every site, and the means over sites."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fedfms_lab.study.analysis.of_run import counted, run_scores
from fedfms_lab.study.analysis.statistics import sample_sd
from fedfms_lab.study.answer import (
    ALL,
    METRICS,
    ROLES,
    Asked,
    Metric,
    Role,
    Score,
    ScoreLine,
    SiteCases,
)
from fedfms_lab.study.record import Run, RunKey


class Value(NamedTuple):
    """A score with the run that it comes from."""

    run: RunKey
    value: float


class _Line(NamedTuple):
    """The key of a ScoreLine."""

    method: str
    regime: str
    role: Role
    metric: Metric
    unit: str
    class_name: str
    best: bool


def not_annotated(
    study: Asked, runs: Sequence[Run], classes: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Site to the classes of which it has no row, where there are any."""
    drawn: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for row in run.scores:
            drawn[row.site].add(row.class_name)
    missing = {
        site: tuple(name for name in classes if name not in drawn[site])
        for site in study.sites
        if site in drawn
    }
    return {site: names for site, names in missing.items() if names}


def score_lines(
    study: Asked,
    runs: Sequence[Run],
    classes: Sequence[str],
    common: Sequence[str],
    best: Mapping[tuple[str, str, str], str],
) -> Iterator[ScoreLine]:
    """Every way to train with its score at every site, each class, metric and role by itself.

    Args:
        classes: all that runs scored; of a single one there are no lines beside those of ALL.
        common: the classes that means are over.
        best: from `best_local`.
    """
    found: dict[_Line, dict[str, list[Value]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        key = run.record.key
        for (site, role, metric, unit, class_name), value in run_scores(run, common).items():
            if class_name != ALL and len(classes) < 2:
                continue
            line = _Line(key.method, key.regime, role, metric, unit, class_name, False)
            found[line][site].append(Value(key, value))
            away = key.regime == "local" and role == "unseen"
            chosen_by = ALL if class_name in common else class_name
            if away and key.trained_on == (best.get((key.method, site, chosen_by)),):
                found[line._replace(best=True)][site].append(Value(key, value))
    order = (ROLES, study.methods, study.regimes, (False, True), ("", "mm", "px"))
    for class_name in (ALL, *classes):
        for metric in METRICS:
            for role, method, regime, is_best, unit in itertools.product(*order):
                line = _Line(method, regime, role, metric, unit, class_name, is_best)
                if line in found:
                    yield _score_line(study, line, found[line])


def _score_line(study: Asked, line: _Line, found: Mapping[str, Sequence[Value]]) -> ScoreLine:
    by_seed = {site: _seed_means(found[site]) for site in study.sites if site in found}
    sites = {site: score_over_seeds(found[site]) for site in by_seed}
    complete = [
        sum(seeds[seed] for seeds in by_seed.values()) / len(by_seed)
        for seed in sorted(set.intersection(*(set(seeds) for seeds in by_seed.values())))
    ]
    overall = Score(
        value=sum(score.value for score in sites.values()) / len(sites),
        spread=sample_sd(complete),
        seeds=len(complete),
        runs=_names(value.run for site in by_seed for value in found[site]),
    )
    pick = max if line.metric == "hd95" else min
    worst = pick(sites, key=lambda site: sites[site].value) if len(sites) > 1 else None
    return ScoreLine(**line._asdict(), sites=sites, mean=overall, worst=worst)


def _seed_means(values: Iterable[Value]) -> dict[int, float]:
    by_seed: dict[int, list[float]] = defaultdict(list)
    for value in values:
        by_seed[value.run.seed].append(value.value)
    return {seed: sum(found) / len(found) for seed, found in sorted(by_seed.items())}


def score_over_seeds(values: Sequence[Value]) -> Score:
    """Mean over the runs of each seed, then over seeds."""
    means = list(_seed_means(values).values())
    return Score(
        value=sum(means) / len(means),
        spread=sample_sd(means),
        seeds=len(means),
        runs=_names(value.run for value in values),
    )


def _names(keys: Iterable[RunKey]) -> tuple[str, ...]:
    return tuple(sorted({key.name for key in keys}))


def best_local(runs: Sequence[Run], common: Sequence[str]) -> dict[tuple[str, str, str], str]:
    """For each (method, site, class), where another site's local model that is best there trained.

    Best by Dice on that very site, mean over seeds: who must choose beforehand does no better. ALL
    is by the mean over the classes in common.
    """
    dice: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(dict)
    for run in runs:
        key = run.record.key
        if key.regime == "local":
            for (site, role, metric, _, class_name), value in run_scores(run, common).items():
                if role == "unseen" and metric == "dice":
                    others = dice[key.method, site, class_name]
                    others.setdefault(key.trained_on[0], []).append(value)
    return {
        place: max(sorted(others), key=lambda name: sum(others[name]) / len(others[name]))
        for place, others in dice.items()
    }


def site_cases(study: Asked, runs: Sequence[Run]) -> Iterator[SiteCases]:
    """How many cases and patients count at every site, in each role."""
    for role in ROLES:
        for site in study.sites:
            patients: dict[str, str] = {}
            valued = set()
            names = set()
            for run in runs:
                for row in counted(run):
                    if (row.site, row.role) == (site, role):
                        patients[row.case] = row.patient
                        names.add(run.record.key.name)
                        if row.dice is not None:
                            valued.add(row.case)
            if patients:
                yield SiteCases(
                    site=site,
                    role=role,
                    cases=len(patients),
                    patients=len(set(patients.values())),
                    without_value=len(patients) - len(valued),
                    runs=tuple(sorted(names)),
                )
