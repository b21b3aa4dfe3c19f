"""Commands of our own at a FLARE server, for admins that are logged in; and how one is asked.

Read in FLARE 2.9.0 (`fuel/hci/`, `private/fed/server/{admin,job_cmds}.py`). FLARE offers no place
for a command of another's: its server takes a list of command modules, which a component may
lengthen while the server starts. Who asks is known to FLARE's login; what he may do is asked of the
server's authorization.json, by the names of FLARE's own commands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.flare_api.flare_api import Session
from nvflare.fuel.hci.proto import MetaStatusValue, make_meta
from nvflare.fuel.hci.reg import CommandModule, CommandModuleSpec, CommandSpec
from nvflare.fuel.hci.server.authz import AuthzFilter, PreAuthzReturnCode
from nvflare.fuel.hci.server.constants import ConnProps
from nvflare.fuel.sec.authz import AuthorizationService, AuthzContext, Person
from nvflare.private.fed.app import utils as app_utils
from nvflare.private.fed.server.admin import FedAdminServer
from nvflare.private.fed.server.fed_server import BaseServer, FederatedServer
from nvflare.private.fed.server.job_cmds import JobCommandModule

from fedfms.errors import FederationError, FedfmsError
from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

log = logging.getLogger(__name__)

# rights, by the names of FLARE's commands
SEE = str(AdminCommandNames.LIST_JOBS)
STOP = str(AdminCommandNames.ABORT_JOB)
DELETE = str(AdminCommandNames.DELETE_JOB)
SUBMIT = str(AdminCommandNames.SUBMIT_JOB)

_SCOPE, _REFUSED, _ANSWER = "fedfms", "refused", "answer"
_WORDS_OF_OTHERS = 200  # characters of what an unexpected error says

MODULES = Assumption(
    "an admin server is made, after SYSTEM_START, of the command modules that server.cmd_modules "
    "lists, and registers each",
    lambda: (
        uses(app_utils.create_admin_server, "cmd_modules")
        and uses(FedAdminServer.__init__, "register_module")
        and uses(FederatedServer.__init__, "cmd_modules")
        and hasattr(BaseServer, "set_admin_server")
    ),
)
RIGHTS = Assumption(
    "a command that names a job is authorized by authorize_job_id(conn, args), which notes the "
    "job's submitter, and by AuthorizationService for user and submitter",
    lambda: (
        takes(JobCommandModule.authorize_job_id, "conn", "args")
        and uses(JobCommandModule.authorize_job_id, "SUBMITTER_NAME", "JOB_ID", "REQUIRE_AUTHZ")
        and uses(AuthzFilter.pre_command, "authz_func", "AuthorizationService", "Person")
        and hasattr(PreAuthzReturnCode, "OK")
    ),
)
SESSIONS = Assumption(
    "a session does a command of the server's list by _do_command, and a dict in the answer is "
    "found by _get_dict_data",
    lambda: (
        takes(Session._do_command, "command", "enforce_meta", "props")
        and takes(Session._get_dict_data, "reply")
    ),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for what."""

    user: str
    job_id: str = ""
    submitter: str = ""
    words: tuple[str, ...] = ()  # after the job's id


@dataclass(frozen=True, slots=True)
class Command:
    """A command of ours."""

    name: str
    what: str  # it does, for FLARE's console
    rights: Sequence[str]  # all of them are needed
    names_job: bool  # its first argument is a job's whole id
    do: Callable[[Asked], Mapping[str, Any]]  # gives JSON types; FedfmsError: refused


@rests_on(MODULES, RIGHTS)
def add_commands(server: Any, commands: Sequence[Command]) -> None:
    """Let a server know commands; to be called at SYSTEM_START."""
    server.cmd_modules = [*(server.cmd_modules or ()), _Module(commands)]


class _Module(CommandModule):  # type: ignore[misc]
    def __init__(self, commands: Sequence[Command]) -> None:
        self._commands = commands
        self._jobs = JobCommandModule()

    def get_spec(self) -> CommandModuleSpec:
        return CommandModuleSpec(_SCOPE, [self._spec(one) for one in self._commands])

    def _spec(self, command: Command) -> CommandSpec:
        def may(conn: Any, args: list[str]) -> PreAuthzReturnCode:
            if command.names_job:
                found = self._jobs.authorize_job_id(conn, args)
                if found == PreAuthzReturnCode.ERROR:
                    return found
            for right in command.rights:
                if not _is_allowed(conn, right):
                    info = f"{conn.get_prop(ConnProps.USER_ROLE, '')} may not {right}"
                    conn.append_error(info, meta=make_meta(MetaStatusValue.NOT_AUTHORIZED, info))
                    return PreAuthzReturnCode.ERROR
            return PreAuthzReturnCode.OK

        def do(conn: Any, args: list[str]) -> None:
            job = conn.get_prop(JobCommandModule.JOB)
            given = 2 if command.names_job else 1
            asked = Asked(
                user=str(conn.get_prop(ConnProps.USER_NAME, "")),
                job_id=str(conn.get_prop(JobCommandModule.JOB_ID, "")),
                submitter=str(job.meta.get(JobMetaKey.SUBMITTER_NAME, "")) if job else "",
                words=tuple(args[given:]),
            )
            conn.append_dict(_answer(command, asked), meta=make_meta(MetaStatusValue.OK))
            conn.append_success("")

        usage = f"{command.name} job_id" if command.names_job else command.name
        return CommandSpec(command.name, command.what, usage, do, may)


def _is_allowed(conn: Any, right: str) -> bool:
    user, submitter = (
        Person(*(conn.get_prop(prop, "") for prop in props))
        for props in (
            (ConnProps.USER_NAME, ConnProps.USER_ORG, ConnProps.USER_ROLE),
            (ConnProps.SUBMITTER_NAME, ConnProps.SUBMITTER_ORG, ConnProps.SUBMITTER_ROLE),
        )
    )
    allowed, _ = AuthorizationService.authorize(AuthzContext(right, user, submitter))
    return bool(allowed)


def _answer(command: Command, asked: Asked) -> dict[str, Any]:
    try:
        return {_ANSWER: dict(command.do(asked))}
    except FedfmsError as error:
        return {_REFUSED: {"problem": error.problem, "fix": error.fix, "code": error.code}}
    except Exception as error:
        log.exception("%s failed", command.name)
        said = f"{type(error).__name__}: {error}"[:_WORDS_OF_OTHERS]
        return {
            _REFUSED: {
                "problem": f"the server could not do it ({said})",
                "fix": "its log says more",
                "code": "unexpected",
            }
        }


@rests_on(SESSIONS)
def ask(session: Session, name: str, *words: str, seconds: float | None = None) -> dict[str, Any]:
    """Let a server do one of these commands.

    Args:
        seconds: that its answer may take; FLARE's own few by default.

    Raises:
        FederationError: the server refuses, with its sentence and code; or it knows no such
            command (code other-version).
        AuthorizationError: FLARE's, for who may not.
    """
    if not session.api.server_cmd_reg.get_command_entries(name):
        raise FederationError(
            "this server does not know that command: it runs another version of fedfms",
            "update the server, or use the version that it runs",
            code="other-version",
        )
    if seconds is not None:
        session.set_timeout(seconds)
    try:
        said = session._get_dict_data(session._do_command(" ".join([name, *words])))
    finally:
        if seconds is not None:
            session.unset_timeout()
    if isinstance(refused := said.get(_REFUSED), dict):
        problem, fix, code = (str(refused.get(key, "")) for key in ("problem", "fix", "code"))
        raise FederationError(problem, fix, code=code)
    return dict(said.get(_ANSWER) or {})
