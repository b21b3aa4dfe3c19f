"""Asking a server before a site joins: FLARE's challenge, the one question that needs no login."""

from __future__ import annotations

from fedfms.flare.greeting import REVOKED, TIME, VERSION
from fedfms.flare.internals import wire
from fedfms.kits.kit import Kit
from fedfms.preflight.network import NetworkError, ServerGreeting

ASK_SECONDS = 5.0  # for one answer; a connection is made meanwhile
ATTEMPTS = 2


def ask_server(kit: Kit) -> ServerGreeting:
    """Challenge the server as FLARE's registration does, under a name beside the site's own.

    The site's own FLARE client may be connected meanwhile; nothing is registered.

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
    answer = wire.challenge(server, kit, seconds=ASK_SECONDS, attempts=ATTEMPTS)
    if answer.code != wire.ANSWERED:
        raise NetworkError(
            f"the server at {server.target} does not answer FLARE's greeting ({answer.code})",
            "ask the coordinator whether the server has started and is of this project",
            code="flare",
        )
    there = answer.headers.get(TIME)
    return ServerGreeting(
        answer.headers.get(VERSION),
        None if there is None else there - (answer.asked + answer.answered) / 2,
        answer.headers.get(REVOKED),
    )
