"""Whether a model tells who was among its training cases, by how small their loss is.

Yeom et al. 2018 (arXiv 1709.01604): whoever has a patient's images and labels asks the model for
its loss; a small one means "was there". The area under the ROC curve is what the attack is worth:
0.5 is guessing, and one that is under it says nothing either. Who attacks here is anybody with the
final model, a coordinator or another site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.prepared import Prepared
from fedfms.data.slices import SliceDataset
from fedfms.errors import FedfmsError
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import write_travelling
from fedfms.training.losses import loss_per_class
from fedfms_lab.attacks.sites import (
    Attacked,
    AttackedSite,
    Refusal,
    averaged,
    cases_for,
    enough_patients,
    first_model,
    for_phantoms,
)

SITES = 3
PATIENTS = 15  # of a site, of one slice; seven in ten train
STRANGERS = 60  # of the same kind, of whom none was there


@dataclass(frozen=True, slots=True)
class Membership:
    """How well members are told from others."""

    auc: float  # [0, 1]; 0.5 is guessing
    half_width: float  # of the 95 % interval around it (Hanley and McNeil 1982)
    members: int
    others: int


def loss_of_patients(
    model: nn.Module, cases: Sequence[Prepared], site: SiteConfig, recipe: Recipe
) -> list[float]:
    """The mean loss of each patient's slices with foreground, in the order of the names."""
    model.eval()
    dataset = SliceDataset(cases, site, recipe)
    losses: dict[str, list[float]] = {}
    device = next(model.parameters()).device
    with torch.inference_mode():
        for item, (number, _) in enumerate(dataset.slices):
            part = dataset[item]
            image, target = (part[key][None].to(device) for key in ("image", "target"))
            loss = loss_per_class(model(image), target, recipe).mean()
            losses.setdefault(cases[number].case.patient, []).append(float(loss))
    return [float(np.mean(losses[patient])) for patient in sorted(losses)]


def membership(members: Sequence[float], others: Sequence[float]) -> Membership:
    """What the losses of both tell.

    Args:
        members: of patients of the training cases.
        others: of patients like them that were not there.
    """
    one, two = len(members), len(others)
    # the share of pairs in which the member's loss is the smaller one
    auc = float(mannwhitneyu(others, members).statistic) / (one * two)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (one - 1) * (q1 - auc**2) + (two - 1) * (q2 - auc**2)
    return Membership(auc, 1.96 * float(np.sqrt(variance / (one * two))), one, two)


@dataclass(frozen=True, slots=True)
class Told:
    """What the final model of a run tells of who was there."""

    refused: str  # the sentence of the policy's refusal; empty where the run came to its end
    rounds: int  # trained
    not_attacked: str = ""  # why there was no attack, where it was not the policy that refused
    auc: float = math.nan  # see Membership
    half_width: float = math.nan
    members: int = 0
    others: int = 0

    @property
    def shows_something(self) -> bool:
        """Whether members are told from others, beyond the 95 % interval."""
        return self.auc - self.half_width > 0.5


def attack_members(
    job: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> Told:
    """Train sites of few patients by a recipe and under a policy; ask the model who was there.

    Args:
        job: with its own rounds and epochs; more of them tell more.
        policy: of each site.
        folder: for the sites; of each at least the patients that its policy asks for.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
    """
    recipe = for_phantoms(dataclasses.replace(job, evaluate_first=job.rounds))
    sites = [
        AttackedSite(
            folder / f"site-{n}",
            cases=max(PATIENTS, cases_for(enough_patients(policy, recipe))),
            slices=1,
            seed=n,
            policy=policy,
            checkpoints=checkpoints,
            name=f"site-{n}",
        )
        for n in range(SITES)
    ]
    answering = [Attacked(sites)] if recipe.sums_only else [Attacked([site]) for site in sites]
    weights = first_model(recipe, checkpoints)
    for number in range(recipe.rounds):
        try:
            weights = averaged(weights, [one.ask(recipe, number, weights) for one in answering])
        except FedfmsError as error:
            why = Refusal.of(error, size_is_given=recipe.patient_rate is not None)
            return Told(why.by_policy, number, why.not_attacked)
    model = build_model(recipe, find_checkpoint(recipe, checkpoints))
    write_travelling(model, weights)
    strangers = AttackedSite(
        folder / "strangers", cases=STRANGERS, slices=1, seed=20_000, policy=policy
    )
    members = [
        loss
        for site in sites
        for loss in loss_of_patients(model, site.cases("train"), site.config, recipe)
    ]
    cases = strangers.cases("train", "validation")
    others = loss_of_patients(model, cases, strangers.config, recipe)
    return Told("", recipe.rounds, "", **dataclasses.asdict(membership(members, others)))
