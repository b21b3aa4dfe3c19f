"""FLARE's processes: `nvflare.private.fed.app.{server.server_train,client.client_train}`.

Read in FLARE 2.9.0. Public API starts neither in this process nor stops it in order: FLARE's start
scripts put both into the background, answer SIGTERM not at all, and try an expired certificate for
ever without a word. So their main functions run here, with a hook at the point from which there is
something to leave.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nvflare.apis.fl_exception import FLCommunicationError
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.private.admin_defs import Message, error_reply
from nvflare.private.defs import SysCommandTopic, TrainingTopic
from nvflare.private.fed.authenticator import Authenticator
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.communicator import Communicator
from nvflare.private.fed.server.fed_server import BaseServer
from nvflare.private.fed.server.server_engine import ServerEngine

from fedfms.bounded import read_json_object
from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

SERVER_PROGRAM = "nvflare.private.fed.app.server.server_train"  # for python -m, too
CLIENT_PROGRAM = "nvflare.private.fed.app.client.client_train"

# topics of requests that a server sends to a site's client
SHELL, SITE_LOG, JOB_LOG = (
    SysCommandTopic.SHELL,
    SysCommandTopic.CONFIGURE_SITE_LOG,
    TrainingTopic.CONFIGURE_JOB_LOG,
)
# what FLARE's start scripts leave; a container's process ids mean nothing to the next one
STALE_NOTES = ("pid.fl", "daemon_pid.fl", "shutdown.fl", "restart.fl", "_process_rc.txt")
Told = Literal["shutdown", "restart"] | None
_SHUT_DOWN, _RESTART = "shutdown.fl", "restart.fl"  # notes of how FLARE was told to end
_LOG_BYTES, _LOG_PARTS = 10 * 2**20, 3  # of each of FLARE's four logs; it has 20 MiB and 10
_LOG_SETTINGS_OF_FLARE, _LOG_SETTINGS = "log_config.json.default", "log_config.json"
_SHORT = "fedfms_short"  # name of our filter in them
_WORDY = {  # loggers of FLARE -> what they may say at least
    "nvflare.fuel.f3": "WARNING",  # connections by number, callbacks
    # that a sign of life was not taken, each 5 s; start.py says it once a minute
    "nvflare.private.fed.client.communicator": "WARNING",
    # each 2 s that it cannot print results; the recorder has them
    "nvflare.app_common.workflows.global_model_eval": "ERROR",
}

SERVER_STARTS = Assumption(
    "server_train.main(args) makes the admin server with its module's create_admin_server",
    lambda: _main_uses(SERVER_PROGRAM, "create_admin_server"),
)
CLIENT_STARTS = Assumption(
    "client_train.main(args) makes, once registered, the admin agent with its module's "
    "create_admin_agent(req_processors, federated_client, client_engine)",
    lambda: (
        _main_uses(CLIENT_PROGRAM, "register", "create_admin_agent")
        and takes(
            importlib.import_module(CLIENT_PROGRAM).create_admin_agent,
            *("req_processors", "federated_client", "client_engine"),
        )
    ),
)
SERVER_STOPS = Assumption(
    "a server waits shutdown_period seconds for its clients and has engine.shutdown_server()",
    lambda: (
        uses(BaseServer.fl_shutdown, "shutdown_period")
        and takes(ServerEngine.shutdown_server)
        and uses(ServerEngine.shutdown_server, "server_shutdown")
    ),
)
CLIENT_STOPS = Assumption(
    "a client's communicator sends signs of life until heartbeat_done; engine.shutdown() ends it",
    lambda: (
        uses(Communicator.__init__, "heartbeat_done")
        and uses(ClientEngine.shutdown, "shutdown_client")
    ),
)
REQUESTS = Assumption(
    "ClientRequestProcessors.request_processors lists what answers each topic of the server",
    lambda: (
        {SHELL, SITE_LOG, JOB_LOG}
        <= {t for one in ClientRequestProcessors.request_processors for t in one.get_topics()}
    ),
)
LOGINS = Assumption(
    "Communicator.client_registration(client_name, project_name, fl_ctx) logs in and raises what "
    "the server answered",
    lambda: (
        takes(Communicator.client_registration, "client_name", "project_name", "fl_ctx")
        and uses(Communicator.client_registration, "Authenticator", "authenticate")
        and uses(Authenticator.authenticate, "FLCommunicationError")
    ),
)
MONITOR = Assumption(
    "MainProcessMonitor.run(main_func, run_dir, shutdown_grace_time, cleanup_grace_time, **) runs "
    "and cleans up",
    lambda: takes(
        MainProcessMonitor.run.__func__,
        *("cls", "main_func", "run_dir", "shutdown_grace_time", "cleanup_grace_time"),
    ),
)

LOG_FILES = Assumption(
    "a workspace's local/log_config.json goes before log_config.json.default",
    lambda: uses(Workspace.get_log_config_file_path, "LOGGING_CONFIG", "DEFAULT_LOGGING_CONFIG"),
)


def _main_uses(program: str, *names: str) -> bool:
    module = importlib.import_module(program)
    main_fits = takes(module.main, "args") and uses(module.main, *names)
    return main_fits and hasattr(module, names[-1])


# ------------------------------------------------------------------------------ start and end


@rests_on(SERVER_STARTS, SERVER_STOPS)
def server_main(on_start: Callable[[Callable[[], None]], None]) -> Callable[[Any], Any]:
    """FLARE's main function of a server.

    Args:
        on_start: called once there is something to leave, with how to stop the server in order.
    """
    module: Any = importlib.import_module(SERVER_PROGRAM)
    create = module.create_admin_server

    def create_admin_server(server: Any, *args: Any, **kwargs: Any) -> Any:
        on_start(lambda: _stop_server(server))
        return create(server, *args, **kwargs)

    module.create_admin_server = create_admin_server
    main: Callable[[Any], Any] = module.main
    return main


def _stop_server(server: Any) -> None:
    # FLARE waits so long for its clients to leave; they find the server again by themselves
    server.shutdown_period = 1.0
    server.engine.shutdown_server()


@rests_on(CLIENT_STARTS, CLIENT_STOPS)
def client_main(
    on_registered: Callable[[Callable[[], None], Callable[[], None]], None],
) -> Callable[[Any], Any]:
    """FLARE's main function of a site's client.

    Args:
        on_registered: called once the server took the site in, with two functions: the first keeps
            the client from reporting anything more, the second deregisters and lets main end.
    """
    module: Any = importlib.import_module(CLIENT_PROGRAM)
    create = module.create_admin_agent

    def create_admin_agent(processors: Any, client: Any, engine: Any) -> Any:
        def silence() -> None:
            client.communicator.heartbeat_done = True

        on_registered(silence, engine.shutdown)
        return create(processors, client, engine)

    module.create_admin_agent = create_admin_agent
    main: Callable[[Any], Any] = module.main
    return main


@rests_on(MONITOR)
def run_main(
    main: Callable[[Any], Any],
    config: str,
    workspace: Path,
    options: Sequence[str],
    codes: Mapping[Told, int],
) -> int:
    """Run a main function of FLARE with the arguments of its start script, and clean up after it.

    Args:
        config: "fed_server" or "fed_client".
        options: more of `--set`, as name=value.
        codes: how FLARE was told to end, also from the console, or None -> exit code.

    Returns:
        one of the codes, or FLARE's own where main failed.
    """
    arguments = argparse.Namespace(
        workspace=str(workspace.resolve()),
        set=["secure_train=true", "config_folder=config", *options],
        local_rank=0,
        **{config: f"{config}.json"},
    )

    def flare(args: argparse.Namespace) -> int:
        main(args)
        if (workspace / _RESTART).exists():
            return codes["restart"]
        return codes["shutdown" if (workspace / _SHUT_DOWN).exists() else None]

    code = MainProcessMonitor.run(
        main_func=flare,
        run_dir=arguments.workspace,
        shutdown_grace_time=0.5,
        cleanup_grace_time=2.0,
        args=arguments,
    )
    return code if isinstance(code, int) else 1


def program_arguments(program: str, kit: Path, config: str, settings: Sequence[str]) -> list[str]:
    """How FLARE's start script calls a program, after `python -u`; for a simulation's processes."""
    return [
        *("-m", program, "-m", str(kit), "-s", config),
        *("--set", "secure_train=true", "config_folder=config", *settings),
    ]


# ----------------------------------------------------------------------------------- at a site


@rests_on(REQUESTS)
def refuse_requests(answers: Mapping[str, str], on_refused: Callable[[str], None]) -> None:
    """Let FLARE's client answer certain requests of the server with a refusal, and do nothing.

    FLARE asks the site's authorization.json, but believes the server's word for who asks and
    whether that must be authorized at all.

    Args:
        answers: topic -> what the asker reads.
        on_refused: told the topic of a request that was refused.
    """

    class Refused(RequestProcessor):  # type: ignore[misc]
        def get_topics(self) -> list[str]:
            return list(answers)

        def process(self, req: Message, app_ctx: object) -> Message:
            on_refused(req.topic)
            return error_reply(answers[req.topic])

    kept = [
        processor
        for processor in ClientRequestProcessors.request_processors
        if not set(processor.get_topics()) & set(answers)
    ]
    ClientRequestProcessors.request_processors[:] = [*kept, Refused()]


@rests_on(LOGINS)
def refused_logins() -> list[str]:
    """What the server answers to logins that it refuses, as they come; FLARE only logs it."""
    heard: list[str] = []
    register = Communicator.client_registration

    def client_registration(*args: Any, **kwargs: Any) -> Any:
        try:
            return register(*args, **kwargs)
        except FLCommunicationError as error:
            heard.append(f"{error} {error.__context__ or ''}")  # FLARE wraps what it was told
            raise

    Communicator.client_registration = client_registration
    return heard


# --------------------------------------------------------------------------------- a workspace


@rests_on(LOG_FILES)
def set_log_level(local: Path, level: str) -> None:
    """Write the log settings that FLARE and its job processes read before their own default.

    At INFO, what FLARE says of its own insides is left out.

    Args:
        local: the workspace's local/, with FLARE's default settings.
        level: a name of logging's.
    """
    settings = read_json_object(local / _LOG_SETTINGS_OF_FLARE)
    settings["loggers"]["root"]["level"] = level
    settings.setdefault("filters", {})[_SHORT] = {"()": "fedfms.flare.log_lines.ShortMessages"}
    for handler in settings["handlers"].values():
        handler["filters"] = [_SHORT, *handler.get("filters", ())]
        if "maxBytes" in handler:
            handler |= {"maxBytes": _LOG_BYTES, "backupCount": _LOG_PARTS}
    if level == "INFO":
        settings["loggers"] |= {name: {"level": least} for name, least in _WORDY.items()}
    (local / _LOG_SETTINGS).write_text(json.dumps(settings, indent=2))


def remove_stale_notes(workspace: Path) -> None:
    """Remove what an earlier process left of itself."""
    for name in STALE_NOTES:
        (workspace / name).unlink(missing_ok=True)
