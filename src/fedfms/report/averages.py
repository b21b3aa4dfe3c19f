"""Each round closed again, from the answers that a server kept, and compared with the models.

The answers are those of the sites' receipts, to the bit; the model that a round comes to is the one
with which every site began the next round, by its receipt, and the last one the run's result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedfms import __version__
from fedfms.contracts.decode import Misfits
from fedfms.contracts.receipt import Countersigned, Receipt
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Verdict
from fedfms.errors import FedfmsError
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.round_guard import RoundGuard, combine_judged
from fedfms.exchange.strategies import Strategy, find_strategy
from fedfms.exchange.tensors import (
    find_fault,
    fingerprint,
    from_wire,
    load_tensors,
    shapes_of,
    to_precision,
)
from fedfms.exchange.waiting import WaitingRoom
from fedfms.records.history import History
from fedfms.records.layout import (
    ANSWERS,
    BEST_MODEL,
    GLOBAL_MODEL,
    START_MODEL,
    kept_answer,
)
from fedfms.records.schema import ContributionRecord, EvaluationRecord, Record

# by which figures of the guard may differ on another processor, in the last digits of sums
_RELATIVE, _COSINE = 1e-6, 2e-4

Model = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Averages:
    """What came of it: problems, or why nothing was looked at."""

    problems: tuple[str, ...] = ()
    note: str = ""
    looked: bool = True


def check_averages(
    source: Path, records: Sequence[Record], recipe: Recipe | None, answers: Path | None
) -> Averages:
    """Close each round of a run again.

    Args:
        source: the folder of its records and models.
        records: all that can be read.
        recipe: as it ran; None where it cannot be read.
        answers: the folder that the server kept of the run; None: `ANSWERS` beside the records.
    """
    if recipe is None:
        return _nothing("without a recipe nobody knows how they were made")
    if recipe.canary:
        return _nothing("a canary adds nothing to a model")
    if recipe.sums_only:
        return _nothing("secure sums: the server had no answer of a single site to keep")
    history = History(records, {"holdout": recipe.holdout})
    if not history.done:
        return _nothing("no round was brought to its end")
    folder = answers if answers is not None else source / ANSWERS
    if not folder.is_dir():
        if answers is not None:
            return Averages((f"there is no folder {answers}",))
        if history.job.answers_kept:
            return _nothing(
                f"not here, averages not checked: the server kept the answers in its volume, in "
                f"{ANSWERS}/{history.job.job_id}; name a copy of that folder with --answers"
            )
        return _nothing("not kept, averages not checked")
    again = _Again(source, folder, history, recipe)
    problems = tuple(again.problems())
    version = history.job.fedfms_version
    if problems and version not in (None, __version__):
        problems += (f"the run was made by fedfms {version}, and this is {__version__}",)
    return Averages(problems, f"{again.read} answers of {len(history.done)} rounds")


def _nothing(why: str) -> Averages:
    return Averages(note=why, looked=False)


class _NotThatError(Exception):
    """Not what the site answered."""


class _Again:
    """The rounds of one run, one after the other."""

    def __init__(self, source: Path, folder: Path, history: History, recipe: Recipe) -> None:
        self._source, self._folder = source, folder
        self._history, self._recipe = history, recipe
        self.read = 0  # answers that are those of their receipts
        self._model: Model | None = None  # None as soon as it is not known any more
        self._fingerprints: dict[int, str] = {}  # of the model after so many rounds, as it is kept

    def problems(self) -> Iterator[str]:
        """Look at all of it."""
        try:
            strategy = find_strategy(self._recipe)
            self._model = load_tensors(self._folder / START_MODEL)
        except FedfmsError as error:
            yield error.problem
        guard = RoundGuard(self._recipe)
        for number in sorted(self._history.done):
            answers = self._answers(number)
            yield from self._began(number, answers)
            with tempfile.TemporaryDirectory() as scratch:
                room = WaitingRoom(Path(scratch) / "waiting")
                differences: dict[str, Mapping[str, Tensor]] = {}
                for site, answer in answers.items():
                    try:
                        differences[site] = room.put(self._tensors(number, site, answer))
                    except (FedfmsError, _NotThatError) as error:
                        why = error.problem if isinstance(error, FedfmsError) else error
                        yield f"round {number}, {site}: {why}"
                        self._model = None
                yield from self._others(number, differences)
                if self._model is not None:
                    yield from self._close(number, answers, differences, guard, strategy)
        yield from self._results()

    def _answers(self, number: int) -> dict[str, ContributionRecord]:
        """The accepted answers of a round, by site."""
        return {
            site: one
            for (of, site), one in sorted(self._history.answers.items())
            if of == number and one.accepted
        }

    def _tensors(self, number: int, site: str, answer: ContributionRecord) -> Model:
        """What a site answered, as it came; nothing of a holdout.

        Raises:
            FedfmsError: it cannot be read.
            _NotThatError: it is not there, or not the answer of its receipt.
        """
        receipt = _receipt(answer)
        named = receipt.tensors_sha256 if receipt is not None else None
        if answer.said is not None and answer.said.role == "holdout" and named is None:
            return {}
        path = self._folder / kept_answer(number, site)
        if not path.is_file():
            raise _NotThatError("its answer was not kept")
        tensors = load_tensors(path)
        if receipt is None:
            raise _NotThatError("its answer has no receipt to compare it with")
        if fingerprint(tensors) != named:
            raise _NotThatError("what was kept is not the answer of its receipt")
        decoded = from_wire(tensors)
        if self._model is not None and (fault := find_fault(shapes_of(self._model), decoded)):
            raise _NotThatError(f"its answer does not fit the model: {fault[1]}")
        self.read += 1
        return {name: tensor.float() for name, tensor in decoded.items()}

    def _began(self, number: int, answers: Mapping[str, ContributionRecord]) -> Iterator[str]:
        """Whether the sites began with the model that the rounds before come to."""
        if self._model is None:
            return
        self._fingerprints[number] = fingerprint(self._model)
        sent = fingerprint(to_precision(self._model, self._recipe.transfer_precision))
        other = [
            site
            for site, answer in answers.items()
            if (receipt := _receipt(answer)) is not None and receipt.model_in_sha256 != sent
        ]
        if other:
            came = f"what the answers of round {number - 1} come to" if number else START_MODEL
            yield f"round {number}: {', '.join(other)} began with another model than {came}"

    def _others(self, number: int, known: Iterable[str]) -> Iterator[str]:
        """Files of a round that are no site's answer."""
        expected = {self._folder / kept_answer(number, site) for site in self._answers(number)}
        folder = (self._folder / kept_answer(number, "")).parent
        for path in sorted(set(folder.glob("*")) - expected):
            yield f"round {number}: {path.name} is no answer that was accepted"

    def _close(
        self,
        number: int,
        answers: Mapping[str, ContributionRecord],
        differences: Mapping[str, Mapping[str, Tensor]],
        guard: RoundGuard,
        strategy: Strategy,
    ) -> Iterator[str]:
        """Judge and combine; the model is the next round's then."""
        assert self._model is not None
        model, self._model = self._model, None
        slices = {site: _slices(answer) for site, answer in answers.items()}
        if unknown := [site for site, count in slices.items() if count is None]:
            yield f"round {number}, {unknown[0]}: its report cannot be read, nor its weight"
            return
        counts = {site: count for site, count in slices.items() if count is not None}
        weights = {
            site: weight_of(self._recipe, answer.said)
            for site, answer in answers.items()
            if answer.said is not None
        }
        judged = self._history.judged.get(number)
        if judged is None:
            yield f"round {number}: no record says what the guard found"
            return
        try:
            found = {one.site: one for one in guard.judge(counts, differences, weights)}
            recorded = {one.site: one for one in judged.sites}
            if judged.acts != guard.acts:
                yield f"round {number}: the guard acts by the recipe or by the record, not by both"
            for site in sorted({*found, *recorded}):
                if other := _other(recorded.get(site), found.get(site)):
                    yield f"round {number}, {site}: the guard finds another {', '.join(other)}"
            change = combine_judged(strategy, number, counts, differences, judged.sites)
        except (FedfmsError, ValueError, KeyError) as error:  # of records that were changed
            why = error.problem if isinstance(error, FedfmsError) else f"{error}"
            yield f"round {number} cannot be closed again: {why}"
            return
        self._model = {name: model[name] + change.get(name, 0) for name in sorted(model)}

    def _results(self) -> Iterator[str]:
        """Whether the models of the result are those that the rounds come to."""
        if self._model is None:
            yield "the rounds after that, and the models, could not be computed again"
            return
        rounds = max(self._history.done) + 1
        self._fingerprints[rounds] = fingerprint(self._model)
        kept = {GLOBAL_MODEL: rounds}
        for one in self._history.evaluations.values():
            if one.model == "best" and (trained := _rounds(one)) is not None:
                kept[BEST_MODEL] = trained
        for name, trained in kept.items():
            if not (self._source / name).is_file():
                continue  # another check says it
            try:
                found = fingerprint(load_tensors(self._source / name))
            except FedfmsError as error:
                yield error.problem
                continue
            if found != self._fingerprints.get(trained):
                yield f"{name} is not what the answers of {trained} rounds come to"


def _receipt(record: ContributionRecord) -> Receipt | None:
    with contextlib.suppress(Misfits):
        return Countersigned.from_dict(record.receipt).signed.receipt
    return None


def _slices(record: ContributionRecord) -> int | None:
    return record.said.training_slices if record.said is not None else None


def _rounds(record: EvaluationRecord) -> int | None:
    return record.said.round if record.said is not None else None


def _other(recorded: Verdict | None, found: Verdict | None) -> list[str]:
    """In which figures a record differs from what comes out, but for the last digits."""
    if recorded is None or found is None:
        return ["verdict"]
    differs = []
    for field in dataclasses.fields(Verdict):
        one, other = getattr(recorded, field.name), getattr(found, field.name)
        if isinstance(one, float) and isinstance(other, float):
            absolute = _COSINE if field.name == "cosine" else 0.0
            if not math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=absolute):
                differs.append(field.name)
        elif one != other:
            differs.append(field.name)
    return differs
