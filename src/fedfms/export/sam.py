"""A trained SAM as Segment Anything's own checkpoint, for every program that loads one."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Reading
from fedfms.errors import ConfigError
from fedfms.export.facts import about, pictures_text, render, terms
from fedfms.geometry import pixel_statistics
from fedfms.models.sam import GEOMETRY
from fedfms.models.trained import Trained, whole_network

UPSTREAM_IMAGE_SIZE = 1024  # pixels; the only one that upstream's build_sam.py builds


def write_sam(trained: Trained, site: Reading | None, file: Path) -> tuple[tuple[str, ...], None]:
    """Write the state dict, and beside it FILE.md that says how to load and use it.

    The tensors are the trained ones, fp32, under SAM's names. Position tables stay those of the
    recipe's image_size: resampling them for 1024 pixels would make a file that loads everywhere and
    segments worse than what was evaluated, without a word.

    Returns:
        sentences for the person who exports, and no difference: the tensors are the same, or
        what a method added is part of them.

    Raises:
        ConfigError: "no-sam-checkpoint"; a class head, which SAM does not have. What else SAM does
            not have, `export_model` refuses.
    """
    recipe = trained.recipe
    if len(recipe.classes) > 1:
        raise ConfigError(
            f"the model segments {len(recipe.classes)} classes ({', '.join(recipe.classes)}) with "
            "a layer behind SAM's masks, for which SAM's own checkpoint has no place",
            "export it with --as fedfms, --as onnx or --as bundle; or train one class for --as sam",
            code="no-sam-checkpoint",
        )
    trained.model.method.merge(trained.model)
    torch.save(whole_network(trained.model), file)
    notes = _notes(recipe)
    mean, std = pixel_statistics(recipe)
    text = render(
        "sam.md",
        recipe=recipe,
        file_name=file.name,
        about=about(recipe),
        terms=terms(recipe),
        is_mobile=recipe.backbone == "vit_t",
        notes=notes,
        registry_loads=recipe.backbone != "vit_demo" and recipe.image_size == UPSTREAM_IMAGE_SIZE,
        size=GEOMETRY.get(recipe.backbone),
        depth=BACKBONES[recipe.backbone].depth,
        grid=recipe.image_size // recipe.patch_size,
        mean=mean[0],
        std=std[0],
        threshold=_logit(recipe.probability_threshold),
        patch=recipe.image_size // recipe.mask_size,
        pictures=pictures_text(site),
    )
    file.with_name(f"{file.name}.md").write_text(text, encoding="utf-8")
    return notes, None


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _notes(recipe: Recipe) -> tuple[str, ...]:
    notes = [
        "It was trained without prompts and with nothing in place of SAM's dense prompt: run the "
        "decoder as the .md file beside it shows. SamPredictor works, but adds no_mask_embed, "
        "which this decoder never saw, and the prompt encoder and the IoU head are still those of "
        "the SAM checkpoint that training started from."
    ]
    size = recipe.image_size
    if recipe.backbone == "vit_demo":
        notes.append(
            "vit_demo is a small SAM of this project: sam_model_registry does not know its sizes, "
            "the code in the .md file does."
        )
    elif recipe.backbone == "vit_t":
        notes.append(
            "It loads with the package mobile_sam, MobileSAM's own; segment_anything has no vit_t."
        )
        if size != UPSTREAM_IMAGE_SIZE:
            notes.append(
                f"It was trained at {size} pixels, and mobile_sam computes at "
                f"{UPSTREAM_IMAGE_SIZE} alone, which was never evaluated: the file loads there all "
                f"the same. fedfms predict computes at {size}."
            )
    elif size != UPSTREAM_IMAGE_SIZE:
        notes.append(
            f"It was trained at {size} pixels and has the position tables of {size}: "
            f'sam_model_registry["{recipe.backbone}"] builds {UPSTREAM_IMAGE_SIZE} and refuses it. '
            "Load it with the code in the .md file; for a file that the registry loads, train with "
            f"image_size {UPSTREAM_IMAGE_SIZE}."
        )
    if not recipe.normalize:
        notes.append(
            "It was trained on grey / 255 without SAM's pixel mean and standard deviation: "
            "set sam.pixel_mean and sam.pixel_std as the .md file shows."
        )
    if recipe.resize == "stretch":
        notes.append(
            "It was trained on pictures stretched to a square; SAM's ResizeLongestSide keeps the "
            "aspect ratio instead: resize as mask_of in the .md file does."
        )
    else:
        notes.append(
            "Slices of volumes kept their shape in millimetres; SAM's ResizeLongestSide counts "
            "pixels: where those of a slice are not square, resize as mask_of in the .md file does."
        )
    if recipe.probability_threshold != 0.5:
        notes.append(
            f"A pixel is foreground from probability {recipe.probability_threshold:g} on, logit "
            f"{_logit(recipe.probability_threshold):.4f}; SAM's own mask_threshold is 0."
        )
    return tuple(notes)
