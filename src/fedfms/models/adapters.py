"""Adapters of Medical-SAM-Adapter (Wu et al. 2023, arXiv 2304.12620) in SAM's image encoder.

Each block gets two small bottlenecks: one after attention with a skip, one beside the MLP at half
weight. Written from the paper's description as FedFMS uses it; the depth adapters of 3-D input,
which a network for slices never runs, are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedfms.models.encoder import Block, EncoderBlock
from fedfms.models.tiny_vit import TinyBlock

ADAPTER_RATIO = 0.25  # width of the bottleneck over the width of a token
MLP_ADAPTER_SCALE = 0.5


class Adapter(nn.Module):
    """Bottleneck of two linear layers with GELU between.

    Args:
        width: C.
        starts_as_zero: the second layer starts with zeros, so that the adapter first adds nothing.
    """

    def __init__(self, width: int, *, starts_as_zero: bool) -> None:
        super().__init__()
        bottleneck = int(width * ADAPTER_RATIO)
        self.down = nn.Linear(width, bottleneck)
        self.act = nn.GELU()
        self.up = nn.Linear(bottleneck, width)
        if starts_as_zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.up(self.act(self.down(tokens)))  # type: ignore[no-any-return]


class AdaptedBlock(EncoderBlock):
    """An encoder block with its two adapters; its arguments are those of its parts."""

    def __init__(
        self, block: EncoderBlock, *, starts_as_zero: bool, norm_padding: bool = False
    ) -> None:
        super().__init__(block, norm_padding=norm_padding)
        width = self.attn.proj.out_features
        self.space_adapter = Adapter(width, starts_as_zero=starts_as_zero)
        self.mlp_adapter = Adapter(width, starts_as_zero=starts_as_zero)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C).

        The adapter works on single tokens, so that running it after the windows are put together
        gives what Medical-SAM-Adapter has before.
        """
        attended = self.attention(tokens)
        # what is added is added up before it meets its token, beside which it is small
        tokens = tokens + (attended + self.space_adapter(attended))
        normed = self.norm2(tokens)
        return (  # type: ignore[no-any-return]
            tokens + torch.add(self.mlp(normed), self.mlp_adapter(normed), alpha=MLP_ADAPTER_SCALE)
        )


class AdaptedTinyBlock(TinyBlock):
    """A block of TinyViT with its two adapters, at the places that SAM's blocks have them.

    Args:
        block: whose parts become this one's under their own names.
        starts_as_zero: of the adapters.
    """

    def __init__(self, block: TinyBlock, *, starts_as_zero: bool) -> None:
        Block.__init__(self)
        self.attn, self.local_conv, self.mlp = block.attn, block.local_conv, block.mlp
        width = self.attn.proj.out_features
        self.space_adapter = Adapter(width, starts_as_zero=starts_as_zero)
        self.mlp_adapter = Adapter(width, starts_as_zero=starts_as_zero)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        attended = self.attn(tokens)
        tokens = self.convolved(tokens + (attended + self.space_adapter(attended)))
        normed = self.mlp.norm(tokens)
        return (  # type: ignore[no-any-return]
            tokens + torch.add(self.mlp(normed), self.mlp_adapter(normed), alpha=MLP_ADAPTER_SCALE)
        )


def add_adapters(encoder: Any, *, starts_as_zero: bool, norm_padding: bool, first: int = 0) -> None:
    """Give blocks of an image encoder their adapters, drawn from torch's global generator.

    Args:
        encoder: ImageEncoder or TinyViT.
        norm_padding: see `EncoderBlock`; TinyViT always does.
        first: number of the first block that gets them, from 0; as many as there are: none does.
    """

    def adapted(number: int, block: nn.Module) -> nn.Module:
        if number < first:
            return block
        if isinstance(block, TinyBlock):
            return AdaptedTinyBlock(block, starts_as_zero=starts_as_zero)
        assert isinstance(block, EncoderBlock)  # one that is not would lose its place
        return AdaptedBlock(block, starts_as_zero=starts_as_zero, norm_padding=norm_padding)

    encoder.replace_blocks(adapted)
