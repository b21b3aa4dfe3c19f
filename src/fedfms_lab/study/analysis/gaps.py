"""Differences between two ways to train, case by case: paired, tested, and one site alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from fedfms_lab.study.analysis.scores import score_over_seeds
from fedfms_lab.study.analysis.statistics import (
    PatientDifference,
    holm,
    interval,
    p_value,
    site_balanced_mean,
)
from fedfms_lab.study.answer import (
    ALL,
    FEWEST_PATIENTS,
    PRIMARY,
    ROLES,
    Against,
    Asked,
    Gap,
    LocalCell,
    Role,
)

_CASE = ["site", "patient", "case"]

# columns that runs of a pair have in common
_SAME_FOLD = ["method", "holdout", "seed"]
_SAME_FOLD_OF_ANY_METHOD = ["holdout", "seed"]
_SAME_SEED = ["method", "seed"]
_WITHOUT_FOLDS = ("local", "local-best", "zero-shot")

_AGAINST: Mapping[Role, tuple[Against, ...]] = {
    "train": ("local", "ensemble", "central-matched", "central", "scratch", "zero-shot"),
    "unseen": (
        *("ensemble", "local", "local-best"),
        *("central-matched", "central", "scratch", "zero-shot"),
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """What is compared, case by case."""

    method: str
    against: Against
    role: Role
    differences: pd.DataFrame  # by site, patient and case; a column for each seed
    runs: pd.DataFrame  # site and run of all that it comes from
    strategy: str = ""
    other: str = ALL


def _differences(
    left: pd.DataFrame, right: pd.DataFrame, pairing: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Left minus right of each case and seed: over the pairs of runs, then over classes.

    Args:
        left, right: rows with a Dice, from `counted`.
        pairing: columns that the runs of a pair have in common; the seed is one.

    Returns:
        differences by site, patient and case, a column for each seed; and the site and run of each
        row that made a pair.
    """
    pair = [*_CASE, "class_name", *pairing]
    means = [side.groupby(pair).dice.mean() for side in (left, right)]
    paired = (means[0] - means[1]).dropna()
    by_class = paired.groupby([*_CASE, "class_name", "seed"]).mean()
    both = pd.concat([left, right])
    took_part = both.set_index(pair).index.isin(paired.index)
    by_seed = by_class.groupby([*_CASE, "seed"]).mean().unstack("seed")
    return by_seed, both[took_part][["site", "run"]].drop_duplicates()


def _with_dice(cases: pd.DataFrame, common: Sequence[str]) -> pd.DataFrame:
    """Where there is a Dice, of the classes that count, as in the scores; none: all."""
    valued = cases.dropna(subset="dice")
    return valued[valued.class_name.isin(common)] if common else valued


def gaps(
    study: Asked,
    cases: pd.DataFrame,
    common: Sequence[str],
    best: Mapping[tuple[str, str, str], str],
) -> Iterator[Gap]:
    """Over all sites first, the primary ones with the test and its correction; then site by site.

    Args:
        cases: from `counted`.
    """
    comparisons = _comparisons(study, _with_dice(cases, common), best)
    compared = [one for one in comparisons if len(one.differences)]
    asked = _primary(compared)
    overall = [_gap(one, study.sites, ALL, primary=one in asked) for one in compared]
    for gap, adjusted in zip(overall, holm([gap.p for gap in overall]), strict=True):
        yield dataclasses.replace(gap, p_holm=adjusted)
    for comparison in compared:
        having = comparison.differences.index.unique("site")
        for site in (site for site in study.sites if site in having):
            yield _gap(comparison, [site], site, primary=comparison in asked)


def _primary(compared: Sequence[_Comparison]) -> list[_Comparison]:
    """One of each method and role: the first that there is in PRIMARY."""
    found = []
    for method in dict.fromkeys(one.method for one in compared):
        for role in ROLES:
            own = {one.against: one for one in compared if (one.method, one.role) == (method, role)}
            found += [own[against] for against in PRIMARY[role] if against in own][:1]
    return found


def _comparisons(
    study: Asked, cases: pd.DataFrame, best: Mapping[tuple[str, str, str], str]
) -> Iterator[_Comparison]:
    """Each method against other training, its strategies against it, then method against method."""
    is_federated = cases.regime == "federated"
    for method in study.methods:
        for role, others in _AGAINST.items():
            here = (cases.method == method) & (cases.role == role)
            left = cases[here & is_federated]
            for against in others:
                right = cases[here & (cases.regime == against)]
                if against == "local-best":
                    right = cases[here & (cases.regime == "local")]
                    places = zip(right.method, right.site, strict=True)
                    right = right[[best.get((*place, ALL)) for place in places] == right.trained_at]
                pairing = _SAME_SEED if against in _WITHOUT_FOLDS else _SAME_FOLD
                yield _Comparison(method, against, role, *_differences(left, right, pairing))
            for way in study.regimes:
                strategy = way.removeprefix("federated ")
                if strategy != way:
                    found = _differences(cases[here & (cases.regime == way)], left, _SAME_FOLD)
                    yield _Comparison(method, "strategy", role, *found, strategy=strategy)
    for first, second in itertools.combinations(study.methods, 2):
        for role in ROLES:
            here = is_federated & (cases.role == role)
            left, right = (cases[here & (cases.method == name)] for name in (second, first))
            found = _differences(left, right, _SAME_FOLD_OF_ANY_METHOD)
            yield _Comparison(second, "method", role, *found, other=first)


def _gap(comparison: _Comparison, sites: Sequence[str], site: str, *, primary: bool) -> Gap:
    """Over these sites; of seeds without all of their runs only where no seed has them all."""
    found = comparison.differences
    found = found[found.index.isin(sites, "site")]
    complete = found.dropna(axis="columns")
    whole = complete if len(complete.columns) else found.mean(axis="columns").to_frame()
    by_site: dict[str, list[PatientDifference]] = {}
    for (name, _), cases in whole.groupby(["site", "patient"]):
        one = PatientDifference(tuple(cases.sum().tolist()), len(cases))
        by_site.setdefault(name, []).append(one)
    difference = site_balanced_mean(by_site)
    assert difference is not None  # there are cases
    runs = comparison.runs[comparison.runs.site.isin(sites)].run
    return Gap(
        method=comparison.method,
        strategy=comparison.strategy,
        against=comparison.against,
        other=comparison.other,
        primary=primary,
        role=comparison.role,
        site=site,
        difference=difference,
        interval=interval(by_site, fewest=2 if site == ALL else FEWEST_PATIENTS),
        p=p_value(by_site) if primary and site == ALL else None,
        p_holm=None,
        seeds=len(complete.columns),
        cases=len(found),
        patients=sum(map(len, by_site.values())),
        sites=len(by_site),
        runs=tuple(sorted(runs.unique())),
    )


# ----------------------------------------------------------------------------------------- local


def local_cells(
    study: Asked, cases: pd.DataFrame, scores: pd.DataFrame, common: Sequence[str]
) -> Iterator[LocalCell]:
    """Each local model at each site, and how far below federated training it is there.

    Compared with federated runs in which the site is unseen, as it is to the local model; where the
    study has none, and at the model's own site, with those that trained there.

    Args:
        cases: from `counted`.
        scores: from `run_scores`.
    """
    cases = _with_dice(cases, common)
    found = scores.query("regime == 'local' and metric == 'dice' and class_name == @ALL")
    models = dict(iter(found.groupby(["method", "trained_at", "site"])))
    for method, trained_at, site in itertools.product(study.methods, study.sites, study.sites):
        if (values := models.get((method, trained_at, site))) is None:
            continue
        here = cases[(cases.method == method) & (cases.site == site)]
        local, federated = here[here.trained_at == trained_at], here[here.regime == "federated"]
        for role in ROLES if trained_at == site else reversed(ROLES):
            behind, runs = _differences(federated[federated.role == role], local, _SAME_SEED)
            if len(behind):
                break
        yield LocalCell(
            method=method,
            trained_at=trained_at,
            scored_at=site,
            dice=score_over_seeds(values),
            behind=float(behind.mean(axis="columns").mean()) if len(behind) else None,
            behind_role=role if len(behind) else None,
            behind_cases=len(behind),
            behind_runs=tuple(sorted(runs.run.unique())),
        )
