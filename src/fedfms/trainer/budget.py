"""What a site's training has cost of its patients' privacy, over its whole history; the limit.

    WORK/privacy-account.jsonl     a line for each round whose difference was let out, whichever
                                   run, job or console asked; it stays when a run is forgotten

Two units are counted beside each other, each (epsilon, delta) of exchange/account.py: a patient of
the training cases, and the whole site. A round that samples patients counts for its noise; one
whose whole difference is clipped and noised (`clip_norm`, `noise_std`) counts for the site, and for
a patient with twice the reach, since one patient may turn a clipped difference round. A round
without noise makes epsilon infinite. What is asked for again and answered alike is not counted
twice. Scores are of other cases and not part of it: where the policy has a limit, those of training
cases stay, also at a holdout site.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedfms.contracts.announcement import PrivacySpent
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.errors import DoorClosed
from fedfms.exchange.account import Noised, epsilon
from fedfms.files import cut_torn_line
from fedfms.trainer.egress import append_for_sure

ACCOUNT = "privacy-account.jsonl"
Unit = Literal["patient", "site"]
UNITS: tuple[Unit, ...] = ("patient", "site")
_FIELDS = {"patient": "patient_epsilon", "site": "site_epsilon"}
_WHAT = {"patient": "one patient", "site": "the whole site"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A round that was let out."""

    time: float  # seconds since 1970-01-01 UTC
    job: str
    round: int
    patient: Noised
    site: Noised


_ENTRY = TypeAdapter(Entry)


@dataclass(frozen=True, slots=True)
class Spent:
    """What one unit has cost, of how much."""

    unit: Unit
    epsilon: float  # infinite where a round had no noise
    budget: float | None
    delta: float
    let_out: tuple[Noised, ...] = ()  # what it is the epsilon of, alike together

    @property
    def is_told(self) -> bool:
        """Whether anybody asks for it: there is a limit, or something left with noise."""
        return self.budget is not None or any(one.noise > 0 for one in self.let_out)

    def __str__(self) -> str:
        of = "without a limit" if self.budget is None else f"of {self.budget:g}"
        return f"{epsilon_text(self.epsilon)} {of} for {_WHAT[self.unit]} (delta {self.delta:g})"


def epsilon_text(value: float) -> str:
    """`epsilon 1.23`, upwards in its last digit."""
    if math.isinf(value):
        return "epsilon is infinite (a round had no noise)"
    return f"epsilon {math.ceil(value * 100 - 1e-9) / 100:.2f}"


def costs_of_policy(policy: Policy) -> dict[Unit, Noised]:
    """What a round counts for by the policy's noise alone, where the recipe has none."""
    return {"patient": Noised(policy.noise_std / 2), "site": Noised(policy.noise_std)}


def costs(policy: Policy, recipe: Recipe) -> dict[Unit, Noised]:
    """What a round of this recipe counts for under this policy."""
    found = costs_of_policy(policy)
    if recipe.patient_rate is not None:
        rate, steps = recipe.patient_rate, recipe.steps_of_patients
        found["patient"] = Noised(recipe.patient_noise, rate, steps)
    return found


def after(spent: PrivacySpent, recipe: Recipe) -> float | None:
    """The epsilon of a site after all rounds of a recipe more; None where it does not tell enough.

    By what the site announced: as `Budget.check` will judge the first of them.
    """
    if spent.let_out is None:
        return None
    cost = Noised(spent.round_noise)
    if spent.unit == "patient" and recipe.patient_rate is not None:
        cost = Noised(recipe.patient_noise, recipe.patient_rate, recipe.steps_of_patients)
    planned = dataclasses.replace(cost, steps=cost.steps * recipe.rounds)
    before = (Noised(one.noise, one.rate, one.steps) for one in spent.let_out)
    return _epsilon((*before, planned), spent.delta)


class Budget:
    """The account in a site's private folder."""

    def __init__(self, work: Path) -> None:
        self._path = work / ACCOUNT

    def state(self) -> tuple[int, int]:
        """Changes when a round is counted."""
        try:
            about = self._path.stat()
        except OSError:
            return (0, 0)
        return (about.st_size, about.st_mtime_ns)

    def spent(self, policy: Policy) -> tuple[Spent, ...]:
        """What all rounds since `counted_since` cost together, for each unit.

        Raises:
            DoorClosed: code privacy-account; the account cannot be read.
        """
        return tuple(self._spent(policy, unit) for unit in UNITS)

    def check(self, policy: Policy, recipe: Recipe, rounds: int) -> None:
        """Whether so many rounds more stay within what the policy allows; before any computing.

        Raises:
            DoorClosed: code privacy-budget or privacy-account.
        """
        for unit, cost in costs(policy, recipe).items():
            budget = getattr(policy, _FIELDS[unit])
            if budget is None:
                continue
            planned = dataclasses.replace(cost, steps=cost.steps * rounds)
            after = self._spent(policy, unit, (planned,)).epsilon
            if after > budget:
                now = self._spent(policy, unit).epsilon
                raise DoorClosed(
                    f"the {rounds} rounds that are left would bring this site from "
                    f"{epsilon_text(now)} to {epsilon_text(after)} for {_WHAT[unit]} "
                    f"(delta {policy.delta:g}), and its policy allows {budget:g}",
                    f"{_less(unit, recipe)}, or raise {_FIELDS[unit]} in privacy.json if the site "
                    "agrees",
                    code="privacy-budget",
                )

    def add(self, policy: Policy, recipe: Recipe, job: str, number: int) -> None:
        """Count a round, before it is let out.

        Raises:
            DoorClosed: code privacy-account; it cannot be written, and nothing may leave then.
        """
        cost = costs(policy, recipe)
        # a clock that is wrong, or a day that is still to come, takes no round out of the count
        now = max(time.time(), _counted_from(policy))
        entry = Entry(now, job, number, cost["patient"], cost["site"])
        line = json.dumps(dataclasses.asdict(entry)) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            cut_torn_line(self._path)
            append_for_sure(self._path, line.encode())
        except OSError as error:
            raise DoorClosed(
                f"{ACCOUNT} in the trainer's private folder cannot be written ({error.strerror}), "
                "and what is not counted does not leave",
                "free room on that disk, or look at it; the next round tries again",
                code="privacy-account",
            ) from error

    def _spent(self, policy: Policy, unit: Unit, more: tuple[Noised, ...] = ()) -> Spent:
        let_out = [getattr(one, unit) for one in self._entries(policy)]
        total = _epsilon((*let_out, *more), policy.delta)
        steps: Counter[tuple[float, float]] = Counter()
        for one in let_out:
            steps[one.noise, one.rate] += one.steps
        alike = tuple(Noised(*kind, count) for kind, count in sorted(steps.items()))
        return Spent(unit, total, getattr(policy, _FIELDS[unit]), policy.delta, alike)

    def _entries(self, policy: Policy) -> Sequence[Entry]:
        since = _counted_from(policy)
        try:
            # a last line without an end is of a round that was not let out yet
            lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
            entries = [_ENTRY.validate_json(line) for line in lines]
        except OSError as error:
            raise _unusable(f"it cannot be read ({error.strerror})") from error
        except (ValidationError, ValueError) as error:
            raise _unusable("a line of it is damaged") from error
        return [entry for entry in entries if entry.time >= since]


def _counted_from(policy: Policy) -> float:
    """From when on rounds count, in seconds since 1970-01-01 UTC."""
    if policy.counted_since is None:
        return 0.0
    day = datetime.date.fromisoformat(policy.counted_since)
    midnight = datetime.time(tzinfo=datetime.timezone.utc)
    return datetime.datetime.combine(day, midnight).timestamp()


@functools.lru_cache(maxsize=32)
def _epsilon(let_out: tuple[Noised, ...], delta: float) -> float:
    return epsilon(let_out, delta)


def _less(unit: Unit, recipe: Recipe) -> str:
    if unit == "site":
        return "ask for fewer rounds, or raise noise_std in privacy.json"
    if recipe.patient_rate is None:
        return "set patient_rate, patient_clip_norm and patient_noise in the recipe"
    return "ask for fewer rounds, more patient_noise or a smaller patient_rate in the recipe"


def _unusable(why: str) -> DoorClosed:
    return DoorClosed(
        f"the account of what was let out ({ACCOUNT} in the trainer's private folder): {why}",
        "restore that file from a backup; without one, move it away and set counted_since in "
        "privacy.json to today, which forgets what left before",
        code="privacy-account",
    )
