"""A network of a method, whatever it is made of: pictures in, logits out, and what of it learns."""

from __future__ import annotations

from torch import nn

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods import Method


class Segmenter(nn.Module):
    """(B, 3, S, S) pictures to (B, K, M, M) logits, with S, K and M as the recipe says.

    Args:
        recipe: the job's.
        method: says which of the parameters learn and which of those leave a site.
    """

    def __init__(self, recipe: Recipe, method: Method) -> None:
        super().__init__()
        self.recipe = recipe
        self.method = method

    def train(self, mode: bool = True) -> Segmenter:
        """Training mode for the modules that hold a learning tensor; the others stay as they are.

        SAM has no layer that minds; a backbone with dropout or batch statistics would.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self
