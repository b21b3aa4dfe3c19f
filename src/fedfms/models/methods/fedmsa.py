"""FedMSA: the image encoder is frozen; adapters in it and the mask decoder train and travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods.method import Method, learns_in_decoder

if TYPE_CHECKING:
    from torch import nn


class FedMSA(Method):
    """Medical-SAM-Adapter's adapters; under `paper_compat` also its start and its padding."""

    name: ClassVar[str] = "fedmsa"
    title: ClassVar[str] = "FedMSA"
    sentence: ClassVar[str] = (
        "the image encoder is frozen; Medical-SAM-Adapter adapters and the mask decoder train "
        "and travel"
    )
    adds: ClassVar[str] = "adapters in the image encoder"
    places_adapters: ClassVar[bool] = True

    def add(self, encoder: nn.Module, recipe: Recipe) -> None:
        """Two adapters in every block, or in the last ones that the recipe asks for."""
        from fedfms.models.adapters import add_adapters  # here: the words are asked without torch

        add_adapters(
            encoder,
            starts_as_zero=not recipe.paper_compat,
            norm_padding=recipe.paper_compat,
            first=recipe.frozen_blocks or 0,
        )

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        """The adapters and the decoder."""
        return self.is_added(tensor, recipe) or learns_in_decoder(tensor, recipe)

    def is_added(self, tensor: str, recipe: Recipe) -> bool:
        """The adapters."""
        return ".space_adapter." in tensor or ".mlp_adapter." in tensor
