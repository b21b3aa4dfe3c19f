"""What somebody needs to know to use an exported network without this package, as JSON types."""

from __future__ import annotations

from typing import Any

from fedfms import __version__
from fedfms.config import Recipe
from fedfms.data.dataset import PIXEL_MEAN, PIXEL_STD

INPUT_KEY = "fedfms_input"  # of `input_facts`, beside RECIPE_KEY, in a file's metadata
VERSION_KEY = "fedfms_version"

Triple = tuple[float, float, float]


def pixel_statistics(recipe: Recipe) -> tuple[Triple, Triple]:
    """(mean, standard deviation) of each channel in grey levels, 0 to 255.

    The network's input is (grey - mean) / std. Without `normalize` that is grey / 255.
    """
    if recipe.normalize:
        return PIXEL_MEAN, PIXEL_STD
    return (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)


def input_facts(recipe: Recipe) -> dict[str, Any]:
    """How a picture becomes the network's input, and its output a mask; docs/export.md explains."""
    mean, std = pixel_statistics(recipe)
    return {
        "classes": list(recipe.classes),
        "image_size": recipe.image_size,  # pixels a side of the input
        "mask_size": recipe.mask_size,  # pixels a side of the output
        "resize": recipe.resize,  # pad: the slice keeps its shape in millimetres
        "antialias": not recipe.paper_compat,
        "pixel_mean": list(mean),
        "pixel_std": list(std),
        "probability_threshold": recipe.probability_threshold,
        "exclusive_classes": recipe.exclusive_classes,
    }


def about(recipe: Recipe) -> str:
    """One line: what was trained, with what."""
    method = {"fedsam": "FedSAM", "fedmsa": "FedMSA"}[recipe.method]
    return (
        f"{method} on SAM's {recipe.backbone} at {recipe.image_size} pixels, classes "
        f"{', '.join(recipe.classes)}; fedfms {__version__}, recipe {recipe.sha256[:12]}"
    )
