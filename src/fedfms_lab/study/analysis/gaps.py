"""Differences between two ways to train, case by case: paired, tested, and one site alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from fedfms_lab.study.analysis.scores import score_over_seeds
from fedfms_lab.study.analysis.statistics import (
    PatientDifference,
    bootstrap_interval,
    holm,
    signed_rank_p,
    site_balanced_mean,
)
from fedfms_lab.study.answer import ALL, FEWEST_PATIENTS, ROLES, Asked, Gap, LocalCell, Role

_CASE = ["site", "patient", "case"]

# columns that runs of a pair have in common
_SAME_FOLD = ["method", "holdout", "seed"]
_SAME_FOLD_OF_ANY_METHOD = ["holdout", "seed"]
_SAME_SEED = ["method", "seed"]

_Against = Literal["central", "local", "local-best", "method"]
_AGAINST: tuple[tuple[Role, _Against], ...] = (
    ("train", "central"),
    ("unseen", "central"),
    ("train", "local"),
    ("unseen", "local"),
    ("unseen", "local-best"),
)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A family member: what is compared, case by case."""

    method: str
    against: _Against
    other: str
    role: Role
    differences: pd.Series  # by site, patient and case
    runs: pd.DataFrame  # site and run of all that it comes from


def _differences(
    left: pd.DataFrame, right: pd.DataFrame, pairing: Sequence[str]
) -> tuple[pd.Series, pd.DataFrame]:
    """Left minus right of each case: over the pairs of runs with a value, then over classes.

    Args:
        left, right: rows with a Dice, from `counted`.
        pairing: columns that the runs of a pair have in common.

    Returns:
        differences by site, patient and case; and the site and run of each row that made a pair.
    """
    pair = [*_CASE, "class_name", *pairing]
    means = [side.groupby(pair).dice.mean() for side in (left, right)]
    paired = (means[0] - means[1]).dropna()
    by_class = paired.groupby([*_CASE, "class_name"]).mean()
    both = pd.concat([left, right])
    took_part = both.set_index(pair).index.isin(paired.index)
    return by_class.groupby(_CASE).mean(), both[took_part][["site", "run"]].drop_duplicates()


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
    """Over all sites first, with the test and its correction; then site by site, untested.

    Args:
        cases: from `counted`.
    """
    comparisons = _comparisons(study, _with_dice(cases, common), best)
    compared = [one for one in comparisons if len(one.differences)]
    overall = [_gap(comparison, study.sites) for comparison in compared]
    for gap, adjusted in zip(overall, holm([gap["p"] for gap in overall]), strict=True):
        yield Gap(**gap, site=ALL, p_holm=adjusted)
    for comparison in compared:
        having = comparison.differences.index.unique("site")
        for site in (site for site in study.sites if site in having):
            yield Gap(**{**_gap(comparison, [site]), "p": None}, site=site, p_holm=None)


def _comparisons(
    study: Asked, cases: pd.DataFrame, best: Mapping[tuple[str, str, str], str]
) -> Iterator[_Comparison]:
    """The family: each method against central and local training, then method against method."""
    everyone: list[tuple[str, tuple[str, ...]]] = [(m, (m,)) for m in study.methods]
    if len(study.methods) > 1:
        everyone.append((ALL, study.methods))
    is_federated = cases.regime == "federated"
    for name, methods in everyone:
        for role, against in _AGAINST:
            here = cases.method.isin(methods) & (cases.role == role)
            left, right = cases[here & is_federated], cases[here & (cases.regime == against)]
            if against == "local-best":
                right = cases[here & (cases.regime == "local")]
                places = zip(right.method, right.site, strict=True)
                right = right[[best.get((*place, ALL)) for place in places] == right.trained_at]
            pairing = _SAME_FOLD if against == "central" else _SAME_SEED
            yield _Comparison(name, against, ALL, role, *_differences(left, right, pairing))
    for first, second in itertools.combinations(study.methods, 2):
        for role in ROLES:
            here = is_federated & (cases.role == role)
            left, right = (cases[here & (cases.method == name)] for name in (second, first))
            found = _differences(left, right, _SAME_FOLD_OF_ANY_METHOD)
            yield _Comparison(second, "method", first, role, *found)


def _gap(comparison: _Comparison, sites: Sequence[str]) -> dict[str, Any]:
    at_sites = comparison.differences[comparison.differences.index.isin(sites, "site")]
    by_site: dict[str, list[PatientDifference]] = {}
    for (site, _), cases in at_sites.groupby(["site", "patient"]):
        by_site.setdefault(site, []).append(PatientDifference(float(cases.sum()), len(cases)))
    patients = [patient for found in by_site.values() for patient in found]
    runs = comparison.runs[comparison.runs.site.isin(sites)].run
    return {
        "method": comparison.method,
        "against": comparison.against,
        "other": comparison.other,
        "role": comparison.role,
        "difference": site_balanced_mean(by_site),
        "interval": bootstrap_interval(by_site, fewest=2 if len(sites) > 1 else FEWEST_PATIENTS),
        "p": signed_rank_p([patient.mean for patient in patients]),
        "cases": len(at_sites),
        "patients": len(patients),
        "sites": len(by_site),
        "runs": tuple(sorted(runs.unique())),
    }


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
            behind=float(behind.mean()) if len(behind) else None,
            behind_role=role if len(behind) else None,
            behind_cases=len(behind),
            behind_runs=tuple(sorted(runs.run.unique())),
        )
