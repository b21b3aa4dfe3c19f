from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.exchange.tensors import save_tensors
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling


@pytest.fixture(autouse=True)
def one_seed_one_thread():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """A results folder with a model that training has moved; vit_demo unless told otherwise."""

    def make(name: str = "results", **values: Any) -> Path:
        defaults: dict[str, Any] = {
            "method": "fedmsa",
            "backbone": "vit_demo",
            "classes": ("lesion",),
            "rounds": 1,
            "image_size": 64,
        }
        values = {**defaults, **values}
        official = values["backbone"] != "vit_demo"
        recipe = Recipe(backbone_sha256=BACKBONES[values["backbone"]].sha256, **values)
        model = build_model(recipe, None if official else find_checkpoint(recipe, None))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / name
        folder.mkdir()
        save_tensors(folder / "global_model.safetensors", read_travelling(model), "fp32")
        (folder / "recipe.json").write_text(recipe.to_json())
        return folder

    return make


@pytest.fixture
def pictures() -> Callable[..., torch.Tensor]:
    """(B, 3, S, S) float32 as a network sees them: about normal."""

    def make(batch: int, size: int = 64) -> torch.Tensor:
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))

    return make
