"""What we assume of FLARE, one test each. One that fails names what an upgrade of FLARE changed."""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import json
import logging
import pkgutil
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import nvflare
import pytest
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import (
    ConfigVarName,
    FLContextKey,
    ReturnCode,
    ServerCommandKey,
    ServerCommandNames,
    SystemComponents,
)
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.job_def import Job
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.fl_context_utils import gen_new_peer_ctx
from nvflare.apis.workspace import Workspace
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet import cell as cell_module
from nvflare.fuel.f3.cellnet.cell import Adapter
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, Encoding, MessageHeaderKey
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.f3.drivers.grpc_driver import GRPC_DEFAULT_OPTIONS, GrpcDriver
from nvflare.fuel.f3.message import Message as CellMessage
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.f3.streaming import blob_streamer, byte_receiver
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.fuel.f3.streaming.stream_types import BlobSizeError, StreamError, StreamFuture
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.fuel.hci.client.api import AdminAPI
from nvflare.fuel.hci.conn import Connection
from nvflare.fuel.hci.proto import MetaStatusValue
from nvflare.fuel.hci.server.authz import AuthzFilter
from nvflare.fuel.hci.server.constants import ConnProps
from nvflare.fuel.hci.server.reg import ServerCommandRegister
from nvflare.fuel.sec.audit import Auditor, AuditService
from nvflare.fuel.sec.authz import AuthorizationService
from nvflare.fuel.utils import app_config_utils, fobs
from nvflare.fuel.utils.config_service import ConfigService
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.private.admin_defs import Message, MsgHeader
from nvflare.private.admin_defs import ReturnCode as AdminReturnCode
from nvflare.private.defs import CellMessageHeaderKeys, RequestHeader, TrainingTopic
from nvflare.private.fed.app.client import client_train
from nvflare.private.fed.app.server import server_train
from nvflare.private.fed.authenticator import Authenticator
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.communicator import Communicator
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.job_cmds import JobCommandModule
from nvflare.private.fed.server.job_runner import JobRunner
from nvflare.private.fed.server.server_command_agent import ServerCommandAgent
from nvflare.private.fed.server.server_commands import SubmitUpdateCommand
from nvflare.private.fed.server.server_engine import ServerEngine
from nvflare.private.fed.server.server_runner import ServerRunner
from nvflare.private.fed.server.sys_cmd import SystemCommandModule
from nvflare.security.security import FLAuthorizer
from nvflare.tool.cert import cert_commands

import fedfms
from fedfms.errors import FederationError
from fedfms.flare import internals
from fedfms.flare.executor import SERVER_MODELS
from fedfms.flare.internals import (
    audit,
    client,
    commands,
    console,
    job,
    kit,
    process,
    rejoin,
    settings,
    streams,
    uploads,
    version,
    wire,
)
from fedfms.flare.internals import server as flare_server
from fedfms.flare.internals.state import CertificateState
from fedfms.flare.internals.version import Assumption, FlareChanged
from fedfms.flare.kit import AUTHORIZATION
from fedfms.flare.simulate import PROJECT, SERVER, provision

MODULES = [found.name for found in pkgutil.iter_modules(internals.__path__)]
ASSUMPTIONS = {
    f"{module}.{name}": value
    for module in MODULES
    for name, value in vars(importlib.import_module(f"{internals.__name__}.{module}")).items()
    if isinstance(value, Assumption)
}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of FLARE's provisioner, as a simulation gets them."""
    return provision(tmp_path_factory.mktemp("kits") / "kits", ["site-1"], 8102)


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def context(**properties: Any) -> FLContext:
    fl_ctx = FLContext()
    for name, value in properties.items():
        fl_ctx.set_prop(getattr(FLContextKey, name), value, private=True, sticky=False)
    return fl_ctx


# ------------------------------------------------------------------------------- the wall itself


@pytest.mark.parametrize("name", ASSUMPTIONS)
def test_what_a_process_looks_at_when_it_starts_holds(name: str) -> None:
    assert ASSUMPTIONS[name].is_true(), ASSUMPTIONS[name].what


@pytest.mark.parametrize("name", ASSUMPTIONS)
def test_each_assumption_has_a_test_of_its_own_below(name: str) -> None:
    name = name.rpartition(".")[2]
    assert re.search(
        rf"\n# {name}\n(@[^\n]*\n( [^\n]*\n\)\n)?)?def test_", Path(__file__).read_text()
    )


def test_a_touch_whose_assumption_fails_says_what_and_which_version_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(ServerEngine, "shutdown_server")
    with pytest.raises(FlareChanged, match="does not hold that a server waits") as caught:
        process.server_main(lambda stop: None)
    assert caught.value.fix.endswith(f"pip install nvflare=={version.TESTED[0]}")
    with pytest.raises(FlareChanged, match=r"has engine\.shutdown_server\(\)"):
        version.check("process", "server")


def test_all_that_fails_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(JobRunner, "update_unfinished_jobs")
    monkeypatch.delattr(ClientManager, "is_client_disabled")
    broken = [one.what for one in version.broken_assumptions("server", "process")]
    assert [what.split()[0] for what in broken] == [
        "client_manager",
        "job_runner.update_unfinished_jobs(fl_ctx)",
    ]


def test_an_untested_flare_is_one_line_in_the_log_and_a_tested_one_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert nvflare.__version__ in version.TESTED
    with caplog.at_level(logging.INFO):
        version.check("process")
        assert caplog.messages == []
        monkeypatch.setattr(nvflare, "__version__", "2.10.0")
        version.check("process")
    tested = ", ".join(version.TESTED)
    assert caplog.messages == [
        f"NVFLARE 2.10.0 was not tested with this version of fedfms (tested: {tested})"
    ]


# --------------------------------------------------------------------------------------- audit


# AUDIT
def test_the_audit_waits_for_room_and_writes_every_line_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.log"
    monkeypatch.setattr(AuditService, "the_auditor", Auditor(str(path)))
    audit.let_audit_wait()
    audit.let_audit_wait()  # again is no harm
    assert AuditService.add_event("ann", "first")

    def no_room(path: Path, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(audit, "append_whole", no_room)
        assert AuditService.add_event("ann", "second")
        assert AuditService.add_job_event("job-1", msg="third")
    assert path.read_text().count("\n") == 1
    assert AuditService.add_event("ann", "fourth")
    lines = path.read_text().splitlines()
    assert [
        word in line
        for word, line in zip(("first", "second", "third", "fourth"), lines, strict=True)
    ] == ([True] * 4)
    with monkeypatch.context() as broken:
        broken.setattr(audit, "append_whole", lambda *given: (_ for _ in ()).throw(OSError(5, "")))
        with pytest.raises(OSError):
            AuditService.add_event("ann", "fifth")


# ------------------------------------------------------------------------------------- streams


def received(number: int, ttl: float) -> RxTask:
    task = RxTask(number, f"site-{number}", None)
    RxTask.rx_task_map[(task.origin, number)] = task
    task._schedule_remove_task(ttl)
    return task


# TIMERS
def test_streams_are_forgotten_in_their_time_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_receiver, "threading", threading)
    monkeypatch.setattr(RxTask, "rx_task_map", {})
    streams.forget_in_one_thread()
    streams.forget_in_one_thread()  # again is no harm
    before = threading.active_count()
    late = [received(number, 60.0) for number in range(300)]
    soon = [received(1000 + number, 3.0) for number in range(300)]
    assert threading.active_count() <= before + 1
    assert len(RxTask.rx_task_map) == 600
    deadline = time.monotonic() + 20
    while len(RxTask.rx_task_map) > 300:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {task.sid for task in RxTask.rx_task_map.values()} == {task.sid for task in late}
    assert all(task.cleanup_timer is None for task in soon)
    for task in late:
        task._remove_task()  # what FLARE does when the sender says that it is over
    assert not RxTask.rx_task_map


# ------------------------------------------------------------------------------------- process


# SERVER_STARTS
def test_a_servers_main_finds_the_hook_in_its_module() -> None:
    assert parameters(server_train.main) == ["args"]
    assert "create_admin_server" in server_train.main.__code__.co_names
    assert callable(server_train.create_admin_server)


# CLIENT_STARTS
def test_a_clients_main_registers_and_then_finds_the_hook_in_its_module() -> None:
    names = client_train.main.__code__.co_names
    assert names.index("register") < names.index("create_admin_agent")
    wanted = ["req_processors", "federated_client", "client_engine"]
    assert parameters(client_train.create_admin_agent) == wanted


# SERVER_STOPS
def test_a_server_stops_by_its_engine_and_waits_for_shutdown_period() -> None:
    assert parameters(ServerEngine.shutdown_server) == []
    assert parameters(FederatedServer.__init__).count("shutdown_period") == 1
    assert "> self.shutdown_period" in inspect.getsource(FederatedServer.__mro__[1])


# CLIENT_STOPS
def test_a_client_sends_signs_of_life_until_heartbeat_done() -> None:
    looks = [f for f in vars(Communicator).values() if inspect.isfunction(f)]
    assert sum("heartbeat_done" in f.__code__.co_names for f in looks) >= 2  # set, and asked
    assert parameters(ClientEngine.shutdown) == []


# REQUESTS
def test_what_answers_the_server_at_a_site_can_be_exchanged() -> None:
    before, asked = list(ClientRequestProcessors.request_processors), []
    try:
        process.refuse_requests({process.SHELL: "no"}, asked.append)
        (one,) = [
            p for p in ClientRequestProcessors.request_processors if process.SHELL in p.get_topics()
        ]
        reply = one.process(Message(process.SHELL, "ls /"), None)
    finally:
        ClientRequestProcessors.request_processors[:] = before
    assert (reply.get_header(MsgHeader.RETURN_CODE), reply.body) == (AdminReturnCode.ERROR, "no")
    assert asked == [process.SHELL]


# LOGINS
def test_a_login_goes_through_the_communicator_and_raises_what_the_server_said() -> None:
    assert parameters(Communicator.client_registration) == ["client_name", "project_name", "fl_ctx"]
    assert "FLCommunicationError" in Authenticator.authenticate.__code__.co_names


# MONITOR
def test_the_monitor_runs_a_main_function_with_arguments_of_its_own() -> None:
    wanted = ["main_func", "run_dir", "shutdown_grace_time", "cleanup_grace_time", "kwargs"]
    assert parameters(MainProcessMonitor.run) == wanted


# LOG_FILES
def test_log_settings_of_ours_go_before_flares(kits: Path, tmp_path: Path) -> None:
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    default = (kits / "site-1" / "local" / "log_config.json.default").read_text()
    (tmp_path / "local" / "log_config.json.default").write_text(default)
    process.set_log_level(tmp_path / "local", "INFO")
    found = Path(Workspace(str(tmp_path)).get_log_config_file_path())
    assert found == tmp_path / "local" / "log_config.json"
    loggers = json.loads(found.read_text())["loggers"]
    assert loggers["root"]["level"] == "INFO"
    assert loggers["nvflare.fuel.f3"] == {"level": "WARNING"}


def test_a_message_with_a_whole_model_is_short_in_each_log(kits: Path, tmp_path: Path) -> None:
    default = (kits / "site-1" / "local" / "log_config.json.default").read_text()
    (tmp_path / "log_config.json.default").write_text(default)
    process.set_log_level(tmp_path, "DEBUG")
    code = (
        "import json, logging, logging.config\n"
        "logging.config.dictConfig(json.load(open('log_config.json')))\n"
        "log = logging.getLogger('nvflare.fuel.f3.cellnet.cell')\n"
        "log.debug(f'incoming data={bytes(2**20)}')\n"
        "log.error('%s of %s', 'x' * 5000, 'y')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert "(4194321 characters)" in ran.stdout and ran.stderr == ""
    files = {path.name: path.read_text() for path in tmp_path.glob("*log*") if path.is_file()}
    for name in ("log.txt", "log.json", "error_log.txt"):
        assert "(5005 characters)" in files[name]
        assert len(files[name]) < 8000
    assert len(ran.stdout) < 8000


# -------------------------------------------------------------------------------------- server


# CHALLENGES
def test_a_challenge_is_answered_by_a_callback_on_the_servers_cell() -> None:
    assert parameters(FederatedServer.client_challenge) == ["request"]
    names = FederatedServer._register_cellnet_cbs.__code__.co_names
    assert {"cell", "register_request_cb", "SERVER_MAIN", "Challenge", "client_challenge"} <= {
        *names
    }


# REGISTRATIONS
def test_a_site_is_taken_in_by_a_callback_on_the_servers_cell() -> None:
    assert parameters(FederatedServer.register_client) == ["request"]
    assert "register_client" in FederatedServer._register_cellnet_cbs.__code__.co_names
    text = inspect.getsource(FederatedServer.register_client)
    assert "data = request.payload" in text and "data.get_peer_context()" in text
    assert "CellMessageHeaderKeys.TOKEN: client.token" in text


# CONNECTED
def test_a_server_knows_its_clients_by_token_and_by_name() -> None:
    manager, client = ClientManager(), Client("site-1", "token")
    assert (manager.clients, manager.name_to_clients) == ({}, {})
    assert client.last_connect_time > 1e9 and client.token == "token"
    assert manager.is_client_disabled("site-1") is False
    manager.disabled_clients.add("site-1")
    assert manager.is_client_disabled("site-1") is True


# RUNNING
def test_a_server_knows_which_jobs_run_and_whose_cell_asks() -> None:
    assert "run_processes" in ServerEngine.__init__.__code__.co_names
    assert FQCN.get_root("site-1.check-0a") == FQCN.get_root("site-1") == "site-1"


# UNFINISHED_JOBS
def test_a_job_runner_can_give_up_jobs_that_nobody_runs() -> None:
    assert parameters(JobRunner.update_unfinished_jobs) == ["fl_ctx"]
    text = inspect.getsource(JobRunner.update_unfinished_jobs)
    assert "job_manager.set_status(job.job_id, RunStatus.ABANDONED, fl_ctx)" in text


# STATISTICS
def test_a_servers_engine_asks_a_jobs_process_for_its_figures() -> None:
    asked = []

    def answer(**about: object) -> dict[str, str]:
        asked.append(about)
        return {"a": "b"}

    engine = SimpleNamespace(send_command_to_child_runner_process=answer)
    assert ServerEngine.show_stats(engine, "j") == {"a": "b"}
    assert [(one["job_id"], one["command_name"]) for one in asked] == [("j", "show_stats")]


# SCHEDULER
def test_how_many_jobs_run_at_once_and_how_long_one_waits_can_be_set() -> None:
    scheduler = DefaultJobScheduler(max_jobs=1)
    engine = SimpleNamespace(get_component={SystemComponents.JOB_SCHEDULER: scheduler}.get)
    flare_server.set_scheduler(engine, 2)
    context = FLContext()
    for job_id, full in (("a", False), ("b", True)):
        context.set_prop(FLContextKey.EVENT_DATA, {"job_id": job_id}, private=True, sticky=False)
        scheduler.handle_event(EventType.JOB_STARTED, context)
        assert scheduler._exceed_max_jobs(context) is full
    waits = Job("j", {}, {"app": ["@ALL"]}, {"schedule_count": 500})
    scheduler.scheduled_jobs.clear()
    tried, given_up = [], []
    scheduler._try_job = lambda job, ctx: tried.append(job) or (1, None, "a site pauses")
    scheduler._do_schedule_job([waits], scheduling_context(), [], given_up)
    assert tried == [waits] and given_up == []


def scheduling_context() -> FLContext:
    context = FLContext()
    context.get_engine = lambda: SimpleNamespace(
        new_context=lambda: contextlib.nullcontext(context)
    )
    return context


# HEARTBEATS
def test_a_sites_property_comes_with_each_sign_of_life_and_its_name_by_its_token() -> None:
    context = FLContext()
    context.set_prop("said", {"x": 1}, private=False, sticky=False)
    data = Shareable()
    data.set_peer_context(gen_new_peer_ctx(context))
    assert "gen_new_peer_ctx(fl_ctx)" in inspect.getsource(Communicator.send_heartbeat)
    manager = ClientManager()
    manager.clients["t"] = Client("site-1", "t")
    registered: dict[str, Any] = {}
    server = SimpleNamespace(
        client_heartbeat=lambda request: "reply",
        client_manager=manager,
        cell=SimpleNamespace(
            register_request_cb=lambda channel, topic, cb: registered.update({topic: cb})
        ),
    )
    heard = []
    flare_server.hear_signs_of_life(server, "said", lambda site, said: heard.append((site, said)))
    text = inspect.getsource(FederatedServer._register_cellnet_cbs)
    assert "topic=CellChannelTopic.HEART_BEAT" in text
    for token in ("t", "of nobody"):
        request = CellMessage({CellMessageHeaderKeys.TOKEN: token}, data)
        assert registered[CellChannelTopic.HEART_BEAT](request) == "reply"
    assert heard == [("site-1", {"x": 1})]


# -------------------------------------------------------------------------------------- client


# REMOVALS
def test_a_site_hears_of_a_job_that_the_server_removes_unless_it_runs_there() -> None:
    class Engine(ClientEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            self.removed: list[str] = []

        def get_all_job_ids(self) -> list[str]:
            return ["running"]

        def delete_run(self, job_id: str) -> str:
            self.removed.append(job_id)
            return ""

    before, told, engine = list(ClientRequestProcessors.request_processors), [], Engine()

    def remove(job_id: str) -> str:
        told.append(job_id)
        return "gone"

    try:
        client.hear_removals(remove)
        (one,) = [
            p
            for p in ClientRequestProcessors.request_processors
            if TrainingTopic.DELETE_RUN in p.get_topics()
        ]
        said = []
        for job_id in ("running", "old"):
            message = Message(TrainingTopic.DELETE_RUN, "")
            message.set_header(RequestHeader.JOB_ID, job_id)
            said.append(one.process(message, engine).body)
    finally:
        ClientRequestProcessors.request_processors[:] = before
    assert (said, told, engine.removed) == (["still-running", "gone"], ["old"], ["old"])
    text = inspect.getsource(client_train.main)
    assert text.index("federated_client.register(") < text.index("deployer.req_processors")


# ------------------------------------------------------------------------------------ commands


# MODULES
def test_a_server_takes_a_command_that_was_added_while_it_started() -> None:
    text = inspect.getsource(server_train.main)
    assert text.index("deployer.deploy(") < text.index("create_admin_server(")
    server = SimpleNamespace(cmd_modules=["FLARE's"])
    commands.add_commands(server, [commands.Command("c", "what", [], False, lambda asked: {})])
    assert server.cmd_modules[0] == "FLARE's" and len(server.cmd_modules) == 2


def asked_of_a_server(
    monkeypatch: pytest.MonkeyPatch, role: str, user: str, command: str, submitter: str
) -> tuple[list[commands.Asked], dict[str, Any]]:
    """What a command of ours gets, and what FLARE's server answers, by FLARE's own filters."""
    done: list[commands.Asked] = []

    def do(asked: commands.Asked) -> dict[str, Any]:
        done.append(asked)
        return {"done": True}

    rights = {"see": [commands.SEE], "stop": [commands.STOP], "forget": [commands.DELETE]}
    rights |= {"resume": [commands.SUBMIT, commands.STOP]}
    server = SimpleNamespace(cmd_modules=[])
    commands.add_commands(
        server, [commands.Command(name, "", one, name != "see", do) for name, one in rights.items()]
    )
    monkeypatch.setattr(
        AuthorizationService, "the_authorizer", FLAuthorizer("server_org", AUTHORIZATION)
    )
    meta = {"job_id": JOB_ID, "submitter_name": submitter, "submitter_org": f"of_{submitter}"}
    jobs = SimpleNamespace(get_job=lambda jid, fl_ctx: SimpleNamespace(meta=meta))
    engine = SimpleNamespace(job_def_manager=jobs, new_context=FLContext)
    register = ServerCommandRegister(engine)
    register.add_filter(AuthzFilter())
    register.register_module(server.cmd_modules[0])
    register.finalize()
    props = {ConnProps.USER_NAME: user, ConnProps.USER_ORG: f"of_{user}", ConnProps.USER_ROLE: role}
    conn = Connection(props=props)
    register.process_command(conn, command if command == "see" else f"{command} {JOB_ID}")
    return done, json.loads(conn.close())


JOB_ID = "6f0c7c0e-0000-4000-8000-000000000000"


MAY = [  # role, user, command on a run of bob's, whether
    ("project_admin", "ann", "stop", True),
    ("project_admin", "ann", "resume", True),
    ("project_admin", "ann", "forget", True),
    ("lead", "bob", "stop", True),  # his own
    ("lead", "bob", "resume", True),
    ("lead", "ann", "stop", False),
    ("lead", "ann", "resume", False),  # she may submit, and not end what is bob's
    ("lead", "ann", "forget", False),
    ("org_admin", "ann", "resume", False),
    ("member", "bob", "see", True),
    ("member", "bob", "stop", False),
    ("member", "bob", "forget", False),
]


# RIGHTS
@pytest.mark.parametrize(("role", "user", "command", "may"), MAY)
def test_the_server_asks_its_own_authorization_who_may_do_what_to_whose_run(
    monkeypatch: pytest.MonkeyPatch, role: str, user: str, command: str, may: bool
) -> None:
    done, said = asked_of_a_server(monkeypatch, role, user, command, submitter="bob")
    assert bool(done) is may
    status = said["meta"]["status"]
    assert status == (MetaStatusValue.OK if may else MetaStatusValue.NOT_AUTHORIZED)
    if may and command != "see":
        assert done[0] == commands.Asked(user, JOB_ID, "bob")


# SESSIONS
def test_a_session_gives_the_dict_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = asked_of_a_server(monkeypatch, "lead", "bob", "stop", submitter="bob")
    assert Session._get_dict_data(said) == {"answer": {"done": True}}
    assert parameters(Session._do_command) == ["command", "enforce_meta", "props"]
    assert "server_cmd_reg.get_command_entries(cmd_name)" in inspect.getsource(
        AdminAPI._get_command_detail
    )


# -------------------------------------------------------------------------------------- rejoin


# FAILURES
def test_the_end_of_a_sites_job_process_comes_by_a_callback_and_ends_the_job() -> None:
    assert parameters(FederatedServer.process_job_failure) == ["request"]
    assert "process_job_failure" in FederatedServer._register_cellnet_cbs.__code__.co_names
    text = inspect.getsource(FederatedServer.process_job_failure)
    assert text.index("is_client_outcome_pending") < text.index("fail_run(job_id")
    assert {101, 104, 9} == set(rejoin.MAY_PASS)
    assert not {102, 103} & set(rejoin.MAY_PASS)  # a class that is not allowed, a faulty file


# DEATHS
def test_a_death_reaches_a_jobs_process_through_one_method_of_the_server() -> None:
    told = []
    server = SimpleNamespace(
        _notify_dead_job=lambda client, job_id, reason: told.append((client.name, job_id)),
        engine=SimpleNamespace(run_processes={"j": {"_participants": {}}}),
    )
    rejoin.hold_deaths(server, lambda job_id, site, reason: site == "site-2")
    for name in ("site-1", "site-2"):
        server._notify_dead_job(SimpleNamespace(name=name), "j", "client dead")
    assert told == [("site-1", "j")]
    for method in (FederatedServer._sync_client_jobs, FederatedServer.notify_dead_client):
        assert "self._notify_dead_job(client, job_id, " in inspect.getsource(method)


# PARTICIPANTS
def test_a_jobs_process_learns_who_takes_part_from_the_servers_books() -> None:
    text = inspect.getsource(FederatedServer._listen_command)
    assert "self.engine.run_processes[job_id].get(RunProcessKey.PARTICIPANTS)" in text
    first, second = Client("site-1", "a"), Client("site-1", "b")
    engine = SimpleNamespace(client_manager=ClientManager())
    engine.client_manager.set_clients({"a": first})
    second.last_connect_time = 7.0  # what a heart beat sets, in the server's main process
    sent = fobs.loads(fobs.dumps({"b": second}))["b"]  # as it comes to the job's process
    engine._retrieve_clients_data = lambda job_id: {"b": sent}
    assert rejoin.follow_participants(engine, "j") == {"site-1": 7.0}
    assert engine.client_manager.clients == {"b": sent}
    engine._retrieve_clients_data = lambda job_id: None  # the main process does not answer
    assert rejoin.follow_participants(engine, "j") == {}
    assert engine.client_manager.clients == {"b": sent}


# STARTS
def test_a_job_is_started_at_a_site_by_check_deployment_and_start() -> None:
    text = inspect.getsource(JobRunner._deploy_job)
    assert "self._make_deploy_message(job, app_data, app_name, fl_ctx)" in text
    assert "admin_server.send_requests_and_get_reply_dict(" in text
    assert "engine.start_client_job(job, client_sites, fl_ctx)" in inspect.getsource(
        JobRunner._start_run
    )
    # the job process is in the books of running jobs only after this event
    started = inspect.getsource(JobRunner.run)
    assert started.index("self._start_run(") < started.index("self.running_jobs[job_id] =")


# AGAIN
def test_a_submitted_job_is_skipped_while_its_folder_has_the_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FilesystemStorage(root_dir=str(tmp_path / "store"))
    manager = SimpleJobDefManager(uri_root="/jobs")
    monkeypatch.setattr(manager, "_get_job_store", lambda fl_ctx: store)
    context = FLContext()
    meta = manager.create({"name": "x", "deploy_map": {"app": ["@ALL"]}}, b"zip", context)

    def to_schedule() -> list[str]:
        return [one.job_id for one in manager.get_jobs_to_schedule(context)]

    job_id = meta["job_id"]
    assert to_schedule() == [job_id]
    tag = rejoin._scheduled_tag(manager, job_id, context)
    tag.touch()
    assert to_schedule() == []
    tag.unlink()
    assert to_schedule() == [job_id]


# STOPS
def test_a_job_is_stopped_by_its_status_or_by_the_runner() -> None:
    text = inspect.getsource(JobCommandModule.abort_job)
    assert "in [RunStatus.SUBMITTED.value, RunStatus.DISPATCHED.value]" in text
    assert "message = job_runner.stop_run(job_id, fl_ctx)" in text


# DELETIONS
def test_a_site_removes_a_jobs_folder_when_the_server_asks_for_it() -> None:
    message = inspect.getsource(JobRunner._delete_run)
    assert "TrainingTopic.DELETE_RUN" in message and "RequestHeader.JOB_ID" in message
    assert "shutil.rmtree(job_id_folder)" in inspect.getsource(ClientEngine.delete_run)


# ------------------------------------------------------------------------------------- uploads


class JobProcess:
    """What `uploads` asks of a job's process: one site with a task, and what takes its answers."""

    def __init__(self) -> None:
        task = Task(name="train", data=Shareable())
        task.data.add_cookie(AppConstants.CONTRIBUTION_ROUND, 3)
        self.task = ClientTask(Client("site-1", "token-1"), task)
        self.taken: list[Any] = []
        communicator = WFCommServer()
        communicator._client_task_map[self.task.id] = self.task
        self.workflow = SimpleNamespace(controller=SimpleNamespace(communicator=communicator))
        self.server = SimpleNamespace(
            client_manager=SimpleNamespace(clients={"token-1": self.task.client}),
            command_agent=SimpleNamespace(execute_command=self.taken.append),
        )

    @contextlib.contextmanager
    def new_context(self) -> Iterator[FLContext]:
        yield context(RUNNER=SimpleNamespace(current_wf=self.workflow))

    @property
    def headers(self) -> dict[str, Any]:
        """Of an answer of the site."""
        return {
            StreamHeaderKey.CHANNEL: CellChannel.SERVER_COMMAND,
            StreamHeaderKey.TOPIC: ServerCommandNames.SUBMIT_UPDATE,
            StreamHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS,
            CellMessageHeaderKeys.TOKEN: "token-1",
        }

    def is_refused(self, reply: Shareable, code: str) -> bool:
        """Whether it is an error reply of the site to its task."""
        return (
            reply.get_return_code() == ReturnCode.EXECUTION_RESULT_ERROR
            and reply.get_header("why") == code
            and reply.get_header(FLContextKey.TASK_NAME) == "train"
            and reply.get_cookie(FLContextKey.TASK_ID) == self.task.id
            and reply.get_cookie(AppConstants.CONTRIBUTION_ROUND) == 3
            and reply.get_peer_context().get_identity_name() == "site-1"
            and reply.get_peer_context().get_job_id() == "job"
        )


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> JobProcess:
    """A process that takes 1000 bytes; afterwards this one is as it was."""
    monkeypatch.setattr(blob_streamer, "BlobTask", blob_streamer.BlobTask)
    monkeypatch.setattr(ItemConsumer, "consume", ItemConsumer.consume)
    monkeypatch.setattr(cell_module, "decode_payload", cell_module.decode_payload)
    monkeypatch.setattr(cell_module, "os", cell_module.os)
    process_ = JobProcess()
    uploads.bound_uploads(uploads.Uploads(process_, "job", 1000, lambda code: {"why": code}))
    return process_


def arrives(data: bytes, headers: dict[str, Any]) -> StreamFuture:
    """A blob comes in, whose size it says of itself."""
    future = StreamFuture(1, headers)
    handler = blob_streamer.BlobHandler(lambda one: one.result())
    handler.handle_blob_cb(future, blob_streamer.BlobStream(data, headers), False)
    return future


# BLOBS
def test_a_blob_beyond_the_bound_is_not_kept_and_its_site_is_answered_for(
    bounded: JobProcess,
) -> None:
    assert b"".join(arrives(b"x" * 1000, bounded.headers).result(10)) == b"x" * 1000
    assert bounded.taken == []
    with pytest.raises(StreamError, match="exceeds configured limit 1000"):
        arrives(b"x" * 1001, bounded.headers).result(10)
    deadline = time.monotonic() + 10
    while not bounded.taken and time.monotonic() < deadline:
        time.sleep(0.01)
    (request,) = bounded.taken
    assert bounded.is_refused(request.payload, uploads.TOO_LARGE)
    other = {**bounded.headers, StreamHeaderKey.TOPIC: "another"}
    with pytest.raises(StreamError):
        arrives(b"x" * 1001, other).result(10)
    assert len(bounded.taken) == 1


class Together(ItemConsumer):
    def consume_items(self, items: list[Any], result: Any) -> Any:
        return (result or b"") + b"".join(items)


# ITEMS
def test_tensors_beyond_the_bound_are_let_go_as_soon_as_it_is_passed(bounded: JobProcess) -> None:
    consumer = Together()
    assert consumer.consume("ref", {"next": 1}, [b"a" * 400, b"b" * 400]) == {"next": 1}
    assert len(consumer.result) == 800
    with pytest.raises(uploads.TooLarge):
        consumer.consume("ref", {"next": 2}, [b"c" * 201])
    assert consumer.result is None


def test_an_answer_whose_tensor_comes_as_too_large_a_blob_is_called_too_large(
    bounded: JobProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = uploads.Uploads(bounded, "job", 1000, lambda code: {"why": code})
    known.turn_away({MessageHeaderKey.ORIGIN: "site-1.job", StreamHeaderKey.TOPIC: "a reply"})
    for code in (uploads.TOO_LARGE, uploads.UNDECODABLE):  # it is said once
        headers = {**bounded.headers, MessageHeaderKey.ORIGIN: "site-1.job"}
        message = CellMessage(headers, b"no FOBS")
        known.decode(message, StreamHeaderKey.PAYLOAD_ENCODING, {})
        assert bounded.is_refused(message.payload, code)


# DECODING
@pytest.mark.parametrize("data", [b"", b"no FOBS", b"\x00" * 900])
def test_an_answer_that_cannot_be_decoded_is_an_error_reply_and_ends_no_process(
    bounded: JobProcess, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    cell = SimpleNamespace(
        decode_pass_through_channels=(),
        decode_pass_through_topics=(),
        get_fobs_context=lambda props: dict(props),
    )
    adapter = Adapter(taken.append, SimpleNamespace(fqcn="server.job"), cell)
    monkeypatch.setattr(adapter, "_send_response", lambda *parts: None)
    future = StreamFuture(1, bounded.headers)
    future.set_result(data)
    adapter.call(future)
    assert bounded.is_refused(taken[0].payload, uploads.UNDECODABLE)
    other = StreamFuture(2, {**bounded.headers, StreamHeaderKey.TOPIC: "another"})
    other.set_result(data)
    with pytest.raises(Exception, match=r".+"):
        adapter.call(other)


def test_a_site_that_calls_a_message_too_large_ends_no_process(bounded: JobProcess) -> None:
    adapter = Adapter(print, SimpleNamespace(fqcn="server.job"), None)
    reply = StreamFuture(1, {})
    reply.set_exception(BlobSizeError("too large, it says"))
    adapter._handle_reply_stream_done(reply)


# TASKS
def test_the_task_that_a_site_is_at_is_known_by_its_token(bounded: JobProcess) -> None:
    known = uploads.Uploads(bounded, "job", 1000, lambda code: {"why": code})
    assert bounded.is_refused(known.stand_in(bounded.headers, "code"), "code")
    stranger = known.stand_in({**bounded.headers, CellMessageHeaderKeys.TOKEN: "other"}, "code")
    assert stranger.get_cookie(FLContextKey.TASK_ID) is None
    bounded.task.result_received_time = time.time()  # it has answered
    assert known.stand_in(bounded.headers, "code").get_cookie(FLContextKey.TASK_ID) is None
    assert "execute_command" in vars(ServerCommandAgent)


# ----------------------------------------------------------------------------------------- job


# SUMS
def test_an_aggregators_sums_can_be_exchanged_once_a_job_starts() -> None:
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHT_DIFF")
    aggregator.handle_event(EventType.START_RUN, FLContext())
    job.put_sums(aggregator, lambda number, weights, kept: {})
    helpers = [type(one.aggregation_helper) for one in aggregator.dxo_aggregators.values()]
    assert helpers == [job.RoundSums]
    assert parameters(job.RoundSums.add) == parameters(WeightedAggregationHelper.add)


# FIGURES
def test_the_figures_of_a_round_are_those_that_flare_would_make() -> None:
    figures, known = [], []

    def combine(number: int, weights: dict[str, float], kept: dict[str, Any]) -> dict[str, Any]:
        known.append((number, weights, {site: sorted(data) for site, data in kept.items()}))
        return {"b": np.ones(1), "w": np.ones(2)}

    for helper in (WeightedAggregationHelper(), job.RoundSums(combine)):
        helper.add({"w": np.ones(2), "b": np.ones(1)}, 3.0, "site-1", 4)
        helper.add({"w": np.ones(2)}, 5.0, "site-2", 4)
        helper.get_result()
        figures.append((helper.last_aggregation_stats, helper.history))
    assert figures[0] == figures[1]
    sent = {"site-1": ["b", "w"], "site-2": ["w"]}
    assert known == [(4, {"site-1": 3.0, "site-2": 5.0}, sent)]


# SELECTION
def test_the_selector_asks_its_subclass_and_forgets_with_each_round() -> None:
    told = []

    class Selector(job.ComparedModels):
        def forget_round(self) -> None:
            told.append("forget")

        def is_best(self) -> bool:
            told.append("is it?")
            return False

    selector = Selector("val_dice")
    for event in (AppEventType.ROUND_STARTED, AppEventType.BEFORE_AGGREGATION):
        selector.handle_event(event, FLContext())
    assert told == ["forget", "forget", "is it?", "forget"]
    assert selector.best_val_metric == float("-inf")


# GONE_SITES
def test_a_site_that_is_reported_gone_is_on_its_workflows_list_until_it_is_back() -> None:
    workflow = SimpleNamespace(communicator=WFCommServer())
    for site in ("site-1", "site-2"):
        job.report_gone(workflow, site, FLContext())
    assert set(workflow.communicator._dead_clients) == {"site-1", "site-2"}
    for site in ("site-1", "site-3"):
        job.report_back(workflow, site, FLContext())
    assert set(workflow.communicator._dead_clients) == {"site-2"}


# TOO_FEW
@pytest.mark.parametrize(("targets", "is_end"), [(2, True), (3, False)])
def test_a_round_that_too_few_sites_can_answer_is_known_by_what_flare_says(
    targets: int, is_end: bool
) -> None:
    said = []

    class Workflow(ScatterAndGather):
        def system_panic(self, reason: str, fl_ctx: FLContext) -> None:
            said.append(reason)

        def log_warning(self, fl_ctx: FLContext, msg: str, **named: object) -> None:
            said.append(msg)

    workflow = Workflow(min_clients=2)
    workflow._current_num_targets = targets
    workflow._accept_train_result("site-1", make_reply(ReturnCode.EXECUTION_EXCEPTION), FLContext())
    assert [job.is_for_too_few_answers(text) for text in said] == [is_end]


# EVENTS
def test_the_recorder_hears_of_an_answer_before_the_guard_and_after_it() -> None:
    text = inspect.getsource(ServerRunner._process_submission)
    order = (
        *("fire_event(EventType.BEFORE_TASK_RESULT_FILTER", "apply_filters("),
        "fire_event(EventType.AFTER_TASK_RESULT_FILTER",
        *("fire_event(EventType.BEFORE_PROCESS_SUBMISSION", "communicator.process_submission("),
    )
    places = [text.index(words) for words in order]
    assert places == sorted(places)


# SAME_ANSWER
def test_the_selector_reads_the_very_object_that_a_filter_changes() -> None:
    answer, came = Shareable(), []
    answer.set_peer_context(FLContext())
    answer.set_header(ServerCommandKey.FL_CLIENT, Client("site-1", "token"))
    runner = SimpleNamespace(process_submission=lambda *arguments: came.append(arguments[3]))
    fl_ctx = context(RUNNER=runner)
    SubmitUpdateCommand().process(answer, fl_ctx)
    assert came[0] is answer
    assert fl_ctx.get_peer_context().get_prop(FLContextKey.SHAREABLE) is answer


# SENDER
def test_who_sent_an_answer_is_told_by_the_token_of_its_request() -> None:
    text = inspect.getsource(ServerCommandAgent)
    assert "data.set_header(ServerCommandKey.FL_CLIENT, client)" in text
    assert "token = request.get_header(CellMessageHeaderKeys.TOKEN" in text
    assert "client = self._get_client(token)" in text and "return clients.get(token)" in text


# MODEL_NAMES
def test_models_of_the_server_have_flares_prefix_in_an_evaluation() -> None:
    assert f'"{job.SERVER_MODEL}" + name' in inspect.getsource(CrossSiteModelEval)
    assert all(name.startswith(job.SERVER_MODEL) for name in SERVER_MODELS)


# PARTICIPANTS
@pytest.mark.parametrize(
    "entry", [["a", "b"], {"targets": ["a", "b"]}, {"sites": ["a", "b"]}, [{"sites": ["a"]}, "b"]]
)
def test_a_deploy_map_is_read_as_flare_reads_it(entry: Any) -> None:
    assert job.participants_of(entry) == ["a", "b"]
    with pytest.raises(ValueError, match="invalid participant"):
        job.participants_of({"where": ["a"]})


# ---------------------------------------------------------------------------------------- wire


# CELL
def test_a_cell_of_the_network_can_be_made_and_asked() -> None:
    made, asked = parameters(CoreCell.__init__), parameters(CoreCell.send_request)
    assert {"fqcn", "root_url", "secure", "credentials"} <= {*made}
    assert {"auth_identity", "auth_identity_map"} <= {*made}
    assert {"channel", "topic", "target", "request", "timeout", "optional"} <= {*asked}


def test_a_kit_names_its_server_in_flares_words(kits: Path) -> None:
    address = wire.server_address(kits / "site-1")
    assert address == wire.ServerAddress(f"{SERVER}:8102", "grpc", SERVER)


# ------------------------------------------------------------------------------------- console


# SILENCE
def test_a_command_that_nobody_answers_says_so() -> None:
    said = []
    conn = SimpleNamespace(append_error=said.append)
    module = SystemCommandModule()
    module.send_request_to_clients = lambda *_: None
    module.report_resources(_connection(conn), ["report_resources", "client"])
    assert console.NO_ANSWER in said[0]


# RESOURCES
def test_what_a_site_reports_comes_as_pythons_text_of_it() -> None:
    reported = {"fedfms": {"ready": True, "classes": ["disc"], "fault": None}}
    reply = Message("reply", json.dumps(reported))
    rows: list[list[str]] = []
    table = SimpleNamespace(add_row=rows.append)
    module = SystemCommandModule()
    module.send_request_to_clients = lambda *_: [SimpleNamespace(client_name="a", reply=reply)]
    conn = SimpleNamespace(append_table=lambda *_: table)
    module.report_resources(_connection(conn), ["report_resources", "client"])
    assert rows == [["a", str(reported)]]
    assert console.read_cell(rows[0][1]) == reported


def _connection(conn: SimpleNamespace) -> Any:
    """With the properties that FLARE's commands put into a message."""
    conn.get_prop = lambda name, default=None: default
    conn.get_header = lambda name, default=None: default
    return conn


# SESSION_FOLDER
def test_a_session_is_opened_with_a_name_a_folder_and_a_time() -> None:
    assert parameters(new_secure_session)[:4] == [
        *("username", "startup_kit_location", "debug", "timeout")
    ]


# JOB_WORDS
def test_why_a_job_waits_stands_after_the_time_in_its_history() -> None:
    one = Job("id", {}, {}, meta={})
    DefaultJobScheduler()._update_schedule_history(one, "not enough sites: 1 of 2", FLContext())
    assert console.waiting_reason(one.meta) == "not enough sites: 1 of 2"
    detail = ["server: OK", "site-3: NVFLARE_ERROR: BYOC not permitted"]
    assert console.deploy_trouble({"job_deploy_detail": detail}) == detail[1]


# CERT_COMMAND
def test_the_command_for_certificates_answers_in_json(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"FLARE refuses: .*none\.yml") as error:
        console.nvflare_cert("request", "-p", "none.yml", home=tmp_path)
    assert error.value.code == "request-refused"


def test_the_folder_of_an_authority_has_the_files_that_the_command_wants(tmp_path: Path) -> None:
    key = console.write_authority(tmp_path / "ca", b"PEM", b"KEY", "fedfms")
    wanted = ("rootCA.pem", "rootCA.key", "ca.json")
    assert {path.name for path in (tmp_path / "ca").iterdir()} == set(wanted)
    assert key.read_bytes() == b"KEY"
    assert str(wanted).replace("'", '"') in inspect.getsource(cert_commands)


# ----------------------------------------------------------------------------------------- kit


# RESOURCE_FILES
def test_resources_of_ours_go_before_flares_which_are_read_where_ours_are_gone(
    kits: Path,
) -> None:
    places = Workspace(str(kits / "site-1"))
    assert places.get_resources_file_path().endswith("local/resources.json")
    (kits / "site-1" / "local" / "resources.json").rename(kits / "kept")
    try:
        assert places.get_resources_file_path().endswith("local/resources.json.default")
    finally:
        (kits / "kept").rename(kits / "site-1" / "local" / "resources.json")


# FINALIZE
def test_a_builder_before_the_cert_builder_finalizes_after_it() -> None:
    text = inspect.getsource(Provisioner)
    build, turn, finish = (text.index(t) for t in ("b.build(", "builders[::-1]", "b.finalize("))
    assert build < turn < finish


# CERTIFICATES
def test_a_participants_certificate_is_written_by_one_method() -> None:
    wanted = ["participant", "base_name", "ctx"]
    assert parameters(CertBuilder._build_write_cert_pair) == wanted
    builder = CertBuilder()
    assert builder.persistent_state is None and builder.serialized_cert is None


def test_flare_writes_the_components_that_are_changed_in_a_kit(kits: Path) -> None:
    for name, wanted in ((SERVER, ("job_manager", "job_scheduler")), ("site-1", ())):
        default = kit.read_default_resources(kits / name / "local")
        for one in (*wanted, *(["resource_manager"] if name == "site-1" else [])):
            assert kit.component(default, one)["id"] == one


def test_the_provisioner_remembers_what_it_made_by_name(kits: Path) -> None:
    state = CertificateState.read(kits.parent / "state" / "cert.json")
    assert kits.parent.name == PROJECT
    assert {"root_cert", "root_pri_key", "site-1", SERVER} <= set(state.content)
    assert set(state.content["site-1"]) >= {"cert", "pri_key"}
    state.certificate("site-1").verify_directly_issued_by(state.root)


# ------------------------------------------------------------------------------------ settings


# STREAMS
def test_a_sender_takes_window_and_retries_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in settings.stream_settings(0.1).items():
        monkeypatch.setenv(name, value)
    ConfigService.reset()
    try:
        config = CommConfigurator()
        window = config.get_streaming_window_size(0)
        assert window == 1024 * 1024 and config.get_streaming_ack_interval(0) == window // 4
        piece = config.get_streaming_chunk_size(0)
        # three times as long as what is under way takes on the line
        wait = config.get_streaming_retry_wait(0.0)
        assert wait == pytest.approx(3 * (window + piece) / 1e5, abs=1.0)
        # nobody gives up before somebody else could have tried again
        assert config.get_streaming_read_timeout(0) > 2 * wait
        patience = config.get_streaming_retry_timeout(0.0)
        assert patience == config.get_streaming_ack_wait(0) >= 10 * wait
        assert patience == config.get_streaming_ack_progress_timeout(0.0)
    finally:
        ConfigService.reset()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.4, 1.0, 100.0, None])
def test_what_is_under_way_is_never_sent_again_before_it_can_have_arrived(
    rate: float | None,
) -> None:
    values = settings.stream_settings(rate)
    window = int(values["NVFLARE_STREAMING_WINDOW_SIZE"])
    under_way = window + int(values["NVFLARE_STREAMING_CHUNK_SIZE"])
    wait = float(values["NVFLARE_STREAMING_RETRY_WAIT"])
    assert wait >= 2.9 * under_way / ((rate or 0.4) * 1e6) and wait >= 30


# DOWNLOADS
def test_tensors_are_asked_for_in_chunks_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in settings.stream_settings(None).items():
        monkeypatch.setenv(name, value)
    ConfigService.reset()
    try:
        decomposer = TensorDecomposer()
        chunk = decomposer._config_var_name(ConfigVarName.DOWNLOAD_CHUNK_SIZE)
        assert app_config_utils.get_int_var(chunk, 0) == 4 * 1024 * 1024
        ask = decomposer._config_var_name(ConfigVarName.STREAMING_PER_REQUEST_TIMEOUT)
        assert app_config_utils.get_positive_float_var(ask, 1.0) > 600
    finally:
        ConfigService.reset()


# RESENDS
def test_a_job_process_resends_its_requests_though_it_has_read_that_it_does_not() -> None:
    ConfigService.reset()
    try:
        assert CommConfigurator().get_streaming_reliable(False) is False
        settings.resend_requests()
        assert CommConfigurator().get_streaming_reliable(False) is True
    finally:
        ConfigService.reset()


# CONNECTIONS
def test_a_grpc_connection_asks_whether_the_other_side_is_there(tmp_path: Path) -> None:
    settings.write_connection_settings(tmp_path, 0.1)
    ConfigService.initialize(section_files={}, config_path=[str(tmp_path)])
    CommConfigurator.reset()
    try:
        options = dict(GrpcDriver().options)
    finally:
        ConfigService.reset()
        CommConfigurator.reset()
    assert options.items() >= dict(GRPC_DEFAULT_OPTIONS).items()
    wait = float(settings.stream_settings(0.1)["NVFLARE_STREAMING_RETRY_WAIT"])
    assert options["grpc.keepalive_timeout_ms"] == pytest.approx(1e3 * wait, abs=1e3)
    # or a server would end the connections of its sites
    allowed = options["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed < options["grpc.keepalive_time_ms"]


# VARIABLES
def test_flare_reads_a_setting_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = settings.gone_site_settings(grace=7, lead=2, outcome=9)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ConfigService.reset()
    try:
        assert ConfigService.get_float_var("dead_client_grace_period", default=60.0) == 7.0
        assert JobRunner("").client_outcome_wait_timeout == 9.0
    finally:
        ConfigService.reset()
    compose = Path(fedfms.__file__).parent / "provisioning/templates/server/compose.yml"
    assert set(variables) <= set(re.findall(r"NVFLARE_\w+", compose.read_text()))
