"""What keeps one job alive while its processes die: the touches of a running server for that.

Read in FLARE 2.9.0 (`private/fed/server/{fed_server,job_runner,server_engine}.py`, its
`apis/impl/job_def_manager.py`). As shipped, a site's job process that dies ends the job of all
sites; a client that logs in again gets no part of running jobs; and a job whose server process
died is over. Nothing public starts a running job at one more site, hears a death before the job is
ended for it, or lets a job that was running be scheduled again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import RunProcessKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl import job_def_manager
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import Job, JobMetaKey, RunStatus
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.job_scheduler_spec import DispatchInfo
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.private.admin_defs import Message, MsgHeader
from nvflare.private.admin_defs import ReturnCode as AdminCode
from nvflare.private.defs import (
    CellMessageHeaderKeys,
    JobFailureMsgKey,
    RequestHeader,
    TrainingTopic,
)
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.training_cmds import DeleteRunNumberProcessor
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.job_cmds import JobCommandModule
from nvflare.private.fed.server.job_runner import JobRunner
from nvflare.private.fed.server.server_engine import ServerEngine
from nvflare.private.fed.utils.fed_utils import extract_participants

from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 20.0  # for a site's answer to a deployment
_STATUS_SECONDS = 5.0  # for its answer to which jobs it runs
_STARTED_ALREADY = "Client app already started."  # the old process is not reaped yet
_SITES_OF_ALL = "@ALL"

# ends of a job process that may not come again; the others (a faulty configuration, a class that
# is not allowed) are the job's fault, and FLARE ends the job for them
MAY_PASS = (
    JobReturnCode.EXCEPTION,
    JobReturnCode.INFRASTRUCTURE_ERROR,
    JobReturnCode.ABORTED,
)

# a job process that ended before it told its client that it works
NEVER_BEGAN = JobReturnCode.INFRASTRUCTURE_ERROR

FAILURES = Assumption(
    "a site reports the end of a job process to process_job_failure(request), registered on the "
    "server's cell, and the job runner waits for it (is_client_outcome_pending, "
    "resolve_client_outcome)",
    lambda: (
        takes(FederatedServer.process_job_failure, "request")
        and uses(FederatedServer.process_job_failure, "fail_run", "resolve_client_outcome")
        and uses(
            FederatedServer._register_cellnet_cbs, "register_request_cb", "process_job_failure"
        )
        and takes(JobRunner.is_client_outcome_pending, "job_id", "client_name")
        and takes(JobRunner.resolve_client_outcome, "job_id", "client_name")
    ),
)
DEATHS = Assumption(
    "a server tells a job's process of a site that is gone by _notify_dead_job(client, job_id, "
    "reason), from heart beats, from dead clients and from nowhere else",
    lambda: (
        takes(FederatedServer._notify_dead_job, "client", "job_id", "reason")
        and uses(FederatedServer._notify_dead_job, "engine", "notify_dead_job")
        and uses(FederatedServer._sync_client_jobs, "_notify_dead_job")
        and uses(FederatedServer.notify_dead_client, "_notify_dead_job")
    ),
)
PARTICIPANTS = Assumption(
    "run_processes[job][PARTICIPANTS] are a running job's clients by token, and its process asks "
    "for them (GET_CLIENTS)",
    lambda: (
        uses(FederatedServer._listen_command, "run_processes", "PARTICIPANTS", "CLIENTS")
        and uses(ServerEngine.sync_clients_from_main_process, "_retrieve_clients_data")
        and takes(ServerEngine._retrieve_clients_data, "job_id")
        and takes(ClientManager.set_clients, "clients")
        and uses(ClientManager.heartbeat, "last_connect_time")
    ),
)
STARTS = Assumption(
    "a job is started at a site by check_client_resources, a deployment message and "
    "start_client_job; its outcome is waited for in _pending_client_outcomes",
    lambda: (
        takes(ServerEngine.check_client_resources, "job", "resource_reqs", "fl_ctx")
        and takes(ServerEngine.start_client_job, "job", "client_sites", "fl_ctx")
        and takes(JobRunner._make_deploy_message, "job", "app_data", "app_name", "fl_ctx")
        and uses(JobRunner._start_run, "_pending_client_outcomes", "start_client_job")
        and uses(JobRunner.run, "running_jobs")
        and _STARTED_ALREADY in ClientEngine.start_app.__code__.co_consts
    ),
)
AGAIN = Assumption(
    "a job that is SUBMITTED and has no tag 'scheduled' in its folder of the store is scheduled, "
    "whatever it was before",
    lambda: (
        job_def_manager._OBJ_TAG_SCHEDULED == "scheduled"
        and uses(SimpleJobDefManager.get_jobs_to_schedule, "_scan")
        and hasattr(FilesystemStorage, "_object_path")
        and takes(SimpleJobDefManager.set_status, "jid", "status", "fl_ctx")
        and takes(JobRunner.abort_client_run, "job_id", "client_sites", "fl_ctx")
    ),
)


STOPS = Assumption(
    "a job that waits is stopped by its status, and one that runs by job_runner.stop_run(job_id, "
    "fl_ctx)",
    lambda: (
        uses(JobCommandModule.abort_job, "FINISHED_ABORTED", "stop_run", "set_status")
        and takes(JobRunner.stop_run, "job_id", "fl_ctx")
    ),
)
DELETIONS = Assumption(
    "a site's client removes its folder of a job at the request DELETE_RUN with the header JOB_ID",
    lambda: (
        uses(DeleteRunNumberProcessor.process, "JOB_ID", "delete_run")
        and takes(ClientEngine.delete_run, "job_id")
    ),
)


class StartFailed(Exception):
    """A job could not be started at a site; says why."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job with a process at this server."""

    job_id: str
    min_sites: int
    aborted: bool  # somebody ended it
    sites: frozenset[str]  # that take part now


# ----------------------------------------------------------------------------- what is heard


@rests_on(FAILURES)
def hear_failures(server: Any, take: Callable[[str, str, int, str], bool]) -> None:
    """Be told of a site's job process that ended before its job, before the job is ended for it.

    Args:
        take: gets job, site, exit code and FLARE's reason, of an end that may not come again
            (MAY_PASS) while the job runs; true: FLARE does nothing about it.
    """
    plain, engine = server.process_job_failure, server.engine

    def failure(request: Any) -> Any:
        told = request.payload
        client = server.client_manager.clients.get(request.get_header(CellMessageHeaderKeys.TOKEN))
        if client is None or not isinstance(told, dict):
            return plain(request)
        job_id = str(told.get(JobFailureMsgKey.JOB_ID))
        code = told.get(JobFailureMsgKey.CODE)
        runner = engine.job_runner
        if (
            code not in MAY_PASS
            or job_id not in engine.run_processes
            or job_id in engine.exception_run_processes
            or not runner.is_client_outcome_pending(job_id, client.name)
            or not take(job_id, client.name, code, str(told.get(JobFailureMsgKey.REASON)))
        ):
            return plain(request)
        return make_reply(ReturnCode.OK, "", None)

    server.cell.register_request_cb(
        channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.REPORT_JOB_FAILURE, cb=failure
    )


@rests_on(DEATHS)
def hold_deaths(server: Any, holds: Callable[[str, str, str], bool]) -> Callable[[str, str], None]:
    """Be asked before a job's process is told that a site is gone.

    Args:
        holds: gets job, site and FLARE's reason; true: the process is not told.

    Returns:
        tells a job's process of a site that is gone: job, site. It asks `holds` too.
    """
    plain = server._notify_dead_job

    def notify(client: Any, job_id: str, reason: str) -> None:
        if not holds(job_id, client.name, reason):
            plain(client, job_id, reason)

    def tell(job_id: str, site: str) -> None:
        for client in _participants(server.engine, job_id).values():
            if client.name == site:
                notify(client, job_id, "its job process ended")

    server._notify_dead_job = notify
    return tell


# -------------------------------------------------------------------------------- running jobs


@rests_on(PARTICIPANTS, STARTS)
def running_job(engine: Any, job_id: str) -> RunningJob | None:
    """A job that runs here, if it does."""
    job = engine.job_runner.running_jobs.get(job_id)
    if job is None or job_id not in engine.run_processes:
        return None
    return RunningJob(
        job_id, int(job.min_sites or 1), bool(job.run_aborted), sites_of(engine, job_id)
    )


@rests_on(PARTICIPANTS)
def sites_of(engine: Any, job_id: str) -> frozenset[str]:
    """Sites that take part in a job that has a process here, from its very start on."""
    return frozenset(client.name for client in _participants(engine, job_id).values())


@rests_on(PARTICIPANTS, STARTS)
def running_jobs(engine: Any) -> list[RunningJob]:
    """All jobs that run here."""
    found = [running_job(engine, job_id) for job_id in list(engine.run_processes)]
    return [job for job in found if job is not None]


@rests_on(STARTS, PARTICIPANTS)
def is_meant_for(engine: Any, job_id: str, site: str) -> bool:
    """Whether the job that was submitted goes to a site."""
    job = engine.job_runner.running_jobs.get(job_id)
    return job is not None and _app_of(job, site) is not None


@rests_on(PARTICIPANTS)
def leave_out(engine: Any, job_id: str, site: str) -> None:
    """Take a site out of a running job: its next round does not wait for it."""
    participants = _participants(engine, job_id)
    kept = {token: client for token, client in participants.items() if client.name != site}
    _set_participants(engine, job_id, kept)


@rests_on(FAILURES)
def give_up_outcome(engine: Any, job_id: str, site: str) -> None:
    """The job's end does not wait for word from a site."""
    engine.job_runner.resolve_client_outcome(job_id, site)


@rests_on(STARTS, PARTICIPANTS)
def start_at_site(engine: Any, job_id: str, site: str, seconds: float = 30.0) -> None:
    """Start a running job at one site (again), as FLARE does for all sites of a new job.

    The site checks signature, policy and classes as it does for a new job. Its job process gets
    the task that the running round has for it, unless it was answered.

    Args:
        seconds: for an old process of the job to be gone at the site.

    Raises:
        StartFailed: the site is not connected, refused, or did not answer.
    """
    runner = engine.job_runner
    deadline = time.monotonic() + seconds
    with engine.new_context() as ctx:
        job, client = runner.running_jobs.get(job_id), engine.get_client_from_name(site)
        if job is None or job_id not in engine.run_processes:
            raise StartFailed("the job ended")
        if client is None:
            raise StartFailed("the site is not connected")
        app = _app_of(job, site)
        if app is None:
            raise StartFailed("the job is not meant for it")
        while True:
            enough, reserved = engine.check_client_resources(job, {site: {}}, ctx).get(
                site, (False, "")
            )
            if not enough:
                raise StartFailed(str(reserved) or "the site did not answer")
            message = runner._make_deploy_message(job, job.get_application(app, ctx), app, ctx)
            answers = engine.server.admin_server.send_requests_and_get_reply_dict(
                {client.token: message}, timeout_secs=_REQUEST_SECONDS
            )
            _require_ok(answers.get(client.token), "the deployment")
            # before the start: the job's process asks who takes part, and knows a site by its token
            others = {
                token: one
                for token, one in _participants(engine, job_id).items()
                if one.name != site
            }
            _set_participants(engine, job_id, {**others, client.token: client})
            job.meta[JobMetaKey.JOB_CLIENTS] = [
                one.to_dict() for one in _participants(engine, job_id).values()
            ]
            with runner.lock:
                runner._pending_client_outcomes.setdefault(job_id, set()).add(site)
            started = engine.start_client_job(job, {site: DispatchInfo(app, {}, reserved)}, ctx)
            reply = started[0].reply if started else None
            _require_ok(reply, "the start")
            if reply is None or _STARTED_ALREADY not in str(reply.body):
                return
            if time.monotonic() > deadline:
                raise StartFailed("an old process of the job does not end there")
            time.sleep(1.0)


def _require_ok(reply: Message | None, what: str) -> None:
    if reply is None:
        raise StartFailed(f"the site did not answer to {what}")
    if reply.get_header(MsgHeader.RETURN_CODE, AdminCode.OK) != AdminCode.OK:
        raise StartFailed(f"the site refused {what}: {reply.body}")


def _app_of(job: Job, site: str) -> str | None:
    for app, entry in job.get_deployment().items():
        names = extract_participants(entry)
        if site in names or [name.upper() for name in names] == [_SITES_OF_ALL]:
            return str(app)
    return None


def _participants(engine: Any, job_id: str) -> dict[str, Any]:
    info = engine.run_processes.get(job_id) or {}
    return dict(info.get(RunProcessKey.PARTICIPANTS) or {})


def _set_participants(engine: Any, job_id: str, participants: dict[str, Any]) -> None:
    info = engine.run_processes.get(job_id)
    if info is not None:
        info[RunProcessKey.PARTICIPANTS] = participants  # a new dict: others may be reading the old


# -------------------------------------------------------------------- at the job's own process


@rests_on(PARTICIPANTS)
def follow_participants(engine: Any, job_id: str) -> dict[str, float]:
    """Let a job's process know who takes part now.

    Returns:
        when the server's main process heard of each of them last, in seconds since 1970-01-01 UTC.
    """
    clients = engine._retrieve_clients_data(job_id) or {}
    if clients and set(clients) != set(engine.client_manager.clients):
        engine.client_manager.set_clients(clients)
    return {client.name: float(client.last_connect_time) for client in clients.values()}


# ---------------------------------------------------------------------------- the same job again


@rests_on(AGAIN)
def jobs_of_before(fl_ctx: FLContext) -> list[str]:
    """Jobs that ran when an earlier process of this server ended; to ask while it starts."""
    manager = fl_ctx.get_engine().get_component(SystemComponents.JOB_MANAGER)
    found = manager.get_jobs_by_status([RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx)
    return [job.job_id for job in found]


@rests_on(AGAIN)
def waiting_again(fl_ctx: FLContext) -> list[str]:
    """Jobs that were put back by `put_back` and are not let go yet."""
    manager = fl_ctx.get_engine().get_component(SystemComponents.JOB_MANAGER)
    found = manager.get_jobs_by_status([RunStatus.SUBMITTED], fl_ctx)
    return [job.job_id for job in found if _scheduled_tag(manager, job.job_id, fl_ctx).exists()]


@rests_on(AGAIN)
def put_back(engine: Any, job_id: str) -> None:
    """Make a job SUBMITTED that had been started, and keep it from being scheduled yet.

    It can be aborted and deleted as a new one meanwhile.
    """
    with engine.new_context() as ctx:
        manager = engine.get_component(SystemComponents.JOB_MANAGER)
        _scheduled_tag(manager, job_id, ctx).touch()
        manager.set_status(job_id, RunStatus.SUBMITTED, ctx)


@rests_on(AGAIN)
def give_up(engine: Any, job_id: str) -> None:
    """Mark a job of an earlier process of this server as FINISHED:ABANDONED."""
    with engine.new_context() as ctx:
        manager = engine.get_component(SystemComponents.JOB_MANAGER)
        manager.set_status(job_id, RunStatus.ABANDONED, ctx)


@rests_on(AGAIN)
def let_go(engine: Any, job_id: str) -> bool:
    """Let a job that was put back be scheduled; false where somebody ended it meanwhile."""
    with engine.new_context() as ctx:
        manager = engine.get_component(SystemComponents.JOB_MANAGER)
        if status_of(engine, job_id) != RunStatus.SUBMITTED.value:
            return False
        manager.update_meta(job_id, _NEVER_SCHEDULED, ctx)
        _scheduled_tag(manager, job_id, ctx).unlink(missing_ok=True)
        return True


@rests_on(STOPS)
def stop_job(engine: Any, job_id: str) -> str:
    """Stop a job that waits or runs, as FLARE's own command; why it could not be, or nothing."""
    with engine.new_context() as ctx:
        if status_of(engine, job_id) in (RunStatus.SUBMITTED.value, RunStatus.DISPATCHED.value):
            manager = engine.get_component(SystemComponents.JOB_MANAGER)
            manager.set_status(job_id, RunStatus.FINISHED_ABORTED, ctx)
            return ""
        return str(engine.job_runner.stop_run(job_id, ctx) or "")


@rests_on(STARTS)
def end_at_site(engine: Any, job_id: str, site: str) -> None:
    """End a running job's process at one connected site."""
    with engine.new_context() as ctx:
        engine.job_runner.abort_client_run(job_id, [site], ctx)


@rests_on(DELETIONS)
def delete_at_sites(engine: Any, job_id: str, seconds: float) -> dict[str, str]:
    """Have a job that has ended removed at all connected sites.

    Returns:
        what each site answered; empty where it did not.
    """
    requests, names = {}, {}
    for client in engine.get_clients():
        message = Message(topic=TrainingTopic.DELETE_RUN, body="")
        message.set_header(RequestHeader.JOB_ID, job_id)
        requests[client.token], names[client.token] = message, client.name
    answers = engine.server.admin_server.send_requests_and_get_reply_dict(
        requests, timeout_secs=seconds
    )
    return {
        names[token]: "" if reply is None else str(reply.body) for token, reply in answers.items()
    }


def min_sites_of(engine: Any, job_id: str) -> int:
    """How many sites a job needs."""
    with engine.new_context() as ctx:
        job = engine.get_component(SystemComponents.JOB_MANAGER).get_job(job_id, ctx)
        return int(job.min_sites or 1)


def status_of(engine: Any, job_id: str) -> str | None:
    """FLARE's word for how a job is; None where there is no such job."""
    with engine.new_context() as ctx:
        job = engine.get_component(SystemComponents.JOB_MANAGER).get_job(job_id, ctx)
        return None if job is None else str(job.meta.get(JobMetaKey.STATUS.value))


def end_at_sites(engine: Any, job_id: str, sites: Collection[str], seconds: float) -> list[str]:
    """End what connected sites still run of a job that has no process here.

    Args:
        sites: that may run it.
        seconds: for them to end it.

    Returns:
        the sites that still run it. A new start would be answered "already started" there.
    """
    deadline, told = time.monotonic() + seconds, False
    while still := [site for site, runs in asked_sites(engine, job_id, sites).items() if runs]:
        if not told:
            with engine.new_context() as ctx:
                engine.job_runner.abort_client_run(job_id, still, ctx)
            told = True
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return still


@rests_on(STARTS)
def asked_sites(engine: Any, job_id: str, sites: Collection[str]) -> dict[str, bool]:
    """Whether a job has a process there, as each connected site that answers says itself."""
    requests = {}
    names = {}
    for site in sites:
        client = engine.get_client_from_name(site)
        if client is not None:
            message = Message(topic=TrainingTopic.CHECK_STATUS, body="")
            message.set_header(RequestHeader.JOB_ID, job_id)
            requests[client.token], names[client.token] = message, site
    answers: dict[str, Any] = {}
    with contextlib.suppress(RuntimeError):
        answers = engine.server.admin_server.send_requests_and_get_reply_dict(
            requests, timeout_secs=_STATUS_SECONDS
        )
    return {
        names[token]: job_id in str(reply.body)
        for token, reply in answers.items()
        if reply is not None
    }


_NEVER_SCHEDULED = {
    JobMetaKey.SCHEDULE_COUNT.value: 0,
    JobMetaKey.LAST_SCHEDULE_TIME.value: 0.0,
}


def _scheduled_tag(manager: Any, job_id: str, fl_ctx: FLContext) -> Path:
    store = manager._get_job_store(fl_ctx)
    folder = Path(store._object_path(manager.job_uri(job_id)))
    return folder / str(job_def_manager._OBJ_TAG_SCHEDULED)


def connected_sites(engine: Any) -> Sequence[str]:
    """Names of the sites that are connected."""
    return sorted(client.name for client in engine.get_clients())
