"""A network of a method, whatever it is made of: pictures in, logits out, and what of it learns."""

from __future__ import annotations

from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods import Method


class Segmenter(nn.Module):
    """(B, C, S, S) pictures to (B, K, M, M) logits, with C, S, K and M as the recipe says.

    C is the number of the recipe's contrasts, or 3.

    Args:
        recipe: the job's.
        method: says which of the parameters learn and which of those leave a site.
    """

    def __init__(self, recipe: Recipe, method: Method) -> None:
        super().__init__()
        self.recipe = recipe
        self.method = method
        # encoder blocks before everything that learns; None where what they make of a slice is not
        # worth keeping: `prefix` then is not asked for
        self.frozen_blocks: int | None = None

    def prefix(self, images: Tensor) -> Tensor:
        """What the frozen part makes of pictures, which stays the same however long one trains.

        The network itself takes it, too: `model(model.prefix(images), from_prefix=True)` is
        `model(images)`, to the bit. It is in the precision in which it is kept.
        """
        raise NotImplementedError("this network has no frozen part before all that learns")

    def train(self, mode: bool = True) -> Segmenter:
        """Training mode for the modules that hold a learning tensor; the others stay as they are.

        SAM has no layer that minds; a backbone with dropout or batch statistics would.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self
