"""SAM's image encoder: upstream's modules and tensor names, computed in a faster order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fedfms.models.attention import attend
from fedfms.models.upstream import ImageEncoderViT, window_partition, window_unpartition


class Block(nn.Module):
    """A transformer block of an image encoder, whose activations can be computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointed = False  # see `checkpoint_blocks`

    def __call__(self, tokens: Tensor) -> Tensor:
        """As of any module; where the block is checkpointed, it keeps its input alone."""
        if not (self.checkpointed and self.training and torch.is_grad_enabled()):
            return super().__call__(tokens)  # type: ignore[no-any-return]
        # what its parameters are now, rounded ones in bf16 (build.py), they are the second time too
        now = dict(self.named_parameters())

        def compute(given: Tensor) -> Any:
            return functional_call(_Plain(self), {f"block.{k}": v for k, v in now.items()}, given)

        # nothing in a block is drawn, so that no generator has to be put back
        return checkpoint(compute, tokens, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class EncoderBlock(Block):
    """A transformer block that takes over the parts of an upstream block under their own names.

    Args:
        block: upstream's Block; its norm1, attn, norm2 and mlp become ours.
        norm_padding: normalize the zeros that fill up border windows, as Medical-SAM-Adapter does;
            they then enter attention as the norm's bias. SAM leaves them zero.
    """

    def __init__(self, block: Any, *, norm_padding: bool = False) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = block.attn
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.window_size = block.window_size  # tokens a side; 0: attention over the whole grid
        self.norm_padding = norm_padding

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalization and attention, in windows if the block has them: (B, H, W, C) to the same.

        Projections work on single tokens, so they run on the real ones only, and the padding of
        border windows is filled with what they would have made of it.
        """
        qkv = self.attn.qkv(self.norm1(tokens))
        if self.window_size == 0:
            return self.attn.proj(attend(qkv, self.attn))  # type: ignore[no-any-return]
        grid = (tokens.shape[1], tokens.shape[2])
        if any(side % self.window_size for side in grid):
            padding = tokens.new_zeros(tokens.shape[-1])
            padding = self.attn.qkv(self.norm1(padding) if self.norm_padding else padding)
            qkv = pad_to_windows(qkv, padding, self.window_size)
        windows, padded = window_partition(qkv, self.window_size)
        attended = attend(windows, self.attn)
        return self.attn.proj(  # type: ignore[no-any-return]
            window_unpartition(attended, self.window_size, padded, grid)
        )


class _Plain(nn.Module):
    """A block whose call is that of any module, whether it is checkpointed or not."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Any:
        return nn.Module.__call__(self.block, tokens)


def checkpoint_blocks(model: nn.Module, on: bool) -> int:
    """Let the encoder's blocks keep their inputs alone and compute the rest anew when it is needed.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174), one segment a block: the same
    numbers for a third more computing, and for the memory of one block in the place of all. Blocks
    in which nothing learns are as they were.

    Returns:
        how many blocks there are; 0 in a network that is not SAM.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.checkpointed = on
    return len(blocks)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether any of its blocks is."""
    return any(isinstance(one, Block) and one.checkpointed for one in model.modules())


class ImageEncoder(ImageEncoderViT):  # type: ignore[misc]
    """Upstream's ImageEncoderViT with our blocks: (B, 3, S, S) to (B, C, S / patch, S / patch)."""

    def __init__(self, **upstream: Any) -> None:
        super().__init__(**upstream)
        upstream_blocks = self.blocks
        self.blocks: nn.ModuleList = nn.ModuleList(map(EncoderBlock, upstream_blocks))

    def replace_blocks(self, make: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put `make(number, block)` in the place of each block."""
        self.blocks = nn.ModuleList(make(number, one) for number, one in enumerate(self.blocks))

    def forward(
        self, given: Tensor, *, before: int | None = None, after: int | None = None
    ) -> Tensor:
        """The whole encoder, or one of the two parts that a block's number cuts it into.

        All but the neck is in the precision of what is given, the neck in that of its weights.

        Args:
            given: images, or with `after` what the same number as `before` gave.
            before: gives what goes into the block of this number, from 0: tokens (B, H, W, C). Of a
                number as large as there are blocks that is the encoder's output.
            after: gives the encoder's output.
        """
        last = len(self.blocks) if before is None else before
        if after == len(self.blocks):
            return given
        tokens = given
        if after is None:
            tokens = self.patch_embed(given)
            if self.pos_embed is not None:
                tokens = tokens + self.pos_embed
        for block in self.blocks[after or 0 : last]:
            tokens = block(tokens)
        if last < len(self.blocks):
            return tokens
        grid = tokens.permute(0, 3, 1, 2).to(self.neck[0].weight.dtype)
        return self.neck(grid)  # type: ignore[no-any-return]


def pad_to_windows(values: Tensor, padding: Tensor, window: int) -> Tensor:
    """Fill (B, H, W, C) at the bottom and right with `padding` (C,) to whole windows."""
    batch, height, width, channels = values.shape
    full_height, full_width = (-(-side // window) * window for side in (height, width))
    filled = padding.to(values.dtype).expand(batch, full_height, full_width, channels).clone()
    filled[:, :height, :width] = values
    return filled
