"""Over which of a site's cases a mean may leave, by the sets of patients of earlier means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.data.cache import StoredCase
from fedfms.trainer.history import History, Patients
from fedfms.training.evaluate import CaseScore, summarize


@dataclass(frozen=True, slots=True)
class Telling:
    """What may be told of one task's scores and loss."""

    cases: frozenset[str]  # keys of those whose scores enter the means; of all where none leave
    scores: bool  # whether means of scores may leave
    loss: bool  # whether the mean loss may
    smallest: int  # cases of a mean
    scored_patients: Patients
    trained_patients: Patients

    @classmethod
    def of(
        cls,
        history: History | None,
        scored: Sequence[StoredCase],
        training: Sequence[StoredCase],
        smallest: int,
    ) -> Telling:
        """By what was told before; None for the history of a canary, which tells nothing."""
        everybody = frozenset(one.case.key for one in scored)
        if history is None:
            return cls(everybody, True, True, smallest, frozenset(), frozenset())
        told = history.may_tell("scores", (one.case.patient for one in scored), smallest)
        trained = history.names(one.case.patient for one in training)
        told_loss = history.may_tell("loss", (one.case.patient for one in training), smallest)
        return cls(
            everybody
            if told is None
            else frozenset(
                one.case.key for one in scored if history.name(one.case.patient) in told
            ),
            told is not None,
            told_loss == trained,
            smallest,
            told or frozenset(),
            trained,
        )

    def metrics(self, scores: Sequence[CaseScore]) -> tuple[Metric, ...]:
        """Means over the cases that may be told of; names alone where none may."""
        found = summarize([one for one in scores if one.key in self.cases], self.smallest)
        if self.scores:
            return found
        return tuple(
            dataclasses.replace(one, mean=None, std=None, cases=0, empty=0) for one in found
        )

    def is_told(self, history: History, report: Contribution) -> None:
        """Write down of whom a report that is about to leave tells."""
        if self.scores and any(metric.mean is not None for metric in report.metrics):
            history.told("scores", self.scored_patients)
        if report.loss is not None:
            history.told("loss", self.trained_patients)
