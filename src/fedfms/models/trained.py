"""A trained model on disk to a network: a results folder, its tensors, or one file with everything.

What travels in a federation is a part of the network; the rest is the SAM checkpoint that the
recipe names. A file that `fedfms export` wrote holds all tensors and the recipe, and needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfms.bounded import decode_json
from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError, ConfigError, Undecodable
from fedfms.exchange.tensors import load_tensors, read_metadata
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import write_own, write_travelling
from fedfms.records.layout import GLOBAL_MODEL, MODEL, RECIPE

MODEL_FILES = (GLOBAL_MODEL, MODEL)  # of a job, of a study's run
RECIPE_KEY = "fedfms_recipe"  # in the metadata of a file that holds the whole network
INPUT_KEY = "fedfms_input"  # there too: how pictures became its input, as JSON


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network with the recipe that made it."""

    recipe: Recipe
    model: Segmenter  # fp32, on the processor, in evaluation mode
    file: Path  # that the trained tensors were read from
    pictures: Mapping[str, Any] | None = None  # INPUT_KEY of the file, if it has it


def load_trained(path: Path, checkpoints: Path | None, own: Path | None = None) -> Trained:
    """The network of a results folder, of a `.safetensors` file beside its recipe, or of an export.

    Args:
        path: a folder with recipe.json and the model, or a file.
        checkpoints: folder of SAM checkpoints; not asked for vit_demo nor for a whole network.
        own: what a site kept of a run whose recipe has `personal` parts (`staying.safetensors`);
            None: these are as the run shared them last, or as the network began.

    Raises:
        ConfigError: no model is there ("no-model"), or no recipe for it ("no-recipe").
        CheckpointError: the file is damaged or does not fit its recipe, or the SAM checkpoint that
            the recipe names is missing.
    """
    file = _model_file(path)
    tensors = load_tensors(file)
    metadata = read_metadata(file)
    text = metadata.get(RECIPE_KEY)
    if text is not None:
        recipe = Recipe.from_text(text, f"the recipe in {file}")
        model = build_model(recipe, None)
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} does not hold the network of its own recipe: "
                f"{str(error).splitlines()[-1]}",
                "export the model again with this version of fedfms",
                code="not-this-network",
            ) from None
    else:
        beside = file.with_name(RECIPE)
        if not beside.is_file():
            raise ConfigError(
                f"there is no {RECIPE} beside {file}",
                "keep the recipe that ran with the model; it lies in the job's results folder",
                code="no-recipe",
            )
        recipe = Recipe.from_json(beside)
        model = build_model(recipe, find_checkpoint(recipe, checkpoints))
        write_travelling(model, tensors)
    if own is not None:
        write_own(model, load_tensors(own))
    return Trained(recipe, model.eval(), file, _pictures(metadata, file))


def whole_network(model: Segmenter) -> dict[str, Tensor]:
    """All tensors of the network by name, on the processor: what `RECIPE_KEY` files hold.

    Numbers in fp32; a count, which only vit_t's batch normalization has, as it is.
    """
    return {
        name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in model.state_dict().items()
    }


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in MODEL_FILES:
        if (path / name).is_file():
            return path / name
    raise ConfigError(
        f"there is no model at {path}",
        f"name a results folder (it holds {MODEL_FILES[0]} and {RECIPE}), a run of a study, "
        "or a .safetensors file",
        code="no-model",
    )


def _pictures(metadata: Mapping[str, str], file: Path) -> Mapping[str, Any] | None:
    try:
        facts = decode_json(metadata.get(INPUT_KEY, "null"), INPUT_KEY)
    except Undecodable:
        facts = 0
    if facts is not None and not isinstance(facts, dict):
        raise CheckpointError(
            f"{INPUT_KEY} in the metadata of {file} is no JSON object",
            "export the model again with fedfms export",
        )
    return facts
