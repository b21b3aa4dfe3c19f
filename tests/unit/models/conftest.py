from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.models.upstream import ImageEncoderViT


@pytest.fixture(autouse=True)
def one_seed_one_thread():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    def make(backbone: str = "vit_demo", **values: Any) -> Recipe:
        defaults = {
            "method": "fedmsa",
            "backbone": backbone,
            "backbone_sha256": BACKBONES[backbone].sha256,
            "classes": ("object",),
            "rounds": 1,
            "image_size": 128,
        }
        return Recipe(**{**defaults, **values})

    return make


@pytest.fixture
def fill_positions() -> Callable[[nn.Module], None]:
    """Give the position tables, which start as zeros, and the biases values that matter."""

    def fill(module: nn.Module) -> None:
        for name, tensor in module.named_parameters():
            if "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
                nn.init.normal_(tensor, std=0.2)

    return fill


@pytest.fixture
def upstream_encoder(fill_positions) -> Callable[..., nn.Module]:
    """segment_anything's own encoder with ViT-B's sizes (or fewer blocks) and random weights."""

    def make(image_size: int, depth: int = 12, global_blocks: tuple[int, ...] = (2, 5, 8, 11)):
        encoder = ImageEncoderViT(
            depth=depth,
            embed_dim=768,
            img_size=image_size,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=12,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=global_blocks,
            window_size=14,
            out_chans=256,
        )
        fill_positions(encoder)
        return encoder

    return make
