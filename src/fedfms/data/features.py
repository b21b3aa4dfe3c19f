"""What the frozen part of a network makes of slices, kept on the site's own disk.

It is as private as the slices: for this user only, below the trainer's private folder, and never
sent. It can be computed anew at any time, so that whatever is wrong with it costs time alone.

    WORK/features/SPACE/         SPACE: SHA-256 of all that decides the numbers but the case
        JOB.job                  a job that uses them; with the last of these the folder goes
        CASE/7.features          of slice 7; CASE: SHA-256 of the case's grey levels and their shape
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfms.bounded import decode_json
from fedfms.contracts.site import Reading
from fedfms.data.cache import StoredCase
from fedfms.data.memory import size_text
from fedfms.files import PART, read_whole
from fedfms.geometry import Part, Pictured, pixel_aspect, whole_of

log = logging.getLogger(__name__)

_ENDING, _JOB = ".features", ".job"
_MAGIC = b"FEDFMSF1"
_ALIGNMENT = 64  # bytes; of the numbers in a file
_LARGEST = 1 << 30  # bytes of one file; ViT-H at 1024 pixels has 21 MB in fp32
_LEFT_FREE = 20  # a file is not written where less than this part of the disk would stay free
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def case_name(case: StoredCase, reading: Reading) -> str:
    """Of all that decides the pictures of a case, 64 hexadecimal digits."""
    aspect = pixel_aspect(*case.record.spacing[1:])
    text = f"{case.record.digest} {aspect} {reading.channels}"
    if reading.contrasts:  # which of the channels is what
        text += f" {', '.join(reading.contrasts)} {reading.missing_contrast}"
    return hashlib.sha256(text.encode()).hexdigest()


def slice_name(case: Pictured, index: int, reading: Reading) -> str | None:
    """Of a slice or a part of it in a `FeatureFolder`; None of a case that is in memory alone."""
    whole = whole_of(case)
    if not isinstance(whole, StoredCase):
        return None
    part = "".join(f"-{number}" for number in case.tile) if isinstance(case, Part) else ""
    return f"{case_name(whole, reading)}/{index}{part}"


class FeatureFolder:
    """Features of one network's frozen part, for one job at a time.

    What this folder's network made stays; to make room, of the others' the least recently used
    goes. Where there is no room, or the disk fails, a slice is not kept, and nothing else happens.

    Args:
        folder: FEATURES_FOLDER of the trainer; is made if it is not there.
        space: 64 hexadecimal digits of all that decides the numbers but the case.
        job: that uses them.
        limit: bytes of all files in `folder`, of this network and others.
    """

    def __init__(self, folder: Path, space: str, job: str, limit: int) -> None:
        self._root, self._own, self._limit = folder, folder / space, limit
        self._stopped = False
        self._total = 0
        self._others: deque[tuple[float, int, Path]] = deque()  # the least recently used first
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for path in (folder, self._own):  # of each, since parents would have another mode
                path.mkdir(exist_ok=True, mode=0o700)
            (self._own / f"{job}{_JOB}").touch(mode=0o600)
            self._look()
        except OSError as error:
            self._go_on_without(error.strerror or type(error).__name__)

    def get(self, name: str) -> Tensor | None:
        """On the processor; None if it is not there or not whole (a CRC tells)."""
        path = self._path(name)
        try:
            features = _decoded(bytearray(read_whole(path, _LARGEST)))
            os.utime(path)  # when it was asked for
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            log.warning("the kept features of a slice are damaged and are computed anew")
            return None
        return features

    def put(self, name: str, features: Tensor) -> None:
        """Keep the features of a slice: all of them or none, whenever this process is killed."""
        if self._stopped:
            return
        head, data = _encoded(features)
        size = len(head) + data.nbytes
        path = self._path(name)
        try:
            if not self._has_room(size):
                return
            path.parent.mkdir(exist_ok=True, mode=0o700)
            before = path.stat().st_size if path.exists() else 0
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=PART)  # of mode 0600
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(head)
                    file.write(data)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._go_on_without(error.strerror or type(error).__name__)
            return
        self._total += size - before

    def _look(self) -> None:
        """What is there; what another process left half written goes."""
        found = []
        for path in self._root.glob("*/*/*"):
            if path.suffix == PART:
                path.unlink(missing_ok=True)
            elif path.suffix == _ENDING:
                status = path.stat()
                self._total += status.st_size
                if not path.is_relative_to(self._own):
                    found.append((status.st_mtime, status.st_size, path))
        self._others.extend(sorted(found))

    def _has_room(self, size: int) -> bool:
        while self._total + size > self._limit and self._others:
            _, freed, path = self._others.popleft()
            path.unlink(missing_ok=True)
            self._total -= freed
        if self._total + size > self._limit:
            self._go_on_without(f"they may take {size_text(self._limit)}")
            return False
        disk = shutil.disk_usage(self._root)
        if disk.free - size < disk.total // _LEFT_FREE:
            self._go_on_without("the disk is nearly full")
            return False
        return True

    def _go_on_without(self, why: str) -> None:
        self._stopped = True
        log.warning(
            "the features of further slices are not kept (%s); they are computed each time", why
        )

    def _path(self, name: str) -> Path:
        return self._own / f"{name}{_ENDING}"


@contextlib.contextmanager
def features_meanwhile(folder: Path, space: str, limit: int) -> Iterator[FeatureFolder | None]:
    """A `FeatureFolder` that is gone afterwards; None where there can be none.

    Args:
        folder: on a disk; is made if it is not there.
        space, limit: of the `FeatureFolder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = Path(tempfile.mkdtemp(prefix="meanwhile-", dir=folder))
    except OSError as error:
        log.warning("no features are kept: %s", error.strerror)
        yield None
        return
    try:
        yield FeatureFolder(place, space, "meanwhile", limit)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def forget_job(folder: Path, job: str) -> None:
    """Remove the features that a job used, but for those that another one uses, too.

    Raises:
        OSError: something could not be removed.
    """
    for space in _folders_in(folder):
        mark = space / f"{job}{_JOB}"
        if mark.exists() and set(space.glob(f"*{_JOB}")) == {mark}:
            shutil.rmtree(space)
        mark.unlink(missing_ok=True)


def forget_others(folder: Path, cases: Collection[str]) -> int:
    """Remove the features of cases that are there no more; of how many folders.

    Args:
        folder: FEATURES_FOLDER of the trainer.
        cases: `case_name` of all that are there.
    """
    gone = [
        path
        for space in _folders_in(folder)
        for path in _folders_in(space)
        if path.name not in cases
    ]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return len(gone)


def _folders_in(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return []


# magic, length of the header, CRC of all that follows, the header as JSON, the numbers


def _encoded(features: Tensor) -> tuple[bytes, Any]:
    """The beginning of a file, and its numbers as bytes."""
    values = features.detach().cpu().contiguous()
    kind = str(values.dtype).removeprefix("torch.")
    assert kind in _TYPES
    header = json.dumps({"shape": list(values.shape), "type": kind}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNMENT)
    data = values.view(torch.uint8).numpy().reshape(-1).data
    crc = zlib.crc32(data, zlib.crc32(header))
    return _MAGIC + len(header).to_bytes(4, "big") + crc.to_bytes(4, "big") + header, data


def _decoded(file: bytearray) -> Tensor:
    """The features; ValueError, TypeError or KeyError if the file is something else."""
    start = len(_MAGIC) + 8
    length, crc = (int.from_bytes(file[i : i + 4], "big") for i in (start - 8, start - 4))
    if not file.startswith(_MAGIC) or zlib.crc32(memoryview(file)[start:]) != crc:
        raise ValueError("no whole features")
    header = decode_json(bytes(file[start : start + length]), "features")
    kind, shape = _TYPES[header["type"]], tuple(header["shape"])
    found = torch.frombuffer(file, dtype=kind, count=math.prod(shape), offset=start + length)
    return found.reshape(shape)
