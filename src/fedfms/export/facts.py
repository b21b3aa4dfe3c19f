"""What somebody needs to know to use an exported network without this package, as JSON types."""

from __future__ import annotations

from typing import Any

from fedfms import __version__
from fedfms.contracts.recipe import BACKBONES, Recipe, adapters_in_words
from fedfms.contracts.site import Reading
from fedfms.geometry import pixel_statistics
from fedfms.models.methods import find_method
from fedfms.pages.parts import environment

VERSION_KEY = "fedfms_version"
TERMS_KEY = "license"  # in the metadata of a file: `terms`

_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


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
        # channels of the input, one of each contrast
        **({"contrasts": list(recipe.contrasts)} if recipe.contrasts else {}),
    }


def site_facts(site: Reading | None) -> dict[str, Any]:
    """How a site's files become pictures; None for what is not known, or has no meaning there."""
    if site is None:
        return {"plane": None, "channels": None, "intensity": None}
    low, high = site.intensity.bounds
    return {
        "plane": site.plane if site.format in ("nifti", "dicom") else None,
        "channels": site.channels,
        "intensity": {
            "rule": site.intensity.rule,
            "bounds": [low, high],  # percentiles, or stored values
            "rounding": site.intensity.rounding,
        },
    }


def rounded(site: Reading) -> str:
    """What becomes of the digits behind the point when grey levels get 8 bits."""
    return "cut off" if site.intensity.rounding == "truncate" else "rounded"


def greys(site: Reading, whole: str) -> str:
    """Which stored values the grey levels are of; `whole`: what percentiles are of, in a word."""
    low, high = site.intensity.bounds
    if site.intensity.rule == "percentile":
        return f"grey levels from percentile {low:g} to {high:g} of each {whole}"
    return f"grey levels from stored value {low:g} to {high:g}"


_CHANNELS = {
    "gray": "three equal channels",
    "neighbours": (
        "three channels: the slice before, the slice itself, the slice after (at an end the slice "
        "itself stands for the missing one)"
    ),
    "rgb": "the three colours",
}


def pictures_text(site: Reading | None) -> str:
    """Sentences: from a file to grey levels and channels."""
    if site is None:
        ways = "; ".join(f"{name}: {text}" for name, text in _CHANNELS.items())
        return (
            "Grey levels 0 to 255 by the site's intensity rule, then three channels as `channels` "
            f"in site.yml says ({ways}), of slices in the `plane` that it says. Which of these "
            "this file does not know: export with --site site.yml to have it written here."
        )
    plane = site_facts(site)["plane"]
    whole = "volume" if plane else "image"
    levels = greys(site, whole).replace("grey levels", "Grey levels 0 to 255")
    slices = f"{plane} slices, " if plane else ""
    return f"{levels}, {rounded(site)} to 8 bits; {slices}{_CHANNELS[site.channels]}."


def about(recipe: Recipe) -> str:
    """One line: what was trained, with what."""
    method = find_method(recipe.method)
    network = f" on SAM's {recipe.backbone}" if method.uses_sam else ""
    where = adapters_in_words(recipe.adapter_blocks)
    network += f", {where}," if where else ""
    return (
        f"{method.title}{network} at {recipe.image_size} pixels, classes "
        f"{', '.join(recipe.classes)}; fedfms {__version__}, recipe {recipe.sha256[:12]}"
    )


def terms(recipe: Recipe) -> str:
    """Whose weights training started from and under which licence; empty where from none.

    What the participants say of the trained network is theirs to add.
    """
    file = BACKBONES.get(recipe.backbone)
    if file is None:
        return ""
    text = f"trained from {file.file_name} {file.licence}, {_APACHE}"
    if recipe.backbone_sha256 != file.sha256:
        text = (
            f"trained from a checkpoint of SHA-256 {recipe.backbone_sha256}, whose own terms hold; "
            f"{file.file_name}, whose layout it has, is {file.licence}, {_APACHE}"
        )
    return text


def render(template: str, **values: Any) -> str:
    """One of templates/, which lie beside an exported network, with its values filled in."""
    return environment("fedfms.export").get_template(f"{template}.j2").render(values)
