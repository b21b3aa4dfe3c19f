"""A small U-Net of MONAI, from scratch: what SAM has to be better than to be worth its bytes.

It joins the registry of methods by this package's entry point, so that the same federation trains
it, with the same door, guard and average, wherever the laboratory is installed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError
from fedfms.models.methods import Method
from fedfms.models.segmenter import Segmenter

FEATURES = (16, 16, 32, 64, 128, 16)  # channels of MONAI's BasicUNet: five levels, and the last
_STEP = 16  # pixels of the input for one of the lowest level
_LEAST = 2 * _STEP  # normalization of a single pixel is none


class UNetSegmenter(Segmenter):
    """(B, 3, S, S) pictures to (B, K, S, S) logits; S and K as the recipe says.

    MONAI's BasicUNet (Falk et al. 2019, Nature Methods 16) with instance normalization, whose
    parameters learn and which keeps no statistics: all that the network is travels.
    """

    def __init__(self, recipe: Recipe, method: Method) -> None:
        super().__init__(recipe, method)
        from monai.networks.nets.basic_unet import BasicUNet  # here: it takes seconds

        self.net = BasicUNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=len(recipe.classes),
            features=FEATURES,
            norm=("instance", {"affine": True}),
        )

    def forward(self, images: Tensor) -> Tensor:
        """As of the class."""
        logits: Tensor = self.net(images)
        return logits.to(torch.float32)


class UNet(Method):
    """All of it learns and travels; there is nothing of SAM in it, and no checkpoint."""

    name: ClassVar[str] = "unet"
    title: ClassVar[str] = "U-Net"
    sentence: ClassVar[str] = "a small U-Net, from scratch: every parameter trains and travels"
    uses_sam: ClassVar[bool] = False
    exports: ClassVar[tuple[str, ...]] = ("fedfms", "onnx", "bundle")

    def network(self, recipe: Recipe) -> Segmenter:
        """The network, drawn from torch's global generator.

        Raises:
            ConfigError: an image_size that its levels do not divide.
        """
        if recipe.image_size < _LEAST or recipe.image_size % _STEP:
            raise ConfigError(
                f"image_size is {recipe.image_size}, and a U-Net halves it four times",
                f"use a multiple of {_STEP} pixels, {_LEAST} or more",
            )
        return UNetSegmenter(recipe, self)

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        """Everything."""
        return True
