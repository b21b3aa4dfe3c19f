from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.errors import CheckpointError, ConfigError
from fedfms.exchange.tensors import save_tensors
from fedfms.models.build import SamSegmenter, build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.trained import RECIPE_KEY, load_trained, whole_network
from fedfms.models.travelling import read_travelling

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256=BACKBONES["vit_demo"].sha256,
    classes=("disc", "cup"),
    rounds=1,
    image_size=128,
)


@pytest.fixture(scope="module")
def trained() -> SamSegmenter:
    model = build_model(RECIPE, find_checkpoint(RECIPE, None)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(model: SamSegmenter) -> torch.Tensor:
    picture = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(picture)


@pytest.mark.parametrize("name", ["global_model.safetensors", "model.safetensors"])
def test_a_results_folder_and_its_model_file_give_the_network(
    tmp_path: Path, trained: SamSegmenter, name: str
) -> None:
    save_tensors(tmp_path / name, read_travelling(trained), "fp32")
    (tmp_path / "recipe.json").write_text(RECIPE.to_json())
    for path in (tmp_path, tmp_path / name):
        loaded = load_trained(path, None)
        assert loaded.recipe == RECIPE
        assert torch.equal(outputs(loaded.model), outputs(trained))


def test_one_file_with_everything_needs_no_recipe_and_no_checkpoint(
    tmp_path: Path, trained: SamSegmenter
) -> None:
    file = tmp_path / "model.safetensors"
    nowhere = dataclasses.replace(RECIPE, backbone_sha256="0" * 64)  # no checkpoint has this one
    save_file(whole_network(trained), file, metadata={RECIPE_KEY: nowhere.to_json()})
    loaded = load_trained(file, None)
    assert loaded.recipe == nowhere
    assert torch.equal(outputs(loaded.model), outputs(trained))


def test_what_is_missing_is_named(tmp_path: Path, trained: SamSegmenter) -> None:
    with pytest.raises(ConfigError, match="name a results folder"):
        load_trained(tmp_path, None)
    save_tensors(tmp_path / "model.safetensors", read_travelling(trained), "fp32")
    with pytest.raises(ConfigError, match=r"no recipe\.json beside"):
        load_trained(tmp_path, None)
    tensors = whole_network(trained)
    del tensors["mask_decoder.mask_tokens.weight"]
    save_file(tensors, tmp_path / "part.safetensors", metadata={RECIPE_KEY: RECIPE.to_json()})
    with pytest.raises(CheckpointError, match="export the model again") as error:
        load_trained(tmp_path / "part.safetensors", None)
    assert "mask_tokens" in str(error.value)
