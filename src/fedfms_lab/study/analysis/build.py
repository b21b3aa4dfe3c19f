"""A study's finished runs to its answer: every number of the page, with the runs it comes from.

Like is compared with like. At a site that a run trained at, only its validation cases count; at a
site that it did not, all cases. A difference between two ways to train is taken case by case, from
runs of the same seed (and fold, where both have folds), and over the cases that both scored.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedfms_lab.study.analysis import costs
from fedfms_lab.study.analysis.gaps import gaps, local_cells
from fedfms_lab.study.analysis.scores import (
    best_local,
    classes_in_common,
    counted,
    false_alarms,
    not_annotated,
    run_scores,
    score_lines,
    site_cases,
)
from fedfms_lab.study.answer import Answer, Asked
from fedfms_lab.study.record import Run
from fedfms_lab.study.tuning import choices


def answer(study: Asked, runs: Sequence[Run]) -> Answer:
    """All tables of what has finished so far."""
    planned = set(study.planned)
    ours = tuple(run for run in runs if run.record.key.name in planned)
    tries = [run for run in runs if run.record.key.name in study.tries]
    finished = {run.record.key.name for run in ours}
    classes = tuple(dict.fromkeys(row.class_name for run in ours for row in run.scores))
    cases = counted(ours)
    common = classes_in_common(cases, classes)
    scores = run_scores(cases, common)
    best = best_local(scores)
    learnt = {run.record.key.name: costs.learning(run, scores, common, classes) for run in ours}
    moved = tuple(costs.communication(study, ours, learnt))
    trained = tuple(costs.training(study, ours))
    return Answer(
        study=study,
        runs=ours,
        missing=tuple(name for name in study.planned if name not in finished),
        strangers=tuple(
            run.record.key.name
            for run in runs
            if run.record.key.name not in planned.union(study.tries)
        ),
        classes=classes,
        common=common,
        not_annotated=not_annotated(study, ours, classes),
        cases=tuple(site_cases(study, cases)),
        scores=tuple(score_lines(study, scores, classes, common, best)),
        false_alarms=tuple(false_alarms(study, cases)),
        choices=tuple(choices(tries)),
        gaps=tuple(gaps(study, cases, common, best)),
        local=tuple(local_cells(study, cases, scores, common)),
        communication=moved,
        training=trained,
        savings=tuple(costs.savings(moved, trained)),
        curves=tuple(costs.curves(study, ours, learnt)),
    )
