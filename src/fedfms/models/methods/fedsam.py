"""FedSAM: all of SAM that gets a gradient trains and travels."""

from __future__ import annotations

from typing import ClassVar

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods.method import Method, learns_in_decoder

_CLASSIFIER = ("image_encoder.head.", "image_encoder.norm_head.")  # of vit_t (models/tiny_vit.py)


class FedSAM(Method):
    """Adds nothing; the prompt encoder stays, since there are no prompts."""

    name: ClassVar[str] = "fedsam"
    title: ClassVar[str] = "FedSAM"
    sentence: ClassVar[str] = "every parameter of SAM that is used trains and travels"
    exports: ClassVar[tuple[str, ...]] = ("sam", "fedfms", "onnx", "bundle")

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        """The image encoder and the decoder."""
        if tensor.startswith(_CLASSIFIER):
            return False  # nothing asks for it
        return tensor.startswith("image_encoder.") or learns_in_decoder(tensor, recipe)
