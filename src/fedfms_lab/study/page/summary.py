"""The head of the page: what was done, what is missing, and the largest numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fedfms.pages.parts import Tile
from fedfms.report import words as shown
from fedfms_lab.study.answer import ALL, Answer
from fedfms_lab.study.page import words
from fedfms_lab.study.record import RUNS_FOLDER

_RUNS_NAMED = 12  # in a notice


def meta(found: Answer) -> str:
    """The study's name, how many of its runs are done, and when it began."""
    done, planned = len(found.runs), len(found.study.planned)
    parts = [f"Study {found.study.name}", f"{done} of {shown.numerals(planned, 'run')}"]
    if found.runs:
        parts.append(shown.moment(min(run.record.started for run in found.runs)))
    return " · ".join(parts)


def notices(found: Answer) -> Iterator[str]:
    """What a reader must know first: runs that are missing, strange or not comparable."""
    if found.missing:
        named = ", ".join(found.missing[:_RUNS_NAMED])
        rest = len(found.missing) - _RUNS_NAMED
        more = f" and {rest} more" if rest > 0 else ""
        done = len(found.runs)
        yield (
            f"This study is incomplete: {done} of "
            f"{shown.numerals(len(found.study.planned), 'planned run')} "
            f"{'has' if done == 1 else 'have'} finished, and what is shown is of those. "
            f"Missing: {named}{more}."
        )
    if found.strangers:
        yield (
            f"{shown.numerals(len(found.strangers), 'run')} below {RUNS_FOLDER}/ "
            "are not in the study's plan and count nowhere: "
            f"{', '.join(found.strangers[:_RUNS_NAMED])}."
        )
    if found.runs and words.by_class(found):
        yield _unlike(found)
    for site in found.study.sites:
        facts = [run.record.sites[site] for run in found.runs if site in run.record.sites]
        for what, values in (
            ("images or labels", {fact.manifest_sha256 for fact in facts}),
            ("site.yml", {fact.config_sha256 for fact in facts}),
        ):
            if len(values) > 1:
                yield (
                    f"The {what} of {site} changed between runs ({len(values)} states), so its "
                    "scores are not of the same data. Remove the runs of the old state and start "
                    "the study again."
                )
    for what, count in (
        ("SAM checkpoint", len({run.record.backbone_sha256 for run in found.runs})),
        ("set of versions", len({tuple(sorted(r.record.versions.items())) for r in found.runs})),
    ):
        if count > 1:
            yield f"The runs did not all use the same {what}: there are {count}. See What ran."


def _unlike(found: Answer) -> str:
    """Which classes are compared, where sites did not all score the same."""
    missing = [
        f"{site} does not annotate {shown.class_names(names)}"
        for site, names in found.not_annotated.items()
    ]
    why = f" ({'; '.join(missing)})" if missing else ""
    told = f"Not every site has a score of every class{why}, so each class is told by itself."
    if found.common:
        return (
            f"{told} Differences, one site alone, curves and costs are of "
            f"{shown.class_names(found.common)}, which all sites scored in all runs."
        )
    return (
        f"{told} There is no class that all sites scored in all runs: differences are taken case "
        "by case over the classes that both scored, and there are no curves and no target."
    )


def headlines(found: Answer) -> list[Tile]:
    """The few numbers above all tables."""
    tiles = []
    partly = words.by_class(found)
    groups = [ALL] if found.common or not partly else list(found.classes)
    for method, class_name in itertools.product(found.study.methods[:2], groups):
        named = found.common if class_name == ALL else [class_name]
        of_class = f" of {shown.class_names(named)}" if partly else ""
        line = found.line(method, "federated", "unseen", class_name=class_name) or found.line(
            method, "federated", "train", class_name=class_name
        )
        if line is None:
            continue
        caption = []
        for regime in ("central", "local"):
            other = found.line(method, regime, line.role, class_name=class_name)
            if other is not None:
                same = set(other.sites) == set(line.sites)
                over = "" if same else f" over {shown.numerals(len(other.sites), 'site')}"
                caption.append(f"{words.REGIMES[regime]} {shown.score(other.mean.value)}{over}")
        caption.append(f"mean of {shown.numerals(len(line.sites), 'site')}")
        label = f"Dice{of_class}, {words.method(method)}, {words.ROLES[line.role]}"
        tiles.append(Tile(label, shown.score(line.mean.value), "; ".join(caption)))
    for saving in found.savings[:1]:
        here, there = (words.quantity(n, saving.unit) for n in (saving.needs, saving.other_needs))
        label = f"{words.method(saving.method)}, a site and round"
        tiles.append(Tile(label, here, f"{words.method(saving.other)} {there}; both ways"))
    if not found.savings and found.communication:
        moved = found.communication[0]
        about = f"{words.method(moved.method)}, all sites and rounds, mean of runs"
        tiles.append(Tile("Moved by a federated run", shown.size(moved.both_ways), about))
    if found.runs:
        seconds = sum(run.record.seconds for run in found.runs)
        about = f"{shown.numerals(len(found.runs), 'run')}, one after the other"
        tiles.append(Tile("Time of all runs", shown.duration(seconds), about))
    return tiles
