"""Differences that wait on a disk until their round closes.

So a server holds one difference at a time, whatever the number of sites. A tensor is read when it
is looked up, and is not kept. The files are the server's own and live for one round.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


class OnDisk(Mapping[str, Tensor]):
    """Named tensors in a safetensors file.

    Args:
        path: of the file, which nobody else changes.
        names: of its tensors.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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

        Raises:
            OSError: the disk is full or cannot be written; nothing of it is left there.
        """
        if not tensors:
            return {}
        self._number += 1
        path = self._folder / f"{self._number:06d}.safetensors"
        try:
            safetensors.torch.save_file(
                {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, path
            )
        except (OSError, safetensors.SafetensorError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        return OnDisk(path, tuple(sorted(tensors)))

    def clear(self) -> None:
        """Remove what waited."""
        if self._folder.is_dir():
            for path in self._folder.glob("*.safetensors"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Remove the folder, too."""
        shutil.rmtree(self._folder, ignore_errors=True)
