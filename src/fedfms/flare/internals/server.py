"""A running FLARE server, as `FLContextKey.SITE_OBJ` gives it to its components.

Read in FLARE 2.9.0 (`private/fed/server/`). A component hears of a registration only by events that
can refuse it without a reason, and nothing public asks a server who is disabled, or gives up the
jobs of an earlier process.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nvflare.apis.client import Client
from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    IdentityChallengeKey,
    MessageHeaderKey,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.defs import CellMessageHeaderKeys, ClientType
from nvflare.private.fed.client.communicator import Communicator
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.fed_server import BaseServer, FederatedServer
from nvflare.private.fed.server.job_runner import JobRunner
from nvflare.private.fed.server.server_engine import ServerEngine

from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

log = logging.getLogger(__name__)

_ATTEMPTS = 1_000_000  # to start a job whose sites are not there, or pause
_ATTEMPT_SECONDS = 60.0  # between the later ones

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
HEARTBEATS = Assumption(
    "a server hears a site's sign of life by client_heartbeat(request), registered on its cell, "
    "whose request holds a Shareable with the site's context and a token in its headers",
    lambda: (
        takes(FederatedServer.client_heartbeat, "request")
        and uses(FederatedServer.client_heartbeat, "get_peer_context", "TOKEN")
        and uses(FederatedServer._register_cellnet_cbs, "HEART_BEAT", "client_heartbeat")
        and uses(Communicator.send_heartbeat, "gen_new_peer_ctx", "BEFORE_CLIENT_HEARTBEAT")
    ),
)
SCHEDULER = Assumption(
    "the job scheduler starts no more than max_jobs at once, and gives a job up after "
    "max_schedule_count attempts, of which the last are max_schedule_interval seconds apart",
    lambda: (
        uses(DefaultJobScheduler._exceed_max_jobs, "max_jobs", "scheduled_jobs")
        and uses(
            DefaultJobScheduler._do_schedule_job, "max_schedule_count", "max_schedule_interval"
        )
    ),
)
RUNNING = Assumption(
    "a server's engine lists the jobs that run in run_processes; a cell's first name is its site",
    lambda: (
        uses(ServerEngine.__init__, "run_processes")
        and uses(FederatedServer.__init__, "engine", "_create_server_engine")
        and FQCN.get_root("site-1.job") == "site-1"
    ),
)
UNFINISHED_JOBS = Assumption(
    "job_runner.update_unfinished_jobs(fl_ctx) marks jobs that no process runs as abandoned",
    lambda: (
        takes(JobRunner.update_unfinished_jobs, "fl_ctx")
        and uses(JobRunner.update_unfinished_jobs, "set_status", "ABANDONED")
    ),
)
STATISTICS = Assumption(
    "the server's engine has show_stats(job_id), which asks the job's process",
    lambda: (
        takes(ServerEngine.show_stats, "job_id")
        and uses(ServerEngine.show_stats, "send_command_to_child_runner_process", "SHOW_STATS")
    ),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """A site that is registered."""

    token: str
    silent_seconds: float  # since its last sign of life


class Asked(NamedTuple):
    """A challenge that asks for more than a greeting."""

    name: str  # whose certificate the connection has
    revoked: bool
    wanted: Any  # as the participant says it
    payload: Any
    busy: bool  # a job runs


@rests_on(CHALLENGES, CONNECTED, RUNNING)
def greet_with(
    server: Any,
    headers: Callable[[bool], dict[str, Any]],
    also: Mapping[str, Callable[[Asked], tuple[dict[str, Any], bytes | None]]],
) -> None:
    """Add headers to the server's answers to a challenge, the one question that needs no login.

    Args:
        headers: is told whether who asks is disabled; an error in it changes nothing.
        also: by the header that asks for it, what is answered instead: headers and payload.
    """
    answer = server.client_challenge

    def other(request: Any) -> Any | None:
        for header, answer_to in also.items():
            if (wanted := request.get_header(header)) is not None:
                name = FQCN.get_root(request.get_header(MessageHeaderKey.ORIGIN) or "")
                revoked = bool(server.client_manager.is_client_disabled(name))
                busy = bool(server.engine.run_processes)
                said, payload = answer_to(Asked(name, revoked, wanted, request.payload, busy))
                reply = make_reply(rc=ReturnCode.OK, body=payload)
                for key, value in said.items():
                    reply.set_header(key, value)
                return reply
        return None

    def challenge(request: Any) -> Any:
        if (reply := other(request)) is not None:
            return reply
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


@rests_on(HEARTBEATS, CONNECTED)
def hear_signs_of_life(server: Any, said: str, take: Callable[[str, Any], None]) -> None:
    """Be told what sites say with their signs of life.

    Args:
        said: name of a public property of the context that sites send along.
        take: gets the site, by its token and not by what it says, and that property; an error in
            it changes nothing.
    """
    heartbeat = server.client_heartbeat

    def heard(request: Any) -> Any:
        reply = heartbeat(request)
        try:
            token = request.get_header(CellMessageHeaderKeys.TOKEN)
            if (client := server.client_manager.clients.get(token)) is not None:
                take(client.name, _property(request, said))
        except Exception:
            log.exception("a sign of life was not understood")
        return reply

    server.cell.register_request_cb(
        channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.HEART_BEAT, cb=heard
    )


def _connection(manager: Any, name: str) -> Connection | None:
    client = manager.name_to_clients.get(name)
    if not client:
        return None
    silent = time.time() - client.last_connect_time
    # a sign of life from the future: the clock was put back, and it is not known how old it is
    return Connection(client.token, silent if silent >= 0 else math.inf)


def _property(request: Any, name: str) -> Any:
    try:
        return request.payload.get_peer_context().get_prop(name)
    except AttributeError:
        return None


@rests_on(SCHEDULER)
def set_scheduler(engine: Any, max_jobs: int | None) -> None:
    """Let a job wait for its sites as long as it takes; FLARE gives it up after some 90 minutes.

    Args:
        max_jobs: at once; None: as the kit says.
    """
    scheduler = engine.get_component(SystemComponents.JOB_SCHEDULER)
    scheduler.max_schedule_count = _ATTEMPTS
    scheduler.max_schedule_interval = _ATTEMPT_SECONDS
    if max_jobs is not None:
        scheduler.max_jobs = max_jobs


@rests_on(UNFINISHED_JOBS)
def give_up_unfinished_jobs(fl_ctx: FLContext) -> None:
    """Mark jobs that ran when an earlier server process ended as FINISHED:ABANDONED.

    Nothing is done at a site, whose engine has no job runner.
    """
    runner = getattr(fl_ctx.get_engine(), "job_runner", None)
    if runner is not None:
        runner.update_unfinished_jobs(fl_ctx)


@rests_on(STATISTICS)
def job_statistics(engine: Any, job_id: str) -> dict[str, Any]:
    """What the components of a running job tell, by group, as FLARE's console shows it.

    An answer that does not come is empty.
    """
    told = engine.show_stats(job_id)
    return told if isinstance(told, dict) else {}
