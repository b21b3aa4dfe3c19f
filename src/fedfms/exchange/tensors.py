"""Named tensors and their form on the wire and on disk; nothing about whether they may travel.

A file of ours that is to last carries its own SHA-256, under `fedfms_sha256` in the metadata of
safetensors, over all of its bytes with those 64 digits as zeros. Whoever reads it compares. Files
that others made carry none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedfms.bounded import header_end, safetensors_header
from fedfms.errors import CheckpointError, ConfigError, Undecodable
from fedfms.exchange import coding
from fedfms.files import read_whole, write_whole

Precision = Literal["fp32", "fp16", "int8"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
MASKED = {64: torch.int64, 32: torch.int32}  # by the bits of a secure sum
Shapes = Mapping[str, torch.Size]

EXCHANGE_MODE = 0o660  # of files: trainer and FLARE client may be two users of one group

CHECKSUM_KEY = "fedfms_sha256"  # in the metadata of a safetensors file
NO_CHECKSUM = f"sha256:{'0' * 64}"  # its value while the file is summed up
# one damaged byte hits the key or the value, and the other is found
_CHECKSUM = re.compile(rb'"fedfms_sha256":"|"sha256:[0-9a-f]{64}"')
_WHOLE_CHECKSUM = re.compile(rb'"fedfms_sha256":"sha256:([0-9a-f]{64})"')


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


def largest_value(tensor: Tensor) -> float:
    """The largest absolute value; 0 of none, NaN where one is NaN."""
    if not tensor.numel():
        return 0.0
    least, most = (float(value) for value in tensor.aminmax())
    return most if math.isnan(most) else max(-least, most)


def find_masked_fault(
    expected: Shapes, tensors: Mapping[str, Tensor], bits: int
) -> tuple[str, str] | None:
    """The first way in which tensors are not exactly the expected ones in masked integers.

    Args:
        bits: of a value, 64 or 32.

    Returns:
        (code, sentence) or None. Codes: unknown-tensor, missing-tensor, wrong-type, wrong-shape.
    """
    return _misfit(expected, tensors, (MASKED[bits],), f"not masked, in {bits} bits")


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
    if fault := _misfit(expected, tensors, DTYPES.values(), "neither fp32 nor fp16"):
        return fault
    for name in expected:
        if not math.isfinite(largest_value(tensors[name])):
            return "non-finite", f"{name} holds NaN or infinity"
    return None


def find_coded_fault(expected: Shapes, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first way in which tensors are not the expected ones in eight bits, finite and canonical.

    Args:
        expected: names and shapes of what was encoded.

    Returns:
        (code, sentence) or None. Codes: those of `find_fault`, and wrong-coding.
    """
    if not isinstance(tensors, Mapping):
        return "missing-tensor", "there are no named tensors"
    coded = coding.coded_shapes(expected)
    shapes = {name: shape for name, (shape, _) in coded.items()}
    for dtype in (torch.int8, torch.float16, torch.float32):
        own = {name: shape for name, shape in shapes.items() if coded[name][1] == dtype}
        there = {name: one for name, one in tensors.items() if name in own or name not in shapes}
        if fault := _misfit(own, there, (dtype,), f"no {dtype}, as int8 asks for"):
            return fault
    if not tensors:
        return None
    decoded = coding.decode(tensors)
    for name, tensor in decoded.items():
        if not math.isfinite(largest_value(tensor)):
            return "non-finite", f"{name} holds NaN or infinity"
    if not coding.is_canonical(tensors, decoded):
        return "wrong-coding", "its eight bits are not those that encoding gives"
    return None


def _misfit(
    expected: Shapes, tensors: Mapping[str, Tensor], types: Collection[torch.dtype], otherwise: str
) -> tuple[str, str] | None:
    """The first way in which tensors are not the expected ones in memory, whatever their values."""
    if not isinstance(tensors, Mapping):
        return "missing-tensor", "there are no named tensors"
    if strange := sorted(str(name) for name in tensors if name not in expected):
        return "unknown-tensor", f"{strange[0]} is no travelling tensor of this recipe"
    if missing := sorted(set(expected) - set(tensors)):
        return "missing-tensor", f"{missing[0]} is missing"
    for name, shape in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in types:
            return "wrong-type", f"{name} is {otherwise}"
        if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
            return "wrong-type", f"{name} has no values in memory"
        if tensor.shape != shape:
            return "wrong-shape", f"{name} is {list(tensor.shape)}, expected is {list(shape)}"
    return None


def to_precision(tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The tensors in the precision of the wire; `from_wire` is the way back.

    What came from the wire is made into the very same bytes again.

    Raises:
        ConfigError: code fp16-overflow; a value beyond 65504 does not exist in fp16, and in eight
            bits neither among the few that travel as fp16.
    """
    if precision == "int8":
        converted = coding.encode(tensors)
    else:
        converted = {name: tensor.to(DTYPES[precision]) for name, tensor in tensors.items()}
    if precision != "fp32":
        for name, tensor in converted.items():
            if tensor.is_floating_point() and bool(torch.isinf(tensor).any()):
                raise ConfigError(
                    f"{name} holds a value that is too large for half precision",
                    "set transfer_precision to fp32 in the job's recipe.json",
                    code="fp16-overflow",
                )
    return converted


def from_wire(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_precision` made: fp32 and fp16 as they are, eight bits a value as fp32.

    Four bytes are made of each byte that came, and no more, whatever it says.

    Raises:
        CheckpointError: code wrong-coding; eight bits whose types or scales do not fit each other.
    """
    if coding.SCALES not in tensors:
        return dict(tensors)
    try:
        return coding.decode(tensors)
    except ValueError as error:
        raise CheckpointError(
            f"what came in eight bits a value cannot be decoded: {error}",
            "use the same version of fedfms at the server and every site",
            code="wrong-coding",
        ) from None


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    precision: Precision | None,
    *,
    checksum: bool = True,
) -> None:
    """Write a safetensors file whole or not at all (temporary name, then rename).

    Args:
        path: an existing file is replaced; a link at that place is replaced, never followed.
        tensors: on any device.
        precision: of the file; None stores each tensor as it is.
        checksum: whether it carries one; not needed for what never lies on a disk. Equal tensors
            make equal files either way.

    Raises:
        ConfigError: code fp16-overflow, see `to_precision`.
        OSError: the folder is full, or cannot be written.
    """
    stored = tensors if precision is None else to_precision(tensors, precision)
    data = safetensors.torch.save(
        {name: stored[name].detach().cpu().contiguous() for name in sorted(stored)},
        {CHECKSUM_KEY: NO_CHECKSUM} if checksum else None,
    )
    write_whole(path, with_checksum(data) if checksum else data, mode=EXCHANGE_MODE)


def with_checksum(data: bytes) -> bytes:
    """The bytes of a safetensors file that carries `CHECKSUM_KEY`, with the checksum that fits."""
    place, _ = _checksum(data) or (None, b"")
    if place is None:
        raise ValueError("the file has no place for a checksum")
    view = memoryview(data)
    return b"".join((view[:place], _sum_up(data, place), view[place + 64 :]))


def write_checksum(path: Path) -> None:
    """The same for a file that lies on the disk, under another name than its last."""
    data = path.read_bytes()
    path.write_bytes(with_checksum(data))


def load_tensors(path: Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, each tensor as stored, on the CPU.

    The file is read into memory and not mapped: the other side may cut it short at any time.

    Raises:
        CheckpointError: code unreadable-tensors; no plain file, too large, or no safetensors. Code
            damaged-model; it carries a checksum that does not fit.
    """
    try:
        data = read_whole(path, max_bytes)
        tensors = decode_tensors(data)
        found = _checksum(data)
    except (OSError, Undecodable) as error:
        why = error.problem if isinstance(error, Undecodable) else error
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {why}",
            "fetch or copy the file again; if it comes out so again, the disk is full or failing",
            code="unreadable-tensors",
        ) from None
    if found is not None and found[1] != _sum_up(data, found[0]):
        raise CheckpointError(
            f"{path} is damaged: it is not what was written, by the checksum that it carries",
            "fetch or copy the file again; if it comes out so again, look at that disk",
            code="damaged-model",
        )
    return tensors


def decode_tensors(data: bytes, source: str = "it") -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, each as stored, on the CPU.

    Raises:
        Undecodable: it is none, or beyond a bound of `fedfms.bounded`.
    """
    safetensors_header(data, source)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except _OF_SAFETENSORS as error:
        raise Undecodable(
            f"{source} is no safetensors file: {str(error)[:200]}", "fetch or copy it again"
        ) from None
    return tensors


# of damaged bytes, and of types that torch does not have
_OF_SAFETENSORS = (
    *(safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError),
    *(OverflowError, AttributeError),
)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, text by text; raises OSError and Undecodable."""
    with path.open("rb") as file:
        data = file.read(8)
        data += file.read(header_end(data, str(path)) - 8)
        size = file.seek(0, 2)
    return dict(safetensors_header(data, str(path), size).get("__metadata__", {}))


def _checksum(data: bytes) -> tuple[int, bytes] | None:
    """Where a file's checksum is, and its 64 digits; None where it carries none.

    One that is there and cannot be read is no digits at the file's end.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if whole := _WHOLE_CHECKSUM.search(data, 8, end):
        return whole.start(1), whole[1]
    return (len(data), b"") if _CHECKSUM.search(data, 8, end) else None


def _sum_up(data: bytes, place: int) -> bytes:
    """The digits of the SHA-256 of a file in which they are zeros, without a copy of it."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:place])
    digest.update(b"0" * 64)
    digest.update(view[place + 64 :])
    return digest.hexdigest().encode()
