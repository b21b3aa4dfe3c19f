"""Files and folders that are there whole or not at all, and files that are safe to read.

What is unfinished lies beside its place as `.NAME.HEX.part`, in the same folder and so on the same
disk, and takes its place by a rename once the disk has it. Whoever reads the place sees what was
there before or what is there now, never a part, whatever is killed or full in between. Nothing
heavy is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedfms.bounded import read_json_object

PART = ".part"  # how the name of what is unfinished ends
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: the disk is full, or this user's share is
_BLOCK_BYTES = 1 << 20
_SEAL = "sha256.json"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write or replace one file; see `write_together`."""
    write_together({path: data}, mode=mode)


def write_together(files: Mapping[Path, bytes | str], *, mode: int = 0o666) -> None:
    """Write or replace files; the first takes its place when all of them are on the disk.

    Args:
        files: what to write by place, in order. A text becomes UTF-8, and what UTF-8
            does not have is spelt out. A link at a place is replaced, never followed.
        mode: of the files, less the process's umask.

    Raises:
        OSError: a folder is full or cannot be written, or something that is neither a file nor a
            link is at a place; `filename` is that place. What was there before is there still.
    """
    parts: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            part = _beside(path)
            parts.append((part, path))
            with _naming(path):
                _refuse_what_is_no_file(path)
                _write_new(part, data, mode)
        for part, path in parts:
            with _naming(path):
                part.replace(path)
    finally:
        for part, _ in parts:
            with contextlib.suppress(OSError):  # of most of them there is none any more
                part.unlink()


def link_whole(source: Path, target: Path) -> None:
    """Have one file in a second place, too: the same file, or a copy where the disk has no links.

    What is at `target` gives way; nothing is done where `source` is not there.

    Raises:
        OSError: the folder is full or cannot be written.
    """
    if not source.exists() or (target.exists() and source.samefile(target)):
        return
    part = _beside(target)
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copy2(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_whole(path: Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a plain file of at most `max_bytes`.

    Raises:
        OSError: it is not there, larger, or a link, folder, pipe or device.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(f"{status.st_size} bytes, at most {max_bytes} were expected")
        # the other side of a shared folder may make it longer at any time
        return file.read() if max_bytes is None else file.read(max_bytes)


def is_file(path: Path) -> bool:
    """Whether a file is there that this user can see; no error for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def append_whole(path: Path, line: bytes, *, durable: bool = False, mode: int = 0o666) -> None:
    """Add to the end of a file all of a line, or nothing.

    Args:
        durable: whether it is on the disk when this returns, whatever loses its power then.
        mode: of a file that is made, less the process's umask.

    Raises:
        OSError: the disk is full or cannot be written; the file is as it was before.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with os.fdopen(os.open(path, flags, mode), "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # on a disk that gets full a part may be taken
                written += file.write(line[written:])
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def cut_torn_line(path: Path) -> None:
    """Remove what a power cut left of the last line of a file that `append_whole` adds to.

    For whoever adds to it: another would take a line for torn that is being written.

    Raises:
        OSError: it cannot be read or written; nothing where it is not there.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def mount_of(folder: Path) -> Path:
    """Where the disk of a folder is mounted; of its nearest parent where it is not there."""
    place = folder.absolute()
    while not (place.exists() and os.path.ismount(place)) and place != place.parent:
        place = place.parent
    return place


@contextlib.contextmanager
def whole_folder(place: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write into; it becomes `place` if nothing is raised.

    Args:
        place: its parents are made. An empty folder there counts as nothing.
        replace: a folder that is there gives way, and comes back if that fails.

    Raises:
        OSError: it cannot be written, or something is at `place` that does not give way.
    """
    with scratch_folder(place) as part:
        yield part
        flush_folder(part)
        if not (replace and place.exists()):
            part.rename(place)
            return
        old = _beside(place)
        place.rename(old)
        try:
            part.rename(place)
        except BaseException:
            old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`; it is gone afterwards, with what is left in it."""
    part = _beside(place)
    try:
        part.mkdir(parents=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down the SHA-256 of each file in a folder, in a file beside them."""
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / _SEAL).write_text(json.dumps(sums, indent=1))


def is_as_sealed(folder: Path) -> bool:
    """Whether the files in a folder are those of its seal, byte for byte."""
    try:
        sums = read_json_object(folder / _SEAL)
        there = {path.name for path in folder.iterdir() if path.is_file()} - {_SEAL}
        return there == set(sums) and all(file_sha256(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError, TypeError):
        return False


def flush_folder(folder: Path) -> None:
    """Have the disk take every file in a folder, else a power cut could leave empty ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")


def _write_new(path: Path, data: bytes | str, mode: int) -> None:
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _refuse_what_is_no_file(path: Path) -> None:
    """A rename would take the place of a pipe or of a device such as /dev/null."""
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except OSError:
        return  # nothing is there, or writing says why not
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind not in (stat.S_IFREG, stat.S_IFLNK):
        raise OSError(errno.EINVAL, "not a plain file")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error name the place, and not the part beside it that nobody has heard of."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
