"""Scores of each way to train at every site, and the means over sites."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from fedfms_lab.study.answer import (
    ALL,
    METRICS,
    ROLES,
    SLICE_METRICS,
    Asked,
    FalseAlarms,
    Score,
    ScoreLine,
    SiteCases,
)
from fedfms_lab.study.record import Run, ScoreRow

_RUN = ["run", "method", "regime", "holdout", "trained_at", "seed"]
_LINE = ["method", "regime", "role", "metric", "unit", "class_name", "best"]


def counted(runs: Sequence[Run]) -> pd.DataFrame:
    """The rows of scores.csv that count, each with its run.

    These are validation cases where the run trained, and all cases elsewhere; of a run that
    trained nowhere the validation cases stand in both roles. A class that none of the sites draws
    at which the run trained was never taught: its rows do not count anywhere. A case in which
    nothing is drawn has no score: what was found in it is a false alarm, and counted as such.

    Returns:
        columns of ScoreRow, without a value NaN; run (its name), method, regime (a run's way to
        train), holdout and trained_at (of a local run; both "" where there is none), and seed.
    """
    rows = []
    for run in runs:
        key = run.record.key
        trained_at = key.trained_on[0] if key.regime == "local" else ""
        of_run = (key.name, key.method, key.way, key.holdout or "", trained_at, key.seed)
        taught = {row.class_name for row in run.scores if row.role == "train"}
        for row in run.scores:
            of_class = not taught or row.class_name in taught
            if of_class and (row.role == "unseen" or row.split == "validation"):
                rows.append((*of_run, *dataclasses.astuple(row)))
            if of_class and not key.trained_on and row.split == "validation":
                there = dataclasses.replace(row, role="train")
                rows.append((*of_run, *dataclasses.astuple(there)))
    columns = [*_RUN, *(one.name for one in dataclasses.fields(ScoreRow))]
    kinds: dict[str, type] = {**dict.fromkeys(METRICS, float), "slices": int, "seed": int}
    cases = pd.DataFrame(rows, columns=columns).astype(kinds)
    cases.loc[~cases["drawn"].astype(bool), ["dice", "iou", "hd95"]] = float("nan")
    return cases


def classes_in_common(cases: pd.DataFrame, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes over which means may be taken and compared: those that every site scored.

    A class is one of them where it has a Dice in every run and at every site that has any. A mean
    over other classes here and there would be a mean of other things.

    Args:
        cases: from `counted`.
    """
    valued = cases.dropna(subset="dice")
    places = valued[["run", "site", "role"]].drop_duplicates()
    having = valued[["run", "site", "role", "class_name"]].drop_duplicates().class_name
    return tuple(name for name in classes if (having == name).sum() == len(places))


def run_scores(cases: pd.DataFrame, common: Sequence[str]) -> pd.DataFrame:
    """A row for each run's score at a site in a role: metric, unit, class_name and value.

    Cases count alike; in the scores of slices the slices do, as at the site. The class ALL is the
    mean over the classes in `common`, from `classes_in_common`.
    """
    place = [*_RUN, "site", "role", "metric", "unit"]
    beside = [*_RUN, "site", "role", "class_name", "unit", "slices"]
    scores = cases.melt(beside, METRICS, "metric").dropna(subset="value")
    scores["unit"] = scores.unit.where(scores.metric == "hd95", "")
    scores["n"] = scores.slices.clip(lower=1).where(scores.metric.isin(SLICE_METRICS), 1)
    scores["value"] *= scores.n
    sums = scores.groupby([*place, "class_name"])[["value", "n"]].sum()
    by_class = (sums.value / sums.n).rename("value").reset_index()
    over = by_class[by_class.class_name.isin(common)].groupby(place).value.agg(["mean", "size"])
    whole = over[over["size"] == len(common)]["mean"].rename("value").reset_index()
    return pd.concat([by_class, whole.assign(class_name=ALL)], ignore_index=True)


def best_local(scores: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """For each (method, site, class), where another site's local model that is best there trained.

    Best by Dice on that very site, mean over seeds: who must choose beforehand does no better. ALL
    is by the mean over the classes in common.

    Args:
        scores: from `run_scores`.
    """
    found = scores.query("regime == 'local' and role == 'unseen' and metric == 'dice'")
    means = found.groupby(["method", "site", "class_name", "trained_at"]).value.mean()
    places = means.groupby(["method", "site", "class_name"])
    return {place: values.idxmax()[-1] for place, values in places}  # of equal ones the first


def not_annotated(
    study: Asked, runs: Sequence[Run], classes: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Site to the classes of which it has no row, where there are any."""
    drawn = {(row.site, row.class_name) for run in runs for row in run.scores}
    scored = {site for site, _ in drawn}
    missing = {
        site: tuple(name for name in classes if (site, name) not in drawn)
        for site in study.sites
        if site in scored
    }
    return {site: names for site, names in missing.items() if names}


def score_lines(
    study: Asked,
    scores: pd.DataFrame,
    classes: Sequence[str],
    common: Sequence[str],
    best: Mapping[tuple[str, str, str], str],
) -> Iterator[ScoreLine]:
    """Every way to train with its score at every site, each class, metric and role by itself.

    Args:
        scores: from `run_scores`.
        classes: all that runs scored; of a single one there are no lines beside those of ALL.
        common: the classes that means are over.
        best: from `best_local`.
    """
    if len(classes) < 2:
        scores = scores[scores.class_name == ALL]
    away = scores.query("regime == 'local' and role == 'unseen'")
    chosen_by = away.class_name.where(~away.class_name.isin(common), ALL)
    places = zip(away.method, away.site, chosen_by, strict=True)
    chosen = away[[best.get(place) for place in places] == away.trained_at]
    lines = pd.concat([scores.assign(best=False), chosen.assign(best=True)])
    found = dict(iter(lines.groupby(_LINE)))
    order = (ROLES, study.methods, study.regimes, (False, True), ("", "mm", "px"))
    for class_name, metric in itertools.product((ALL, *classes), METRICS):
        for role, method, regime, is_best, unit in itertools.product(*order):
            key = (method, regime, role, metric, unit, class_name, is_best)
            if key in found:
                yield _score_line(study, dict(zip(_LINE, key, strict=True)), found[key])


def _score_line(study: Asked, key: Mapping[str, object], found: pd.DataFrame) -> ScoreLine:
    by_site = dict(iter(found.groupby("site")))
    sites = {site: score_over_seeds(by_site[site]) for site in study.sites if site in by_site}
    complete = found.pivot_table("value", "seed", "site").dropna().mean(axis="columns")
    overall = dataclasses.replace(
        _score(complete, found), value=sum(score.value for score in sites.values()) / len(sites)
    )
    pick = max if key["metric"] == "hd95" else min
    worst = pick(sites, key=lambda site: sites[site].value) if len(sites) > 1 else None
    return ScoreLine(**key, sites=sites, mean=overall, worst=worst)  # type: ignore[arg-type]


def score_over_seeds(scores: pd.DataFrame) -> Score:
    """Mean over the runs of each seed, then over seeds."""
    return _score(scores.groupby("seed").value.mean(), scores)


def _score(by_seed: pd.Series, scores: pd.DataFrame) -> Score:
    return Score(
        value=float(by_seed.mean()),
        by_seed=tuple(by_seed.tolist()),
        runs=tuple(sorted(scores.run.unique())),
    )


def false_alarms(study: Asked, cases: pd.DataFrame) -> Iterator[FalseAlarms]:
    """Every way to train at every site with a case in which nothing is drawn.

    Args:
        cases: from `counted`.
    """
    blank = cases[~cases["drawn"].astype(bool)]
    blank = blank.assign(value=~blank["empty"].astype(bool))
    by_run = blank.groupby([*_RUN, "role", "site"]).value.mean().reset_index()
    found = dict(iter(by_run.groupby(["role", "method", "regime", "site"])))
    order = (ROLES, study.methods, study.regimes, study.sites)
    for role, method, regime, site in itertools.product(*order):
        if (values := found.get((role, method, regime, site))) is not None:
            here = blank[(blank.role == role) & (blank.site == site)]
            yield FalseAlarms(
                method=method,
                regime=regime,
                role=role,
                site=site,
                cases=len(here[["case", "class_name"]].drop_duplicates()),
                share=score_over_seeds(values),
            )


def site_cases(study: Asked, cases: pd.DataFrame) -> Iterator[SiteCases]:
    """How many cases and patients count at every site, in each role."""
    places = dict(iter(cases.groupby(["role", "site"])))
    for role, site in itertools.product(ROLES, study.sites):
        if (found := places.get((role, site))) is not None:
            number = found.case.nunique()
            yield SiteCases(
                site=site,
                role=role,
                cases=number,
                patients=found.patient.nunique(),
                without_value=number - found.dropna(subset="dice").case.nunique(),
                runs=tuple(sorted(found.run.unique())),
            )
