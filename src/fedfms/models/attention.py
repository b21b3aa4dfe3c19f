"""Attention of SAM's image encoder, with relative positions, without a matrix of all tokens kept.

Upstream adds `q . R_row + q . R_column` (decomposed relative positions, MViTv2, arXiv 2112.01526)
to the logit of every query and key, in tensors of tokens x tokens that wait for the backward pass.
There are three ways to the same numbers, and `choose` says which one runs:

tiled: some queries against all keys at a time, in one buffer that fits into a cache; the backward
pass computes the softmax again (as FlashAttention, arXiv 2205.14135, by whole rows).

folded: the same sum as one longer dot product, `[s q, q R_rows, q R_columns] . [k, onehot(row),
onehot(column)]`, which needs no bias, so that `scaled_dot_product_attention` computes it exactly
and is free to pick its fastest kernel.

own: kernels for a GPU that have the positions inside (gpu/attention.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedfms.contracts.recipe import Recipe
from fedfms.models.gpu.attention import OwnAttention, Rivals, refusal
from fedfms.models.positions import add_from_places, to_places
from fedfms.models.upstream import get_rel_pos

log = logging.getLogger(__name__)

# Logits in a tile: 4 MB in fp32 on a processor; on a GPU enough to fill it, and still a small part
# of its memory.
_TILE = {"cpu": 2**20, "cuda": 2**26}
# Above this width the fp32 kernel of PyTorch on CUDA is slower than plain products (results/gpu.md)
_WIDEST_FP32 = 128


class Choice(NamedTuple):
    """Which way attention is computed, and for a reader of the log why."""

    way: Literal["tiled", "folded", "own"]
    why: str


def choose(
    device: str, dtype: torch.dtype, head_dim: int, height: int, width: int, *, recorded: bool
) -> Choice:
    """The one place that decides how attention is computed; says at debug level what and why.

    Args:
        device: torch's name of its type.
        dtype: of queries, keys and values.
        head_dim: values of a query.
        height, width: of the grid of tokens.
        recorded: a graph is being recorded from the operations, for an export or a compiler.
    """
    choice = _choose(device, dtype, head_dim, height, width, recorded)
    _say(choice, device, dtype, head_dim, height, width)
    return choice


def _choose(
    device: str, dtype: torch.dtype, head_dim: int, height: int, width: int, recorded: bool
) -> Choice:
    if recorded:
        return Choice("folded", "a recorded graph wants operations that every runtime knows")
    # so sdpa_kernel(MATH) leaves it, on every device
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        return Choice("folded", "only the math kernel is allowed, which has second derivatives")
    if device == "cpu":
        if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            return Choice("folded", "AMX runs the fused kernel in bf16 as fast, without a loop")
        return Choice("tiled", "the processor has no fused kernel that is as fast")
    refused = "our kernel is for CUDA"
    if device == "cuda":
        rivals = Rivals(folded=_folded_split, plain=_Tiled.apply)
        refused = refusal(dtype, head_dim, height, width, rivals) or ""
        if not refused:
            return Choice("own", "our kernel has the positions inside")
    folded_width = head_dim + height + width
    if device == "cuda" and dtype == torch.float32 and folded_width > _WIDEST_FP32:
        return Choice("tiled", f"the fused fp32 kernel is slow at width {folded_width}; {refused}")
    return Choice("folded", f"the fused kernel is the fastest; {refused}")


@functools.lru_cache(maxsize=64)  # once for each
def _say(
    choice: Choice, device: str, dtype: torch.dtype, head_dim: int, height: int, width: int
) -> None:
    log.debug(
        "attention of %d x %d tokens, heads of %d, %s on %s: %s, since %s",
        height,
        width,
        head_dim,
        str(dtype).removeprefix("torch."),
        device,
        choice.way,
        choice.why,
    )


def attend(qkv: Tensor, attention: Any) -> Tensor:
    """Multi-head attention among the tokens of each grid.

    Args:
        qkv: (B, H, W, 3 C), output of `attention.qkv`; B counts images or windows.
        attention: upstream's Attention: its heads, scale and tables of relative positions.

    Returns:
        (B, H, W, C), input of `attention.proj`.
    """
    batch, height, width, _ = qkv.shape
    heads, tokens = attention.num_heads, height * width
    recorded = torch._C._is_tracing() or torch.compiler.is_compiling()
    split = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    rows = _positions(height, attention.rel_pos_h, recorded)
    columns = _positions(width, attention.rel_pos_w, recorded)
    choice = choose(qkv.device.type, qkv.dtype, split.shape[-1], height, width, recorded=recorded)
    if choice.way == "folded":
        query, key, value = split.unbind(0)
        attended = _folded(query, key, value, rows, columns, attention.scale)
    else:
        form = OwnAttention if choice.way == "own" else _Tiled
        attended = form.apply(  # type: ignore[no-untyped-call]
            split.reshape(3, batch * heads, tokens, -1), rows, columns, attention.scale
        ).reshape(batch, heads, tokens, -1)
    return attended.transpose(1, 2).reshape(batch, height, width, -1)


def _positions(size: int, table: Tensor, recorded: bool) -> Tensor:
    """Of a table (2 size - 1, D) the row of each distance of two tokens: (size, size, D)."""
    if recorded or table.shape[0] != 2 * size - 1:
        return get_rel_pos(size, size, table)  # type: ignore[no-any-return]
    distances = _distances if _has_values(table) else _distances.__wrapped__
    return table[distances(size, table.device)]


def _has_values(tensor: Tensor) -> bool:
    """Whether it is a tensor proper, and not one of shapes, whose bytes a memory plan counts."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


@functools.lru_cache(maxsize=64)
def _distances(size: int, device: torch.device) -> Tensor:
    """(size, size) rows of a table, made once for each device: no copy to a GPU in every block."""
    with torch.inference_mode(False):  # one made within inference could not be trained with
        place = torch.arange(size, device=device)
        return place[:, None] - place[None, :] + size - 1


# ------------------------------------------------------------------------------------------ folded


def _folded(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> Tensor:
    """(B, heads, H W, D) each, and (H, H, D), (W, W, D), to (B, heads, H W, D)."""
    height, width, head_dim = rows.shape[0], columns.shape[0], query.shape[-1]
    grid = query.reshape(*query.shape[:2], height, width, head_dim)
    to_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)  # (B, heads, tokens, H)
    to_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)
    long_query = torch.cat([query * scale, to_rows, to_columns], dim=-1)
    long_key = torch.cat([key, _places(height, width, key)], dim=-1)
    return F.scaled_dot_product_attention(
        long_query,
        long_key,
        F.pad(value, (0, height + width)),  # the fused kernels want one width for all three
        scale=1.0,
    )[..., :head_dim]


def _folded_split(split: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """As `_folded`, of what the other forms are given."""
    query, key, value = split.unsqueeze(1)
    return _folded(query, key, value, rows, columns, scale)[0]


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """One-hot row and column of every token: (B, heads, H W, H + W), the same for all heads."""
    # not torch.eye: a traced network (export/bundle.py) would keep the device it was traced on
    row = like.new_ones(height).diag().repeat_interleave(width, dim=0)
    column = like.new_ones(width).diag().repeat(height, 1)
    return torch.cat([row, column], dim=-1).expand(*like.shape[:2], -1, -1)


# ------------------------------------------------------------------------------------------- tiled


class _Tiled(torch.autograd.Function):
    """(3, Z, H W, D) queries, keys, values; (H, H, D), (W, W, D); scale: to (Z, H W, D).

    In bf16 a tile's logits are bf16, as where attention is written out; sums over tiles are fp32.
    """

    @staticmethod
    def forward(ctx: Any, split: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        split = split.contiguous()
        query, _, value = split
        to_rows, to_columns = to_places(query, rows, columns)
        out = torch.empty_like(query)
        tiles = _Tiles(split, to_rows, to_columns, scale)
        for some, these in tiles:
            torch.bmm(tiles.attention(some, these), value[some], out=out[some, these])
        ctx.save_for_backward(split, rows, columns, to_rows, to_columns)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        split, rows, columns, to_rows, to_columns = ctx.saved_tensors
        query, key, value = split
        d_out = d_out.contiguous()
        d_split = torch.empty_like(split)
        d_query, d_key, d_value = d_split
        d_rows, d_columns = torch.empty_like(to_rows), torch.empty_like(to_columns)
        height, width = rows.shape[0], columns.shape[0]
        tiles = _Tiles(split, to_rows, to_columns, ctx.scale)
        buffer = query.new_empty(tiles.largest)
        sums: tuple[Tensor, Tensor] | None = None  # of key and value, in fp32
        for some, these in tiles:
            attention = tiles.attention(some, these)  # (z, t, H W)
            of_out = d_out[some, these]
            d_logits = buffer[: attention.numel()].view_as(attention)
            torch.bmm(of_out, value[some].transpose(1, 2), out=d_logits)
            for_value = torch.bmm(attention.transpose(1, 2), of_out)
            torch._softmax_backward_data(  # type: ignore[call-overload]
                d_logits, attention, -1, d_logits.dtype, grad_input=d_logits
            )
            torch.bmm(d_logits, key[some], out=d_query[some, these])
            for_key = torch.bmm(d_logits.transpose(1, 2), query[some, these])
            by_place = d_logits.view(*d_logits.shape[:2], height, width)
            torch.sum(by_place, -1, out=d_rows[some, these])
            torch.sum(by_place, -2, out=d_columns[some, these])
            if tiles.whole:
                d_key[some], d_value[some] = for_key, for_value
                continue
            if these.start == 0:
                sums = (for_key.float(), for_value.float())
            else:
                assert sums is not None
                sums[0].add_(for_key)
                sums[1].add_(for_value)
            if these.stop == query.shape[1]:
                d_key[some], d_value[some] = sums
        d_split[:2].mul_(ctx.scale)
        of_tables = add_from_places(
            d_query, (d_rows, d_columns), query, (rows, columns), ctx.needs_input_grad[1:3]
        )
        return d_split, *of_tables, None


class _Tiles:
    """Which queries of which heads are computed together, and their softmax, in one buffer.

    Iterated, it gives slices of heads and of queries: several heads with all their queries where
    these fit into a tile, else some rows of the grid of one head, from the first to the last. Of
    tensors without values it gives the first ones alone: the others take the same memory again.
    """

    def __init__(self, split: Tensor, to_rows: Tensor, to_columns: Tensor, scale: float) -> None:
        self._query, self._key, _ = split
        self._to_rows, self._to_columns, self._scale = to_rows, to_columns, scale
        self._heads, self._tokens, _ = self._query.shape
        tile = _TILE.get(split.device.type, _TILE["cpu"])
        self._heads_at_once = max(1, min(self._heads, tile // self._tokens**2))
        self._queries = min(self._tokens, max(1, tile // self._tokens))
        self.whole = self._queries == self._tokens  # all queries of a head at once
        self.largest = self._heads_at_once * self._queries * self._tokens  # logits in a tile
        self._logits = self._query.new_empty(self.largest)
        self._has_values = _has_values(split)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for head in range(0, self._heads, self._heads_at_once):
            for first in range(0, self._tokens, self._queries):
                yield (
                    slice(head, min(head + self._heads_at_once, self._heads)),
                    slice(first, min(first + self._queries, self._tokens)),
                )
                if not self._has_values:
                    return

    def attention(self, some: slice, these: slice) -> Tensor:
        """Softmax over all keys, (z, t, H W); good until the next call."""
        query, to_rows, to_columns = (
            tensor[some, these] for tensor in (self._query, self._to_rows, self._to_columns)
        )
        shape = (*query.shape[:2], to_rows.shape[-1], to_columns.shape[-1])
        logits = self._logits[: query.shape[0] * query.shape[1] * self._tokens].view(shape)
        torch.add(to_rows[..., None], to_columns[..., None, :], out=logits)
        logits = logits.flatten(2)
        logits.baddbmm_(query, self._key[some].transpose(1, 2), alpha=self._scale)
        return torch.softmax(logits, -1, out=logits)


def workspace_bytes(recipe: Recipe, device: torch.device) -> int:
    """What the kernels of `attend` take beside the tensors that pass through torch, at most.

    The memory plan (training/step_memory.py) sees every tensor that torch makes, and nothing that a
    kernel allocates inside: whoever changes the kernel says so here. The fused ones of torch keep a
    few tiles of queries and keys a thread, which is less than what the plan cannot resolve.

    Returns:
        bytes for one slice in training; those of several slices are as many times as many.
    """
    return 0
