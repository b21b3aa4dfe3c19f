"""Zip archives that are the same bytes for the same content, and unpacking that stays inside."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

from fedfms.bounded import ZipReader, open_zip
from fedfms.errors import ConfigError, Undecodable

_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold
_UNIX = 3
MAX_BYTES = 64 << 20  # of a kit or request, unpacked; a kit has less than 400 kB
MAX_FILES = 1000


def write_zip(folder: Path, path: Path) -> None:
    """Pack a folder, by its own name, into a new file for this user only.

    Names are sorted, times fixed, modes 0644, 0755 (can be run) or 0600 (private keys), and nothing
    is compressed: the bytes depend on the content alone, not on the machine or a library's version.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = (PurePosixPath(folder.name) / source.relative_to(folder).as_posix()).as_posix()
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system = _UNIX
            info.external_attr = (stat.S_IFREG | kit_mode(source)) << 16
            archive.writestr(info, source.read_bytes())


def kit_mode(path: Path) -> int:
    """The mode of a file in a kit, whatever it is on this machine."""
    if path.suffix == ".key":
        return 0o600
    return 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644


def unpack_zip(path: Path, folder: Path) -> Path:
    """Unpack an archive that holds one folder, with the modes of its files.

    Returns:
        the one folder, below `folder`.

    Raises:
        ConfigError: it is no zip, is too large, or names anything outside the one folder.
    """
    try:
        with open_zip(path, "it", max_bytes=MAX_BYTES, max_entries=MAX_FILES) as archive:
            top = _one_folder(path, archive)
            for name, info in archive.members.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
                target.chmod(archive.mode(info) & 0o755 or 0o644)
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", "check the path") from None
    except Undecodable as error:
        raise _no_kit(path, error.problem) from None
    except OSError as error:
        raise _no_kit(path, error.strerror or str(error)) from None
    return folder / top


def _one_folder(path: Path, archive: ZipReader) -> str:
    """The name of the one folder that all files of an archive are in."""
    if not archive.members:
        raise _no_kit(path, "it is empty")
    parts = [PurePosixPath(name).parts for name in archive.members]
    if alone := [one[0] for one in parts if len(one) < 2]:
        raise _no_kit(path, f"{alone[0]} is in no folder")
    if len({one[0] for one in parts}) != 1:
        raise _no_kit(path, "it does not hold one folder")
    return parts[0][0]


def _no_kit(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be unpacked: {why}",
        "ask the sender for the file again, and compare its SHA-256",
        code="bad-zip",
    )
