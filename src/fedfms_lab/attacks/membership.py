"""Whether a model tells who was among its training cases, by how small their loss is.

Yeom et al. 2018 (arXiv 1709.01604): whoever has a patient's images and labels asks the model for
its loss; a small one means "was there". The area under the ROC curve is what the attack is worth:
0.5 is guessing, and one that is under it says nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.prepared import Prepared
from fedfms.data.slices import SliceDataset
from fedfms.training.losses import loss_per_class


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
