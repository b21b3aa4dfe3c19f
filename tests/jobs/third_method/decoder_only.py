"""A method of another distribution: SAM's mask decoder alone."""

from typing import ClassVar

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods import Method, learns_in_decoder


class DecoderOnly(Method):
    name: ClassVar[str] = "decoder"
    title: ClassVar[str] = "Decoder alone"
    sentence: ClassVar[str] = "the image encoder is frozen; the mask decoder trains and travels"
    exports: ClassVar[tuple[str, ...]] = ("sam", "fedfms", "onnx", "bundle")

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        return learns_in_decoder(tensor, recipe)
