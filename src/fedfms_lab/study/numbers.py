"""study.csv: every number of the answer in a row of its own, with the runs it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedfms_lab.study.answer import (
    ALL,
    FAILS_BELOW,
    Answer,
    Choice,
    Communication,
    Curve,
    FalseAlarms,
    Gap,
    LocalCell,
    Saving,
    Score,
    ScoreLine,
    Spread,
    Training,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One row of study.csv: a number with all its digits, and where it comes from."""

    table: str  # study, cases, classes, scores, gaps, local, communication, training, curves
    method: str = ALL
    regime: str = ""  # or what is compared: "federated - central"
    site: str = ALL
    role: str = ""
    class_name: str = ALL
    metric: str
    statistic: str
    value: float
    n: int | None = None  # what the statistic is over, such as seeds, patients or runs
    unit: str = ""
    runs: tuple[str, ...]


def numbers(answer: Answer) -> Iterator[Number]:
    """Every number of the answer."""
    names = tuple(run.record.key.name for run in answer.runs)
    yield from _each({"planned": len(answer.study.planned)}, table="study", metric="runs", runs=())
    yield from _each({"finished": len(names)}, table="study", metric="runs", runs=names)
    if names:
        where = {"table": "study", "metric": "seconds", "unit": "s", "runs": names}
        seconds = sum(run.record.seconds for run in answer.runs)
        yield from _each({"sum": seconds}, **where, n=len(names))
    for cases in answer.cases:
        where = {"table": "cases", "site": cases.site, "role": cases.role, "runs": cases.runs}
        for metric in ("cases", "patients", "without_value"):
            yield from _each({"count": getattr(cases, metric)}, **where, metric=metric)
    yield from _class_numbers(answer, names)
    for line in answer.scores:
        yield from _score_numbers(line)
    for alarms in answer.false_alarms:
        yield from _alarm_numbers(alarms)
    for choice in answer.choices:
        yield from _choice_numbers(choice)
    for gap in answer.gaps:
        yield from _gap_numbers(gap)
    for cell in answer.local:
        yield from _local_numbers(cell)
    yield from _fail_numbers(answer)
    for moved in answer.communication:
        yield from _communication_numbers(moved)
    for cost in answer.training:
        yield from _training_numbers(cost)
    for saving in answer.savings:
        yield from _saving_numbers(saving)
    for curve in answer.curves:
        yield from _curve_numbers(curve)
    for run in answer.runs:
        key = run.record.key
        where = {"table": "runs", "method": key.method, "regime": key.regime, "runs": (key.name,)}
        yield from _each({"wall clock": run.record.seconds}, **where, metric="seconds", unit="s")


def _each(statistics: Mapping[str, float | None], **where: Any) -> Iterator[Number]:
    """A row for each statistic that has a value; `where` holds the other columns."""
    for statistic, value in statistics.items():
        if value is not None:
            yield Number(statistic=statistic, value=value, **where)


def _class_numbers(answer: Answer, names: tuple[str, ...]) -> Iterator[Number]:
    """Whether means are over a class, and which site does not draw it; nothing of a single class.

    A number of class "" is over the classes that are in common.
    """
    for name in answer.classes if len(answer.classes) > 1 else ():
        where = {"table": "classes", "class_name": name, "runs": names}
        in_common = {"yes or no": int(name in answer.common)}
        yield from _each(in_common, **where, metric="in common")
        for site in answer.study.sites:
            if name in answer.not_annotated.get(site, ()):
                yield from _each({"yes or no": 0}, **where, site=site, metric="annotated")


def _mean_and_spread(score: Score) -> dict[str, float | None]:
    found: dict[str, float | None] = {"mean": score.value, "standard deviation": score.spread}
    if score.seeds == 2:
        found |= {"first seed": score.by_seed[0], "second seed": score.by_seed[1]}
    return found


def _score_numbers(line: ScoreLine) -> Iterator[Number]:
    where = {
        "table": "scores",
        "method": line.method,
        "regime": f"{line.regime}, best model" if line.best else line.regime,
        "role": line.role,
        "class_name": line.class_name,
        "metric": line.metric,
    }
    for site, score in [*line.sites.items(), (ALL, line.mean)]:
        found = {**where, "site": site, "n": score.seeds, "runs": score.runs}
        yield from _each(_mean_and_spread(score), **found, unit=line.unit)
    yield from _each({"sites": len(line.sites)}, **found)
    if line.worst is not None:
        score = line.sites[line.worst]
        found = {**where, "site": line.worst, "n": score.seeds, "runs": score.runs}
        yield from _each({"worst site": score.value}, **found, unit=line.unit)


def _alarm_numbers(alarms: FalseAlarms) -> Iterator[Number]:
    yield from _each(
        {"mean": alarms.share.value, "cases": alarms.cases},
        table="false alarms",
        method=alarms.method,
        regime=alarms.regime,
        site=alarms.site,
        role=alarms.role,
        metric="share of cases with nothing drawn",
        n=alarms.share.seeds,
        runs=alarms.share.runs,
    )


def _choice_numbers(choice: Choice) -> Iterator[Number]:
    fold = f"without {choice.holdout}" if choice.holdout else "all"
    for rate, dice in choice.dice.items():
        yield from _each(
            {f"at rate {rate:g}": dice, f"taken at rate {rate:g}": int(rate == choice.rate)},
            table="learning rates",
            method=choice.method,
            regime=choice.way,
            site=choice.trained_on[0] if choice.way == "local" else fold,
            role="train",
            metric="dice",
            runs=choice.runs,
        )


def _gap_numbers(gap: Gap) -> Iterator[Number]:
    others = {
        "method": f"federated {gap.other}",
        "local-best": "local, best model",
        "strategy": "federated",
    }
    yield from _each(
        {
            "mean difference": gap.difference,
            "interval low": gap.interval.low if gap.interval else None,
            "interval high": gap.interval.high if gap.interval else None,
            "p": gap.p,
            "p after Holm": gap.p_holm,
            "seeds": gap.seeds,
            "cases": gap.cases,
            "patients": gap.patients,
            "sites": gap.sites,
        },
        table="gaps",
        method=gap.method,
        regime=f"{f'federated {gap.strategy}'.rstrip()} - {others.get(gap.against, gap.against)}",
        site=gap.site,
        role=gap.role,
        metric="dice",
        n=gap.patients,
        runs=gap.runs,
    )


def _local_numbers(cell: LocalCell) -> Iterator[Number]:
    regime = f"local at {cell.trained_at}"
    role = "train" if cell.trained_at == cell.scored_at else "unseen"
    where = {"table": "local", "method": cell.method, "site": cell.scored_at, "metric": "dice"}
    found = {**where, "regime": regime, "n": cell.dice.seeds, "runs": cell.dice.runs}
    yield from _each(_mean_and_spread(cell.dice), **found, role=role)
    found = {**where, "regime": f"federated - {regime}", "n": cell.behind_cases}
    role = cell.behind_role or ""
    yield from _each({"mean difference": cell.behind}, **found, role=role, runs=cell.behind_runs)


def _fail_numbers(answer: Answer) -> Iterator[Number]:
    for method in answer.study.methods:
        away = answer.away(method)
        if away:
            what = f"pairs of sites more than {FAILS_BELOW} below federated"
            yield from _each(
                {what: sum(cell.fails for cell in away)},
                table="local",
                method=method,
                regime="local",
                role="unseen",
                metric="dice",
                n=len(away),
                runs=tuple(sorted({name for cell in away for name in cell.behind_runs})),
            )


def _spread_numbers(spread: Spread | None, after: str = "", **where: Any) -> Iterator[Number]:
    if spread is not None:
        found = {f"{name}{after}": getattr(spread, name) for name in ("mean", "low", "high")}
        yield from _each(found, **where, n=spread.n)


def _communication_numbers(moved: Communication) -> Iterator[Number]:
    where = {"table": "communication", "method": moved.method, "regime": "federated"}
    for spread, metric, unit, runs in (
        (moved.down, "bytes to a site in a round", "B", moved.runs),
        (moved.up, "bytes from a site in a round", "B", moved.runs),
        (moved.total_down, "bytes to all sites in a run", "B", moved.runs),
        (moved.total_up, "bytes from all sites in a run", "B", moved.runs),
        (moved.rounds, "rounds", "rounds", moved.runs),
        (moved.target, "target dice", "", moved.target_runs),
        (moved.rounds_to_target, "rounds to target", "rounds", moved.reached),
        (moved.bytes_to_target, "bytes to target", "B", moved.reached),
    ):
        yield from _spread_numbers(spread, **where, metric=metric, unit=unit, runs=runs)
    both = {"metric": "bytes both ways in a run", "unit": "B", "n": moved.total_up.n}
    yield from _each({"mean": moved.both_ways}, **where, **both, runs=moved.runs)
    if moved.target is not None:
        reached = {"metric": "runs that reached the target", "n": moved.target.n}
        yield from _each({"count": len(moved.reached)}, **where, **reached, runs=moved.reached)


def _training_numbers(cost: Training) -> Iterator[Number]:
    where: dict[str, Any] = {"table": "training", "method": cost.method, "regime": cost.regime}
    where["runs"] = cost.runs
    for phase, spread in cost.seconds.items():
        yield from _spread_numbers(spread, **where, metric=f"seconds of {phase}", unit="s")
    for phase, size in cost.peak_memory_bytes.items():
        found = {"metric": f"peak memory of {phase}", "n": cost.seconds[phase].n}
        yield from _each({"high": size}, **where, **found, unit="B")
    yield from _spread_numbers(cost.wall_seconds, **where, metric="wall seconds", unit="s")


def _saving_numbers(saving: Saving) -> Iterator[Number]:
    where = {"table": "savings", "method": saving.method, "metric": saving.what}
    for regime, found, unit in (
        ("federated", {"needs": saving.needs}, saving.unit),
        (f"federated {saving.other}", {"needs": saving.other_needs}, saving.unit),
        (f"federated - federated {saving.other}", {"share saved": saving.share}, ""),
    ):
        yield from _each(found, **where, regime=regime, unit=unit, runs=saving.runs)


def _curve_numbers(curve: Curve) -> Iterator[Number]:
    where = {"table": "curves", "method": curve.method, "regime": curve.regime, "role": "train"}
    for point in curve.points:
        after, found = f" after round {point.round}", {**where, "runs": curve.runs}
        yield from _spread_numbers(point.dice, after, **found, metric="dice")
        moved = {f"mean{after}": point.bytes_moved}
        yield from _each(moved, **found, metric="bytes moved", n=point.dice.n, unit="B")
