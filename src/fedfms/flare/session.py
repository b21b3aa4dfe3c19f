"""A coordinator's side of FLARE: prepare a job, submit it, watch it, fetch its result, abort it.

Submitting signs a job folder in place, so what is submitted is a copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.api_spec import JobNotFound, JobNotRunning
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedfms.config import Recipe
from fedfms.errors import ConfigError, FederationError
from fedfms.flare.job import RECIPE_FILE, RESULT_FOLDER, START_MODEL_FILE
from fedfms.flare.recorder import PROGRESS_GROUP

log = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0
MIN_CLIENTS = "min_clients"  # may be set beside the values of the recipe

_CONFIG = Path("app/config")
_SERVER = _CONFIG / "config_fed_server.json"
_TRAINING = "nvflare.app_common.workflows.scatter_and_gather.ScatterAndGather"


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job folder of our own, ready to submit."""

    folder: Path
    recipe: Recipe
    min_clients: int
    trains: bool


@dataclass(frozen=True, slots=True)
class JobState:
    """What FLARE says of a job."""

    status: str  # SUBMITTED, DISPATCHED, RUNNING, FINISHED:…
    detail: str  # why a site does not take part, as far as FLARE says

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.startswith("FINISHED")

    @property
    def is_completed(self) -> bool:
        """Whether FLARE calls it a success; the job's own records have the last word."""
        return self.status == "FINISHED:COMPLETED"


def prepare_job(
    job: Path, destination: Path, overrides: Sequence[str] = (), model: Path | None = None
) -> PreparedJob:
    """Copy a job folder and write the overrides into the copy.

    Args:
        job: a job folder, such as jobs/fedmsa; it is not changed.
        destination: new folder; its name becomes the name of the job folder at the server.
        overrides: `name=value` for the recipe, or `min_clients=N`.
        model: safetensors of travelling tensors to start from, or to evaluate. A recipe.json beside
            it, as in a results folder, goes before the job's own.

    Raises:
        ConfigError: no job folder, a recipe or an override that cannot be used, a job with code.
    """
    if not (job / "meta.json").is_file() or not (job / _SERVER).is_file():
        raise ConfigError(f"{job} is no job folder", "name a folder such as jobs/fedmsa")
    if any(path.is_dir() and path.name == "custom" for path in job.rglob("custom")):
        raise ConfigError(
            f"{job} holds a custom folder, and sites take no code from a job",
            "remove the folder; code belongs into the package",
            code="job-with-code",
        )
    if destination.exists():
        raise ConfigError(f"{destination} exists already", "name a new folder for the job's copy")
    shutil.copytree(job, destination)
    recipe_file = destination / _CONFIG / RECIPE_FILE
    if model is not None:
        if not model.is_file():
            raise ConfigError(
                f"there is no {model}", "name a .safetensors file of a results folder"
            )
        shutil.copyfile(model, destination / _CONFIG / START_MODEL_FILE)
        if (model.parent / RECIPE_FILE).is_file():
            shutil.copyfile(model.parent / RECIPE_FILE, recipe_file)
    of_recipe = [text for text in overrides if not text.startswith(f"{MIN_CLIENTS}=")]
    recipe = Recipe.from_json(recipe_file).with_overrides(of_recipe)
    recipe_file.write_text(recipe.to_json())
    meta = _read(destination / "meta.json")
    server = _read(destination / _SERVER)
    min_clients = _min_clients(overrides, meta)
    training = [w["args"] for w in server["workflows"] if w["path"] == _TRAINING]
    for arguments in training:
        arguments.update(num_rounds=recipe.rounds, min_clients=min_clients)
    for chain in server["task_result_filters"]:
        for one in chain["filters"]:
            if "min_contributions" in one["args"]:
                one["args"]["min_contributions"] = min_clients
    meta["min_clients"] = min_clients
    _write(destination / "meta.json", meta)
    _write(destination / _SERVER, server)
    return PreparedJob(destination, recipe, min_clients, bool(training))


def check_sites(job: PreparedJob, sites: Sequence[str]) -> None:
    """Refuse a job that FLARE would take and never start, or that would end in its first round.

    Args:
        job: from `prepare_job`.
        sites: those that are connected.

    Raises:
        ConfigError: code unknown-site or too-few-sites.
    """
    connected = ", ".join(sites) or "none"
    if unknown := sorted(set(job.recipe.holdout) - set(sites)):
        raise ConfigError(
            f"the recipe's holdout names {unknown[0]}, which is not connected",
            f"name connected sites: {connected}",
            code="unknown-site",
        )
    training = sorted(set(sites) - set(job.recipe.holdout)) if job.trains else list(sites)
    if len(training) < job.min_clients:
        raise ConfigError(
            f"the job needs {job.min_clients} {'training ' if job.trains else ''}sites, "
            f"and {len(training)} can take part",
            f"connect more sites, or allow fewer with --set min_clients={max(1, len(training))}",
            code="too-few-sites",
        )


def keep_model_at_server(job: PreparedJob, sites: Sequence[str]) -> None:
    """Deploy a given model to the server only: sites get it as a task, not with the job."""
    if not (job.folder / _CONFIG / START_MODEL_FILE).is_file():
        return
    shutil.copytree(
        job.folder / "app", job.folder / "app_site", ignore=lambda *_: [START_MODEL_FILE]
    )
    meta = _read(job.folder / "meta.json")
    meta["deploy_map"] = {"app": ["server"], "app_site": list(sites)}
    _write(job.folder / "meta.json", meta)


class Coordinator:
    """An open session with a FLARE server; `connect` makes one."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def sites(self) -> list[str]:
        """Names of the connected sites."""
        with _as_our_error("list the sites"):
            return sorted(client.name for client in self._session.get_system_info().client_info)

    def submit(
        self,
        job: Path,
        workspace: Path,
        overrides: Sequence[str] = (),
        model: Path | None = None,
    ) -> tuple[str, PreparedJob]:
        """Check a job against the connected sites and submit a copy of it.

        Args:
            job: a job folder; it is not changed.
            workspace: where the copy is made.
            overrides: as `prepare_job`.
            model: as `prepare_job`.

        Returns:
            FLARE's id of the job, and what was submitted.

        Raises:
            ConfigError: as `prepare_job` and `check_sites`.
            FederationError: the server does not take it.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        prepared = prepare_job(job, workspace / f"{job.name}-{stamp}", overrides, model)
        sites = self.sites()
        check_sites(prepared, sites)
        keep_model_at_server(prepared, sites)
        return self.submit_prepared(prepared.folder), prepared

    def submit_prepared(self, folder: Path) -> str:
        """Submit a folder of `prepare_job` as it is; FLARE's id of the job."""
        with _as_our_error("submit the job"):
            job_id = str(self._session.submit_job(str(folder.resolve())))
        log.info("submitted %s as %s", folder.name, job_id)
        return job_id

    def state(self, job_id: str) -> JobState:
        """What FLARE says of the job now."""
        with _as_our_error("ask for the job"):
            meta = self._session.get_job_meta(job_id)
        detail = meta.get("job_deploy_detail") or ""
        texts = detail if isinstance(detail, list) else [detail]
        trouble = [str(text) for text in texts if text and not str(text).endswith("OK")]
        return JobState(str(meta.get("status", "")), "; ".join(trouble))

    def progress(self, job_id: str) -> dict[str, Any]:
        """What the job's recorder counts: round, rounds, sites, answered, evaluating."""
        with _as_our_error("ask for the progress"):
            try:
                stats = self._session.show_stats(job_id, "server")
            except (JobNotFound, JobNotRunning):  # its process is starting, or has ended
                return {}
        for groups in stats.values() if isinstance(stats, dict) else ():
            if isinstance(groups, dict) and isinstance(groups.get(PROGRESS_GROUP), dict):
                return dict(groups[PROGRESS_GROUP])
        return {}

    def watch(
        self, job_id: str, poll_seconds: float = 3.0
    ) -> Iterator[tuple[JobState, dict[str, Any]]]:
        """State and progress again and again, the last time when the job has finished."""
        while True:
            state = self.state(job_id)
            progress = self.progress(job_id) if state.status == "RUNNING" else {}
            yield state, progress
            if state.is_finished:
                return
            time.sleep(poll_seconds)

    def download(self, job_id: str, folder: Path) -> Path:
        """Fetch a finished job; the folder with its records and models.

        Raises:
            FederationError: it cannot be fetched, or holds no records.
        """
        with _as_our_error("fetch the result"):
            place = self._session.download_job_result(job_id, str(folder.resolve()))
        result = Path(place) / "workspace" / RESULT_FOLDER
        if not result.is_dir():
            raise FederationError(
                "the job left no records at the server",
                "look at the server's log: the job ended before it began",
                code="no-records",
            )
        return result

    def abort(self, job_id: str) -> None:
        """Stop a running job."""
        with _as_our_error("abort the job"):
            self._session.abort_job(job_id)


@contextlib.contextmanager
def connect(kit: Path, seconds: float = CONNECT_SECONDS) -> Iterator[Coordinator]:
    """Log in with an admin's startup kit.

    Args:
        kit: the folder that holds `startup/` of an admin.
        seconds: how long to try.

    Raises:
        ConfigError: no admin kit.
        FederationError: the server does not answer, or does not let this admin in.
    """
    settings = kit / "startup" / "fed_admin.json"
    if not settings.is_file():
        raise ConfigError(
            f"{kit} is no startup kit of an admin",
            "name the folder that the coordinator's kit was unpacked to",
            code="no-admin-kit",
        )
    name = _read(settings)["admin"]["username"]
    with _as_our_error("connect to the server"), contextlib.redirect_stdout(io.StringIO()):
        session = new_secure_session(name, str(kit.resolve()), timeout=seconds)
    try:
        yield Coordinator(session)
    finally:
        try:
            session.close()
        except Exception as error:
            log.debug("the session could not be closed: %s", error)


@contextlib.contextmanager
def _as_our_error(what: str) -> Iterator[None]:
    try:
        yield
    except FederationError:
        raise
    except Exception as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise FederationError(
            f"cannot {what}: {text}",
            "look whether the server runs and this machine can reach it; its log says more",
            code="no-server",
        ) from error


def _min_clients(overrides: Sequence[str], meta: dict[str, Any]) -> int:
    text = str(meta.get("min_clients", 1))
    for override in overrides:
        name, _, value = override.partition("=")
        if name == MIN_CLIENTS:
            text = value
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"min_clients is {text}", "set a whole number of sites, 1 or more")
    return int(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "correct the file") from None
    return dict(values)


def _write(path: Path, values: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)
