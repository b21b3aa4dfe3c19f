"""Differences between two ways to train, case by case: paired, tested, and one site alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedfms_lab.study.analysis.of_run import counted, run_scores
from fedfms_lab.study.analysis.scores import Value, score_over_seeds
from fedfms_lab.study.analysis.statistics import (
    PatientDifference,
    bootstrap_interval,
    holm,
    mean,
    signed_rank_p,
    site_balanced_mean,
)
from fedfms_lab.study.answer import ALL, FEWEST_PATIENTS, ROLES, Asked, Gap, LocalCell, Role
from fedfms_lab.study.record import Run, RunKey

# (case, class) -> Dice of each run that has one
_Side = Mapping[tuple[str, str], Sequence[Value]]


@dataclass(frozen=True, slots=True)
class _Differences:
    """Paired differences at one site."""

    by_case: Mapping[str, float]
    runs: frozenset[str]


class _Cases:
    """Dice of every case, class and run, where it counts.

    Args:
        common: the classes that count, as in the scores; none: all, case by case.
    """

    def __init__(self, runs: Sequence[Run], common: Sequence[str]) -> None:
        self.patients: dict[tuple[str, str], str] = {}
        self._values: dict[tuple[str, Role, str, str], dict[tuple[str, str], list[Value]]] = {}
        for run in runs:
            key = run.record.key
            for row in counted(run):
                if row.dice is not None and (not common or row.class_name in common):
                    self.patients[row.site, row.case] = row.patient
                    side = self._values.setdefault((row.site, row.role, key.method, key.regime), {})
                    side.setdefault((row.case, row.class_name), []).append(Value(key, row.dice))

    def side(
        self,
        site: str,
        role: Role,
        methods: Sequence[str],
        regime: str,
        trained_at: Mapping[str, str] | None = None,
    ) -> _Side:
        """What these methods' runs scored at a site.

        Args:
            trained_at: for each method, the only site whose local runs count; None: all runs count.
        """
        joined: dict[tuple[str, str], list[Value]] = defaultdict(list)
        for method in methods:
            only = None if trained_at is None else (trained_at[method],)
            for case, values in self._values.get((site, role, method, regime), {}).items():
                joined[case] += [v for v in values if only in (None, v.run.trained_on)]
        return {case: values for case, values in joined.items() if values}

    def by_patient(self, site: str, by_case: Mapping[str, float]) -> list[PatientDifference]:
        """The site's patients, each with its cases."""
        grouped: dict[str, list[float]] = defaultdict(list)
        for case in sorted(by_case):
            grouped[self.patients[site, case]].append(by_case[case])
        return [PatientDifference(sum(v), len(v)) for _, v in sorted(grouped.items())]


def _differences(left: _Side, right: _Side, pairing: Callable[[RunKey], Hashable]) -> _Differences:
    """Left minus right of each case: over the pairs of runs with a value, then over classes."""
    by_case: dict[str, list[float]] = defaultdict(list)
    names: set[str] = set()
    for case, class_name in sorted(set(left) & set(right)):
        lefts = _grouped(left[case, class_name], pairing)
        rights = _grouped(right[case, class_name], pairing)
        both = [pair for pair in lefts if pair in rights]
        if both:
            of_pairs = [_mean_value(lefts[pair]) - _mean_value(rights[pair]) for pair in both]
            by_case[case].append(sum(of_pairs) / len(of_pairs))
            names |= {v.run.name for pair in both for v in (*lefts[pair], *rights[pair])}
    means = {case: sum(values) / len(values) for case, values in by_case.items()}
    return _Differences(means, frozenset(names))


def _grouped(
    values: Iterable[Value], pairing: Callable[[RunKey], Hashable]
) -> dict[Hashable, list[Value]]:
    groups: dict[Hashable, list[Value]] = defaultdict(list)
    for value in values:
        groups[pairing(value.run)].append(value)
    return groups


def _mean_value(values: Sequence[Value]) -> float:
    return sum(value.value for value in values) / len(values)


def _same_fold(key: RunKey) -> Hashable:
    return key.method, key.holdout, key.seed


def _same_fold_of_any_method(key: RunKey) -> Hashable:
    return key.holdout, key.seed


def _same_seed(key: RunKey) -> Hashable:
    return key.method, key.seed


_Other = Literal["central", "local", "local-best"]

_AGAINST: tuple[tuple[Role, _Other], ...] = (
    ("train", "central"),
    ("unseen", "central"),
    ("train", "local"),
    ("unseen", "local"),
    ("unseen", "local-best"),
)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A family member: what is compared, at each site."""

    method: str
    against: Literal["central", "local", "local-best", "method"]
    other: str
    role: Role
    sites: Mapping[str, _Differences]


def gaps(
    study: Asked,
    runs: Sequence[Run],
    common: Sequence[str],
    best: Mapping[tuple[str, str, str], str],
) -> Iterator[Gap]:
    """Over all sites first, with the test and its correction; then site by site, untested."""
    cases = _Cases(runs, common)
    compared = [c for c in _comparisons(study, cases, best) if c.sites]
    overall = [_gap(cases, comparison, list(comparison.sites)) for comparison in compared]
    for gap, adjusted in zip(overall, holm([gap["p"] for gap in overall]), strict=True):
        yield Gap(**gap, site=ALL, p_holm=adjusted)
    for comparison in compared:
        for site in comparison.sites:
            yield Gap(**{**_gap(cases, comparison, [site]), "p": None}, site=site, p_holm=None)


def _comparisons(
    study: Asked, cases: _Cases, best: Mapping[tuple[str, str, str], str]
) -> Iterator[_Comparison]:
    """The family: each method against central and local training, then method against method."""
    everyone: list[tuple[str, tuple[str, ...]]] = [(m, (m,)) for m in study.methods]
    if len(study.methods) > 1:
        everyone.append((ALL, study.methods))

    def at_sites(role: Role, other: _Other, methods: tuple[str, ...]) -> dict[str, _Differences]:
        found = {}
        for site in study.sites:
            left = cases.side(site, role, methods, "federated")
            if other == "local-best":
                chosen = {m: best[m, site, ALL] for m in methods if (m, site, ALL) in best}
                right = cases.side(site, role, tuple(chosen), "local", chosen)
            else:
                right = cases.side(site, role, methods, other)
            pairing = _same_fold if other == "central" else _same_seed
            differences = _differences(left, right, pairing)
            if differences.by_case:
                found[site] = differences
        return found

    for name, methods in everyone:
        for role, other in _AGAINST:
            yield _Comparison(name, other, ALL, role, at_sites(role, other, methods))
    for first, second in itertools.combinations(study.methods, 2):
        for role in ROLES:
            found = {}
            for site in study.sites:
                left = cases.side(site, role, (second,), "federated")
                right = cases.side(site, role, (first,), "federated")
                differences = _differences(left, right, _same_fold_of_any_method)
                if differences.by_case:
                    found[site] = differences
            yield _Comparison(second, "method", first, role, found)


def _gap(cases: _Cases, comparison: _Comparison, sites: Sequence[str]) -> dict[str, Any]:
    by_site = {site: cases.by_patient(site, comparison.sites[site].by_case) for site in sites}
    patients = [patient for found in by_site.values() for patient in found]
    runs = frozenset().union(*(comparison.sites[site].runs for site in sites))
    return {
        "method": comparison.method,
        "against": comparison.against,
        "other": comparison.other,
        "role": comparison.role,
        "difference": site_balanced_mean(by_site),
        "interval": bootstrap_interval(by_site, fewest=2 if len(sites) > 1 else FEWEST_PATIENTS),
        "p": signed_rank_p([patient.mean for patient in patients]),
        "cases": sum(patient.cases for patient in patients),
        "patients": len(patients),
        "sites": len(sites),
        "runs": tuple(sorted(runs)),
    }


# ----------------------------------------------------------------------------------------- local


def local_cells(study: Asked, runs: Sequence[Run], common: Sequence[str]) -> Iterator[LocalCell]:
    """Each local model at each site, and how far below federated training it is there.

    Compared with federated runs in which the site is unseen, as it is to the local model; where the
    study has none, and at the model's own site, with those that trained there.
    """
    cases = _Cases(runs, common)
    found: dict[tuple[str, str, str], list[Value]] = defaultdict(list)
    for run in runs:
        key = run.record.key
        if key.regime == "local":
            for (site, _, metric, _, class_name), value in run_scores(run, common).items():
                if metric == "dice" and class_name == ALL:
                    found[key.method, key.trained_on[0], site].append(Value(key, value))
    for method in study.methods:
        for trained_at in study.sites:
            for scored_at in study.sites:
                values = found.get((method, trained_at, scored_at))
                if not values:
                    continue
                local_role: Role = "train" if trained_at == scored_at else "unseen"
                local = cases.side(scored_at, local_role, (method,), "local", {method: trained_at})
                fed_role: Role | None = None
                behind = _Differences({}, frozenset())
                for role in ROLES if local_role == "train" else reversed(ROLES):
                    federated = cases.side(scored_at, role, (method,), "federated")
                    behind = _differences(federated, local, _same_seed)
                    if behind.by_case:
                        fed_role = role
                        break
                yield LocalCell(
                    method=method,
                    trained_at=trained_at,
                    scored_at=scored_at,
                    dice=score_over_seeds(values),
                    behind=mean(list(behind.by_case.values())),
                    behind_role=fed_role,
                    behind_cases=len(behind.by_case),
                    behind_runs=tuple(sorted(behind.runs)),
                )
