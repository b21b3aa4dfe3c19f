"""Gaussian noise that nobody can take away again."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor


def random_normal(shape: torch.Size) -> Tensor:
    """Standard normal fp32 values from the operating system's random source.

    Box and Muller 1958 on 32-bit uniform numbers. Torch's own CPU generator keeps 32 bits of its
    seed, few enough to try them all.
    """
    pairs = (shape.numel() + 1) // 2
    if pairs == 0:
        return torch.zeros(shape)
    raw = torch.frombuffer(bytearray(os.urandom(8 * pairs)), dtype=torch.int32).double()
    uniform = ((raw + 2.0**31 + 0.5) / 2.0**32).view(2, pairs)  # in (0, 1), both ends excluded
    radius, angle = torch.sqrt(-2 * torch.log(uniform[0])), 2 * math.pi * uniform[1]
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return values[: shape.numel()].float().reshape(shape)
