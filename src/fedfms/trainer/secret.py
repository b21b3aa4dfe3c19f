"""A site's secret: a file that its trainer makes once, in its private folder.

The order of a round's slices follows from it, with the whole recipe, the round's number and the
model that came: who knows these does not know which slice was in which step. The patients of a set
stand in the site's history under names that follow from it, and its sketches of models do, too:
with another secret that history says nothing, and is refused. It never leaves.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from fedfms.errors import DoorClosed
from fedfms.files import write_whole

SECRET_FILE = "secret"
_BYTES = 32


def site_secret(work: Path) -> bytes:
    """The secret in a private folder, 32 bytes; made if there is none.

    Raises:
        DoorClosed: code no-secret; there is a file, and it cannot be used.
        OSError: it cannot be made.
    """
    path = work / SECRET_FILE
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        work.mkdir(parents=True, exist_ok=True)
        secret = secrets.token_bytes(_BYTES)
        write_whole(path, secret, mode=0o600)
        return secret
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    if len(secret) != _BYTES:
        raise _unusable(path, f"has {len(secret)} bytes and not {_BYTES}")
    return secret


def part_of(secret: bytes, purpose: str) -> bytes:
    """A secret of its own for each purpose: HMAC-SHA256 (RFC 2104), 32 bytes."""
    return hmac.digest(secret, purpose.encode(), "sha256")


def _unusable(path: Path, why: str) -> DoorClosed:
    return DoorClosed(
        f"the site's secret {path} {why}",
        "put it back from a backup of that volume; without one, remove it and history.jsonl: the "
        "trainer makes a new one, and all counts begin anew",
        code="no-secret",
    )
