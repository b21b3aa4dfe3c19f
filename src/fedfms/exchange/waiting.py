"""Differences, and masked answers, that wait on a disk until their round closes.

So a server holds one difference at a time, whatever the number of sites. A tensor is read when it
is looked up, and is not kept. The files are the server's own and live for one round. A tensor whose
values are all those of half precision, as what travels in that, lies there in half the bytes.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NUMPY = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
_ENDING = ".values"
_LOOK = 1024  # values that are asked first, whether they are those of half precision


class _Place(NamedTuple):
    """Where a tensor lies in a file: bytes before it, its shape, and the type of its values."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class OnDisk(Mapping[str, Tensor]):
    """Named tensors, fp32, int32 or int64, in a file that holds nothing but their values.

    Args:
        path: of the file, which nobody else changes.
        places: of each tensor.
    """

    def __init__(self, path: Path, places: Mapping[str, _Place]) -> None:
        self._path, self._places = path, places

    def __getitem__(self, name: str) -> Tensor:
        shape = self._places[name].shape
        return self.part(name, 0, math.prod(shape)).reshape(shape)

    def part(self, name: str, start: int, end: int) -> Tensor:
        """See `part_of`."""
        place = self._places[name]
        end = min(end, math.prod(place.shape))
        with self._path.open("rb") as file:
            file.seek(place.start + start * place.dtype.itemsize)
            values = np.fromfile(file, _NUMPY[place.dtype], max(0, end - start))
        found = torch.from_numpy(values)
        return found.float() if found.is_floating_point() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Scaled(Mapping[str, Tensor]):
    """Named tensors times a factor, in their own type."""

    def __init__(self, tensors: Mapping[str, Tensor], factor: float) -> None:
        self._tensors, self._factor = tensors, factor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name] * self._factor

    def part(self, name: str, start: int, end: int) -> Tensor:
        """See `part_of`."""
        return part_of(self._tensors, name, start, end) * self._factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def part_of(tensors: Mapping[str, Tensor], name: str, start: int, end: int) -> Tensor:
    """Some values of a tensor, as a vector; where they lie on a disk, these alone are read.

    Args:
        tensors: of which one is looked at.
        start: of the values in their order in memory.
        end: the first that is not wanted; beyond the last there is none.
    """
    if isinstance(tensors, OnDisk | Scaled):
        return tensors.part(name, start, end)
    return tensors[name].reshape(-1)[start:end]


class WaitingRoom:
    """The differences of one round after another.

    Args:
        folder: is made, for this user alone; what an earlier process left there is removed.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.clear()
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)

    def put(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Keep one difference; the same tensors, now on the disk.

        Args:
            tensors: on the CPU, int32, int64, or of floating point, which become fp32.

        Raises:
            OSError: the disk is full or cannot be written; nothing of it is left there.
        """
        if not tensors:
            return {}
        self._number += 1
        path = self._folder / f"{self._number:06d}{_ENDING}"
        places, start = {}, 0
        try:
            with path.open("xb") as file:
                for name in sorted(tensors):
                    values = _as_kept(tensors[name].detach().contiguous())
                    file.write(values.reshape(-1).numpy().data)
                    places[name] = _Place(start, values.shape, values.dtype)
                    start += values.nbytes
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return OnDisk(path, places)

    def clear(self) -> None:
        """Remove what waited."""
        if self._folder.is_dir():
            for path in self._folder.glob(f"*{_ENDING}"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Remove the folder, too."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _as_kept(values: Tensor) -> Tensor:
    """The same values in the type that they wait in."""
    if not values.is_floating_point():
        return values
    values = values.float()
    for some in (values.reshape(-1)[:_LOOK], values):
        half = some.half()
        if not torch.equal(half.float(), some):
            return values
    return half
