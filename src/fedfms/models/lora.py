"""Low-rank updates (LoRA, Hu et al. 2021, arXiv 2106.09685) of q and v in SAM's image encoder.

As SAMed has them (Zhang and Liu 2023, arXiv 2304.13785): the projection that makes q, k and v of a
token stays, and q and v get an update of small rank beside it, which starts as nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedfms.models.tiny_vit import TinyBlock


class LowRankQkv(nn.Linear):
    """SAM's projection of tokens to q, k and v, with updates `x A B` of q and of v.

    Both factors of an update have `rank` rows of C values, so that a row of either has a scale of
    its own in eight bits.

    Args:
        qkv: upstream's, C to 3 C; its parameters become ours under their own names.
        rank: of an update.
        groups: of heads whose q, k and v lie together in what it makes: 1 in SAM, each head alone
            in TinyViT.
    """

    def __init__(self, qkv: nn.Linear, rank: int, groups: int = 1) -> None:
        width = qkv.in_features
        super().__init__(width, 3 * width, qkv.bias is not None, device="meta")
        self.weight, self.bias = qkv.weight, qkv.bias
        self.groups = groups
        self.q_down = nn.Linear(width, rank, bias=False)  # drawn as any linear layer
        self.v_down = nn.Linear(width, rank, bias=False)
        self.q_up = nn.Parameter(torch.zeros(rank, width))
        self.v_up = nn.Parameter(torch.zeros(rank, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) to (..., 3 C), in the type of the tokens and of all its parameters."""
        projected = super().forward(tokens)
        projected = projected.view(*tokens.shape[:-1], self.groups, 3, -1)
        to_q, to_v = self.q_down(tokens) @ self.q_up, self.v_down(tokens) @ self.v_up
        q, k, v = projected.unbind(-2)
        parts = [q + to_q.view_as(q), k, v + to_v.view_as(v)]
        return torch.stack(parts, dim=-2).flatten(-3)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same projection as one plain layer."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        to_q, to_v = self.q_up.T @ self.q_down.weight, self.v_up.T @ self.v_down.weight
        shape = (self.groups, -1, self.in_features)
        parts = [one.view(shape) for one in (to_q, torch.zeros_like(to_q), to_v)]
        update = torch.stack(parts, dim=1).flatten(0, 2)
        plain.weight = nn.Parameter(self.weight + update, requires_grad=False)
        plain.bias = self.bias
        return plain


def add_low_rank(encoder: Any, rank: int) -> None:
    """Give every block of an ImageEncoder or TinyViT its updates, of torch's global generator."""
    for block in encoder.blocks:
        groups = block.attn.heads if isinstance(block, TinyBlock) else 1
        block.attn.qkv = LowRankQkv(block.attn.qkv, rank, groups)


def merge_low_rank(encoder: Any) -> None:
    """Put plain projections into the places of those with updates, which compute the same."""
    for block in encoder.blocks:
        if isinstance(block.attn.qkv, LowRankQkv):
            block.attn.qkv = block.attn.qkv.merged()
