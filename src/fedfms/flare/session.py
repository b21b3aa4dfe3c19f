"""A coordinator's side of FLARE: prepare a job, submit it, watch it, fetch its result, abort it.

Submitting signs a job folder in place, so what is submitted is a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.x509.oid import NameOID
from nvflare.apis.storage import WORKSPACE
from nvflare.fuel.flare_api.api_spec import (
    AuthenticationError,
    AuthorizationError,
    InternalError,
    InvalidJobDefinition,
    JobNotDone,
    JobNotFound,
    JobNotRunning,
    NoClientsAvailable,
)
from nvflare.fuel.flare_api.flare_api import Session

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.recipe import JOB_RECIPE, read_job_recipe
from fedfms.errors import ConfigError, FederationError, FedfmsError
from fedfms.exchange.tensors import load_tensors
from fedfms.files import write_whole
from fedfms.flare import feed, runs
from fedfms.flare.announce import FORGOTTEN, read_announcement
from fedfms.flare.internals import commands, console
from fedfms.flare.internals.settings import set_stream_settings
from fedfms.flare.job import PROGRESS_GROUP, RESULT_FOLDER, START_MODEL_FILE
from fedfms.flare.kit import AUTHORIZATION
from fedfms.flare.lint import SERVER, PreparedJob, read_json
from fedfms.flare.progress import Event
from fedfms.flare.runs import RunInfo
from fedfms.kits.certificates import read_certificate
from fedfms.kits.kit import read_kit
from fedfms.preflight.network import NetworkError, proxy_for, reach, resolve
from fedfms.records.layout import RECIPE

log = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0
RECONNECT_SECONDS = 5.0  # for one attempt after a connection was lost
FORGET_SECONDS = 60.0  # for the server to ask the sites, and to read what it has
MIN_CLIENTS = "min_clients"  # may be set beside the values of the recipe

_CONFIG = Path("app/config")
SERVER_CONFIG = _CONFIG / "config_fed_server.json"  # in a job folder
TRAINING = "nvflare.app_common.workflows.scatter_and_gather.ScatterAndGather"


@dataclass(frozen=True, slots=True)
class JobState:
    """What FLARE says of a job."""

    status: str  # SUBMITTED, DISPATCHED, RUNNING, FINISHED:…
    detail: str  # why a site does not take part, or why the job waits, as far as FLARE says
    job_id: str = ""
    name: str = ""
    submitted: str = ""  # time, ISO 8601
    submitter: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether FLARE has not started it yet."""
        return self.status in ("SUBMITTED", "APPROVED")

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.startswith("FINISHED")

    @property
    def is_aborted(self) -> bool:
        """Whether somebody stopped it."""
        return self.status == "FINISHED:ABORTED"

    @property
    def is_completed(self) -> bool:
        """Whether FLARE calls it a success; the job's own records have the last word."""
        return self.status == "FINISHED:COMPLETED"


def prepare_job(
    job: Path,
    destination: Path,
    overrides: Sequence[str] = (),
    model: Path | None = None,
    recipe: Path | None = None,
) -> PreparedJob:
    """Copy a job folder and write the overrides into the copy.

    Args:
        job: a job folder, such as jobs/fedmsa; it is not changed.
        destination: new folder; its name becomes the name of the job folder at the server.
        overrides: `name=value` for the recipe, or `min_clients=N`.
        model: safetensors of travelling tensors to start from, or to evaluate. A recipe.json beside
            it, as in a results folder, goes before the job's own.
        recipe: a recipe.json that goes before both; of the job's method, if the job trains.

    Raises:
        ConfigError: no job folder, a recipe or an override that cannot be used, a job with code, a
            recipe of another method (code other-method).
    """
    if not (job / "meta.json").is_file() or not (job / SERVER_CONFIG).is_file():
        raise ConfigError(f"{job} is no job folder", "name a folder such as jobs/fedmsa")
    if any(path.is_dir() and path.name == "custom" for path in job.rglob("custom")):
        raise ConfigError(
            f"{job} holds a custom folder, and sites take no code from a job",
            "remove the folder; code belongs into the package",
            code="job-with-code",
        )
    if destination.exists():
        raise ConfigError(f"{destination} exists already", "name a new folder for the job's copy")
    shutil.copytree(job, destination, ignore=shutil.ignore_patterns(".__nvfl*"))  # signatures
    if model is not None:
        if not model.is_file():
            raise ConfigError(
                f"there is no {model}", "name a .safetensors file of a results folder"
            )
        load_tensors(model)  # a damaged one is said here, and not after all sites came together
        shutil.copyfile(model, destination / _CONFIG / START_MODEL_FILE)
        if recipe is None and (model.parent / RECIPE).is_file():
            recipe = model.parent / RECIPE
    meta = read_json(destination / "meta.json")
    server = read_json(destination / SERVER_CONFIG)
    min_clients = _min_clients(overrides, meta)
    training = [w["args"] for w in server["workflows"] if w["path"] == TRAINING]
    of_recipe = [text for text in overrides if not text.startswith(f"{MIN_CLIENTS}=")]
    what = read_job_recipe(job, recipe, of_recipe, any_method=not training)
    if what.canary:
        raise ConfigError(
            "the recipe says canary, and a run is no canary",
            "take canary out of it, and submit with --canary: a canary goes before the run",
        )
    (destination / JOB_RECIPE).write_text(what.to_json())
    for arguments in training:
        arguments.update(num_rounds=what.rounds, min_clients=min_clients)
    for chain in server["task_result_filters"]:
        for one in chain["filters"]:
            if "min_contributions" in one["args"]:
                one["args"]["min_contributions"] = min_clients
    meta["min_clients"] = min_clients
    _write(destination / "meta.json", meta)
    _write(destination / SERVER_CONFIG, server)
    return PreparedJob(destination, what, min_clients, bool(training))


def deploy(job: PreparedJob, sites: Sequence[str], *, leaves_out: bool = False) -> None:
    """Give a given model to the server alone: sites get it as a task, not with the job.

    Args:
        job: from `prepare_job`.
        sites: that take part.
        leaves_out: whether the job goes to these sites only, whoever else connects before it
            starts.
    """
    meta = job.meta
    if leaves_out:
        apps = list(meta["deploy_map"])
        if len(apps) != 1:
            raise ConfigError(
                "a job with several apps cannot leave a site out",
                "take the site out of deploy_map in meta.json",
                code="deploy-map",
            )
        meta["deploy_map"] = {apps[0]: [SERVER, *sites]}
    if (job.folder / _CONFIG / START_MODEL_FILE).is_file():
        shutil.copytree(
            job.folder / "app", job.folder / "app_site", ignore=lambda *_: [START_MODEL_FILE]
        )
        meta["deploy_map"] = {"app": [SERVER], "app_site": list(sites)}
    _write(job.folder / "meta.json", meta)


@dataclass(frozen=True, slots=True)
class Admin:
    """Whose kit a session was opened with."""

    name: str
    organization: str
    role: str  # project_admin, org_admin, lead, member; or one of the project's own


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Where a run was forgotten."""

    sites: tuple[str, ...]
    not_connected: tuple[str, ...]  # that had taken part
    failed: Mapping[str, str]  # site: code of why not, or empty where it did not answer

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Forgotten:
        """What the server answered."""
        sites, away = said.get("sites") or {}, said.get("not_connected") or ()
        if not isinstance(sites, dict) or not isinstance(away, list | tuple):
            raise _not_understood("where the run was forgotten")
        told = {str(site): str(word) for site, word in sites.items()}
        return cls(
            tuple(sorted(site for site, word in told.items() if word == FORGOTTEN)),
            tuple(str(site) for site in away),
            {site: word for site, word in sorted(told.items()) if word != FORGOTTEN},
        )


class Coordinator:
    """An open session with a FLARE server; `connect` makes one."""

    def __init__(
        self, session: Session, admin: Admin, again: Callable[[], Session] | None = None
    ) -> None:
        self._session = session
        self.admin = admin
        self._again = again

    def reconnect(self) -> None:
        """Log in anew, to a server that was started again; tries for a few seconds.

        Raises:
            FederationError: it does not answer yet, or does not let this admin in.
        """
        if self._again is None:
            return
        self.close()
        with self._asking("connect to the server"):
            self._session = self._again()

    def close(self) -> None:
        """End the session."""
        try:
            self._session.close()
        except Exception as error:
            log.debug("the session could not be closed: %s", error)

    # --------------------------------------------------------------------------------- sites

    def sites(self) -> list[str]:
        """Names of the connected sites."""
        with self._asking("list the sites"):
            return sorted(client.name for client in self._session.get_system_info().client_info)

    def announcements(self) -> list[Announcement]:
        """What each connected site says of itself, by name."""
        sites = self.sites()
        with self._asking("ask the sites what they can do", "report_resources"):
            try:
                said = console.reported_resources(self._session) if sites else {}
            except NoClientsAvailable:  # they went in the meantime
                said = {}
        return [read_announcement(site, said.get(site)) for site in sites]

    def revoke(self, site: str) -> None:
        """Let a site no longer connect, whatever certificate it has; ends its connection.

        Raises:
            FederationError: not for this admin, or the server does not know such a site.
        """
        with self._asking(f"revoke {site}", "operate"):
            said = self._session.disable_client(site)
        _check_site_change(said, site, "disabled")

    def readmit(self, site: str) -> None:
        """Let a revoked site connect again."""
        with self._asking(f"readmit {site}", "operate"):
            said = self._session.enable_client(site)
        _check_site_change(said, site, "enabled")

    # ---------------------------------------------------------------------------------- jobs

    def require_right(self, right: str, what: str) -> None:
        """Refuse at once what this admin's role does not allow, by the kits of fedfms provision.

        Raises:
            FederationError: code not-authorized. A role of the project's own is not judged.
        """
        rights = AUTHORIZATION["permissions"].get(self.admin.role)
        if rights is not None and rights.get(right, "none") == "none":
            raise self._not_authorized(what, right)

    def submit_prepared(self, folder: Path) -> str:
        """Submit a folder of `prepare_job` as it is; FLARE's id of the job."""
        with self._asking("submit the job", "submit_job"):
            job_id = str(self._session.submit_job(str(folder.resolve())))
        log.info("submitted %s as %s", folder.name, job_id)
        return job_id

    def jobs(self, largest: int = 20) -> list[JobState]:
        """The last jobs of the server, newest first; without detail."""
        with self._asking("list the jobs"):
            listed = self._session.list_jobs(limit=largest, reverse=True)
        return [
            JobState(
                status=str(one.get("status", "")),
                detail="",
                job_id=str(one.get("job_id", "")),
                name=str(one.get("job_name", "")),
                submitted=str(one.get("submit_time", "")),
            )
            for one in listed
        ]

    def find_job(self, beginning: str) -> str:
        """The id of the only job that begins so.

        Raises:
            FederationError: code no-such-job or ambiguous-job.
        """
        if not re.fullmatch(r"[0-9a-fA-F-]{1,36}", beginning):
            raise FederationError(
                f"{beginning} is no id of a job",
                "give the id, or how it begins, as fedfms status shows it",
                code="no-such-job",
            )
        with self._asking("look for the job"):
            listed = self._session.list_jobs(id_prefix=beginning.lower())
        found = sorted(str(one.get("job_id", "")) for one in listed)
        if len(found) == 1:
            return found[0]
        if not found:
            raise FederationError(
                f"the server has no job {beginning}", "look at fedfms status", code="no-such-job"
            )
        raise FederationError(
            f"{len(found)} jobs begin with {beginning}: {', '.join(found[:5])}",
            "give more of the id",
            code="ambiguous-job",
        )

    def state(self, job_id: str) -> JobState:
        """What FLARE says of the job now."""
        with self._asking("ask for the job"):
            meta = self._session.get_job_meta(job_id)
        state = JobState(
            status=str(meta.get("status", "")),
            detail=console.deploy_trouble(meta),
            job_id=job_id,
            name=str(meta.get("name", "")),
            submitted=str(meta.get("submit_time_iso", "")),
            submitter=str(meta.get("submitter_name", "")),
        )
        if state.is_waiting and (reason := console.waiting_reason(meta)):
            state = dataclasses.replace(state, detail=reason)
        return state

    def event(self, job_id: str) -> Event | None:
        """How far a running job is, from its recorder; None before and after it runs."""
        with self._asking("ask for the progress"):
            try:
                stats = self._session.show_stats(job_id, "server")
            except (JobNotFound, JobNotRunning):  # its process is starting, or has ended
                return None
        try:
            return Event.from_dict(console.statistics_group(stats, PROGRESS_GROUP))
        except ValueError:  # it is starting, or of another version
            return None

    def records(self, job_id: str, offset: int = 0) -> feed.Piece | None:
        """Some of a running job's records, from where they were read to; None where nobody answers.

        Args:
            offset: `end` of the last piece.

        Raises:
            FederationError: as of the server's kit this admin may not ask (not-authorized), which
                an older kit allows to nobody.
        """
        with self._asking("ask for the records", feed.RIGHT):
            try:
                told = self._session.do_app_command(job_id, feed.TOPIC, {feed.OFFSET: offset})
            except (JobNotFound, JobNotRunning, InternalError):  # starting, ended, or older
                return None
        return feed.decode_piece(told)

    def download(self, job_id: str, folder: Path) -> Path:
        """Fetch a finished job; the folder with its records and models.

        Raises:
            FederationError: it cannot be fetched, or holds no records.
        """
        with self._asking("fetch the result", "download_job"):
            place = self._session.download_job_result(job_id, str(folder.resolve()))
        result = Path(place) / str(WORKSPACE) / RESULT_FOLDER
        if not result.is_dir():
            raise FederationError(
                "the job left no records at the server",
                "it ended before it began, or the server was started again: see the server's log; "
                "a model that was saved by then is in the server's workspace, JOB_ID/fedfms",
                code="no-records",
            )
        return result

    # ---------------------------------------------------------------------------------- runs

    def runs(self) -> list[RunInfo]:
        """All runs that the server knows, newest first."""
        with self._asking("list the runs"):
            said = commands.ask(self._session, runs.LIST)
        listed = said.get("runs", ())
        try:
            return [runs.RunInfo.from_dict(one) for one in listed]
        except (TypeError, ValueError):
            raise _not_understood("its runs") from None

    def stop(self, job_id: str) -> int:
        """Stop a run for good, until somebody resumes it; how many rounds of it are kept.

        Raises:
            FederationError: code not-running, not-authorized.
        """
        with self._asking("stop the run", "manage_job"):
            return _kept_rounds(commands.ask(self._session, runs.STOP, job_id))

    def resume(self, job_id: str) -> int:
        """Go on with a run that ended before it was done; from how many rounds.

        Raises:
            FederationError: code still-running, not-resumable, nothing-kept, other-recipe,
                not-authorized.
        """
        with self._asking("resume the run", "submit_job"):
            said = commands.ask(self._session, runs.RESUME, job_id, seconds=FORGET_SECONDS)
        return _kept_rounds(said)

    def forget(self, job_id: str) -> Forgotten:
        """Remove all of a run at the server and at the sites that are connected.

        Raises:
            FederationError: code still-running, not-authorized.
        """
        with self._asking("forget the run", "manage_job"):
            said = commands.ask(self._session, runs.FORGET, job_id, seconds=FORGET_SECONDS)
        return Forgotten.from_dict(said)

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with all that the server keeps of it."""
        with self._asking("delete the job", "manage_job"):
            self._session.delete_job(job_id)

    @contextlib.contextmanager
    def _asking(self, what: str, right: str = "view") -> Iterator[None]:
        """Turn what FLARE raises into an error with its fix; `right` is FLARE's name for it."""
        try:
            yield
        except AuthorizationError as error:
            raise self._not_authorized(what, right) from error
        except Exception as error:
            raise _as_our_error(what, error) from error

    def _not_authorized(self, what: str, right: str) -> FederationError:
        return FederationError(
            f"cannot {what}: {self.admin.name} has the role {self.admin.role}, which does not "
            "allow it here",
            f"ask somebody who may: {who_may(right)}; roles stand in the project's project.yml",
            code="not-authorized",
        )


@contextlib.contextmanager
def connect(
    kit: Path, seconds: float = CONNECT_SECONDS, scratch: Path | None = None
) -> Iterator[Coordinator]:
    """Log in with an admin's startup kit, which may be read-only.

    Args:
        kit: where an admin's kit was unpacked: the folder that holds `kit/` or `startup/`, or
            `startup/` itself.
        seconds: how long to try.
        scratch: where results are kept while they come, in a folder of this session; a temporary
            folder by default. It needs room for two models.

    Raises:
        ConfigError: no admin kit.
        FederationError: the server does not answer (code no-server), or does not let this admin in.
    """
    kit = admin_kit(kit)
    admin = read_admin(kit)
    set_stream_settings()
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:

        def login(within: float) -> Session:
            own = tempfile.TemporaryDirectory(
                prefix="fedfms-session-", dir=scratch, ignore_cleanup_errors=True
            )
            return console.open_session(kit, admin.name, Path(stack.enter_context(own)), within)

        _look_for_server(kit, by_name_only=True)  # without a name, FLARE tries in vain for long
        try:
            session = login(seconds)
        except Exception as error:
            found = _as_our_error("connect to the server", error)
            if found.code == "no-server":
                _look_for_server(kit)
            raise found from error
        coordinator = Coordinator(session, admin, lambda: login(RECONNECT_SECONDS))
        stack.callback(coordinator.close)
        yield coordinator


def _look_for_server(kit: Path, by_name_only: bool = False) -> None:
    """Say which step on the way to the server fails, if one does: name, proxy, TCP, TLS.

    Raises:
        FederationError: code no-server.
    """
    try:
        read = read_kit(kit)
        host, port = read.about.server_host, read.about.server_port
        if not by_name_only:
            reach(read)
        elif proxy_for(host) is None:
            resolve(host, port)
    except NetworkError as error:
        fix = error.fix
        if error.code == "dns":
            fix = (
                "ask your network's administrators for a DNS entry, or give this machine the "
                f"address: a line 'ADDRESS {host}' in /etc/hosts; to docker run, --add-host "
                f"{host}:ADDRESS"
            )
        raise FederationError(
            f"cannot connect to the server: {error.problem}", fix, code="no-server"
        ) from None
    except ConfigError:  # not a kit of ours, which FLARE may like all the same
        return


def admin_kit(folder: Path) -> Path:
    """The folder with an admin's `startup/`, given that folder, the one above, or startup itself.

    Raises:
        ConfigError: code no-admin-kit.
    """
    for place in (folder, folder / "kit", folder.parent):
        if (place / "startup" / "fed_admin.json").is_file():
            return place
    raise ConfigError(
        f"{folder} is no startup kit of an admin",
        "name the folder that the coordinator's kit was unpacked to (--kit, or FEDFMS_KIT)",
        code="no-admin-kit",
    )


def read_admin(kit: Path) -> Admin:
    """Who the kit is for, by its certificate.

    Raises:
        ConfigError: code no-admin-kit; the certificate cannot be read.
    """
    path = kit / "startup" / "client.crt"
    try:
        subject = read_certificate(path).subject
        values = [
            str(subject.get_attributes_for_oid(oid)[0].value)
            for oid in (
                NameOID.COMMON_NAME,
                NameOID.ORGANIZATION_NAME,
                NameOID.UNSTRUCTURED_NAME,  # where FLARE keeps the role
            )
        ]
    except (ConfigError, OSError, IndexError):
        raise ConfigError(
            f"{path} cannot be read as the certificate of an admin",
            "unpack the coordinator's kit again, or ask for a new one",
            code="no-admin-kit",
        ) from None
    return Admin(*values)


def who_may(right: str) -> str:
    """The roles with a right, as the kits of `fedfms provision` give it, in words."""
    limits = {"any": "", "n:submitter": " for their own jobs"}
    limits |= {
        "o:submitter": " for jobs of their organisation",
        "o:site": " of the server's organisation",
    }
    words = []
    for role, rights in AUTHORIZATION["permissions"].items():
        limit = limits.get(str(rights.get(right, "none")))
        if limit is not None:
            words.append(f"{role}{limit}")
    return ", ".join(words)


def new_copy(job: Path, workspace: Path) -> Path:
    """A name for a job's copy below the workspace that nobody has taken."""
    name = f"{job.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    place, number = workspace / "submitted" / name, 1
    while place.exists():
        number += 1
        place = place.with_name(f"{name}-{number}")
    return place


def _kept_rounds(said: Mapping[str, Any]) -> int:
    kept = said.get("kept_rounds", 0)
    return kept if isinstance(kept, int) else 0


def _not_understood(what: str) -> FederationError:
    return FederationError(
        f"what the server said of {what} cannot be understood",
        "use the version of fedfms that the server runs",
        code="other-version",
    )


def _check_site_change(said: Any, site: str, wanted: str) -> None:
    results = said.get("clients") if isinstance(said, dict) else None
    for one in results or ():
        if isinstance(one, dict) and one.get("client_name") == site and not one.get("error"):
            return
    raise FederationError(
        f"the server does not say that {site} is {wanted} now",
        "check the name with fedfms status, and the server's log",
        code="site-not-changed",
    )


_MEANINGS: tuple[tuple[type[Exception], str, str], ...] = (
    (AuthenticationError, "not-let-in", "ask for a new kit: the server does not accept this one"),
    (InvalidJobDefinition, "invalid-job", "correct the job folder"),
    (JobNotFound, "no-such-job", "look at fedfms status for the jobs that there are"),
    (JobNotRunning, "not-running", "nothing; fedfms status shows how it ended"),
    (JobNotDone, "still-running", "wait for its end with fedfms watch, or stop it: fedfms stop"),
)


def _as_our_error(what: str, error: Exception) -> FedfmsError:
    if isinstance(error, FedfmsError):
        return error
    text = (str(error) or type(error).__name__).splitlines()[0]
    for kind, code, fix in _MEANINGS:
        if isinstance(error, kind):
            return FederationError(f"cannot {what}: {text}", fix, code=code)
    return FederationError(
        f"cannot {what}: {text}",
        "look whether the server runs and this machine can reach it; its log says more",
        code="no-server",
    )


def _min_clients(overrides: Sequence[str], meta: dict[str, Any]) -> int:
    text = str(meta.get("min_clients", 1))
    for override in overrides:
        name, _, value = override.partition("=")
        if name == MIN_CLIENTS:
            text = value
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"min_clients is {text}", "set a whole number of sites, 1 or more")
    return int(text)


def _write(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")
