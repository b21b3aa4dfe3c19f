"""The models of several sites, each trained alone, as one network: the mean of what they say.

The cheapest alternative to federated learning: each model travels once, and nothing is trained
together (RACOON, Bujotzek et al. 2024, JAMIA, doi 10.1093/jamia/ocae259).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_LEAST = 1e-6  # of a mean probability, and of its distance to 1: so that logits are finite


class Ensemble(nn.Module):
    """(B, C, S, S) pictures to (B, K, M, M) logits of the members' mean probability.

    Args:
        members: networks of one recipe.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """As of the class."""
        said = torch.stack([torch.sigmoid(member(images)) for member in self.members])
        return torch.logit(said.mean(dim=0), eps=_LEAST)
