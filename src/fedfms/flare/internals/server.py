"""A running FLARE server, as `FLContextKey.SITE_OBJ` gives it to its components.

Read in FLARE 2.9.0 (`private/fed/server/`). A component hears of a registration only by events that
can refuse it without a reason, and nothing public asks a server who is disabled, or gives up the
jobs of an earlier process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    IdentityChallengeKey,
    MessageHeaderKey,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.defs import CellMessageHeaderKeys, ClientType
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.fed_server import BaseServer, FederatedServer
from nvflare.private.fed.server.job_runner import JobRunner

from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

log = logging.getLogger(__name__)

CHALLENGES = Assumption(
    "a server answers a challenge by client_challenge(request), registered on its cell",
    lambda: (
        takes(FederatedServer.client_challenge, "request")
        and uses(FederatedServer.client_challenge, "COMMON_NAME")
        and uses(FederatedServer._register_cellnet_cbs, "register_request_cb", "client_challenge")
    ),
)
REGISTRATIONS = Assumption(
    "a server takes a site in by register_client(request), registered on its cell, whose request "
    "holds a Shareable with the site's context",
    lambda: (
        takes(FederatedServer.register_client, "request")
        and uses(FederatedServer.register_client, "get_peer_context", "CLIENT_NAME", "TOKEN")
        and uses(FederatedServer._register_cellnet_cbs, "register_request_cb", "register_client")
    ),
)
CONNECTED = Assumption(
    "client_manager knows clients by token (clients) and by name (name_to_clients), when each was "
    "last heard (last_connect_time), and who is disabled (is_client_disabled)",
    lambda: (
        uses(ClientManager.__init__, "clients", "name_to_clients")
        and uses(Client.__init__, "last_connect_time")
        and takes(ClientManager.is_client_disabled, "client_name")
        and uses(BaseServer.__init__, "client_manager")
    ),
)
UNFINISHED_JOBS = Assumption(
    "job_runner.update_unfinished_jobs(fl_ctx) marks jobs that no process runs as abandoned",
    lambda: (
        takes(JobRunner.update_unfinished_jobs, "fl_ctx")
        and uses(JobRunner.update_unfinished_jobs, "set_status", "ABANDONED")
    ),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """A site that is registered."""

    token: str
    silent_seconds: float  # since its last sign of life


@rests_on(CHALLENGES, CONNECTED)
def greet_with(server: Any, headers: Callable[[bool], dict[str, Any]]) -> None:
    """Add headers to the server's answers to a challenge, the one question that needs no login.

    Args:
        headers: is told whether who asks is disabled; an error in it changes nothing.
    """
    answer = server.client_challenge

    def challenge(request: Any) -> Any:
        reply = answer(request)
        try:
            name = request.get_header(IdentityChallengeKey.COMMON_NAME) or ""
            disabled = bool(server.client_manager.is_client_disabled(name))
            for header, value in headers(disabled).items():
                reply.set_header(header, value)
        except Exception:  # never in the way of a registration
            log.exception("a greeting failed")
        return reply

    server.cell.register_request_cb(
        channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.Challenge, cb=challenge
    )


@rests_on(REGISTRATIONS, CONNECTED)
def guard_registrations(
    server: Any,
    said: str,
    why_not: Callable[[str, Any, Connection | None], str | None],
    on_registered: Callable[[str, Any, set[str]], None],
) -> None:
    """Be asked before a server takes a site in, so that the site hears why it is refused.

    Args:
        said: name of a public property of the context that sites send along.
        why_not: gets the site's name, that property (None where it is not said), and the connection
            that this site has already; answers a reason to refuse, or None.
        on_registered: gets the new token, that property, and all tokens that count.
    """
    register, manager = server.register_client, server.client_manager

    def guarded(request: Any) -> Any:
        if request.get_header(CellMessageHeaderKeys.CLIENT_TYPE) != ClientType.REGULAR:
            return register(request)  # an admin
        name = request.get_header(CellMessageHeaderKeys.CLIENT_NAME)
        value = _property(request, said)
        reason = why_not(name, value, _connection(manager, name))
        if reason is not None:
            return make_reply(rc=ReturnCode.UNAUTHENTICATED, error=reason)
        reply = register(request)
        if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
            payload = reply.payload if isinstance(reply.payload, dict) else {}
            if CellMessageHeaderKeys.TOKEN in payload:
                token = payload[CellMessageHeaderKeys.TOKEN]
                on_registered(token, value, set(manager.clients))
        return reply

    server.cell.register_request_cb(
        channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.Register, cb=guarded
    )


def _connection(manager: Any, name: str) -> Connection | None:
    client = manager.name_to_clients.get(name)
    return client and Connection(client.token, time.time() - client.last_connect_time)


def _property(request: Any, name: str) -> Any:
    try:
        return request.payload.get_peer_context().get_prop(name)
    except AttributeError:
        return None


@rests_on(UNFINISHED_JOBS)
def give_up_unfinished_jobs(fl_ctx: FLContext) -> None:
    """Mark jobs that ran when an earlier server process ended as FINISHED:ABANDONED.

    Nothing is done at a site, whose engine has no job runner.
    """
    runner = getattr(fl_ctx.get_engine(), "job_runner", None)
    if runner is not None:
        runner.update_unfinished_jobs(fl_ctx)
