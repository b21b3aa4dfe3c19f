"""Small cases, networks and settings for the tests of training and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase
from fedfms.data.slices import SliceDataset


def little_recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "method": "fedsam",
        "backbone": "vit_demo",
        "backbone_sha256": "0" * 64,
        "classes": ("disc", "cup"),
        "rounds": 4,
        "image_size": 32,  # and 16 mask pixels
        "batch_size": 3,
        "learning_rate": 1e-2,
        "loss": "dice_bce",
        "seed": 5,
    }
    return Recipe(**{**values, **changes})


def little_site(**changes: Any) -> SiteConfig:
    values: dict[str, Any] = {
        "data_root": Path("nowhere"),
        "format": "nifti",
        "images": "images/*.nii.gz",
        "labels": "labels/*.nii.gz",
        "classes": {"disc": (1, 2), "cup": (2,)},
        "device": "cpu",
    }
    return SiteConfig(**{**values, **changes})


def little_case(
    images: np.ndarray,
    labels: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    key: str = "a",
) -> PreparedCase:
    case = Case(key=key, patient=key, image=Path(key), label=Path(key), split="validation")
    return PreparedCase(
        case=case,
        images=images.astype(np.uint8),
        labels=labels.astype(np.int16),
        spacing=spacing,
        is_volume=len(images) > 1,
    )


def disc_case(seed: int, depth: int, size: int = 24, key: str = "a") -> PreparedCase:
    """A bright disc (1) with a brighter cup (2) on noise, moving from slice to slice."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    images, labels = [], []
    for _ in range(depth):
        centre = rng.uniform(0.35, 0.65, 2) * size
        distance = np.hypot(row - centre[0], column - centre[1])
        label = (distance < 0.3 * size).astype(int) + (distance < 0.12 * size)
        images.append(np.clip(40 + 80 * label + rng.normal(0, 12, label.shape), 0, 255))
        labels.append(label)
    return little_case(np.stack(images), np.stack(labels), (2.0, 1.0, 1.0), key)


def disc_dataset(
    recipe: Recipe, site: SiteConfig, depths: tuple[int, ...] = (4, 3)
) -> SliceDataset:
    cases = [disc_case(seed, depth, key=str(seed)) for seed, depth in enumerate(depths)]
    return SliceDataset(cases, site, recipe)


class LittleNet(nn.Module):
    """(B, 3, 32, 32) to (B, K, 16, 16) logits; the first layer is frozen if asked."""

    def __init__(self, classes: int = 2, frozen: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, classes, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        self.first.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images)))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
