"""LoRA: the image encoder is frozen; low-rank updates in it and the mask decoder train, travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods.method import Method, learns_in_decoder

if TYPE_CHECKING:
    from torch import nn

    from fedfms.models.segmenter import Segmenter

_ADDED = (".qkv.q_down.weight", ".qkv.q_up", ".qkv.v_down.weight", ".qkv.v_up")


class LoRA(Method):
    """Updates of q and v in every block, of the recipe's `lora_rank`; a step 0 that is SAM."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    sentence: ClassVar[str] = (
        "the image encoder is frozen; low-rank updates of its queries and values, and the mask "
        "decoder, train and travel"
    )
    adds: ClassVar[str] = "low-rank updates in the image encoder"
    exports: ClassVar[tuple[str, ...]] = ("sam", "fedfms", "onnx", "bundle")

    def add(self, encoder: nn.Module, recipe: Recipe) -> None:
        """Two updates in every block."""
        from fedfms.models.lora import add_low_rank  # here: the words are asked without torch

        add_low_rank(encoder, recipe.lora_rank)

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        """The updates and the decoder."""
        return self.is_added(tensor, recipe) or learns_in_decoder(tensor, recipe)

    def is_added(self, tensor: str, recipe: Recipe) -> bool:
        """The updates."""
        return tensor.startswith("image_encoder.") and tensor.endswith(_ADDED)

    def merge(self, model: Segmenter) -> None:
        """The updates become part of SAM's own projections."""
        from fedfms.models.lora import merge_low_rank

        encoder = model.get_submodule("image_encoder")
        merge_low_rank(encoder)
