"""Eight bits a value: each row of a tensor as integers in [-127, 127] and one scale.

A row is a tensor's last dimension, or as many of the last ones as have `SHORTEST_ROW` values
together. Vectors, and tensors without so long a row, are few and travel as fp16.

A scale is the row's largest absolute value by 127, rounded up to 16 significant bits. So a decoded
value is exact in fp32, the largest of a row is always 127, and what was decoded is encoded to the
very same bytes: a server that keeps the decoded numbers can tell what came, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SCALES = ":scales"  # of all rows, fp32, in the order of names; no parameter has such a name
SHORTEST_ROW = 64  # values; four bytes of scale are 6 % of it
LEVELS = 127
_LEAST = 2.0**-100  # a row of smaller values is a row of zeros
_LOW_BITS = 0xFF  # of an fp32's 23 stored ones, that no scale has


def row_length(shape: Sequence[int]) -> int | None:
    """Values of a row of a tensor of this shape; None: it travels as fp16."""
    if len(shape) < 2:
        return None
    length = 1
    for size in reversed(shape):
        length *= size
        if length >= SHORTEST_ROW:
            return length
    return None


def coded_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and type of each tensor that `encode` makes of tensors of these shapes."""
    coded, rows = {}, 0
    for name in sorted(shapes):
        length = row_length(shapes[name])
        coded[name] = (torch.Size(shapes[name]), torch.float16 if length is None else torch.int8)
        rows += 0 if length is None else math.prod(shapes[name]) // length
    if coded:
        coded[SCALES] = (torch.Size([rows]), torch.float32)
    return coded


def encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in eight bits a value.

    Args:
        tensors: by name, of floating point, finite.

    Returns:
        int8 of the same shape, fp16 where there is no row (infinite beyond 65504), and `SCALES`;
        nothing for no tensors. NaN or infinity make their row's scale infinite or NaN.
    """
    coded: dict[str, Tensor] = {}
    scales = [torch.empty(0)]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        length = row_length(tensor.shape)
        if length is None:
            coded[name] = tensor.to(torch.float16)
            continue
        rows = tensor.to(torch.float32).reshape(-1, length)
        least, most = rows.aminmax(dim=1)
        scale = _rounded_up(torch.maximum(-least, most) / LEVELS)
        by = torch.where(scale > 0, scale, math.inf).unsqueeze(1)  # of a row of zeros: zeros
        coded[name] = (rows / by).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
        coded[name] = coded[name].reshape(tensor.shape)
        scales.append(scale)
    if coded:
        coded[SCALES] = torch.cat(scales)
    return coded


def decode(coded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `encode` made into fp32 again, new tensors by sorted name, four bytes a value.

    Raises:
        ValueError: these are not the types and the number of scales that it makes.
    """
    scales, first = coded[SCALES], 0
    tensors: dict[str, Tensor] = {}
    expected = coded_shapes({name: one.shape for name, one in coded.items() if name != SCALES})
    for name, (shape, dtype) in expected.items():
        if coded[name].dtype != dtype or coded[name].shape != shape:
            raise ValueError(f"{name} is no {dtype} of {list(shape)}")
    for name in sorted(expected):
        if name == SCALES:
            continue
        length = row_length(coded[name].shape)
        if length is None:
            tensors[name] = coded[name].to(torch.float32)
            continue
        rows = coded[name].reshape(-1, length).to(torch.float32)
        scale = scales[first : first + len(rows)]
        tensors[name] = rows.mul_(scale.unsqueeze(1)).reshape(coded[name].shape)
        first += len(rows)
    return tensors


def is_canonical(coded: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> bool:
    """Whether encoding the decoded tensors gives the very same bytes, as it does of honest ones."""
    again = encode(decoded)
    return set(again) == set(coded) and all(
        torch.equal(again[name].view(_BITS[again[name].dtype]), one.view(_BITS[one.dtype]))
        for name, one in coded.items()
    )


_BITS = {torch.int8: torch.int8, torch.float16: torch.int16, torch.float32: torch.int32}


def _rounded_up(scale: Tensor) -> Tensor:
    """Positive fp32 to 16 significant bits, never smaller; 0 of what is too small."""
    scale = torch.where(scale < _LEAST, 0.0, scale)
    bits = scale.contiguous().view(torch.int32)
    return ((bits + _LOW_BITS) & ~_LOW_BITS).view(torch.float32)
