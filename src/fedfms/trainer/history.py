"""What this site was asked for in its whole history with the project, whichever run or job asked.

    WORK/history.jsonl    a line for each request that was judged allowed, for each difference that
                          left, and for each set of patients of which a mean left

It outlives restarts, runs and `fedfms forget`; that one request came twice, from whichever job,
counts once, unless the site's data have changed between. Of a model that was asked to be trained on
there is a sketch of 64 numbers, from which the distance between two models follows; of a patient a
name that only this site can make, and a word for what is there of it. Both follow from the site's
secret, so a history is of one secret. A site that removes the file begins anew.

What is not written down does not leave: a full disk, also without the room that is kept free for
such lines, closes the door until there is room. The lines wait in memory until then.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedfms.bounded import decode_json
from fedfms.contracts.messages import Task
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.errors import DoorClosed, Undecodable
from fedfms.exchange.tensors import fingerprint
from fedfms.files import cut_torn_line
from fedfms.trainer.egress import append_for_sure
from fedfms.trainer.secret import SECRET_FILE, part_of

HISTORY_FILE = "history.jsonl"
SKETCH = 64  # numbers; the relative standard deviation of a squared distance is sqrt(2 / 64)
# two models are the same where they lie closer than this share of the site's own difference; in an
# average of a hundred sites whose differences have nothing in common a tenth of it is left
SAME_MODEL = 1e-3

# of whom anything is told at all, whose scores of a class are in a mean, whose loss is
Scored = Literal["cases", "class", "loss"]
# of each patient the history's own name, what was there of it then and, of a class, the mask's name
Patients = frozenset[str]
_NAME = 16  # hexadecimal digits of each
_CHUNK = 2**20  # values that are sketched at once; a multiple of SKETCH


@dataclass(frozen=True, slots=True)
class Request:
    """What a task asks for, whichever job asks."""

    question: str  # equal for two that ask for the same
    recipe: str  # its SHA-256
    round: int
    sketch: NDArray[np.float64] | None  # of the model, of a task that trains on it
    evaluates: bool
    state: str = ""  # of the site, on which the answer depends; empty: not known yet

    @property
    def key(self) -> str:
        """Equal for two that have the same answer."""
        return hashlib.sha256(f"{self.question} {self.state}".encode()).hexdigest()


@dataclass(slots=True)
class _Seen:
    """A request that came."""

    question: str
    recipe: str
    round: int
    sketch: NDArray[np.float64] | None
    evaluates: bool
    norm: float | None = None  # L2 of the difference that left; None: none did


@dataclass(slots=True)
class _State:
    requests: dict[str, _Seen] = field(default_factory=dict)
    sets: dict[Scored, list[Patients]] = field(
        default_factory=lambda: {"cases": [], "class": [], "loss": []}
    )
    unclassed: list[Patients] = field(default_factory=list)  # told before classes were written down
    mark: str | None = None  # of the secret that it was made with


class History:
    """Judges requests by what came before; of one site and its private folder.

    Args:
        work: the private folder.
        secret: the site's own.
    """

    def __init__(self, work: Path, secret: bytes) -> None:
        self._path = work / HISTORY_FILE
        self._signs = part_of(secret, "sketches of models")
        self._names = part_of(secret, "names of patients")
        self._mark = part_of(secret, "mark of a history").hex()[:_NAME]
        self._state: _State | None = None  # as the file and the lines that wait have it
        self._held = b""

    # ------------------------------------------------------------------------------ requests

    def request(
        self, task: Task, received: Mapping[str, Tensor], *, trains: bool, evaluates: bool
    ) -> Request:
        """What a task asks for.

        Args:
            task: as it came.
            received: the model that came with it.
            trains, evaluates: what it means at this site.
        """
        what = f"{task.kind} {task.round} {task.model} {task.recipe.sha256} {fingerprint(received)}"
        return Request(
            question=hashlib.sha256(what.encode()).hexdigest(),
            recipe=task.recipe.sha256,
            round=task.round,
            sketch=sketch(received, self._signs) if trains else None,
            evaluates=evaluates,
        )

    def was_answered(self, request: Request) -> bool:
        """Whether a difference left in answer to the same question, of whichever job and data."""
        seen = self._now().requests.values()
        return any(one.question == request.question and one.norm is not None for one in seen)

    def check(self, policy: Policy, request: Request) -> None:
        """Whether the policy lets this request be answered after all that came before.

        Asked again of a site where nothing has changed, it has the same answer, and was counted and
        judged when it came first. Of a site with other data it is another request. Without the
        site's state a question that came before passes: judge it again with the state.

        Raises:
            DoorClosed: rounds-used-up, evaluations-used-up, same-model, asked-too-often, or history
                where it cannot be read.
        """
        state = self._now()
        others = state.requests.values()
        if request.key in state.requests:
            return
        if not request.state and any(one.question == request.question for one in others):
            return
        if request.evaluates:
            evaluations = sum(one.evaluates for one in others)
            if evaluations >= policy.max_total_evaluations:
                raise _used_up(
                    "evaluations", policy.max_total_evaluations, "max_total_evaluations", "scored"
                )
        if request.sketch is None:
            return
        trained = [one for one in others if one.sketch is not None]
        if len(trained) >= policy.max_total_rounds:
            raise _used_up("rounds", policy.max_total_rounds, "max_total_rounds", "trained")
        same = [one for one in trained if _is_same_model(one, request.sketch)]
        for one in same:
            if one.recipe == request.recipe and one.question != request.question:
                raise DoorClosed(
                    f"the model of round {request.round} is that of round {one.round}, on which "
                    "this site has trained by the same recipe",
                    "look why the server's average did not change it; a round that is asked for "
                    "again as it was is answered as it was",
                    code="same-model",
                )
        if len(same) >= policy.max_asks_of_a_model:
            raise DoorClosed(
                "the site's policy allows training on one model at most "
                f"{policy.max_asks_of_a_model} times (max_asks_of_a_model), by other recipes or on "
                f"other data, and it was {len(same)} times",
                "start from another model, or raise max_asks_of_a_model in privacy.json if the "
                "site agrees",
                code="asked-too-often",
            )

    def check_run(self, policy: Policy, recipe: Recipe, *, trains: bool) -> None:
        """Whether what is left of the policy's counts is enough for a whole run; for its canary.

        Raises:
            DoorClosed: rounds-used-up, evaluations-used-up, or no-history where it cannot be read.
        """
        run = dataclasses.replace(recipe, canary=False)
        rounds, evaluations = self.counts
        scored = sum(run.evaluates(number) for number in range(run.rounds)) + 1  # the final model
        if evaluations + scored > policy.max_total_evaluations:
            most = policy.max_total_evaluations
            raise _used_up("evaluations", most, "max_total_evaluations", "scored", evaluations)
        if trains and rounds + run.rounds > policy.max_total_rounds:
            most = policy.max_total_rounds
            raise _used_up("rounds", most, "max_total_rounds", "trained", rounds)

    def asked(self, request: Request) -> None:
        """A request is going to be answered; it counts from now on, also if that fails.

        Raises:
            DoorClosed: code no-history; it cannot be written.
        """
        sketched = request.sketch
        if request.key not in self._now().requests:
            self._note(
                {
                    "event": "asked",
                    "key": request.key,
                    "question": request.question,
                    "recipe": request.recipe,
                    "round": request.round,
                    "evaluates": request.evaluates,
                    "sketch": None if sketched is None else _text_of(sketched),
                }
            )
        self._write()

    def left(self, request: Request, norm: float | None) -> None:
        """A difference of this L2 norm is about to leave; None: no difference.

        Raises:
            DoorClosed: code no-history; it cannot be written.
        """
        seen = self._now().requests.get(request.key)
        if norm is not None and (seen is None or seen.norm is None):
            self._note({"event": "left", "key": request.key, "norm": norm})
        self._write()

    # ------------------------------------------------------------------------------ sets

    def may_tell(
        self,
        what: Scored,
        now: Patients,
        smallest: int,
        scored: Patients = frozenset(),
        beside: Sequence[Patients] = (),
    ) -> Patients | None:
        """Of which patients a mean may leave: two sets differ in none or in at least `smallest`.

        A patient of whom there is something else than before, another scan or another label, is one
        in whom two sets differ. Sets of classes are held against those of all classes: of patients
        who have the very same mask in two of them, the scores may be the same.

        Args:
            what: anything, mean scores of a class, or the mean loss.
            now: of whom there are scores.
            smallest: the policy's min_cases.
            scored: for a class, of whom anything is told, whether they show it or not.
            beside: what is told of other classes at the same time.

        Returns:
            All of them; where they are too close to an earlier set, that set if it is part of them,
            so that patients who are new count from the `smallest`-th on. None: no mean may leave,
            as of fewer than `smallest` patients.
        """
        if len(now) < smallest:
            return None
        earlier = [*self._now().sets[what], *beside]
        older = self._now().unclassed if what == "class" else []
        if now in earlier or (
            all(_apart(now, one) >= smallest for one in earlier)
            and all(_surely_apart(now, scored, one, smallest) for one in older)
        ):
            return now
        parts = (one for one in reversed(earlier) if one < now and len(one) >= smallest)
        return next(parts, None)

    def told(self, what: Scored, patients: Patients) -> None:
        """A mean over these patients is about to leave.

        Raises:
            DoorClosed: code no-history; it cannot be written.
        """
        if patients and patients not in self._now().sets[what]:
            self._note({"event": "told", "what": what, "patients": sorted(patients)})
        self._write()

    def name(self, patient: str, there: str = "", mask: str | None = None) -> str:
        """The history's name of a patient, with what is there of it: of each 16 digits of HMAC.

        Args:
            patient: the site's own name.
            there: equal where the same images and labels are.
            mask: equal where, of these, the same is foreground of a class.
        """
        name = self._digits(patient) + self._digits(f"{patient}\0{there}")
        return name if mask is None else name + self._digits(f"{patient}\0{there}\0{mask}")

    def _digits(self, text: str) -> str:
        data = text.encode(errors="surrogateescape")
        return hmac.digest(self._names, data, "sha256").hex()[:_NAME]

    # ------------------------------------------------------------------------------ counts

    @property
    def counts(self) -> tuple[int, int]:
        """Rounds and evaluations so far."""
        seen = self._now().requests.values()
        return sum(one.sketch is not None for one in seen), sum(one.evaluates for one in seen)

    # ------------------------------------------------------------------------------ file

    def _now(self) -> _State:
        if self._state is None:
            state = _State()
            for line in self._lines():
                _take(state, line)
            if state.mark not in (None, self._mark):
                raise _unusable(
                    self._path, f"was made with another {SECRET_FILE} than is beside it"
                )
            self._state = state
        return self._state

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            cut_torn_line(self._path)
            text = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self._path, f"cannot be read ({error.strerror})") from None
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                values = decode_json(line, "a line of the history")
            except Undecodable:
                values = None
            if not isinstance(values, dict):
                raise _unusable(self._path, f"is damaged in line {number}")
            yield values

    def _note(self, values: Mapping[str, Any]) -> None:
        made = {"event": "made", "mark": self._mark}
        for line in (made, values) if self._now().mark is None else (values,):
            _take(self._now(), line)
            self._held += json.dumps({"time": round(time.time(), 3), **line}).encode() + b"\n"

    def _write(self) -> None:
        if not self._held:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_for_sure(self._path, self._held)
            self._held = b""
        except OSError as error:
            raise DoorClosed(
                f"the site's history {self._path} cannot be written ({error.strerror}), and what "
                "is not written there does not leave",
                "free room on that disk, or look at it; the next round tries again",
                code="no-history",
            ) from error


def sketch(tensors: Mapping[str, Tensor], key: bytes) -> NDArray[np.float64]:
    """64 numbers of a model such that |sketch(a) - sketch(b)| estimates |a - b|.

    Each value gets a random sign, and every 64th is added up (the AMS sketch: Alon, Matias and
    Szegedy 1996; with buckets, Charikar et al. 2002). The squared distance is right in the mean,
    with a relative standard deviation of at most sqrt(2 / 64).

    Args:
        tensors: by name, on any device, in any float type.
        key: of the signs; who does not know it cannot make two models look alike.
    """
    signs = np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))
    total = np.zeros(SKETCH)
    for name in sorted(tensors):
        values = tensors[name].detach().float().cpu().flatten().numpy()
        for first in range(0, len(values), _CHUNK):
            part = values[first : first + _CHUNK].astype(np.float64)
            part *= 2.0 * signs.integers(0, 2, len(part), dtype=np.int8) - 1.0
            total += np.pad(part, (0, -len(part) % SKETCH)).reshape(-1, SKETCH).sum(axis=0)
    return total


def _is_same_model(one: _Seen, now: NDArray[np.float64]) -> bool:
    """Whether a model is one that was answered, but for less than an average of sites changes."""
    if one.norm is None or one.sketch is None:
        return False  # nothing left: a round that failed may be tried again under another number
    return bool(np.linalg.norm(one.sketch - now) <= SAME_MODEL * one.norm)


def _apart(one: Patients, other: Patients) -> int:
    """In how many patients two sets differ."""
    return len({patient[:_NAME] for patient in one ^ other})


def _surely_apart(now: Patients, scored: Patients, told: Patients, smallest: int) -> bool:
    """Whether the patients of a class are those of an earlier mean, or `smallest` apart from it.

    Of that mean it is known only which patients were scored, and not who of them showed the class.
    Who is there as then is no difference; who is not there any more may be one.
    """
    new = {one[:_NAME] for one in now if one[: 2 * _NAME] not in told}
    gone = told - {one[: 2 * _NAME] for one in scored}
    return len(new) >= smallest or not (new or gone)


def _text_of(sketched: NDArray[np.float64]) -> str:
    return base64.b64encode(sketched.tobytes()).decode()


def _take(state: _State, line: Mapping[str, Any]) -> None:
    """Bring the state up to a line; lines of a newer version that mean nothing here change none."""
    if line.get("event") == "asked":
        raw = line["sketch"]
        state.requests[line["key"]] = _Seen(
            line.get("question", line["key"]),  # of a version that did not look at the data
            line["recipe"],
            line["round"],
            None if raw is None else np.frombuffer(base64.b64decode(raw), np.float64),
            line["evaluates"],
        )
    elif line.get("event") == "left" and line["key"] in state.requests:
        state.requests[line["key"]].norm = line["norm"]
    elif line.get("event") == "made":
        state.mark = line["mark"]
    elif line.get("event") == "told":
        patients = frozenset(line["patients"])
        if line["what"] == "scores":  # of a version that did not look at classes
            state.sets["cases"].append(patients)
            state.unclassed.append(patients)
        else:
            state.sets[line["what"]].append(patients)


def _used_up(what: str, most: int, limit: str, done: str, so_far: int | None = None) -> DoorClosed:
    """The refusal of one more, or of a run, which is too long after so many."""
    had = "so many were" if so_far is None else f"the run is too long after {so_far} that were"
    return DoorClosed(
        f"the site's policy allows at most {most} {what} in all ({limit}), and {had} {done}",
        f"raise {limit} in privacy.json if the site agrees",
        code=f"{what}-used-up",
    )


def _unusable(path: Path, why: str) -> DoorClosed:
    return DoorClosed(
        f"the site's history {path} {why}: nobody can say what was asked of this site before",
        "put it back from a backup of that volume, or remove it: then all counts begin anew",
        code="no-history",
    )
