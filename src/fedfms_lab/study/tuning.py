"""Which learning rate each way to train gets: the best of those that were tried.

Every way to train, in every fold, tries the same rates once, with the study's first seed, and keeps
the one with the highest mean Dice on the validation cases of its own training sites. No case of a
site that is held out has a say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedfms_lab.study.analysis.scores import classes_in_common, counted, run_scores
from fedfms_lab.study.answer import ALL, Choice, Place
from fedfms_lab.study.record import Run, RunKey


def where(key: RunKey) -> Place:
    """What runs have in common that share a choice."""
    return key.method, key.way, key.holdout, key.trained_on


def choices(tries: Sequence[Run]) -> Iterator[Choice]:
    """The choice for each way to train and fold, from the runs that tried.

    Classes that not all of these runs scored do not count. A run without any score tells nothing.
    """
    if not tries:
        return
    cases = counted(tries)
    classes = tuple(dict.fromkeys(cases.class_name))
    scores = run_scores(cases, classes_in_common(cases, classes))
    is_told = (scores.role == "train") & (scores.metric == "dice") & (scores.class_name == ALL)
    dice = scores[is_told].groupby("run").value.mean()
    by_place: dict[Place, list[Run]] = {}
    for run in tries:
        if run.record.key.name in dice.index:
            by_place.setdefault(where(run.record.key), []).append(run)
    for (method, way, holdout, trained_on), runs in by_place.items():
        keys = sorted((run.record.key for run in runs), key=lambda key: key.rate or 0.0)
        yield Choice(
            method=method,
            way=way,
            holdout=holdout,
            trained_on=trained_on,
            dice={key.rate: float(dice[key.name]) for key in keys if key.rate is not None},
            runs=tuple(key.name for key in keys),
        )
