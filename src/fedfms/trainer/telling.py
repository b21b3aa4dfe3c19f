"""Over which of a site's cases a mean may leave, by the sets of patients of earlier means.

A mean of a class is over the cases that show it and over those without it in which something was
found: that depends on the model, which a server chooses. So a class is judged by what a model
cannot change: its patients who show it and its patients who do not are two groups, each of which
counts whole, as told before or by at least `min_cases` patients apart from all that was, or not at
all.

What a model finds in nobody is a constant: Dice 0, and the diagonal as HD95. A mean of constants
and of one patient tells that patient. So it leaves only where something was found in none of those
who show the class, or in at least `min_cases` of them; and where something was found in fewer of
those who do not, it is as if nothing had been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.cache import StoredCase
from fedfms.trainer.history import History, Patients
from fedfms.training.evaluate import CaseScore, as_if_nothing, slices_as_if_nothing, summarize

# Dice from which something was found in a patient: with less, it is 0 in all but name, and patients
# who have a pixel or two in common with the truth would hide nobody
FOUND = 0.02

Names = dict[str, str]  # of each patient the history's name, by the site's own


@dataclass(frozen=True, slots=True)
class _OfClass:
    """Whose scores of one class may leave."""

    patients: frozenset[str]  # the site's own names
    groups: tuple[Patients, ...]  # the same patients, as the history has them


@dataclass(frozen=True, slots=True)
class Telling:
    """What may be told of one task's scores and loss."""

    cases: frozenset[str]  # keys of those of whom anything is told; of all where none leave
    classes: Mapping[str, _OfClass] | None  # whose scores may leave; None: of all, of a canary
    loss: bool  # whether the mean loss may
    smallest: int  # cases of a mean
    scored_patients: Patients
    trained_patients: Patients
    patient_of: Mapping[str, str] = field(default_factory=dict)  # by the case's key

    @classmethod
    def of(
        cls,
        history: History | None,
        site: SiteConfig,
        scored: Sequence[StoredCase],
        scores: Sequence[CaseScore],
        training: Sequence[StoredCase],
        smallest: int,
    ) -> Telling:
        """By what was told before; None for the history of a canary, which tells nothing."""
        patient_of = {one.case.key: one.case.patient for one in scored}
        everybody = frozenset(patient_of)
        if history is None:
            return cls(everybody, None, True, smallest, frozenset(), frozenset(), patient_of)
        now, trained = _names(history, scored), frozenset(_names(history, training).values())
        told = history.may_tell("cases", frozenset(now.values()), smallest)
        of_whom = [] if told is None else [one for one in scored if now[one.case.patient] in told]
        return cls(
            everybody if told is None else frozenset(one.case.key for one in of_whom),
            _by_class(history, site, of_whom, scores, smallest),
            history.may_tell("loss", trained, smallest) == trained,
            smallest,
            told or frozenset(),
            trained,
            patient_of,
        )

    def metrics(self, scores: Sequence[CaseScore], recipe: Recipe) -> tuple[Metric, ...]:
        """Means over the patients who may be told of; names alone where none may."""
        if self.classes is None:
            return summarize(scores, self.smallest, self.patient_of)
        counted = [
            one
            for one in scores
            if one.key in self.cases and self.patient_of[one.key] in self._of(one.class_name)
        ]
        found: dict[tuple[str, str], Metric] = {}
        for name in dict.fromkeys(one.class_name for one in counted):
            rows = [one for one in counted if one.class_name == name]
            for one in self._means_of_class(rows, recipe):
                found[name, one.metric] = one
        return tuple(
            found.get(
                (one.class_name, one.metric),
                dataclasses.replace(one, mean=None, std=None, cases=0, empty=0),
            )
            for one in summarize(scores, self.smallest, self.patient_of)
        )

    def _means_of_class(self, rows: Sequence[CaseScore], recipe: Recipe) -> tuple[Metric, ...]:
        """Means of one class, as far as what was found is no answer about few; none where it is."""
        if self._are_few(one for one in rows if one.drawn and one.dice > FOUND):
            return ()
        held = set()
        if self._are_few(one for one in rows if one.drawn and one.found):
            held.add("hd95")
        if self._are_few(
            one for one in rows if any(part.drawn and part.dice > FOUND for part in one.slices)
        ):
            held |= {"dice_slice", "iou_slice"}
        if self._are_few(one for one in rows if one.found and not one.drawn):
            rows = [one if one.drawn else as_if_nothing(one) for one in rows]
        if self._are_few(
            one for one in rows if any(not part.drawn and not part.empty for part in one.slices)
        ):
            rows = [slices_as_if_nothing(one, recipe) for one in rows]
        return tuple(
            dataclasses.replace(one, mean=None, std=None) if one.metric in held else one
            for one in summarize(rows, self.smallest, self.patient_of)
        )

    def _are_few(self, scores: Iterable[CaseScore]) -> bool:
        """Whether these are of somebody, and of too few patients to tell of."""
        return 0 < len({self.patient_of[one.key] for one in scores}) < self.smallest

    def _of(self, class_name: str) -> frozenset[str]:
        told = (self.classes or {}).get(class_name)
        return frozenset() if told is None else told.patients

    def is_told(self, history: History, report: Contribution) -> None:
        """Write down of whom a report that is about to leave tells."""
        told = {one.class_name for one in report.metrics if one.mean is not None}
        if told:
            history.told("cases", self.scored_patients)
        for name in sorted(told):
            for group in self.classes[name].groups if self.classes else ():
                history.told("class", group)
        if report.loss is not None:
            history.told("loss", self.trained_patients)


def _by_class(
    history: History,
    site: SiteConfig,
    cases: Sequence[StoredCase],
    scores: Sequence[CaseScore],
    smallest: int,
) -> dict[str, _OfClass]:
    """Whose scores of each class may leave; a class of which nobody's may is not in it.

    A patient of a group is named with what is there and with the label values that make the class:
    two classes of which a patient has the very same mask are one, since their scores may be.
    """
    values = {
        one.case.key: frozenset(value for values in one.slice_values() for value in values)
        for one in cases
    }
    # under `paper_compat` slices without any class are left out, and have no score whatever is
    # found in them
    in_slices = {one.key for one in scores if one.slices}
    scored, beside = frozenset(_names(history, cases).values()), list[Patients]()
    found: dict[str, _OfClass] = {}
    rows = {(one.key, one.class_name) for one in scores}
    for name in dict.fromkeys(one.class_name for one in scores):
        there = [one for one in cases if (one.case.key, name) in rows]  # in which it was drawn
        shown = {key: values[key] & frozenset(site.classes[name]) for key in values}
        # what is void there changes a score as what is drawn does
        made_by = {key: values[key] & {*site.classes[name], *site.void_values} for key in values}
        names = _names(history, there, made_by)
        show = {one.case.patient for one in there if shown[one.case.key]}
        sliced = {one.case.patient for one in there if one.case.key in in_slices}
        groups = [show, (names.keys() - show) & sliced, names.keys() - show - sliced]
        allowed = [
            history.may_tell(
                "class", frozenset(names[one] for one in group), smallest, scored, beside
            )
            for group in groups
        ]
        if show and allowed[0] is None:
            continue  # a mean of few, or of a set that is too close to another
        told = tuple(one for one in allowed if one is not None)
        beside += told
        found[name] = _OfClass(
            frozenset(own for own, name in names.items() if any(name in one for one in told)),
            told,
        )
    return found


def _names(
    history: History,
    cases: Sequence[StoredCase],
    shown: Mapping[str, frozenset[int]] | None = None,
) -> Names:
    """See `Names`; with the values that show a class in each case, by its key, of that class."""
    there: dict[str, list[str]] = {}
    of_class: dict[str, list[str]] = {}
    for one in cases:
        record = one.record  # of the grey levels, and of both arrays
        text = f"{record.digest}{record.crc}"
        there.setdefault(one.case.patient, []).append(text)
        if shown is not None:
            values = sorted(shown[one.case.key])
            of_class.setdefault(one.case.patient, []).append(f"{text}{values}")
    return {
        patient: history.name(
            patient,
            " ".join(sorted(texts)),
            *(() if shown is None else (" ".join(sorted(of_class[patient])),)),
        )
        for patient, texts in there.items()
    }
