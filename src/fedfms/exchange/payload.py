"""Files written whole and read safely, whoever else writes into their folder."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, never through a link that somebody else put there."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(part, flags, 0o660), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_whole(path: Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a plain file of at most `max_bytes`; a link, pipe or device is an OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(f"{status.st_size} bytes, at most {max_bytes} were expected")
        return file.read()
