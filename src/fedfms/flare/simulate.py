"""A whole federation on this machine, without containers: the real thing with processes.

Real provisioning, mutual TLS on a free loopback port, one server, and for each site a FLARE client
and a trainer, as in the containers. Nothing of it is left behind, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fedfms.contracts.announcement import Announcement, Slicing
from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.errors import FederationError
from fedfms.exchange.bounds import read_policy
from fedfms.files import write_whole
from fedfms.flare.canary import Findings, refusal, rehearse
from fedfms.flare.coordinator import Patience, connect_patiently
from fedfms.flare.follow import NEWS_SECONDS, OnEvent, follow, news_from, read_end, wait_for_start
from fedfms.flare.internals.process import CLIENT_PROGRAM, SERVER_PROGRAM, program_arguments
from fedfms.flare.internals.settings import (
    gone_site_settings,
    stream_settings,
    write_connection_settings,
)
from fedfms.flare.job import RESULT_FOLDER
from fedfms.flare.lint import PreparedJob, check_sites, slicing_problems, slicing_warnings
from fedfms.flare.progress import Event, JobProgress
from fedfms.flare.provision import run_provisioner
from fedfms.flare.session import Coordinator, JobState, deploy, prepare_job
from fedfms.local.processes import Processes, Supervised, signals_mean
from fedfms.local.sites import (
    Site,
    child_environment,
    images_forgotten,
    start_trainer,
    threads_of_a_trainer,
    trainer_command,
)
from fedfms.models.methods import find_method
from fedfms.records.layout import RECORDS
from fedfms.records.schema import ContributionRecord, EvaluationRecord, JobDone, Record
from fedfms.report.write import check_results_folder, write_results
from fedfms.trainer.own_key import KEY as TRAINER_KEY
from fedfms.trainer.own_key import SUMS, own_key

log = logging.getLogger(__name__)

PROJECT, SERVER, ADMIN = "fedfms-simulation", "localhost", "coordinator@fedfms.local"
ADMINS = {ADMIN: "project_admin"}  # name -> role
START_SECONDS = 180.0  # for the server and all sites to find each other
SCHEDULE_SECONDS = 90.0  # for a submitted job to start
POLL_SECONDS = 0.5
SERVER_STARTS = 5  # that are tried, one after the other

# How fast a site that is gone is noticed. On one machine nothing can be slow but the machine.
HEART_BEAT_SECONDS = 5
SILENCE_SECONDS = 30
GRACE_SECONDS = 15  # longer than the 10 s between a job's heart beats
LEAD_SECONDS = 5
OUTCOME_SECONDS = 10


# errors about a site's own files, as they cross to the server; a full disk may have room later
_OF_FILES = re.compile(r"\b(SiteDataError|ConfigError|CheckpointError) \((?!no-room\b)[a-z0-9-]+")
# how the trainer begins an entry of errors.log
_ENTRY = re.compile(r"^[\d-]+ [\d:]+ job \S+ round \d+ \w+: ", re.MULTILINE)


def simulate(
    job: Path,
    sites: Sequence[Site],
    *,
    overrides: Sequence[str] = (),
    recipe: Path | None = None,
    results: Path,
    workspace: Path,
    checkpoints: Path | None = None,
    model: Path | None = None,
    settings: Callable[[Site], Mapping[str, str]] = lambda site: {},
    on_event: OnEvent | None = None,
    on_canary: Callable[[Findings], None] | None = None,
) -> Path:
    """Run a job on a federation of local processes and write its results folder.

    Args:
        job: job folder, such as jobs/fedmsa; it is not changed.
        sites: see `find_sites`.
        overrides: `name=value` for the recipe, or `min_clients=N`.
        recipe: goes before the job's own; see `session.prepare_job`.
        results: new or empty folder for models, tables and report.
        workspace: for everything else; a folder for this run is made in it, with a log for each
            process.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
        model: model to start from, or to evaluate; see there.
        settings: for the environment of a site's trainer.
        on_event: told how far it is.
        on_canary: a canary goes before the run (canary.py), and this is told what it found.

    Returns:
        the folder with one log for each process.

    Raises:
        FedfmsError: whatever keeps the federation from coming to its end, with the end of the log
            that says why.
        KeyboardInterrupt: Ctrl-C, or SIGTERM; everything has been stopped by then.
    """
    tell = on_event or (lambda event: None)
    check_results_folder(results)
    run = workspace / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    prepared = prepare_job(job, run / job.name, overrides, model, recipe)
    find_method(prepared.recipe.method)  # all of it runs here: said before anything starts
    if prepared.recipe.strategy != "mean":  # always there; to look costs an import of torch
        from fedfms.exchange.strategies import find_strategy

        find_strategy(prepared.recipe)
    names = [site.name for site in sites]
    check_sites(prepared, names)
    for text in _different_slices(sites):
        tell(Event("provision", text=f"warning: {text}", sites=tuple(names)))
    federation = Federation(run, sites, prepared.recipe, checkpoints, tell, settings=settings)
    with signals_mean(_interrupt, signal.SIGTERM), federation.running() as coordinator:
        if on_canary is not None:
            on_canary(federation.rehearse(coordinator, prepared))
        deploy(prepared, names)
        tell(Event("submit", sites=tuple(names)))
        job_id = federation.submit(coordinator, prepared.folder)
        status = federation.wait_for_end(coordinator, job_id)
        tell(Event("fetch"))
        downloaded = coordinator.download(job_id, run / "download")
    end = read_end(downloaded, status)
    write_results(downloaded, results)
    if not end.completed:
        raise FederationError(
            end.problem,
            f"{end.fix}; a site's own words are in {federation.run}/sites/SITE/errors.log, "
            f"all logs in {federation.logs}; what there is of results lies in {results}",
            code="job-failed",
        )
    federation.forget()
    tell(Event("done"))
    return federation.logs


def _different_slices(sites: Sequence[Site]) -> list[str]:
    """Where sites make unlike pictures, as sentences.

    Raises:
        ConfigError: the first site.yml that cannot be used.
        DoorClosed: likewise the first policy: nothing of that site would ever be in the model.
    """
    told = []
    for site in sites:
        read_policy(site.folder / "policy")
        config = SiteConfig.from_yaml(site.folder / "site.yml", site.data, "--data")
        told.append(Announcement(site.name, slicing=Slicing.of(config)))
    return [*(one.problem for one in slicing_problems(told)), *slicing_warnings(told)]


class Federation:
    """Server, FLARE clients and trainers of one run."""

    untold_line: float | None = 100.0  # MB/s at the least: all lines are of this machine

    def __init__(
        self,
        run: Path,
        sites: Sequence[Site],
        recipe: Recipe,
        checkpoints: Path | None,
        tell: OnEvent,
        admins: Mapping[str, str] = ADMINS,
        settings: Callable[[Site], Mapping[str, str]] = lambda site: {},
    ) -> None:
        self.run = run.resolve()
        self.logs = self.run / "logs"
        self.sites = sites
        self.recipe = recipe
        self.checkpoints = checkpoints.resolve() if checkpoints is not None else None
        self.admins = admins
        self._settings = settings
        self._tell = tell
        self._kits = self.run / "kits"
        self._made = self._kits  # with a folder for each participant, once they are made
        self._processes = Processes()
        self._flare: list[Supervised] = []  # server and FLARE clients

    @contextlib.contextmanager
    def running(self) -> Iterator[Coordinator]:
        """Provision, start, and wait until everybody is there; stop everything at the end."""
        self._tell(Event("provision", sites=tuple(site.name for site in self.sites)))
        port = free_port()
        kits = provision(self._kits, [site.name for site in self.sites], port, self.admins)
        self._made = kits
        with images_forgotten(self.run / "sites"), self._processes, _no_proxy():
            self._tell(Event("start", sites=tuple(site.name for site in self.sites)))
            server = self._start_server(kits / SERVER)
            _wait_for_port(server, port)
            if self.recipe.sums_only:
                self._know_each_other()
            for site in self.sites:
                self._start_site(site, kits / site.name)

            def still_starts() -> None:
                if not server.is_running:
                    raise self._failure("the server ended while it started")

            patience = Patience(seconds=START_SECONDS)
            with connect_patiently(kits / ADMIN, self.run, patience, still_starts) as coordinator:
                self._wait_for_sites(coordinator)
                for one in self._flare:  # as a container engine does, once they came up
                    one.restarts = True
                yield coordinator

    def rehearse(self, coordinator: Coordinator, job: PreparedJob) -> Findings:
        """Let a canary go before a job that is not deployed yet.

        Raises:
            FederationError: code canary-failed.
        """
        names = [site.name for site in self.sites]
        found = rehearse(
            coordinator,
            job,
            names,
            self.run,
            lambda text: self._tell(Event("submit", text=text, sites=tuple(names))),
            look=self._look,
        )
        if found.troubles:
            raise FederationError(
                refusal(found.troubles, names).problem,
                f"put each right as its line says, or leave the site's folder out; a site's own "
                f"words are in {self.run}/sites/SITE/errors.log",
                code="canary-failed",
            )
        return found

    def submit(self, coordinator: Coordinator, job: Path) -> str:
        """Submit a prepared job and wait until it runs."""
        job_id = coordinator.submit_prepared(job)
        deadline = time.monotonic() + SCHEDULE_SECONDS

        def give_up_in_time(state: JobState) -> None:
            self._look()
            if time.monotonic() > deadline:
                raise self._failure("FLARE did not start the job", state.detail)

        state = wait_for_start(
            coordinator,
            job_id,
            on_wait=give_up_in_time,
            poll_seconds=POLL_SECONDS,
        )
        if state.detail:
            self._tell(Event("submit", text=f"FLARE says: {state.detail}"))
        return job_id

    def wait_for_end(self, coordinator: Coordinator, job_id: str) -> str:
        """Tell how far the job is until it has ended; FLARE's status of it."""
        folder = self.kit(SERVER) / job_id / RESULT_FOLDER
        reader = JobProgress(folder / RECORDS, self.recipe.rounds)
        ask, next_question = news_from(coordinator, job_id), 0.0

        def news() -> Event | None:
            nonlocal next_question
            for text in self._look():
                self._tell(reader.event(text=text))
            new = reader.read_new()
            for record in new:
                self._stop_for_broken_files(record)
            if new and isinstance(reader.records[-1], JobDone):
                next_question = math.inf  # nobody is there any more to answer
                return reader.event()
            if not new and time.monotonic() < next_question:
                return None
            next_question = time.monotonic() + NEWS_SECONDS
            event = ask()  # what sites do now, the job's process alone knows
            return event or (reader.event() if new else None)

        state = follow(
            coordinator,
            job_id,
            news=news,
            tell=self._tell,
            poll_seconds=POLL_SECONDS,
            state_seconds=2 * POLL_SECONDS,
        )
        if not reader.records and not state.is_completed:
            raise self._failure(f"FLARE ended the job as {state.status}", state.detail)
        return state.status

    def _stop_for_broken_files(self, record: Record) -> None:
        """End at a site's first answer that it cannot use its own files.

        The site would answer so in each round to come. On one machine somebody can mend it now, and
        its own words, which stay at a site otherwise, may be read.

        Raises:
            FederationError: code site-files, with the site's words.
        """
        if not isinstance(record, ContributionRecord | EvaluationRecord):
            return
        first = isinstance(record, EvaluationRecord) or record.round == 0
        said = _OF_FILES.search(record.reason or "")
        if not first or said is None:
            return
        name = record.site
        log_file = self.run / "sites" / name / "errors.log"
        problem, fix = _last_error(log_file) or (f"{said[0]}", "read the file")
        raise FederationError(
            f"{name} cannot take part: {problem}",
            f"{fix}. Or leave the site's folder out. All of it is in {log_file}",
            code="site-files",
        )

    def forget(self) -> None:
        """Remove keys, FLARE's folders and the exchange after a run that went well; logs stay."""
        for folder in (self._kits, self.run / "exchange", self.run / "download"):
            shutil.rmtree(folder, ignore_errors=True)
        for site in self.sites:
            (self._work(site) / TRAINER_KEY).unlink(missing_ok=True)
            shutil.rmtree(self._work(site) / SUMS, ignore_errors=True)
        self._peers.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------ processes

    def _start_server(self, kit: Path) -> Supervised:
        write_connection_settings(kit / "local", self._line)
        settings: dict[str, str] = {**server_settings(self._line), "OMP_NUM_THREADS": "1"}
        if self.checkpoints is not None:
            settings["FEDFMS_CHECKPOINTS"] = str(self.checkpoints)
        server = self._processes.start(
            "the server",
            _flare_command(SERVER_PROGRAM, kit, "fed_server.json"),
            folder=kit,
            log_file=self.logs / "server.log",
            environment=child_environment(settings),
        )
        self._flare.append(server)
        return server

    def _start_site(self, site: Site, kit: Path) -> None:
        exchange = self.run / "exchange" / site.name
        exchange.mkdir(parents=True, mode=0o700, exist_ok=True)
        threads = threads_of_a_trainer(len(self.sites) - len(self.recipe.holdout))
        start_trainer(
            self._processes,
            site,
            self.trainer_command(site, exchange),
            work=self.run / "sites" / site.name,
            log_file=self.logs / f"{site.name}.trainer.log",
            settings={"OMP_NUM_THREADS": str(threads), **self._settings(site)},
        )
        write_connection_settings(kit / "local", self._line)
        client = self._processes.start(
            f"{site.name}'s FLARE client",
            _flare_command(
                CLIENT_PROGRAM,
                kit,
                "fed_client.json",
                f"uid={site.name}",
                f"heart_beat_interval={HEART_BEAT_SECONDS}",
            ),
            folder=kit,
            log_file=self.logs / f"{site.name}.flare.log",
            environment=child_environment(
                {
                    **stream_settings(self._line),
                    "FEDFMS_EXCHANGE": str(exchange),
                    "OMP_NUM_THREADS": "1",
                }
            ),
        )
        self._flare.append(client)

    def trainer_command(self, site: Site, exchange: Path) -> list[str]:
        """How a site's trainer is started."""
        command = trainer_command(site, exchange, self._work(site), self.checkpoints)
        return [*command, "--peers", str(self._peers)] if self.recipe.sums_only else command

    @property
    def _line(self) -> float | None:
        """Megabytes a second that each line is said to carry."""
        return Machine.from_environment().link_megabytes_per_second or self.untold_line

    @property
    def _peers(self) -> Path:
        return self.run / "peers.json"

    def _work(self, site: Site) -> Path:
        """A site's private folder."""
        return self.run / "sites" / site.name

    def _know_each_other(self) -> None:
        """What sites of a real federation tell each other: the keys of their trainers."""
        keys = {site.name: own_key(self._work(site)).public for site in self.sites}
        write_whole(self._peers, json.dumps(keys))

    def _look(self) -> list[str]:
        """What ended since the last look, as sentences; a server that keeps ending is the end."""
        told = []
        for one in self._processes.look():
            if one.name == "the server" and not (one.restarts and one.exits <= SERVER_STARTS):
                raise self._failure("the server ended")
            told.append(f"{one.name} ended{' and is started again' if one.restarts else ''}")
        return told

    # ------------------------------------------------------------------------------- waiting

    def _wait_for_sites(self, coordinator: Coordinator) -> None:
        wanted = {site.name for site in self.sites}
        deadline = time.monotonic() + START_SECONDS
        before: set[str] = set()
        while missing := wanted - (there := set(coordinator.sites())):
            if there != before:
                before = there
                self._tell(Event("start", answered=tuple(sorted(there)), sites=tuple(wanted)))
            for text in self._look():
                if "FLARE client" in text:
                    raise self._failure(text.partition(";")[0], name=text.partition("'")[0])
            if time.monotonic() > deadline:
                name = sorted(missing)[0]
                raise self._failure(f"{name} did not reach the server", name=name)
            time.sleep(POLL_SECONDS)

    def _failure(self, problem: str, detail: str = "", name: str = "") -> FederationError:
        path = self.logs / (f"{name}.flare.log" if name else "server.log")
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()[-12:]
        said = f": {detail}" if detail else ""
        return FederationError(
            f"{problem}{said}", "\n".join([f"read {path}, which ends with", *lines])
        )

    def kit(self, name: str) -> Path:
        """The startup kit of a participant, which is also its FLARE workspace."""
        return self._made / name


def provision(
    folder: Path, sites: Sequence[str], port: int, admins: Mapping[str, str] = ADMINS
) -> Path:
    """Startup kits for a server on this machine, these sites and admins, by FLARE's provisioner.

    The folder holds private keys and is for this user only.

    Returns:
        the folder with one folder for each participant.
    """
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    ours = {"server_storage": str(folder / "storage"), "heart_beat_timeout": SILENCE_SECONDS}
    project: dict[str, Any] = {
        "api_version": 3,
        "name": PROJECT,
        "participants": [
            {"name": SERVER, "type": "server", "org": "coordinator", "fed_learn_port": port},
            *(
                {"name": name, "type": "admin", "org": "coordinator", "role": role}
                for name, role in admins.items()
            ),
            *({"name": name, "type": "client", "org": name.replace("-", "_")} for name in sites),
        ],
        "builders": [
            {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
            {
                "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {"path": "fedfms.flare.kit.FedfmsKitBuilder", "args": ours},
            {"path": "nvflare.lighter.impl.cert.CertBuilder"},
        ],
    }
    return run_provisioner(project, folder)


def _last_error(log_file: Path) -> tuple[str, str] | None:
    """Problem and fix of the last error that a trainer wrote down for its site."""
    try:
        text = log_file.read_text(errors="replace")
    except OSError:
        return None
    last = _ENTRY.split(text)[-1]
    problem, found, fix = last.partition("\n  fix: ")
    return (problem.strip(), fix.strip()) if found else None


def server_settings(megabytes_per_second: float | None = None) -> Mapping[str, str]:
    """Variables for the server's process: how soon it goes on without a site that is gone.

    Args:
        megabytes_per_second: that its line carries.
    """
    gone = gone_site_settings(grace=GRACE_SECONDS, lead=LEAD_SECONDS, outcome=OUTCOME_SECONDS)
    return {**gone, **stream_settings(megabytes_per_second)}


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flare_command(program: str, kit: Path, config: str, *settings: str) -> list[str]:
    return [sys.executable, "-u", *program_arguments(program, kit, config, settings)]


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """The admin session of this process reaches the loopback interface directly."""
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "localhost,127.0.0.1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["no_proxy"]
        else:
            os.environ["no_proxy"] = before


def _wait_for_port(server: Supervised, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if not server.is_running or time.monotonic() > deadline:
            raise FederationError(
                "the server did not start", f"read {server.log}:\n{server.last_lines()}"
            )
        time.sleep(0.2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
