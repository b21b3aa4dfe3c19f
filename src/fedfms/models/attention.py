"""Attention of SAM's image encoder through PyTorch's fused kernels.

Upstream adds `q . R_row + q . R_column` (decomposed relative positions, MViTv2, arXiv 2112.01526)
to the logit of every query and key, in tensors of tokens x tokens. The same sum as one longer dot
product, `[s q, q R_rows, q R_columns] . [k, onehot(row), onehot(column)]`, needs no bias, so that
`scaled_dot_product_attention` computes it exactly, keeps nothing of that size for the backward
pass, and is free to pick its fastest kernel on a CPU and on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfms.contracts.recipe import Recipe
from fedfms.models.upstream import get_rel_pos


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
    split = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)  # (B, heads, tokens, head_dim) each
    head_dim = query.shape[-1]

    grid = query.reshape(batch, heads, height, width, head_dim)
    rows = get_rel_pos(height, height, attention.rel_pos_h)
    columns = get_rel_pos(width, width, attention.rel_pos_w)
    to_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)  # (B, heads, tokens, H)
    to_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)
    long_query = torch.cat([query * attention.scale, to_rows, to_columns], dim=-1)
    long_key = torch.cat([key, _places(height, width, key)], dim=-1)

    attended = F.scaled_dot_product_attention(
        long_query,
        long_key,
        F.pad(value, (0, height + width)),  # the fused kernels want one width for all three
        scale=1.0,
    )[..., :head_dim]
    return attended.transpose(1, 2).reshape(batch, height, width, heads * head_dim)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """One-hot row and column of every token: (B, heads, H W, H + W), the same for all heads."""
    # not torch.eye: a traced network (export/bundle.py) would keep the device it was traced on
    row = like.new_ones(height).diag().repeat_interleave(width, dim=0)
    column = like.new_ones(width).diag().repeat(height, 1)
    return torch.cat([row, column], dim=-1).expand(*like.shape[:2], -1, -1)


def workspace_bytes(recipe: Recipe, device: torch.device) -> int:
    """What the kernels of `attend` take beside the tensors that pass through torch, at most.

    The memory plan (training/step_memory.py) sees every tensor that torch makes, and nothing that a
    kernel allocates inside: whoever changes the kernel says so here. The fused ones of torch keep a
    few tiles of queries and keys a thread, which is less than what the plan cannot resolve.

    Returns:
        bytes for one slice in training; those of several slices are as many times as many.
    """
    return 0
