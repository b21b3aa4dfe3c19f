"""Differences that wait on a disk until their round closes.

So a server holds one difference at a time, whatever the number of sites. A tensor is read when it
is looked up, and is not kept. The files are the server's own and live for one round.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BYTES = 4  # of a value
_ENDING = ".values"


class OnDisk(Mapping[str, Tensor]):
    """Named fp32 tensors in a file that holds nothing but their values, one after the other.

    Args:
        path: of the file, which nobody else changes.
        places: of each tensor, the number of values before it and its shape.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[int, torch.Size]]) -> None:
        self._path, self._places = path, places

    def __getitem__(self, name: str) -> Tensor:
        first, shape = self._places[name]
        with self._path.open("rb") as file:
            file.seek(first * _BYTES)
            values = np.fromfile(file, np.float32, math.prod(shape))
        return torch.from_numpy(values).reshape(shape)

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

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
            tensors: fp32 on the CPU.

        Raises:
            OSError: the disk is full or cannot be written; nothing of it is left there.
        """
        if not tensors:
            return {}
        self._number += 1
        path = self._folder / f"{self._number:06d}{_ENDING}"
        places, first = {}, 0
        try:
            with path.open("xb") as file:
                for name in sorted(tensors):
                    values = tensors[name].detach().contiguous().to(torch.float32)
                    file.write(values.reshape(-1).numpy().data)
                    places[name] = (first, values.shape)
                    first += values.numel()
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
