"""What training takes: learning curves, bytes until a Dice is reached, seconds and memory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedfms.records.rows import RoundRow
from fedfms.records.scores import over
from fedfms_lab.study.analysis.of_run import run_scores
from fedfms_lab.study.analysis.statistics import mean
from fedfms_lab.study.answer import (
    ALL,
    TARGET_SHARE,
    Asked,
    Communication,
    Curve,
    CurvePoint,
    Saving,
    Spread,
    Training,
)
from fedfms_lab.study.record import Run


@dataclass(frozen=True, slots=True)
class LearningPoint:
    """A run's model after some rounds of training."""

    round: int
    dice: float | None  # mean over the training sites; None where one of them has no value
    bytes_moved: int  # tensor bytes to and from all sites until this model existed


def learning(run: Run, common: Sequence[str], classes: Sequence[str]) -> list[LearningPoint]:
    """Round by round from rounds.csv, and the final model from scores.csv.

    Only sites that told a score in some round count, so that every point is over the same sites.

    Args:
        common: the classes that all sites scored; every point is the mean over these.
        classes: all of the study.
    """
    rows = [row for row in run.rounds if row.role == "train" and row.accepted]
    told = {(row.round, row.site): _dice(row, common, classes) for row in rows}
    dice = {place: value for place, value in told.items() if value is not None}
    telling = {site for _, site in dice}
    final = {
        site: value
        for (site, role, metric, _, class_name), value in run_scores(run, common).items()
        if (role, metric, class_name) == ("train", "dice", ALL)
    }
    if telling & set(final):
        final = {site: value for site, value in final.items() if site in telling}
    points = []
    moved = 0
    numbers = sorted({row.round for row in run.rounds})
    for number in numbers:
        at = [dice[number, site] for site in sorted(telling) if (number, site) in dice]
        known = len(at) == len(telling) and bool(at)
        points.append(LearningPoint(number, sum(at) / len(at) if known else None, moved))
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


def _targets(
    study: Asked, runs: Sequence[Run], learnt: Mapping[str, Sequence[LearningPoint]]
) -> dict[str | None, tuple[float, tuple[str, ...]]]:
    """The Dice to reach in each fold, the same for every method, and the runs it comes from.

    TARGET_SHARE of the mean over seeds that central training reached at its end in this fold, of
    the method with the lower one, so that every method can be asked for it.
    """
    if study.target_dice is not None:
        return dict.fromkeys(study.holdouts, (study.target_dice, ()))
    targets: dict[str | None, tuple[float, tuple[str, ...]]] = {}
    for holdout in study.holdouts:
        reached: list[tuple[float, tuple[str, ...]]] = []
        for method in study.methods:
            ends = {
                run.record.key.name: end
                for run in runs
                if (run.record.key.method, run.record.key.regime) == (method, "central")
                and run.record.key.holdout == holdout
                and (end := learnt[run.record.key.name][-1].dice) is not None
            }
            if ends:
                reached.append((sum(ends.values()) / len(ends), tuple(sorted(ends))))
        if reached:
            dice, names = min(reached)
            targets[holdout] = (TARGET_SHARE * dice, names)
    return targets


def communication(
    study: Asked, runs: Sequence[Run], learnt: Mapping[str, Sequence[LearningPoint]]
) -> Iterator[Communication]:
    """What each method's federated runs move, a round and until they reach their fold's target.

    Args:
        learnt: `learning` of each run, by the run's name.
    """
    targets = _targets(study, runs, learnt)
    for method in study.methods:
        own = [
            r for r in runs if (r.record.key.method, r.record.key.regime) == (method, "federated")
        ]
        if not own:
            continue
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
        assert total_down is not None and total_up is not None  # there is a run
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
    for method in study.methods:
        for regime in study.regimes:
            records = [
                run.record
                for run in runs
                if (run.record.key.method, run.record.key.regime) == (method, regime)
            ]
            wall = _spread([record.seconds for record in records])
            if wall is None:
                continue
            phases = dict.fromkeys(name for record in records for name in record.phases)
            costs = {p: [r.phases[p] for r in records if p in r.phases] for p in phases}
            seconds = {p: _spread([phase.seconds for phase in found]) for p, found in costs.items()}
            yield Training(
                method=method,
                regime=regime,
                seconds={p: spread for p, spread in seconds.items() if spread is not None},
                peak_memory_bytes={
                    p: max(phase.peak_memory_bytes for phase in found) for p, found in costs.items()
                },
                wall_seconds=wall,
                runs=tuple(sorted(record.key.name for record in records)),
            )


_Unit = Literal["B", "s", "rounds"]
_BYTES: _Unit = "B"
_SECONDS: _Unit = "s"
_ROUNDS: _Unit = "rounds"


def savings(moved: Sequence[Communication], costs: Sequence[Training]) -> Iterator[Saving]:
    """Method against method, wherever both have the number: bytes, seconds, memory, rounds."""
    trained = {cost.method: cost for cost in costs if cost.regime == "federated"}
    for pair in itertools.combinations(moved, 2):
        if any(m.down is None or m.up is None for m in pair):
            continue
        mine, other = sorted(pair, key=_bytes_a_round)
        runs = tuple(sorted({*mine.runs, *other.runs}))
        needs: list[tuple[str, _Unit, float | None, float | None]] = []
        for what, unit, need in (
            ("bytes a site and round, both ways", _BYTES, _bytes_a_round),
            ("bytes to the target Dice", _BYTES, lambda moved: _mean(moved.bytes_to_target)),
            ("rounds to the target Dice", _ROUNDS, lambda moved: _mean(moved.rounds_to_target)),
        ):
            needs.append((what, unit, need(mine), need(other)))
        if mine.method in trained and other.method in trained:
            a, b = trained[mine.method], trained[other.method]
            for phase in (phase for phase in a.seconds if phase in b.seconds):
                seconds = a.seconds[phase].mean, b.seconds[phase].mean
                needs.append((f"seconds of {phase}", _SECONDS, *seconds))
            for phase in (phase for phase in a.peak_memory_bytes if phase in b.peak_memory_bytes):
                peaks = a.peak_memory_bytes[phase], b.peak_memory_bytes[phase]
                needs.append((f"peak memory of {phase}", _BYTES, *peaks))
        for what, unit, here, there in needs:
            if here is not None and there is not None:
                yield Saving(
                    method=mine.method,
                    other=other.method,
                    what=what,
                    unit=unit,
                    needs=here,
                    other_needs=there,
                    runs=runs,
                )


def _bytes_a_round(moved: Communication) -> float:
    return (_mean(moved.down) or 0) + (_mean(moved.up) or 0)


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def curves(
    study: Asked, runs: Sequence[Run], learnt: Mapping[str, Sequence[LearningPoint]]
) -> Iterator[Curve]:
    """Learning curves of each method and regime, over folds and seeds.

    A curve of local training is over seeds: the mean of the local models of all sites, as a curve
    of federated training is the mean over its training sites. Seeds that lack a site's model do
    not count where another has them all.
    """
    for method in study.methods:
        for regime in study.regimes:
            groups: dict[Hashable, list[str]] = defaultdict(list)
            for run in runs:
                key = run.record.key
                if (key.method, key.regime) == (method, regime):
                    # the local models of one seed stand beside one model of all sites
                    fold = key.seed if regime == "local" else key.name
                    groups[fold].append(key.name)
            largest = max((len(names) for names in groups.values()), default=0)
            members = [sorted(names) for names in groups.values() if len(names) == largest]
            points = _curve_points(members, learnt, moves=regime == "federated")
            if points:
                names = tuple(sorted(name for group in members for name in group))
                yield Curve(method=method, regime=regime, points=points, runs=names)


def _curve_points(
    groups: Sequence[Sequence[str]],
    learnt: Mapping[str, Sequence[LearningPoint]],
    *,
    moves: bool,
) -> tuple[CurvePoint, ...]:
    by_round: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for group in groups:
        telling = [name for name in group if any(p.dice is not None for p in learnt[name])]
        if not telling:
            continue
        at = [{point.round: point for point in learnt[name]} for name in telling]
        for number in sorted(set.intersection(*(set(points) for points in at))):
            dice = [points[number].dice for points in at]
            if (known := [value for value in dice if value is not None]) and len(known) == len(at):
                moved = sum(points[number].bytes_moved for points in at) / len(at)
                by_round[number].append((sum(known) / len(known), moved))
    points = []
    for number, found in sorted(by_round.items()):
        spread = _spread([dice for dice, _ in found])
        assert spread is not None  # a round is there because of a value
        moved_mean = sum(moved for _, moved in found) / len(found)
        points.append(
            CurvePoint(round=number, dice=spread, bytes_moved=moved_mean if moves else None)
        )
    return tuple(points)
