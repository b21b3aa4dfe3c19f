"""Prepared cases on disk, from which slices are read without holding a case in memory.

A record is one case: a header, its grey levels, its label values. It is read through a map, so that
its pages are the file's own, shared by all processes and dropped when memory is short. Records lie
in a folder under the SHA-256 of all that decides them, or, where no folder is named or it cannot be
written, in a file without a name that ends with the last process that uses it.

Several processes may use one folder. Each holds a shared lock on it while it reads and writes; who
gets the lock alone may remove what nobody uses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from fedfms.contracts.site import SiteConfig
from fedfms.data.content import Content, content_sha256
from fedfms.data.manifest import Case
from fedfms.data.memory import GIB, RECORD_ENDING, size_text
from fedfms.data.pictures import Palette
from fedfms.data.prepared import Labels, PreparedCase, smallest, values_of
from fedfms.data.together import Summary, digest_of
from fedfms.errors import SiteDataError

log = logging.getLogger(__name__)

CACHE_VERSION = 3  # raise it when the same files and settings would be prepared differently
LIMIT_BYTES = 100 * GIB  # of a folder's records, but for those in use, which stay in any case

_MAGIC = b"FEDFMS3\n"
_ALIGNMENT = 64  # bytes; of the arrays in a record
_MAPPED = 32  # cases whose map a process keeps open; each holds two file descriptors
_IN_USE_SECONDS = 3600.0  # a record that was asked for within this time is never removed
# what this package left in such a folder, and nothing else is ever removed from it
_OURS = re.compile(r"[0-9a-f]{64}\.(case|npz)|tmp\w+\.part")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def cache_key(
    case: Case,
    images: Sequence[Content | None],
    labels: Sequence[Content],
    site: SiteConfig,
) -> str:
    """SHA-256 over all that decides the result: all files' bytes and the settings used.

    Args:
        case: whose files have these names.
        images: its image, or its contrasts, None where one is missing.
        labels: its label, or the files of its classes.
        site: the site's configuration.
    """
    digests = [None if image is None else content_sha256(image) for image in images]
    of_labels = [content_sha256(label) for label in labels]
    settings: dict[str, Any] = {
        "version": CACHE_VERSION,
        "format": site.format,
        "names": [case.image.suffixes[-1:], case.label.suffixes[-1:]],
        "plane": site.plane,
        "rgb": site.channels == "rgb",
        "intensity": asdict(site.intensity),
        "image": digests[0],
        "label": of_labels[0],
    }
    if case.contrasts:
        settings["contrasts"] = digests
        settings["names"].append([p and p.suffixes[-1:] for p in case.contrasts])
        settings["missing"] = site.missing_contrast
    if case.label_files:
        settings["label_files"], settings["overlap"] = of_labels, site.overlap
        if site.void:  # of other labels the values stay as they are
            settings["void"] = sorted(site.void)
    if site.format == "dicom":  # segments become label values by these, and names mean nothing
        values = {value for values in site.classes.values() for value in values}
        settings["names"] = []
        settings["values"] = [sorted(values), sorted({*site.background, *site.void})]
        settings["label_names"] = sorted((site.label_names or {}).items())
        settings["overlap"], settings["series"] = site.overlap, site.series
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class Record(BaseModel, frozen=True):
    """What a header says of a case, and where in a file its arrays lie.

    shape: of the grey levels, (D, H, W), (D, H, W, 3) or (D, H, W, contrasts), uint8; of the labels
        the first three.
    label_type: of the label values: uint8 where they fit, else int16.
    digest: SHA-256 of the grey levels, as hexadecimal digits.
    crc: of both arrays.
    start: first byte of the record.
    images: first byte of the grey levels.
    """

    shape: Annotated[tuple[int, ...], Field(min_length=3, max_length=4)]
    label_type: Literal["uint8", "int16"]
    spacing: tuple[float, float, float]
    is_volume: bool
    palette: Palette | None
    digest: str
    crc: int
    start: int
    images: int

    @property
    def labels(self) -> int:
        """First byte of the label values."""
        return _aligned(self.images + math.prod(self.shape))


class StoredCase:
    """A prepared case on disk; values as in `PreparedCase`, the arrays read-only maps of its file.

    Labels are uint8 where their values allow, else int16.
    """

    def __init__(self, case: Case, record: Record, shelf: _Shelf, name: str) -> None:
        self.case = case
        self.record = record
        self.spacing = record.spacing
        self.is_volume = record.is_volume
        self.palette = record.palette
        self._shelf = shelf
        self._name = name

    @property
    def images(self) -> NDArray[np.uint8]:
        """(D, H, W), (D, H, W, 3) or (D, H, W, contrasts) uint8 grey levels."""
        return self._shelf.arrays(self._name, self.record)[0]

    @property
    def labels(self) -> Labels:
        """(D, H, W) label values as in the file."""
        return self._shelf.arrays(self._name, self.record)[1]

    @property
    def folder(self) -> Path:
        """Of its file, or of a file without a name."""
        return self._shelf.folder

    @property
    def record_path(self) -> Path | None:
        """Its file in a cache that outlives this process; None where there is none."""
        if isinstance(self._shelf, CacheFolder):
            return self._shelf.path_of(self._name)
        return None

    def slice_values(self) -> list[list[int]]:
        """The label values that occur in each slice; read from the header, not kept."""
        with self._shelf.opened(self._name) as file:
            found: list[list[int]] = _read_header(file, self.record.start)[0]["slices"]
        return found

    def summary(self) -> Summary:
        """What of this case is needed to judge all cases together."""
        values = frozenset(value for values in self.slice_values() for value in values)
        return Summary(self.case, values, bytes.fromhex(self.record.digest), self.palette)

    def __reduce__(self) -> Any:
        """For a worker that is started and not forked: by name, or as arrays if it has none."""
        if isinstance(self._shelf, CacheFolder):
            return StoredCase, (self.case, self.record, self._shelf, self._name)
        images, labels = self._shelf.arrays(self._name, self.record)
        values = (np.array(images), np.array(labels), self.spacing, self.is_volume, self.palette)
        return PreparedCase, (self.case, *values)


class _Shelf:
    """Where records lie; keeps the maps of those that were used last."""

    folder: Path

    def __init__(self) -> None:
        self._maps: OrderedDict[str, tuple[NDArray[np.uint8], Labels]] = OrderedDict()

    def _open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file that holds the record."""
        raise NotImplementedError

    def arrays(self, name: str, record: Record) -> tuple[NDArray[np.uint8], Labels]:
        """Grey levels and label values of a record, as read-only maps.

        Raises:
            SiteDataError: "cache-gone".
        """
        key = f"{name} {record.start}"
        found = self._maps.get(key)
        if found is None:
            with self.opened(name) as file:
                found = self._maps[key] = _mapped(file, record)
        with contextlib.suppress(KeyError):  # a thread that scores may take one away meanwhile
            if len(self._maps) > _MAPPED:
                self._maps.popitem(last=False)
            self._maps.move_to_end(key)
        return found

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """A file that holds the record.

        Raises:
            SiteDataError: "cache-gone".
        """
        try:
            with self._open(name) as file:
                yield file
        except OSError as error:
            raise SiteDataError(
                f"a prepared case can no longer be read from the cache: {error.strerror}",
                "run this again: it prepares the case anew; leave the cache's folder alone while "
                "something uses it",
                code="cache-gone",
            ) from None


class CacheFolder(_Shelf):
    """A folder of records that outlive the process, for this user only.

    Args:
        folder: is made if it is not there.
        limit: bytes; beyond, the records that were not asked for the longest go, but never one that
            was within the last hour, or through this object.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES) -> None:
        super().__init__()
        self.folder = folder
        self.limit = limit
        self._used: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        self._lock: int | None = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        if self._alone():  # nobody writes: what is half written will never be finished
            for path in self._ours():
                if path.suffix != RECORD_ENDING:
                    _remove(path)
        self._share()

    def __reduce__(self) -> Any:
        return _reading_only, (self.folder,)

    def __del__(self) -> None:
        lock = getattr(self, "_lock", None)
        if lock is not None:
            os.close(lock)

    def get(self, case: Case, key: str) -> StoredCase | None:
        """The case from its record; None if there is none, or it is not whole (a CRC tells)."""
        path = self.path_of(key)
        try:
            with path.open("rb") as file:
                record = _checked(file)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # when it was asked for
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            log.warning("a cached case is damaged and is prepared anew")
            return None
        self._used.add(key)
        return StoredCase(case, record, self, key)

    def put(self, prepared: PreparedCase, key: str) -> StoredCase:
        """Write beside the final name, then rename: a reader sees the whole record or none.

        Raises:
            OSError: it cannot be written; ENOSPC where there is no room even without old records.
        """
        header, parts = _record_of(prepared)
        try:
            self._write(key, header, parts)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.remove_unused(limit=0)
            self._write(key, header, parts)
        self._maps.pop(f"{key} 0", None)
        self._used.add(key)
        return StoredCase(prepared.case, _record(header), self, key)

    def _write(self, key: str, header: bytes, parts: Iterable[NDArray[Any]]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                _write_record(file, header, parts)
            Path(temporary).replace(self.path_of(key))
        except BaseException:
            _remove(Path(temporary))
            raise

    def remove_unused(self, limit: int | None = None) -> None:
        """Remove records until no more than `limit` bytes (None: the folder's) are there.

        The one that was asked for the longest ago goes first. None goes that was asked for within
        an hour or through this object, and none at all while another process uses the folder.
        """
        limit = self.limit if limit is None else limit
        if self._alone():
            found = []
            for path in self._ours():
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if total <= limit or time.time() - used < _IN_USE_SECONDS:
                    break
                if path.stem in self._used:
                    continue
                _remove(path)
                total -= size
        self._share()

    def _ours(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]

    def _alone(self) -> bool:
        """Take the folder's lock for this process alone, if no other one holds it."""
        return self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _share(self) -> None:
        self._locked(fcntl.LOCK_SH)

    def _locked(self, how: int) -> bool:
        try:
            if self._lock is None:
                return False
            fcntl.flock(self._lock, how)
        except OSError:  # another process has it, or a file system without locks: nothing goes
            return False
        return True

    def path_of(self, key: str) -> Path:
        """Where a case's record lies."""
        return self.folder / f"{key}{RECORD_ENDING}"

    def _open(self, name: str) -> BinaryIO:
        return self.path_of(name).open("rb")


def _reading_only(folder: Path) -> CacheFolder:
    """The folder in a worker process, whose parent holds the lock."""
    shelf = CacheFolder.__new__(CacheFolder)
    _Shelf.__init__(shelf)
    shelf.folder, shelf.limit, shelf._lock, shelf._used = folder, LIMIT_BYTES, None, set()
    return shelf


class Shelves(_Shelf):
    """Where the cases of one site go: a folder if one is named and can be written, else a file.

    The file has no name: it takes room on a disk, and is gone with this process.

    Args:
        folder: of the cache; None: a file without a name.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.cache: CacheFolder | None = None
        self.folder = temporary_folder()
        self._named = folder
        self._file: BinaryIO | None = None
        if folder is not None:
            try:
                self.cache = CacheFolder(folder)
            except OSError as error:
                self._go_on_without(error)

    def put(self, prepared: PreparedCase, key: str | None) -> StoredCase:
        """Keep a case.

        Raises:
            SiteDataError: "no-room".
        """
        if self.cache is not None and key is not None:
            try:
                return self.cache.put(prepared, key)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise _no_room(self.cache.folder, prepared) from None
                self._go_on_without(error)
        header, parts = _record_of(prepared)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - it stays open
                weakref.finalize(self, self._file.close)
            start = self._file.seek(_aligned(self._file.seek(0, os.SEEK_END)))
            _write_record(self._file, header, parts)
            self._file.flush()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _no_room(self._named or self.folder, prepared) from None
        return StoredCase(prepared.case, _record(header, start), self, "")

    def _open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        assert self._file is not None  # a case is in it
        return contextlib.nullcontext(self._file)

    def _go_on_without(self, error: OSError) -> None:
        log.warning("the cache cannot be written (%s); going on without it", error.strerror)


def temporary_folder() -> Path:
    """TMPDIR if it is set; else the one that systems keep on a disk and not in memory, if it is."""
    on_disk = Path("/var/tmp")
    if not os.environ.get("TMPDIR") and os.access(on_disk, os.W_OK):
        return on_disk
    return Path(tempfile.gettempdir())


def _no_room(folder: Path, prepared: PreparedCase) -> SiteDataError:
    size = prepared.images.nbytes + prepared.labels.nbytes
    return SiteDataError(
        f"there is no room in {folder} for a prepared case of {size_text(size)}",
        "free room on its disk (fedfms check-data says how much all cases need), or name a folder "
        "on a larger one with cache in site.yml",
        code="no-room",
    )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# ---------------------------------------------------------------------------------------- a record

# magic, length of the header, its CRC, the header as JSON, the arrays in C order


def _record_of(prepared: PreparedCase) -> tuple[bytes, tuple[NDArray[Any], NDArray[Any]]]:
    """The header of a case and its two arrays as they are written."""
    labels = smallest(prepared.labels)
    images = np.ascontiguousarray(prepared.images)
    header = {
        "shape": images.shape,
        "label_type": str(labels.dtype),
        "spacing": prepared.spacing,
        "is_volume": bool(prepared.is_volume),
        "palette": prepared.palette,
        "digest": digest_of(images).hex(),
        "crc": zlib.crc32(labels.data, zlib.crc32(images.data)),
        "slices": [values_of(picture) for picture in labels],
    }
    return json.dumps(header).encode(), (images, labels)


def _record(header: bytes, start: int = 0) -> Record:
    """The record that begins at a byte of a file; ValueError if the header is of something else."""
    images = _aligned(start + len(_MAGIC) + 8 + len(header))
    return Record.model_validate({**json.loads(header), "start": start, "images": images})


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def _mapped(file: BinaryIO, record: Record) -> tuple[NDArray[np.uint8], Labels]:
    """Both arrays as read-only maps; ValueError if the file is cut off."""
    images = np.memmap(file, np.uint8, "r", record.images, record.shape)
    labels = np.memmap(file, record.label_type, "r", record.labels, record.shape[:3])
    return np.asarray(images), np.asarray(labels)


def _write_record(file: BinaryIO, header: bytes, parts: Iterable[NDArray[Any]]) -> None:
    lengths = len(header).to_bytes(4, "big") + zlib.crc32(header).to_bytes(4, "big")
    written = file.write(_MAGIC + lengths + header)
    for part in parts:
        written += file.write(bytes(-written % _ALIGNMENT))
        written += file.write(part.data)


def _read_header(file: BinaryIO, start: int = 0) -> tuple[dict[str, Any], bytes]:
    """A record's header, decoded and as it stands.

    Raises:
        ValueError: it is not whole.
    """
    size = len(_MAGIC) + 8
    beginning = os.pread(file.fileno(), size, start)  # workers share the file's position
    length, crc = (int.from_bytes(part, "big") for part in (beginning[-8:-4], beginning[-4:]))
    header = os.pread(file.fileno(), length, start + size)
    if not beginning.startswith(_MAGIC) or zlib.crc32(header) != crc:
        raise ValueError("no whole header of a prepared case")
    return json.loads(header), header


def _checked(file: BinaryIO) -> Record:
    """The record that a file holds.

    Raises:
        ValueError: it is not whole, or something else.
    """
    record = _record(_read_header(file)[1])
    pixels, crc = math.prod(record.shape[:3]), 0
    for start, size in (
        (record.images, math.prod(record.shape)),
        (record.labels, pixels * np.dtype(record.label_type).itemsize),
    ):
        file.seek(start)  # read and not mapped: a disk that fails then is an error
        crc = zlib.crc32(file.read(size), crc)
    if crc != record.crc:
        raise ValueError("the record is damaged")
    return record
