"""TinyViT (Wu et al. 2022, arXiv 2207.10666) as the image encoder of MobileSAM (arXiv 2306.14289).

Convolutions, then ten transformer blocks with attention in windows, then SAM's neck. Tensors have
MobileSAM's names, so that its official file fits key by key; `norm_head` and `head`, the classifier
that TinyViT was trained with, are there for that alone: nobody asks for them, they never learn.

Batch normalization uses its running statistics, in training too, which stay as the checkpoint has
them: a scale and a shift of each channel, which may learn. Statistics of the batch would be those
of a site, and would make of a file whose normalization is folded into convolutions another network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfms.models.encoder import Block, pad_to_windows
from fedfms.models.upstream import LayerNorm2d, window_partition, window_unpartition

# TinyViT-5M: channels of a stage, its blocks, their heads and tokens a side of a window; the first
# stage has convolutions in the place of transformer blocks
STAGES = ((64, 2, 0, 0), (128, 2, 4, 7), (160, 6, 5, 14), (320, 2, 10, 7))
_STRIDES = (2, 2, 1)  # between the stages; MobileSAM keeps the grid of the third in the fourth
_CLASSES = 1000  # of the classifier


class NormedConv(nn.Module):
    """A convolution without bias and its batch normalization, computed as one convolution.

    Args:
        inner: channels that come.
        outer: channels that go.
        size: of the kernel, in pixels a side.
        stride: in pixels.
        groups: of channels that are convolved apart.
    """

    def __init__(self, inner: int, outer: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.padding = size // 2

    def forward(self, grid: Tensor) -> Tensor:
        """(B, inner, H, W) to (B, outer, H / stride, W / stride), rounded up."""
        norm = self.bn
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = self.c.weight * scale[:, None, None, None]
        shift = norm.bias - norm.running_mean * scale
        return F.conv2d(
            grid,
            weight.to(grid.dtype),
            shift.to(grid.dtype),
            self.c.stride,
            self.padding,
            groups=self.c.groups,
        )


class ConvBlock(nn.Module):
    """An inverted bottleneck of four times the channels (MBConv)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(width, 4 * width, 1)
        self.conv2 = NormedConv(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = NormedConv(4 * width, width, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        inside = F.gelu(self.conv2(F.gelu(self.conv1(grid))))
        return F.gelu(grid + self.conv3(inside))


class Merge(nn.Module):
    """From a stage to the channels and the grid of the next."""

    def __init__(self, width: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(width, outer, 1)
        self.conv2 = NormedConv(outer, outer, 3, stride, groups=outer)
        self.conv3 = NormedConv(outer, outer, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outer, H / stride, W / stride), rounded up."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(grid)))))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Attention within windows, with a learnt bias for each distance of two tokens.

    Args:
        width: C.
        heads: whose C / heads queries, keys and values lie together in the output of `qkv`.
        window: tokens a side.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        place = torch.arange(window)
        apart = (place[:, None] - place[None, :]).abs()  # rows, or columns, of two tokens
        pairs = apart[:, None, :, None] * window + apart[None, :, None, :]
        self.pairs: Tensor  # (window^2, window^2), which of the biases
        self.register_buffer("pairs", pairs.reshape(window**2, window**2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalization and attention: (B, H, W, C) to the same.

        The zeros that fill up border windows are normalized as any token and attended to; as in
        `EncoderBlock.attention`, what the projection makes of them is put in after it.
        """
        grid = (tokens.shape[1], tokens.shape[2])
        qkv = self.qkv(self.norm(tokens))
        if any(side % self.window for side in grid):
            padding = self.qkv(self.norm(tokens.new_zeros(tokens.shape[-1])))
            qkv = pad_to_windows(qkv, padding, self.window)
        windows, padded = window_partition(qkv, self.window)
        split = windows.reshape(windows.shape[0], self.window**2, self.heads, 3, -1)
        query, key, value = split.permute(3, 0, 2, 1, 4).unbind(0)
        bias = self.attention_biases[:, self.pairs].to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, bias[None])
        attended = attended.transpose(1, 2).reshape(*windows.shape[:3], -1)
        return self.proj(window_unpartition(attended, self.window, padded, grid))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers of four times the width, behind a normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, normed: Tensor) -> Tensor:
        """(..., C) that `norm` has made to (..., C)."""
        return self.fc2(F.gelu(self.fc1(normed)))  # type: ignore[no-any-return]


class TinyBlock(Block):
    """A transformer block with a convolution between attention and MLP.

    Args:
        width: C.
        heads, window: of its attention.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = NormedConv(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        tokens = self.convolved(tokens + self.attn(tokens))
        return tokens + self.mlp(self.mlp.norm(tokens))  # type: ignore[no-any-return]

    def convolved(self, tokens: Tensor) -> Tensor:
        """What stands between attention and MLP, (B, H, W, C) to the same."""
        return to_tokens(self.local_conv(to_grid(tokens)))


class Stage(nn.Module):
    """Blocks of one width, and what leads to the next stage."""

    def __init__(self, blocks: list[nn.Module], downsample: Merge | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Patches(nn.Module):
    """Pictures to a grid of a quarter of their side, (B, 3, S, S) to (B, C, S / 4, S / 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            NormedConv(3, width // 2, 3, 2), nn.GELU(), NormedConv(width // 2, width, 3, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """As of the class."""
        return self.seq(images)  # type: ignore[no-any-return]


class TinyViT(nn.Module):
    """(B, 3, S, S) to (B, outer, S / 16, S / 16), for S any multiple of 16; MobileSAM's is 1024.

    No tensor depends on S: attention is in windows of 7 or 14 tokens, and the biases are theirs.

    Args:
        outer: channels of the embeddings.
    """

    def __init__(self, outer: int) -> None:
        super().__init__()
        widths = [width for width, *_ in STAGES]
        self.patch_embed = Patches(widths[0])
        stages = []
        for number, (width, depth, heads, window) in enumerate(STAGES):
            merge = None
            if number < len(_STRIDES):
                merge = Merge(width, widths[number + 1], _STRIDES[number])
            blocks: list[nn.Module] = [
                TinyBlock(width, heads, window) if heads else ConvBlock(width) for _ in range(depth)
            ]
            stages.append(Stage(blocks, merge))
        self.layers = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], _CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], outer, 1, bias=False),
            LayerNorm2d(outer),
            nn.Conv2d(outer, outer, 3, padding=1, bias=False),
            LayerNorm2d(outer),
        )

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The transformer blocks, from the first on; the convolutions before them count as none."""
        return tuple(block for block, _ in self._steps())

    def replace_blocks(self, make: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put `make(number, block)` in the place of each of `blocks`."""
        number = 0
        for stage in self._stages()[1:]:
            for place, block in enumerate(stage.blocks):
                stage.blocks[place] = make(number, block)
                number += 1

    def forward(
        self, given: Tensor, *, before: int | None = None, after: int | None = None
    ) -> Tensor:
        """As of `ImageEncoder.forward`; what goes into a block is (B, H, W, C) here too."""
        steps = list(self._steps())
        last = len(steps) if before is None else before
        if after == len(steps):
            return given
        tokens = given
        if after is None:
            grid = self.patch_embed(given)
            first = self._stages()[0]
            for conv in first.blocks:
                grid = conv(grid)
            assert first.downsample is not None
            tokens = to_tokens(first.downsample(grid))
        for block, merge in steps[after or 0 : last]:
            tokens = block(tokens)
            if merge is not None:
                tokens = to_tokens(merge(to_grid(tokens)))
        if last < len(steps):
            return tokens
        of_neck = next(self.neck.parameters()).dtype
        return self.neck(to_grid(tokens).to(of_neck))  # type: ignore[no-any-return]

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def _steps(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each transformer block, and what stands between it and the next."""
        for stage in self._stages()[1:]:
            for place, block in enumerate(stage.blocks):
                yield block, stage.downsample if place == len(stage.blocks) - 1 else None


def to_grid(tokens: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W)."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C)."""
    return grid.permute(0, 2, 3, 1)
