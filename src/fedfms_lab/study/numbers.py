"""study.csv: every number of the answer in a row of its own, with the runs it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedfms_lab.study.answer import (
    ALL,
    FAILS_BELOW,
    Answer,
    Communication,
    Curve,
    Gap,
    LocalCell,
    Saving,
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
    yield Number(
        table="study", metric="runs", statistic="planned", value=len(answer.study.planned), runs=()
    )
    yield Number(table="study", metric="runs", statistic="finished", value=len(names), runs=names)
    if names:
        seconds = sum(run.record.seconds for run in answer.runs)
        yield Number(
            table="study",
            metric="seconds",
            statistic="sum",
            value=seconds,
            n=len(names),
            unit="s",
            runs=names,
        )
    for cases in answer.cases:
        for metric in ("cases", "patients", "without_value"):
            yield Number(
                table="cases",
                site=cases.site,
                role=cases.role,
                metric=metric,
                statistic="count",
                value=getattr(cases, metric),
                runs=cases.runs,
            )
    yield from _class_numbers(answer, names)
    for line in answer.scores:
        yield from _score_numbers(line)
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
        yield Number(
            table="runs",
            method=run.record.key.method,
            regime=run.record.key.regime,
            metric="seconds",
            statistic="wall clock",
            value=run.record.seconds,
            unit="s",
            runs=(run.record.key.name,),
        )


def _class_numbers(answer: Answer, names: tuple[str, ...]) -> Iterator[Number]:
    """Whether means are over a class, and which site does not draw it; nothing of a single class.

    A number of class "" is over the classes that are in common.
    """
    for class_name in answer.classes if len(answer.classes) > 1 else ():
        yield Number(
            table="classes",
            class_name=class_name,
            metric="in common",
            statistic="yes or no",
            value=int(class_name in answer.common),
            runs=names,
        )
        for site in answer.study.sites:
            if class_name in answer.not_annotated.get(site, ()):
                yield Number(
                    table="classes",
                    site=site,
                    class_name=class_name,
                    metric="annotated",
                    statistic="yes or no",
                    value=0,
                    runs=names,
                )


def _score_numbers(line: ScoreLine) -> Iterator[Number]:
    regime = f"{line.regime}, best model" if line.best else line.regime
    for site, score in [*line.sites.items(), (ALL, line.mean)]:
        statistics: list[tuple[str, float, int]] = [("mean", score.value, score.seeds)]
        if score.spread is not None:
            statistics.append(("standard deviation", score.spread, score.seeds))
        if site == ALL:
            statistics.append(("sites", len(line.sites), score.seeds))
        for statistic, value, n in statistics:
            yield Number(
                table="scores",
                method=line.method,
                regime=regime,
                site=site,
                role=line.role,
                class_name=line.class_name,
                metric=line.metric,
                statistic=statistic,
                value=value,
                n=n,
                unit="" if statistic == "sites" else line.unit,
                runs=score.runs,
            )
    if line.worst is not None:
        worst = line.sites[line.worst]
        yield Number(
            table="scores",
            method=line.method,
            regime=regime,
            site=line.worst,
            role=line.role,
            class_name=line.class_name,
            metric=line.metric,
            statistic="worst site",
            value=worst.value,
            n=worst.seeds,
            unit=line.unit,
            runs=worst.runs,
        )


def _gap_numbers(gap: Gap) -> Iterator[Number]:
    if gap.against == "method":
        regime = f"federated - federated {gap.other}"
    elif gap.against == "local-best":
        regime = "federated - local, best model"
    else:
        regime = f"federated - {gap.against}"
    statistics: list[tuple[str, float | None]] = [
        ("mean difference", gap.difference),
        ("interval low", gap.interval.low if gap.interval else None),
        ("interval high", gap.interval.high if gap.interval else None),
        ("p", gap.p),
        ("p after Holm", gap.p_holm),
        ("cases", gap.cases),
        ("patients", gap.patients),
        ("sites", gap.sites),
    ]
    for statistic, value in statistics:
        if value is not None:
            yield Number(
                table="gaps",
                method=gap.method,
                regime=regime,
                site=gap.site,
                role=gap.role,
                metric="dice",
                statistic=statistic,
                value=value,
                n=gap.patients,
                runs=gap.runs,
            )


def _local_numbers(cell: LocalCell) -> Iterator[Number]:
    regime = f"local at {cell.trained_at}"
    role = "train" if cell.trained_at == cell.scored_at else "unseen"
    values = [("mean", cell.dice.value)]
    if cell.dice.spread is not None:
        values.append(("standard deviation", cell.dice.spread))
    for statistic, value in values:
        yield Number(
            table="local",
            method=cell.method,
            regime=regime,
            site=cell.scored_at,
            role=role,
            metric="dice",
            statistic=statistic,
            value=value,
            n=cell.dice.seeds,
            runs=cell.dice.runs,
        )
    if cell.behind is not None:
        yield Number(
            table="local",
            method=cell.method,
            regime=f"federated - {regime}",
            site=cell.scored_at,
            role=cell.behind_role or "",
            metric="dice",
            statistic="mean difference",
            value=cell.behind,
            n=cell.behind_cases,
            runs=cell.behind_runs,
        )


def _fail_numbers(answer: Answer) -> Iterator[Number]:
    for method in answer.study.methods:
        away = [
            cell
            for cell in answer.local
            if cell.method == method
            and cell.trained_at != cell.scored_at
            and cell.behind is not None
        ]
        if away:
            yield Number(
                table="local",
                method=method,
                regime="local",
                role="unseen",
                metric="dice",
                statistic=f"pairs of sites more than {FAILS_BELOW} below federated",
                value=sum(cell.fails for cell in away),
                n=len(away),
                runs=tuple(sorted({name for cell in away for name in cell.behind_runs})),
            )


def _spread_numbers(
    spread: Spread | None, metric: str, unit: str, runs: tuple[str, ...], **where: str
) -> Iterator[Number]:
    if spread is not None:
        for statistic in ("mean", "low", "high"):
            yield Number(
                metric=metric,
                statistic=statistic,
                value=getattr(spread, statistic),
                n=spread.n,
                unit=unit,
                runs=runs,
                **where,  # type: ignore[arg-type]
            )


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
        yield from _spread_numbers(spread, metric, unit, runs, **where)
    total = moved.total_down.mean + moved.total_up.mean
    yield Number(
        metric="bytes both ways in a run",
        statistic="mean",
        value=total,
        n=moved.total_up.n,
        unit="B",
        runs=moved.runs,
        **where,  # type: ignore[arg-type]
    )
    if moved.target is not None:
        yield Number(
            metric="runs that reached the target",
            statistic="count",
            value=len(moved.reached),
            n=moved.target.n,
            runs=moved.reached,
            **where,  # type: ignore[arg-type]
        )


def _training_numbers(cost: Training) -> Iterator[Number]:
    where = {"table": "training", "method": cost.method, "regime": cost.regime}
    for phase, spread in cost.seconds.items():
        yield from _spread_numbers(spread, f"seconds of {phase}", "s", cost.runs, **where)
    for phase, size in cost.peak_memory_bytes.items():
        yield Number(
            metric=f"peak memory of {phase}",
            statistic="high",
            value=size,
            n=cost.seconds[phase].n,
            unit="B",
            runs=cost.runs,
            **where,  # type: ignore[arg-type]
        )
    yield from _spread_numbers(cost.wall_seconds, "wall seconds", "s", cost.runs, **where)


def _saving_numbers(saving: Saving) -> Iterator[Number]:
    for regime, statistic, value, unit in (
        ("federated", "needs", saving.needs, saving.unit),
        (f"federated {saving.other}", "needs", saving.other_needs, saving.unit),
        (f"federated - federated {saving.other}", "share saved", saving.share, ""),
    ):
        if value is not None:
            yield Number(
                table="savings",
                method=saving.method,
                regime=regime,
                metric=saving.what,
                statistic=statistic,
                value=value,
                unit=unit,
                runs=saving.runs,
            )


def _curve_numbers(curve: Curve) -> Iterator[Number]:
    where = {"table": "curves", "method": curve.method, "regime": curve.regime, "role": "train"}
    for point in curve.points:
        for statistic in ("mean", "low", "high"):
            yield Number(
                metric="dice",
                statistic=f"{statistic} after round {point.round}",
                value=getattr(point.dice, statistic),
                n=point.dice.n,
                runs=curve.runs,
                **where,  # type: ignore[arg-type]
            )
        if point.bytes_moved is not None:
            yield Number(
                metric="bytes moved",
                statistic=f"mean after round {point.round}",
                value=point.bytes_moved,
                n=point.dice.n,
                unit="B",
                runs=curve.runs,
                **where,  # type: ignore[arg-type]
            )
