"""Asking a server before a site joins: FLARE's challenge, the one question that needs no login."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from fedfms.bounded import number
from fedfms.errors import Undecodable
from fedfms.flare.greeting import REVOKED, TIME, VERSION
from fedfms.flare.internals import wire
from fedfms.kits.kit import Kit
from fedfms.preflight.network import NetworkError, ServerGreeting

ASK_SECONDS = 5.0  # for one answer
CONNECT_SECONDS = 10.0  # for the first answer: a far line takes seconds to connect


def ask_server(kit: Kit) -> ServerGreeting:
    """Challenge the server as FLARE's registration does, under a name beside the site's own.

    The site's own FLARE client may be connected meanwhile; nothing is registered.

    Raises:
        NetworkError: code flare.
    """
    with conversation(kit) as (_, answer):
        version, revoked = answer.headers.get(VERSION), answer.headers.get(REVOKED)
        here = (answer.asked + answer.answered) / 2
        ahead = None
        with contextlib.suppress(Undecodable):
            ahead = number(answer.headers.get(TIME), "the server's time") - here
        return ServerGreeting(
            version if isinstance(version, str) else None,
            ahead,
            revoked if isinstance(revoked, bool) else None,
        )


@contextlib.contextmanager
def conversation(kit: Kit) -> Iterator[tuple[wire.Ask, wire.Answer]]:
    """A connection for more than one question; yields how to ask, and the server's first answer.

    Raises:
        NetworkError: code flare.
    """
    try:
        server = wire.server_address(kit.folder)
    except (OSError, ValueError, LookupError, TypeError):
        raise NetworkError(
            f"{kit.folder}/startup/fed_client.json does not name a server",
            "unzip the kit again; if that does not help, ask the coordinator for a new one",
            code="flare",
        ) from None
    with wire.asking(server, kit) as ask:
        until = time.monotonic() + CONNECT_SECONDS  # until it connects, asking fails at once
        answer = ask(ASK_SECONDS)
        while answer.code != wire.ANSWERED and time.monotonic() < until:
            time.sleep(0.5)
            answer = ask(ASK_SECONDS)
        if answer.code != wire.ANSWERED:
            raise NetworkError(
                f"the server at {server.target} does not answer FLARE's greeting ({answer.code})",
                "ask the coordinator whether the server has started and is of this project",
                code="flare",
            )
        yield ask, answer
