"""FedProx: a local round that is held to the model that it began with.

Li et al. 2020 (arXiv 1812.06127), equation 2: to the local loss is added half of mu times the
squared distance of the weights to those that were received. Its gradient is mu times the way that a
weight has gone, which follows from no image: with noise for patients (training/private.py) it
is added after the noise, and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import travelling_names


class Proximal:
    """The term of one round; holds a copy of what it is measured from.

    Args:
        model: as it was received, on its device. Of a `Segmenter` what learns and travels is held:
            what stays at the site has nothing that it could be held to.
        weight: mu, above 0.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        held = set(travelling_names(model)) if isinstance(model, Segmenter) else None
        self._weight = weight
        self._held = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (held is None or name in held)
        ]
        self._received: list[Tensor] = [one.detach().clone() for one in self._held]

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> Proximal | None:
        """The term that a recipe asks for; None where it asks for none."""
        return cls(model, recipe.proximal_weight) if recipe.proximal_weight > 0 else None

    @torch.no_grad()
    def add(self) -> None:
        """Add its gradient to the parameters', whose gradient of the loss is there."""
        for parameter, received in zip(self._held, self._received, strict=True):
            gone = parameter - received
            if parameter.grad is None:
                parameter.grad = gone.mul_(self._weight)
            else:
                parameter.grad.add_(gone, alpha=self._weight)
