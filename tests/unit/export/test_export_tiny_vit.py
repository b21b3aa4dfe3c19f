"""Exports of a model on vit_t: the same network, MobileSAM's layout, and whose weights they are."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.exchange.tensors import read_metadata, save_tensors
from fedfms.export.onnx import LARGEST_DIFFERENCE
from fedfms.export.run import export_model
from fedfms.files import file_sha256
from fedfms.models.build import build_model
from fedfms.models.sam import Sam
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_travelling

APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """A results folder, and the folder of its checkpoint."""
    values = {"backbone": "vit_t", "classes": ("lesion",), "rounds": 1, "image_size": 64}
    official = Recipe(method="fedsam", backbone_sha256=BACKBONES["vit_t"].sha256, **values)
    checkpoints, results = tmp_path / "checkpoints", tmp_path / "results"
    checkpoints.mkdir()
    results.mkdir()
    save_file(Sam(official).state_dict(), checkpoints / "some.safetensors")
    digest = file_sha256(checkpoints / "some.safetensors")
    recipe = Recipe(method="lora", backbone_sha256=digest, mask_token=2, **values)
    model = build_model(recipe, checkpoints / "some.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape)
    save_tensors(results / "global_model.safetensors", read_travelling(model), "fp32")
    (results / "recipe.json").write_text(recipe.to_json())
    return results, checkpoints


def test_one_file_of_ours_gives_the_same_logits_and_says_whose_weights(tmp_path, trained, pictures):
    source, checkpoints = trained
    file = tmp_path / "whole.safetensors"
    export_model(source, file, "fedfms", checkpoints=checkpoints)
    images = pictures(2)
    with torch.no_grad():
        expected = load_trained(source, checkpoints).model(images)
        assert torch.equal(load_trained(file, None).model(images), expected)
    said = read_metadata(file)["license"]
    assert "mobile_sam.pt" in said and APACHE in said and "whose own terms hold" in said


def test_a_sam_has_the_official_tensors_and_a_note_that_loads_it(tmp_path, trained, pictures):
    source, checkpoints = trained
    done = export_model(source, tmp_path / "sam.pth", "sam", checkpoints=checkpoints)
    state = torch.load(tmp_path / "sam.pth", weights_only=True)
    official = load_file(checkpoints / "some.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in official.items()
    }
    note = (tmp_path / "sam.pth.md").read_text()
    assert 'sam_model_registry["vit_t"]' in note and "from mobile_sam" in note and APACHE in note
    assert any("1024 alone" in text for text in done.notes)


def test_graphs_compute_the_same_and_say_whose_weights(tmp_path, trained):
    source, checkpoints = trained
    done = export_model(source, tmp_path / "model.onnx", "onnx", checkpoints=checkpoints)
    assert done.largest_difference is not None and done.largest_difference <= LARGEST_DIFFERENCE
    metadata = {one.key: one.value for one in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert "MobileSAM" in metadata["license"]
    export_model(source, tmp_path / "bundle", "bundle", checkpoints=checkpoints)
    assert APACHE in (tmp_path / "bundle/LICENSE").read_text()
