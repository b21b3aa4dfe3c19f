"""A provider's download as it lies on the disk: which files there are, and their bytes.

Nothing here writes to the download. Files are listed in the order of their names, whatever the
file system's; hidden files and what macOS adds to archives (`._x`, `__MACOSX`) do not count.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fedfms.bounded import open_zip, tar_members
from fedfms.data.content import walk
from fedfms.errors import SiteDataError, Undecodable
from fedfms.files import file_sha256

Files = list[tuple[str, Path]]  # case, file
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_BYTES = 1 << 40  # of a download, unpacked; the largest that there is a command for has 20 GB
MAX_FILES = 1_000_000


class Source:
    """The folder of an unpacked download.

    Args:
        root: the folder.

    Raises:
        SiteDataError: it is no folder ("no-source").
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SiteDataError(
                f"there is no folder {root}",
                "name the folder into which the download was unpacked, or its .zip or .tar",
                code="no-source",
            )
        self.root = root.resolve()
        self.files = tuple(sorted(_walk(self.root), key=self.relative))
        self._sha256: dict[Path, str] = {}

    def relative(self, path: Path) -> str:
        """The path below the download, with /, the same on every machine."""
        return unicodedata.normalize("NFC", path.relative_to(self.root).as_posix())

    def parts(self, path: Path) -> tuple[str, ...]:
        """Names of the folders below the download in which the file lies, from the top."""
        return tuple(self.relative(path).split("/")[:-1])

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file; of one that is asked for again, as it was.

        Raises:
            SiteDataError: "unreadable-file".
        """
        if path not in self._sha256:
            try:
                self._sha256[path] = file_sha256(path)
            except OSError as error:
                raise _unreadable(path, error) from None
        return self._sha256[path]

    def where(self, wanted: Callable[[Path], bool]) -> list[Path]:
        """The files for which `wanted` holds, in the order of their names."""
        return [path for path in self.files if wanted(path)]

    def missing(self, what: str, example: str) -> SiteDataError:
        """Nothing of a kind is there: say what was looked for, and what lies there instead."""
        packed = [path.name for path in self.files if path.name.lower().endswith(ARCHIVES)]
        top = sorted({self.relative(path).split("/")[0] for path in self.files})
        there = ", ".join(top[:6]) + (" and more" if len(top) > 6 else "")
        fix = f"compare with the folder tree in docs/data.md; expected for example {example}"
        if packed:
            fix = f"unpack {packed[0]} there first; " + fix
        return SiteDataError(
            f"{self.root} has no {what}; it holds {there or 'no file'}",
            fix,
            code="missing-download-file",
        )

    def lacking(self, what: str, names: Sequence[str], fix: str) -> SiteDataError:
        """Files are not there that a list in the download names."""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return SiteDataError(
            f"{self.root} lacks files {what}: {', '.join(names[:3])}{more}",
            fix,
            code="missing-download-file",
        )


@contextlib.contextmanager
def open_source(path: Path, scratch: Path) -> Iterator[Source]:
    """The download at `path`: a folder, or an archive that is unpacked for as long as it is used.

    Args:
        path: a folder, .zip, .tar, .tar.gz or .tgz.
        scratch: folder in which an archive is unpacked; made if it is not there.

    Raises:
        SiteDataError: "no-source", "truncated-file".
    """
    if not path.is_file():
        yield Source(path)
        return
    if not path.name.lower().endswith(ARCHIVES):
        raise SiteDataError(
            f"{path} is a file, and no {', '.join(ARCHIVES)}",
            "name the folder into which the download was unpacked",
            code="no-source",
        )
    scratch.mkdir(parents=True, exist_ok=True)
    for left in scratch.glob("unpacked-*"):  # of a run that was killed
        shutil.rmtree(left)
    unpacked = Path(tempfile.mkdtemp(prefix="unpacked-", dir=scratch))
    try:
        _unpack(path, unpacked)
        yield Source(unpacked)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def read_source(path: Path) -> bytes:
    """A file of the download, whole.

    Raises:
        SiteDataError: "unreadable-file", "truncated-file".
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not data:
        raise truncated(path, "it has 0 bytes")
    return data


def truncated(path: Path, reason: str) -> SiteDataError:
    """A file that ends too early or cannot be decoded."""
    return SiteDataError(
        f"{path} is damaged or cut off ({reason})",
        "download or unpack this file again, then run the same command: cases that were finished "
        "are kept",
        code="truncated-file",
    )


def unexpected_shape(path: Path, found: str, expected: str) -> SiteDataError:
    """A picture or volume that has not the size it must have."""
    return SiteDataError(
        f"{path} is {found}, expected was {expected}",
        "compare the file with the provider's; it may belong to another version or another case",
        code="unexpected-shape",
    )


def unexpected_values(path: Path, found: Iterable[float], allowed: Iterable[int]) -> SiteDataError:
    """A label with values that the provider does not document."""
    some = ", ".join(f"{value:g}" for value in sorted(found)[:8])
    known = ", ".join(map(str, sorted(allowed)))
    return SiteDataError(
        f"{path} holds the label values {some}; documented are {known}",
        "check that this is the provider's own label file, not one that was resized or saved with "
        "colours",
        code="unexpected-label-values",
    )


def pair_by_key(source: Source, images: Files, labels: Files) -> list[tuple[str, Path, Path]]:
    """(key, image, label) of every case, sorted by key.

    Raises:
        SiteDataError: a key twice ("ambiguous-download"), or one without its partner
            ("missing-download-file").
    """
    by_key, of_labels = _unique(source, images), _unique(source, labels)
    parts = []
    for own, other, partner in ((by_key, of_labels, "label"), (of_labels, by_key, "image")):
        if alone := sorted(own.keys() - other.keys()):
            some = ", ".join(source.relative(own[key]) for key in alone[:3])
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            parts.append(f"no {partner} is there for {some}{more}")
    if parts:
        raise SiteDataError(
            f"{source.root}: " + "; ".join(parts),
            "unpack the download again, all parts of it: each image needs its label",
            code="missing-download-file",
        )
    return [(key, by_key[key], of_labels[key]) for key in sorted(by_key)]


def _unique(source: Source, pairs: Files) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for key, path in pairs:
        if key in found:
            raise SiteDataError(
                f"{source.relative(found[key])} and {source.relative(path)} are both there for "
                f"case {key}",
                "keep one copy of the download below the folder that you name",
                code="ambiguous-download",
            )
        found[key] = path
    return found


def _walk(root: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for folder, folders, names in walk(root, links=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        yield from (folder / name for name in names if not name.startswith("."))


def _unpack(path: Path, folder: Path) -> None:
    """Everything, and nothing outside the folder."""
    try:
        if path.name.lower().endswith(".zip"):
            with open_zip(path, "it", max_bytes=MAX_BYTES, max_entries=MAX_FILES) as archive:
                for name in archive.members:
                    _write(folder / name, archive.blocks(name))
        else:
            for member in tar_members(path, "it", max_entries=MAX_FILES, max_unpacked=MAX_BYTES):
                _write(folder / member.name, member.blocks())
    except Undecodable as error:
        raise truncated(path, error.problem) from None
    except OSError as error:
        raise SiteDataError(
            f"{path} cannot be unpacked to {folder.parent}: {error.strerror}",
            "make room there, or unpack the archive yourself and name its folder",
            code="cannot-unpack",
        ) from None


def _write(target: Path, blocks: Iterable[bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.writelines(blocks)


def _unreadable(path: Path, error: OSError) -> SiteDataError:
    return SiteDataError(
        f"{path} cannot be read: {error.strerror}",
        "check with ls -lL that the file is there and that this user may read it",
        code="unreadable-file",
    )
