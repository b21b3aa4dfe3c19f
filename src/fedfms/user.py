"""Who this process is on its machine: never root in a container, able to read what it is given.

And whose child it is: a process that another one started to help it ends with that one.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from fedfms.errors import ConfigError, FedfmsError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class UserError(FedfmsError):
    """This process runs as the wrong user, or cannot read what it needs as the one it is."""

    default_code = "user"


def refuse_root() -> None:
    """Refuse to do anything as root in a container of the image.

    The image says that it is one (FEDFMS_IN_CONTAINER). A developer's own machine does not, and
    there root may do as it likes.

    Raises:
        UserError: code root.
    """
    if os.environ.get("FEDFMS_IN_CONTAINER", "") not in ("", "0") and os.geteuid() == 0:
        raise UserError(
            "this container runs as root (user 0), and nothing of fedfms does",
            "set FEDFMS_UID in .env to the number of a user other than root (id -u), and let that "
            "user own the folder: sudo chown -R 1000 . for user 1000",
            code="root",
        )


def end_with(parent: int) -> None:
    """From now on the kernel kills this process when the one that started it ends, in any way.

    More exactly when the thread ends that started it.

    Args:
        parent: process id of the one that started this one; if it is gone already, this ends now.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def how_to_read(path: Path) -> str:
    """What to do where this user cannot read a file of a kit's folder."""
    me, owner = os.geteuid(), _owner(path)
    if owner == 0 or owner is None:
        return (
            f"let user {me} own it: sudo chown -R {me} . in the folder with .env; FEDFMS_UID in "
            ".env says which user that is, and never root"
        )
    if owner == me:
        return "let its owner read it: chmod -R u+rX . in the folder with .env"
    return f"set FEDFMS_UID={owner} in .env: that user owns it"


def unreadable(path: Path, error: OSError, code: str) -> ConfigError:
    """That this container's user may not read a file of a kit's folder, and what to do."""
    return ConfigError(
        f"{path} cannot be read ({error.strerror}) by this container's user, "
        f"{os.geteuid()}:{os.getegid()}",
        how_to_read(path),
        code=code,
    )


def _owner(path: Path) -> int | None:
    """The owner of a path, or of the nearest folder above it that can be looked at."""
    for place in (path, *path.parents[:-1]):
        try:
            return place.stat().st_uid
        except OSError:
            continue
    return None
