"""Over which of a site's cases a mean may leave, by the sets of patients of earlier means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    patient_of: Mapping[str, str] = field(default_factory=dict)  # by the case's key

    @classmethod
    def of(
        cls,
        history: History | None,
        scored: Sequence[StoredCase],
        training: Sequence[StoredCase],
        smallest: int,
    ) -> Telling:
        """By what was told before; None for the history of a canary, which tells nothing."""
        patient_of = {one.case.key: one.case.patient for one in scored}
        everybody = frozenset(patient_of)
        if history is None:
            return cls(everybody, True, True, smallest, frozenset(), frozenset(), patient_of)
        now, trained = _names(history, scored), frozenset(_names(history, training).values())
        told = history.may_tell("scores", frozenset(now.values()), smallest)
        return cls(
            everybody
            if told is None
            else frozenset(key for key, patient in patient_of.items() if now[patient] in told),
            told is not None,
            history.may_tell("loss", trained, smallest) == trained,
            smallest,
            told or frozenset(),
            trained,
            patient_of,
        )

    def metrics(self, scores: Sequence[CaseScore]) -> tuple[Metric, ...]:
        """Means over the cases that may be told of; names alone where none may."""
        counted = [one for one in scores if one.key in self.cases]
        found = summarize(counted, self.smallest, self.patient_of)
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


def _names(history: History, cases: Sequence[StoredCase]) -> dict[str, str]:
    """Of each patient of these cases the history's name, by the site's own."""
    there: dict[str, list[str]] = {}
    for one in cases:
        record = one.record  # of the grey levels, and of both arrays
        there.setdefault(one.case.patient, []).append(f"{record.digest}{record.crc}")
    return {
        patient: history.name(patient, " ".join(sorted(found))) for patient, found in there.items()
    }
