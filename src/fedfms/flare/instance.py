"""One instance of each site: a second copy of a kit does not throw the first one out.

FLARE lets the last login win. The first client then works on with a token that counts no more, and
both push each other's connections away, in the middle of a job and without a word to anybody. Here
each FLARE client says which instance it is, and the server refuses another one as long as the first
was heard a moment ago. It keeps accidents apart, such as a forgotten old machine; it is no defence
against a thief of a key, who can say what he likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext

from fedfms.flare.internals import server as flare_server
from fedfms.flare.internals.server import Connection

log = logging.getLogger(__name__)

PROPERTY = "fedfms_instance"  # public, in the context that a site sends along
FRESH_SECONDS = 25.0  # since the last sign of life; there is one each 10 s
SECOND_COPY = "another copy of this site's kit"

_FILE = "fedfms.instance"  # in the workspace
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def read_instance(workspace: Path) -> str:
    """Which instance a FLARE client is: the same after a restart, another on another machine.

    Args:
        workspace: kept between starts, and by one client only.

    Returns:
        16 hexadecimal digits that say nothing of the machine.
    """
    path, own = workspace / _FILE, secrets.token_hex(16)
    try:
        if path.is_file():
            own = path.read_text()
        else:
            path.write_text(own)
    except OSError as error:
        log.warning("%s cannot be kept: %s", path, error.strerror)
    boot = ""  # a workspace may be copied along with the kit
    with contextlib.suppress(OSError):
        boot = _BOOT.read_text()
    return hashlib.sha256(f"{own.strip()} {boot.strip()}".encode()).hexdigest()[:16]


def say_instance(workspace: Path, fl_ctx: FLContext) -> None:
    """Put the instance where the server reads it; for before a registration."""
    fl_ctx.set_prop(PROPERTY, read_instance(workspace), private=False, sticky=False)


def guard_registrations(server: Any) -> None:
    """Let a FLARE server refuse a second instance of a site that is connected."""
    known: dict[str, str] = {}  # token of a registration -> instance

    def why_not(name: str, instance: Any, first: Connection | None) -> str | None:
        if first is None or not _is_one(instance) or known.get(first.token) == instance:
            return None
        if first.silent_seconds >= FRESH_SECONDS:
            return None
        log.warning(
            "%s is connected (heard %.0f s ago), and another copy of its kit asked to "
            "join: refused. If the site moved to another machine, its old FLARE client "
            "must be stopped there; if nobody there knows of a second one, its key may be "
            "stolen: fedfms revoke %s",
            name,
            first.silent_seconds,
            name,
        )
        return f"{SECOND_COPY} is connected (heard {first.silent_seconds:.0f} s ago)"

    def on_registered(token: str, instance: Any, tokens: set[str]) -> None:
        for gone in known.keys() - tokens:
            del known[gone]
        if _is_one(instance):
            known[token] = instance

    flare_server.guard_registrations(server, PROPERTY, why_not, on_registered)


def _is_one(said: Any) -> bool:
    """Whether a login says an instance; a site of an older version says nothing."""
    return isinstance(said, str) and bool(said)
