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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.defs import CellMessageHeaderKeys, ClientType

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
    server.cell.register_request_cb(
        channel=CellChannel.SERVER_MAIN,
        topic=CellChannelTopic.Register,
        cb=_guarded(server.client_manager, server.register_client),
    )


def _guarded(manager: Any, register: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, str] = {}  # token of a registration -> instance

    def guarded(request: Any) -> Any:
        name = request.get_header(CellMessageHeaderKeys.CLIENT_NAME)
        if request.get_header(CellMessageHeaderKeys.CLIENT_TYPE) != ClientType.REGULAR:
            return register(request)
        instance = _said(request)
        first = manager.name_to_clients.get(name)
        if instance and first is not None and known.get(first.token) != instance:
            silent = time.time() - first.last_connect_time
            if silent < FRESH_SECONDS:
                log.warning(
                    "%s is connected (heard %.0f s ago), and another copy of its kit asked to "
                    "join: refused. If the site moved to another machine, its old FLARE client "
                    "must be stopped there; if nobody there knows of a second one, its key may be "
                    "stolen: fedfms revoke %s",
                    name,
                    silent,
                    name,
                )
                return make_reply(
                    rc=ReturnCode.UNAUTHENTICATED,
                    error=f"{SECOND_COPY} is connected (heard {silent:.0f} s ago)",
                )
        reply = register(request)
        if instance and reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
            current = set(manager.clients)
            for token in known.keys() - current:
                del known[token]
            if isinstance(reply.payload, dict) and CellMessageHeaderKeys.TOKEN in reply.payload:
                known[reply.payload[CellMessageHeaderKeys.TOKEN]] = instance
        return reply

    return guarded


def _said(request: Any) -> str | None:
    """What a login says of its instance; a site of an older version says nothing."""
    try:
        said = request.payload.get_peer_context().get_prop(PROPERTY)
    except AttributeError:
        return None
    return said if isinstance(said, str) else None
