"""What runs cost: bytes, time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from fedfms.pages.parts import Cell, Column, Table, with_note
from fedfms.report import words as shown
from fedfms_lab.study.answer import Answer, Communication, Training
from fedfms_lab.study.page import words


def cost_tables(found: Answer) -> list[Table]:
    """Bytes moved, what one method saves against another, and time and memory by phase."""
    tables = []
    if found.communication:
        tables.append(_communication(found))
    if found.savings:
        tables += _savings(found)
    if found.training:
        tables.append(_training(found.training))
    return tables


def _communication(found: Answer) -> Table:
    return Table(
        "Communication of federated runs",
        [
            Column("Method", number=False),
            Column("To a site", "a round"),
            Column("From a site", "a round"),
            Column("All sites", "both ways, a run"),
            Column("Rounds", "a run"),
            Column("Target", "Dice"),
            Column("Reached", "runs"),
            Column("Rounds", "to the target"),
            Column("Moved", "to the target"),
        ],
        [_communication_row(moved) for moved in found.communication],
        note=words.target(found.study, found.communication)
        + " Reached: the first model whose mean validation Dice over the training sites is not "
        "below it. Tensor bytes of training sites in a round, and of all sites in a run, without "
        "protocol and encryption; mean over runs, with the range where they differ. 1 MB is "
        "1 000 000 bytes. Centralized and local training move no tensors.",
    )


def _communication_row(moved: Communication) -> list[Cell]:
    aims = moved.target
    return [
        Cell(words.method(moved.method)),
        words.ranged(moved.down, "B"),
        words.ranged(moved.up, "B"),
        Cell(
            shown.size(moved.both_ways),
            small=f"{shown.size(moved.total_down.mean)} to, {shown.size(moved.total_up.mean)} from",
        ),
        words.ranged(moved.rounds, "rounds"),
        words.ranged(aims, "Dice"),
        Cell(f"{len(moved.reached)} of {aims.n}" if aims else shown.NONE),
        words.ranged(moved.rounds_to_target, "rounds"),
        words.ranged(moved.bytes_to_target, "B"),
    ]


def _savings(found: Answer) -> list[Table]:
    tables = []
    for pair in dict.fromkeys((saving.method, saving.other) for saving in found.savings):
        name, other = (words.method(method) for method in pair)
        rows = [
            [
                Cell(_capital(saving.what)),
                Cell(words.quantity(saving.needs, saving.unit)),
                Cell(words.quantity(saving.other_needs, saving.unit)),
                Cell(words.share(saving.share)),
            ]
            for saving in found.savings
            if (saving.method, saving.other) == pair
        ]
        tables.append(
            Table(
                f"What federated {name} saves against {other}",
                [
                    Column("What", number=False),
                    Column(name),
                    Column(other),
                    Column("Saved", "share"),
                ],
                rows,
            )
        )
    return with_note(
        tables,
        "Means over runs; to the target Dice over the runs that reached it. Below 0: it needs "
        "more. Memory: the largest of any run.",
    )


def _training(costs: Sequence[Training]) -> Table:
    phases = list(dict.fromkeys(phase for cost in costs for phase in cost.seconds))
    rows = []
    for cost in costs:
        cells = []
        for phase in phases:
            seconds, peak = cost.seconds.get(phase), cost.peak_memory_bytes.get(phase)
            text = shown.duration(seconds.mean) if seconds else shown.NONE
            cells.append(Cell(text, small=shown.size(peak) if peak else ""))
        wall = shown.duration(cost.wall_seconds.mean)
        name = words.way(cost.method, cost.regime, False)
        rows.append([name, *cells, Cell(wall), Cell(shown.count(cost.wall_seconds.n))])
    return Table(
        "Time and peak memory of a run",
        [
            Column("Method", "trained", number=False),
            *(Column(_capital(phase), "time, memory") for phase in phases),
            Column("Wall clock", "a run"),
            Column("Runs", "n"),
        ],
        rows,
        note="Time of a phase: summed over the processes that did it (federated: all sites), mean "
        "over runs. Memory: the largest of one process, or of its GPU, in any run. A run of one "
        "site alone trains one site, the others all training sites.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
