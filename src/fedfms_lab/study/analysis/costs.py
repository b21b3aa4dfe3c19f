"""What training takes: learning curves, bytes until a Dice is reached, seconds and memory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from fedfms.records.rows import RoundRow
from fedfms.records.scores import over
from fedfms_lab.study.analysis.statistics import mean
from fedfms_lab.study.answer import (
    ALL,
    TARGET_SHARE,
    Asked,
    Communication,
    Curve,
    CurvePoint,
    SavedUnit,
    Saving,
    Spread,
    Training,
)
from fedfms_lab.study.record import Phase, Run


class LearningPoint(NamedTuple):
    """A run's model after some rounds of training."""

    round: int
    dice: float | None  # mean over the training sites; None where one of them has no value
    bytes_moved: int  # tensor bytes to and from all sites until this model existed


Learnt = Mapping[str, Sequence[LearningPoint]]  # by the run's name
_Target = tuple[float, tuple[str, ...]]  # Dice, and the runs it comes from


def learning(
    run: Run, scores: pd.DataFrame, common: Sequence[str], classes: Sequence[str]
) -> list[LearningPoint]:
    """Round by round from rounds.csv, and the final model from scores.csv.

    Only sites that told a score in some round count, so that every point is over the same sites.

    Args:
        scores: from `run_scores`.
        common: the classes that all sites scored; every point is the mean over these.
        classes: all of the study.
    """
    rows = [row for row in run.rounds if row.role == "train" and row.accepted]
    told = {(row.round, row.site): _dice(row, common, classes) for row in rows}
    dice = {place: value for place, value in told.items() if value is not None}
    telling = {site for _, site in dice}
    trained = scores[(scores.run == run.record.key.name) & (scores.role == "train")]
    at_end = trained[(trained.metric == "dice") & (trained.class_name == ALL)]
    final = dict(zip(at_end.site, at_end.value, strict=True))
    if telling & set(final):
        final = {site: value for site, value in final.items() if site in telling}
    points = []
    moved = 0
    numbers = sorted({row.round for row in run.rounds})
    for number in numbers:
        at_sites = {site: value for (at, site), value in dice.items() if at == number}
        points.append(LearningPoint(number, over(at_sites, sorted(telling)), moved))
        own = [row for row in run.rounds if row.round == number]
        moved += sum((row.bytes_down or 0) + (row.bytes_up or 0) for row in own)
    last = numbers[-1] + 1 if numbers else int(run.recipe.get("rounds") or 0)
    return [*points, LearningPoint(last, mean(list(final.values())), moved)]


def _dice(row: RoundRow, common: Sequence[str], classes: Sequence[str]) -> float | None:
    """Over the classes in common; a row of an older run knows the mean over all classes alone."""
    if row.class_dice:
        return over(row.class_dice, common) if common else None
    return row.dice if set(common) == set(classes) else None


def _spread(values: Sequence[float]) -> Spread | None:
    middle = mean(values)
    return None if middle is None else Spread(middle, min(values), max(values), len(values))


def _of(runs: Sequence[Run], method: str, regime: str) -> list[Run]:
    """The runs of one way to train."""
    keys = ((run, run.record.key) for run in runs)
    return [run for run, key in keys if (key.method, key.way) == (method, regime)]


def _targets(study: Asked, runs: Sequence[Run], learnt: Learnt) -> Mapping[str | None, _Target]:
    """The Dice to reach in each fold, the same for every method, and the runs it comes from.

    TARGET_SHARE of the mean over seeds that central training reached at its end in this fold, of
    the method with the lower one, so that every method can be asked for it.
    """
    if study.target_dice is not None:
        return dict.fromkeys(study.holdouts, (study.target_dice, ()))
    reached: dict[str | None, list[_Target]] = defaultdict(list)
    for method in study.methods:
        ends: dict[str | None, dict[str, float]] = defaultdict(dict)
        for run in _of(runs, method, "central"):
            key = run.record.key
            if (end := learnt[key.name][-1].dice) is not None:
                ends[key.holdout][key.name] = end
        for holdout, found in ends.items():
            dice = TARGET_SHARE * (sum(found.values()) / len(found))
            reached[holdout].append((dice, tuple(sorted(found))))
    return {holdout: min(found) for holdout, found in reached.items()}


def communication(study: Asked, runs: Sequence[Run], learnt: Learnt) -> Iterator[Communication]:
    """What each method's federated runs move, a round and until they reach their fold's target.

    Args:
        learnt: `learning` of each run, by the run's name.
    """
    targets = _targets(study, runs, learnt)
    for method in study.methods:
        own = _of(runs, method, "federated")
        rows = [row for run in own for row in run.rounds if row.role == "train" and row.accepted]
        aims = {run.record.key.name: targets.get(run.record.key.holdout) for run in own}
        hits = {
            name: point
            for name, aim in aims.items()
            if aim is not None
            and (point := next((p for p in learnt[name] if (p.dice or 0) >= aim[0]), None))
        }
        total_down = _spread([float(run.record.bytes_down) for run in own])
        total_up = _spread([float(run.record.bytes_up) for run in own])
        if total_down is None or total_up is None:  # there is no run
            continue
        yield Communication(
            method=method,
            down=_spread([float(row.bytes_down) for row in rows if row.bytes_down]),
            up=_spread([float(row.bytes_up) for row in rows if row.bytes_up]),
            total_down=total_down,
            total_up=total_up,
            rounds=_spread([float(learnt[run.record.key.name][-1].round) for run in own]),
            target=_spread([aim[0] for aim in aims.values() if aim is not None]),
            target_runs=tuple(sorted({n for aim in aims.values() if aim for n in aim[1]})),
            reached=tuple(sorted(hits)),
            rounds_to_target=_spread([float(point.round) for point in hits.values()]),
            bytes_to_target=_spread([float(point.bytes_moved) for point in hits.values()]),
            runs=tuple(sorted(aims)),
        )


def training(study: Asked, runs: Sequence[Run]) -> Iterator[Training]:
    """Seconds and peak memory by phase of each method and regime, as the runs measured them."""
    for method, regime in itertools.product(study.methods, study.regimes):
        records = [run.record for run in _of(runs, method, regime)]
        wall = _spread([record.seconds for record in records])
        if wall is None:
            continue
        costs: dict[str, list[Phase]] = defaultdict(list)
        for record in records:
            for name, phase in record.phases.items():
                costs[name].append(phase)
        seconds = {name: _spread([one.seconds for one in found]) for name, found in costs.items()}
        peaks = {n: max(one.peak_memory_bytes for one in found) for n, found in costs.items()}
        yield Training(
            method=method,
            regime=regime,
            seconds={name: spread for name, spread in seconds.items() if spread is not None},
            peak_memory_bytes=peaks,
            wall_seconds=wall,
            runs=tuple(sorted(record.key.name for record in records)),
        )


def savings(moved: Sequence[Communication], costs: Sequence[Training]) -> Iterator[Saving]:
    """Method against method, wherever both have the number: bytes, seconds, memory, rounds."""
    trained = {cost.method: cost for cost in costs if cost.regime == "federated"}
    for pair in itertools.combinations(moved, 2):
        if any(m.down is None or m.up is None for m in pair):
            continue
        mine, other = sorted(pair, key=_bytes_a_round)
        needs, others = (_needs(one, trained.get(one.method)) for one in (mine, other))
        for what, (need, unit) in needs.items():
            if what in others:
                yield Saving(
                    method=mine.method,
                    other=other.method,
                    what=what,
                    unit=unit,
                    needs=need,
                    other_needs=others[what][0],
                    runs=tuple(sorted({*mine.runs, *other.runs})),
                )


def _needs(moved: Communication, cost: Training | None) -> dict[str, tuple[float, SavedUnit]]:
    """What a method needs, by name."""
    needs: dict[str, tuple[float, SavedUnit]] = {
        "bytes a site and round, both ways": (_bytes_a_round(moved), "B")
    }
    if moved.bytes_to_target is not None and moved.rounds_to_target is not None:
        needs["bytes to the target Dice"] = (moved.bytes_to_target.mean, "B")
        needs["rounds to the target Dice"] = (moved.rounds_to_target.mean, "rounds")
    if cost is not None:
        for phase, seconds in cost.seconds.items():
            needs[f"seconds of {phase}"] = (seconds.mean, "s")
        for phase, peak in cost.peak_memory_bytes.items():
            needs[f"peak memory of {phase}"] = (peak, "B")
    return needs


def _bytes_a_round(moved: Communication) -> float:
    return sum(spread.mean for spread in (moved.down, moved.up) if spread is not None)


def curves(study: Asked, runs: Sequence[Run], learnt: Learnt) -> Iterator[Curve]:
    """Learning curves of each method and regime, over folds and seeds.

    A curve of local training is over seeds: the mean of the local models of all sites, as a curve
    of federated training is the mean over its training sites. Seeds that lack a site's model do
    not count where another has them all.
    """
    for method, regime in itertools.product(study.methods, study.regimes):
        if regime in ("zero-shot", "ensemble"):
            continue  # nothing learns there
        points = pd.DataFrame(
            [
                # the local models of one seed stand beside one model of all sites
                (str(key.seed) if regime == "local" else key.name, key.name, *point)
                for key in (run.record.key for run in _of(runs, method, regime))
                for point in learnt[key.name]
            ],
            columns=["fold", "run", *LearningPoint._fields],
        ).astype({"dice": float})
        sizes = points.groupby("fold").run.nunique()
        points = points[points.fold.isin(sizes.index[sizes == sizes.max()])]
        telling = points[points.groupby("run").dice.transform("count") > 0]
        sizes = telling.groupby("fold").run.nunique()
        found = telling.groupby(["fold", "round"])[["dice", "bytes_moved"]].agg(["mean", "count"])
        known = found["dice", "count"] == found.index.get_level_values("fold").map(sizes)
        by_round = found[known].xs("mean", axis="columns", level=1).groupby("round")
        curve = [
            CurvePoint(
                round=number,
                dice=spread,
                bytes_moved=float(at.bytes_moved.mean()) if regime == "federated" else None,
            )
            for number, at in by_round
            if (spread := _spread(at.dice.tolist())) is not None
        ]
        if curve:
            names = tuple(sorted(points.run.unique()))
            yield Curve(method=method, regime=regime, points=tuple(curve), runs=names)
