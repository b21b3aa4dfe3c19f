"""What a site's policy allows of a recipe: judged before anything is computed.

Each breach names the field of the recipe, its value, and the limit with its name in privacy.json.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.policy import Bounds, Policy
from fedfms.contracts.recipe import AUGMENTATIONS, Recipe
from fedfms.errors import ConfigError, DoorClosed

_OF_SCORES = ("image_size", "probability_threshold")  # what counts where nothing is trained


def read_policy(folder: Path) -> Policy:
    """The site's `privacy.json`.

    Raises:
        DoorClosed: code no-policy; there is none, it cannot be read, or says something unknown.
    """
    fix = "put a correct privacy.json into the site's policy folder; until then nothing leaves"
    try:
        return Policy.from_folder(folder)
    except ConfigError as error:
        raise DoorClosed(
            f"the site's policy cannot be used: {error.problem}",
            f"{error.fix}; {fix}",
            code="no-policy",
        ) from None
    except Exception as error:  # whatever it is: without a policy that was read, nothing leaves
        raise DoorClosed(
            f"the site's policy cannot be used: {type(error).__name__}", fix, code="no-policy"
        ) from error


@dataclass(frozen=True, slots=True)
class Breach:
    """A value that is out of bounds."""

    code: str
    has: str  # such as "rounds is 6"
    allowed: str  # such as "at most 5 rounds (max_rounds)"
    field: str  # of the recipe; empty where no recipe can mend it
    limit: str  # of privacy.json
    way: str  # "raise" or "lower" the field

    @property
    def problem(self) -> str:
        """The sentence of a refusal."""
        return f"the site's policy allows {self.allowed}, and {self.has}"

    @property
    def fix(self) -> str:
        """What to do."""
        other = "lower" if self.limit.startswith("min") else "raise"
        site = f"{other} {self.limit} in privacy.json if the site agrees"
        return f"{self.way} {self.field} in the recipe, or {site}" if self.field else site


def breaches(bounds: Bounds, recipe: Recipe, *, trains: bool = True) -> list[Breach]:
    """All values of a recipe that are out of a site's bounds, whatever its images are.

    Where the site does not train, only what scores depend on counts.
    """
    # code, field, value, limits by the field of Bounds, what is counted
    limits = {field.name for field in dataclasses.fields(Bounds)}
    clip, of_patients = recipe.clip_grad_norm, recipe.patient_clip_norm
    asked: list[tuple[str, str, float | None, str | None, str | None, str]] = [
        ("batch-too-small", "batch_size", recipe.batch_size, "min_batch_size", None, " slices"),
        ("clip-too-small", "clip_grad_norm", clip, "min_clip_grad_norm", None, ""),
        ("clip-too-small", "patient_clip_norm", of_patients, "min_clip_grad_norm", None, ""),
        (
            *("learning-rate-not-allowed", "learning_rate", recipe.learning_rate),
            *("min_learning_rate", "max_learning_rate", ""),
        ),
        (
            *("positive-weight-not-allowed", "positive_weight", recipe.positive_weight),
            *("min_positive_weight", "max_positive_weight", ""),
        ),
        (
            *("proximal-weight-not-allowed", "proximal_weight", recipe.proximal_weight or None),
            *(None, "max_proximal_weight", ""),
        ),
        ("too-many-epochs", "local_epochs", recipe.local_epochs, None, "max_local_epochs", ""),
        (
            *("threshold-not-allowed", "probability_threshold", recipe.probability_threshold),
            *("min_probability_threshold", "max_probability_threshold", ""),
        ),
        (
            *("image-size-not-allowed", "image_size", recipe.image_size),
            *("min_image_size", "max_image_size", " pixels"),
        ),
        *(
            ("augmentation-not-allowed", field, getattr(recipe, field), None, f"max_{field}", "")
            for field in AUGMENTATIONS
            if recipe.augment and f"max_{field}" in limits
        ),
    ]
    found = []
    for code, field, value, least, most, unit in asked:
        has = f"{field} is {_text(value)}"
        if value is None or not (trains or field in _OF_SCORES):
            continue
        if least is not None and value < getattr(bounds, least):
            allowed = f"at least {_text(getattr(bounds, least))}{unit} ({least})"
            found.append(Breach(code, has, f"{field} of {allowed}", field, least, "raise"))
        if most is not None and value > getattr(bounds, most):
            allowed = f"at most {_text(getattr(bounds, most))}{unit} ({most})"
            found.append(Breach(code, has, f"{field} of {allowed}", field, most, "lower"))
    if trains and (breach := _falls_too_low(bounds, recipe)):
        found.append(breach)
    return found


def _falls_too_low(bounds: Bounds, recipe: Recipe) -> Breach | None:
    """The breach of a schedule whose last round has no step of at least min_learning_rate.

    A round's first step has its highest rate. Only in the first round a warm-up rises to it, within
    the round at every site (training/loop.py), so that no round can be asked for below.
    """
    highest = recipe.learning_rate * recipe.falls_to((recipe.rounds - 1) / recipe.rounds)
    if highest >= min(bounds.min_learning_rate, recipe.learning_rate):
        return None  # or the rate itself is too low
    least = _text(bounds.min_learning_rate)
    return Breach(
        "learning-rate-not-allowed",
        f"learning_rate {_text(recipe.learning_rate)} falls to {highest:.1g} at the beginning of "
        f"the last of {recipe.rounds} rounds (schedule cosine)",
        f"rounds with a learning rate of at least {least} (min_learning_rate)",
        "learning_rate",
        "min_learning_rate",
        "set schedule to constant, ask for fewer rounds, or raise",
    )


def check_recipe(policy: Policy, recipe: Recipe, *, trains: bool = True) -> None:
    """Whether all values of a recipe are within the policy's bounds; see `breaches`.

    Raises:
        DoorClosed: too-many-rounds, or the code of the first breach.
    """
    found = breaches(policy, recipe, trains=trains)
    if recipe.rounds > policy.max_rounds:
        allowed = f"at most {policy.max_rounds} rounds (max_rounds)"
        has = f"rounds is {recipe.rounds}"
        found.insert(0, Breach("too-many-rounds", has, allowed, "rounds", "max_rounds", "lower"))
    if found:
        raise closed(found[0])


def check_patients(bounds: Bounds, patients: int) -> None:
    """Whether a site has enough patients to train on.

    Raises:
        DoorClosed: code too-few-training-patients.
    """
    if breach := too_few_patients(bounds, patients):
        raise closed(breach)


def too_few_patients(bounds: Bounds, patients: int) -> Breach | None:
    """The breach of a site with so few patients to train on; None where they are enough."""
    verb = "is" if patients == 1 else "are"
    return _few_patients(bounds, patients, f"{verb} there to train on", "", "")


def check_showing(bounds: Bounds, patients: int) -> None:
    """Whether enough training patients show a class of the recipe: else it is about those few.

    Raises:
        DoorClosed: code too-few-training-patients.
    """
    what = f"of them {'shows' if patients == 1 else 'show'} a class of the recipe"
    if breach := _few_patients(bounds, patients, what, "classes", "name other"):
        raise closed(breach)


def _few_patients(bounds: Bounds, patients: int, what: str, field: str, way: str) -> Breach | None:
    least = bounds.min_training_patients
    if patients >= least:
        return None
    allowed = f"training on at least {least} patients (min_training_patients)"
    code, limit = "too-few-training-patients", "min_training_patients"
    return Breach(code, f"{patients} {what}", allowed, field, limit, way)


def steps_of_a_round(recipe: Recipe, slices: int) -> int:
    """Optimizer steps of a round on so many training slices."""
    if recipe.patient_rate is not None:
        return recipe.steps_of_patients
    return recipe.local_epochs * math.ceil(slices / recipe.batch_size)


def too_few_steps(bounds: Bounds, recipe: Recipe, slices: int) -> Breach | None:
    """The breach of a round that has too few steps on so many slices; None where it has enough."""
    steps = steps_of_a_round(recipe, slices)
    if steps >= bounds.min_steps:
        return None
    return Breach(
        "too-few-steps",
        f"a round has {steps} with local_epochs {recipe.local_epochs} and batch_size "
        f"{recipe.batch_size}",
        f"rounds of at least {bounds.min_steps} steps (min_steps)",
        "local_epochs",
        "min_steps",
        "raise",
    )


def check_steps(bounds: Bounds, recipe: Recipe, slices: int) -> None:
    """Whether a round on so many training slices has enough steps.

    Raises:
        DoorClosed: code too-few-steps.
    """
    if breach := too_few_steps(bounds, recipe, slices):
        raise closed(breach)


def check_drawn(bounds: Bounds, recipe: Recipe, patients: int) -> None:
    """Whether a step of drawn patients has as many on average as a batch must have slices.

    Raises:
        DoorClosed: code batch-too-small.
    """
    if recipe.patient_rate is None:
        return
    drawn = recipe.patient_rate * patients
    if drawn < bounds.min_batch_size:
        raise closed(
            Breach(
                "batch-too-small",
                f"patient_rate {recipe.patient_rate:g} draws fewer here",
                f"steps of at least {bounds.min_batch_size} patients on average (min_batch_size)",
                "patient_rate",
                "min_batch_size",
                "raise",
            )
        )


def closed(breach: Breach) -> DoorClosed:
    """The refusal of a breach."""
    return DoorClosed(breach.problem, breach.fix, code=breach.code)


def _text(value: float | None) -> str:
    """A number as a person writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
