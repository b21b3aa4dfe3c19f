"""What may leave a site: `policy/privacy.json`, the site's own."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedfms.contracts.decode import from_dict, read_json, require, require_name

POLICY_FILE = "privacy.json"

MOST_EPSILON = 100.0  # of a limit; the account (exchange/account.py) ends at 200

_AtLeastOne = Annotated[int, Field(ge=1, lt=2**53)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a site's policy allows of a recipe, and of all recipes together; exchange/bounds.py.

    A coordinator who may choose these freely can shape a round so that its difference shows a
    slice. A site announces them, so that a job is compared with them before it is submitted.
    """

    min_batch_size: _AtLeastOne = 4  # slices of an optimizer step
    min_steps: _AtLeastOne = 4  # optimizer steps of a round here
    # of the recipe's clip_grad_norm, where it has one: below, Adam's epsilon outweighs the
    # gradient, and a difference becomes the plain sum of gradients
    min_clip_grad_norm: _Positive = 0.1
    min_learning_rate: _Positive = 1e-6  # below, rounding is all that is left of a step's curvature
    max_learning_rate: _Positive = 0.1
    # of foreground in the loss; a model made for it leaves next to no other gradient, and with next
    # to no weight that is as a clip_grad_norm of next to nothing
    min_positive_weight: _Positive = 0.01
    max_positive_weight: _Positive = 1000.0
    max_local_epochs: _AtLeastOne = 50
    # of what augmentation may take out of a picture: pictures that show next to nothing any more
    # leave a step to the few that still do
    max_augment_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    max_augment_elastic: _Share = 0.05
    max_augment_gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    max_augment_bias: _Share = 1.0
    max_augment_blur: _Share = 0.02
    max_augment_noise: _Share = 0.3
    # of FedProx; a much larger one undoes each step, so that a round is its first one
    max_proximal_weight: _Positive = 1.0
    # from which a pixel is foreground; far out, next to nobody has any, or next to nobody has none
    min_probability_threshold: _Share = 0.1
    max_probability_threshold: _Share = 0.9
    min_image_size: _AtLeastOne = 64  # pixels
    max_image_size: _AtLeastOne = 2048
    min_training_patients: _AtLeastOne = 10  # with fewer nothing is trained here
    # over the site's whole history with this project, whichever run or job asked
    max_total_rounds: _AtLeastOne = 2000  # trained
    max_total_evaluations: _AtLeastOne = 4000  # of a model that was not scored so before
    max_asks_of_a_model: _AtLeastOne = 20  # to train it by another recipe, or on other data


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Bounds):
    """What may leave a site; `policy/privacy.json`, owned by the site. The last word."""

    # the jobs that may run here; a name may be of a method that this version does not know
    methods: tuple[str, ...] = ("fedsam", "fedmsa", "lora")
    max_rounds: int = 1000  # of one recipe
    clip_norm: float | None = None  # largest L2 norm of a whole difference; longer ones are scaled
    noise_std: float = 0.0  # Gaussian noise on each value, as a share of clip_norm
    # a metric over fewer cases stays; scores of two sets of patients that differ by fewer leave for
    # one of them; smaller counts leave as 0. The larger of this and site.yml's counts
    min_cases: int = 3
    min_cases_for_spread: int = 10  # a standard deviation over fewer cases stays
    require_secure_sum: bool = False  # nothing is trained by a recipe without secure_sum
    pictures: bool = False  # prediction overlays of validation cases in the report
    # differential privacy: what all training of this site may cost, over its whole history with the
    # project; exchange/account.py. null: it is counted and nothing is refused
    patient_epsilon: float | None = None  # of a patient who is there or not
    site_epsilon: float | None = None  # of the whole site that is there or not
    delta: float = 1e-5  # of both; smaller than one over the number of patients
    counted_since: str | None = None  # YYYY-MM-DD: what left before that day is not counted

    def __post_init__(self) -> None:
        require(
            len(self.methods) > 0,
            "methods is empty",
            "list those that the site agrees to, such as fedmsa",
        )
        for name in self.methods:
            require_name(name, "method")
        for key in ("max_rounds", "min_cases", "min_cases_for_spread"):
            value = getattr(self, key)
            require(value >= 1, f"{key} is {value}", f"set {key} to 1 or more")
        for least, most in (
            ("min_learning_rate", "max_learning_rate"),
            ("min_positive_weight", "max_positive_weight"),
            ("min_probability_threshold", "max_probability_threshold"),
            ("min_image_size", "max_image_size"),
        ):
            require(
                getattr(self, least) <= getattr(self, most),
                f"{least} is {getattr(self, least):g}, and {most} {getattr(self, most):g}",
                f"set {least} to {most} or less",
            )
        require(
            self.clip_norm is None or (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            f"clip_norm is {self.clip_norm}",
            "set a positive number, or null for no clipping",
        )
        require(
            math.isfinite(self.noise_std) and self.noise_std >= 0,
            f"noise_std is {self.noise_std}",
            "set 0 or more",
        )
        require(
            self.noise_std == 0 or self.clip_norm is not None,
            "noise_std asks for noise, and there is no clip_norm",
            "set clip_norm: noise_std is a share of it",
        )

        for key in ("patient_epsilon", "site_epsilon"):
            budget = getattr(self, key)
            require(
                budget is None or 0 < budget <= MOST_EPSILON,
                f"{key} is {budget}",
                f"set a positive number, such as 8, or null for no limit; {MOST_EPSILON:g} is the "
                "most, and protects nobody any more",
            )
        require(
            0 < self.delta < 1,
            f"delta is {self.delta}",
            "set a probability smaller than one over the number of patients, such as 1e-5",
        )
        if self.counted_since is not None:
            require(
                re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", self.counted_since) is not None
                and _is_day(self.counted_since),
                f"counted_since is {self.counted_since}",
                "write a day as YYYY-MM-DD, or null",
            )

    @property
    def limits_epsilon(self) -> bool:
        """Whether it promises differential privacy to those who train."""
        return self.patient_epsilon is not None or self.site_epsilon is not None

    @property
    def bounds(self) -> Bounds:
        """Its part that a site announces."""
        return Bounds(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Bounds)})

    @classmethod
    def from_folder(cls, folder: Path) -> Policy:
        """Read `privacy.json` in the site's policy folder; a missing file closes the door."""
        path = folder / POLICY_FILE
        return from_dict(cls, read_json(path), str(path))


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True
