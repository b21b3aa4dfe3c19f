"""Named tensors and their form on the wire and on disk; nothing about whether they may travel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedfms.errors import CheckpointError, ConfigError
from fedfms.files import read_whole, write_whole

Precision = Literal["fp32", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
Shapes = Mapping[str, torch.Size]

EXCHANGE_MODE = 0o660  # of files: trainer and FLARE client may be two users of one group


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Name and shape of each tensor: what `find_fault` compares against."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`after - before` by name in fp32, FLARE's WEIGHT_DIFF; both hold the same names."""
    if set(after) != set(before):
        raise ValueError("a difference needs the same names before and after")
    return {name: after[name].float() - before[name].float() for name in sorted(after)}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, whatever the order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def update_norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all values of all tensors together, accumulated in fp64; 0 for none."""
    return math.sqrt(
        sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors.values())
    )


def payload_bytes(tensors: Any) -> int:
    """Bytes of the values of named tensors, as they travel; 0 for anything else."""
    if not isinstance(tensors, Mapping):
        return 0
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))


def find_fault(expected: Shapes, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first way in which tensors are not exactly the expected finite numbers.

    Returns:
        (code, sentence) or None. Codes: unknown-tensor, missing-tensor, wrong-type (neither fp32
        nor fp16), wrong-shape, non-finite.
    """
    if strange := sorted(str(name) for name in tensors if name not in expected):
        return "unknown-tensor", f"{strange[0]} is no travelling tensor of this recipe"
    if missing := sorted(set(expected) - set(tensors)):
        return "missing-tensor", f"{missing[0]} is missing"
    for name, shape in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            return "wrong-type", f"{name} is neither fp32 nor fp16"
        if tensor.shape != shape:
            return "wrong-shape", f"{name} is {list(tensor.shape)}, expected is {list(shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return "non-finite", f"{name} holds NaN or infinity"
    return None


def to_precision(tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The tensors in the precision of the wire.

    Raises:
        ConfigError: code fp16-overflow; a value beyond 65504 does not exist in fp16.
    """
    converted = {name: tensor.to(DTYPES[precision]) for name, tensor in tensors.items()}
    if precision == "fp16":
        for name, tensor in converted.items():
            if bool(torch.isinf(tensor).any()):
                raise ConfigError(
                    f"{name} holds a value that is too large for half precision",
                    "set transfer_precision to fp32 in the job's recipe.json",
                    code="fp16-overflow",
                )
    return converted


def save_tensors(path: Path, tensors: Mapping[str, Tensor], precision: Precision | None) -> None:
    """Write a safetensors file whole or not at all (temporary name, then rename).

    Args:
        path: an existing file is replaced; a link at that place is replaced, never followed.
        tensors: on any device.
        precision: of the file; None stores each tensor as it is.

    Raises:
        ConfigError: code fp16-overflow, see `to_precision`.
        OSError: the folder is full, or cannot be written.
    """
    stored = tensors if precision is None else to_precision(tensors, precision)
    data = safetensors.torch.save(
        {name: stored[name].detach().cpu().contiguous() for name in sorted(stored)}
    )
    write_whole(path, data, mode=EXCHANGE_MODE)


def load_tensors(path: Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, each tensor as stored, on the CPU.

    The file is read into memory and not mapped: the other side may cut it short at any time.

    Raises:
        CheckpointError: code unreadable-tensors; no plain file, too large, or no safetensors.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(read_whole(path, max_bytes))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}",
            "look whether the disk or the exchange volume is full, then run the round again",
            code="unreadable-tensors",
        ) from None
    return tensors
