"""A canary: a job of its own before a run, by which every site says what would keep it from it.

One round on two cases a site, the whole way: policy, reading, checkpoint, training, scores, door,
upload, guard, average, final evaluation. Zeros leave the sites, as their trainers see by the recipe
that it is a canary; the server can make no run of it, since a site would see another recipe, which
nobody signed. All sites are heard, also where the first of them fails. Afterwards the job is
deleted, and the server and the sites keep nothing of it.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.codes import CODES
from fedfms.contracts.contribution import Contribution, Rehearsal
from fedfms.contracts.recipe import BACKBONES, JOB_RECIPE, Recipe
from fedfms.errors import ConfigError, FederationError, FedfmsError
from fedfms.files import write_whole
from fedfms.flare.lint import PreparedJob, read_json
from fedfms.flare.session import SERVER_CONFIG, TRAINING, Coordinator, JobState, deploy
from fedfms.records.layout import RECORDS
from fedfms.records.read import RecordReader
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    Record,
    RoundDone,
    RoundStarted,
)

log = logging.getLogger(__name__)

NAME_ENDING = "-canary"  # of the job's name, as sites' and server's audits show it
SECONDS = 1800.0  # that a canary may take; a processor at 1024 pixels takes minutes a step
END_SECONDS = 60.0  # for FLARE to end a job that was told to
POLL_SECONDS = 1.0

Tell = Callable[[str], None]  # one line for the person who waits


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a site, or the server, from the run."""

    site: str  # "the server" where no site is to blame
    code: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Pace:
    """What a site needs, by its canary."""

    site: str
    said: Rehearsal
    micro_batch: int  # slices in memory at once; 0 of a holdout
    transfer_seconds: float  # both ways, while all sites transfer

    @property
    def seconds_per_round(self) -> float:
        """The site's work and its transfers."""
        return self.said.seconds_per_round + self.transfer_seconds


@dataclass(frozen=True, slots=True)
class Findings:
    """What a canary came to."""

    paces: tuple[Pace, ...]
    troubles: tuple[Trouble, ...]
    seconds: float  # that it took

    @property
    def slowest(self) -> Pace | None:
        """The site that the others will wait for."""
        return max(self.paces, key=lambda pace: pace.seconds_per_round, default=None)


def rehearse(
    coordinator: Coordinator,
    job: PreparedJob,
    sites: Sequence[str],
    scratch: Path,
    tell: Tell,
    *,
    look: Callable[[], object] = lambda: None,
    seconds: float = SECONDS,
) -> Findings:
    """Run a job's canary at these sites, to its end, and forget it.

    Args:
        coordinator: an open session.
        job: from `prepare_job`, not deployed yet; it is not changed.
        sites: that are to take part.
        scratch: where its folder and its records lie meanwhile.
        tell: gets a line when a site has answered.
        look: called now and then; may raise to give up.
        seconds: after which it is stopped; who has not answered then is a trouble.

    Raises:
        ConfigError: the job does not train.
        FedfmsError: the server is lost, or does not take the job.
    """
    if not job.trains:
        raise ConfigError(
            "a canary goes before a job that trains, and this one evaluates a model",
            "submit it without --canary",
            code="no-canary",
        )
    began = time.monotonic()
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="canary-", dir=scratch) as folder:
        canary = _prepare(job, Path(folder) / job.folder.name)
        deploy(canary, sites, leaves_out=True)
        with _forgotten(coordinator, coordinator.submit_prepared(canary.folder)) as job_id:
            state, late = _wait(coordinator, job_id, sites, tell, look, began + seconds)
            records = _records(coordinator, job_id, Path(folder) / "download")
    paces, troubles = findings(records, sites, canary.recipe, state, late)
    return Findings(tuple(paces), tuple(troubles), time.monotonic() - began)


def findings(
    records: Sequence[Record], sites: Sequence[str], recipe: Recipe, state: JobState, late: bool
) -> tuple[list[Pace], list[Trouble]]:
    """What the records of a canary say of each site.

    Args:
        state: FLARE's last word.
        late: whether it was stopped since it took too long.
    """
    started = next((r.time for r in records if isinstance(r, RoundStarted)), None)
    answers = {r.site: r for r in records if isinstance(r, ContributionRecord)}
    missed = {s: why for r in records if isinstance(r, RoundDone) for s, why in r.missed.items()}
    not_scored = {r.site: r.reason for r in records if isinstance(r, EvaluationRecord) and r.reason}
    paces, troubles = [], []
    for site in sorted(sites):
        answer = answers.get(site)
        said = answer.contribution if answer is not None and answer.accepted else None
        if answer is not None and isinstance(said, Contribution) and said.rehearsal is not None:
            passed = 0.0
            if answer.time is not None and started is not None:
                passed = answer.time - started - said.rehearsal.seconds
            paces.append(Pace(site, said.rehearsal, said.micro_batch, max(0.0, passed)))
            if site in not_scored:
                troubles.append(trouble(site, not_scored[site], recipe))
        elif answer is not None and answer.reason:
            troubles.append(trouble(site, answer.reason, recipe))
        elif answers or late:
            why = missed.get(site) or ("no answer in time" if late else "no answer")
            told = f"; FLARE says: {state.detail}" if state.detail else ""
            troubles.append(
                Trouble(site, "no-answer", f"{why}{told}", _fix("no-answer", site, recipe))
            )
    done = next((r for r in reversed(records) if isinstance(r, JobDone)), None)
    if not troubles and not late and (done is None or done.status != "completed"):
        reason = done.reason if done is not None and done.reason else state.detail
        problem = f"the canary ended as {state.status}{f': {reason}' if reason else ''}"
        troubles.append(Trouble("the server", "job-failed", problem, "look at the server's log"))
    return paces, troubles


def trouble(site: str, reason: str, recipe: Recipe) -> Trouble:
    """What a site's answer says: its public code, what that means, and what to do."""
    found = _CODE.match(reason)
    code = found[1] if found else "unexpected"
    means = CODES.get(code)
    return Trouble(
        site, code, f"{means} ({code})" if found and means else reason, _fix(code, site, recipe)
    )


def refusal(troubles: Sequence[Trouble], sites: Sequence[str]) -> FederationError:
    """All troubles as one error, a line for each with its fix."""
    lines = [f"- {one.site}: {one.problem}; fix: {one.fix}" for one in troubles]
    bad = [site for site in sites if any(one.site == site for one in troubles)]
    without = " ".join(f"--without {site}" for site in bad)
    count = f"{len(bad)} of {len(sites)} sites" if bad else "the server"
    first = f"the canary found that {count} cannot do this job; it was not started:"
    return FederationError(
        "\n  ".join([first, *lines]),
        "put each right as its line says, then submit again"
        + (f"; or go on without: {without}" if bad and len(bad) < len(sites) else ""),
        code="canary-failed",
    )


def _prepare(job: PreparedJob, destination: Path) -> PreparedJob:
    """The job's copy that is its canary."""
    shutil.copytree(job.folder, destination)
    recipe = dataclasses.replace(job.recipe, canary=True)
    (destination / JOB_RECIPE).write_text(recipe.to_json())
    server, meta = read_json(destination / SERVER_CONFIG), read_json(destination / "meta.json")
    for workflow in server["workflows"]:
        if workflow["path"] == TRAINING:  # hear everybody, whoever fails
            workflow["args"].update(
                num_rounds=1,
                min_clients=1,
                ignore_result_error=True,
                wait_time_after_min_received=int(SECONDS),
            )
    for chain in server["task_result_filters"]:
        for one in chain["filters"]:
            if "min_contributions" in one["args"]:
                one["args"]["min_contributions"] = 1
    meta.update(name=f"{meta['name']}{NAME_ENDING}", min_clients=1)
    meta.pop("mandatory_clients", None)
    write_whole(destination / SERVER_CONFIG, json.dumps(server, indent=2) + "\n")
    write_whole(destination / "meta.json", json.dumps(meta, indent=2) + "\n")
    return PreparedJob(destination, recipe, 1, job.trains)


@contextlib.contextmanager
def _forgotten(coordinator: Coordinator, job_id: str) -> Iterator[str]:
    """Have a job end and be deleted, however this is left."""
    try:
        yield job_id
    finally:
        try:
            _end(coordinator, job_id)
            coordinator.delete(job_id)
        except FedfmsError as error:
            log.warning("the canary %s could not be deleted: %s", job_id, error.problem)


def _end(coordinator: Coordinator, job_id: str) -> JobState:
    """Stop a job that has not ended, and wait until it has."""
    deadline = time.monotonic() + END_SECONDS
    told = False
    while not (state := coordinator.state(job_id)).is_finished:
        if not told:
            coordinator.stop(job_id)
            told = True
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return state


def _wait(
    coordinator: Coordinator,
    job_id: str,
    sites: Sequence[str],
    tell: Tell,
    look: Callable[[], object],
    deadline: float,
) -> tuple[JobState, bool]:
    """Until the canary has ended, or is stopped; FLARE's last word, and whether it was."""
    heard: set[str] = set()
    waits = ""
    while not (state := coordinator.state(job_id)).is_finished:
        look()
        if state.is_waiting and state.detail and state.detail != waits:
            waits = state.detail
            tell(f"canary: FLARE has not started it yet: {waits}")
        if time.monotonic() > deadline:
            return _end(coordinator, job_id), True
        event = None
        with contextlib.suppress(FedfmsError):  # its process ends before FLARE says so
            event = coordinator.event(job_id)
        if event is not None and event.phase == "train" and set(event.answered) - heard:
            heard |= set(event.answered)
            tell(f"canary: {len(heard)} of {len(sites)} sites passed: {', '.join(sorted(heard))}")
        time.sleep(POLL_SECONDS)
    return state, False


def _records(coordinator: Coordinator, job_id: str, folder: Path) -> list[Record]:
    try:
        folder.mkdir()
        return RecordReader(coordinator.download(job_id, folder) / RECORDS).read_new()
    except FederationError as error:
        if error.code != "no-records":  # it never began, and FLARE says why
            raise
        return []


# ------------------------------------------------------------------------------------- words

_CODE = re.compile(r"^\w+ \(([a-z0-9-]+)[,)]")  # as FedfmsError.public begins

_LABELS = (
    *("unknown-label-values", "foreground-is-1", "foreground-is-255", "empty-masks"),
    *("unknown-class", "classes-share-values", "nothing-annotated", "no-training-slices"),
    *("unknown-segments", "label-value-too-large", "white-is-zero"),
)
_CHECKPOINTS = (
    *("checkpoint", "missing-checkpoint", "wrong-checkpoint", "damaged-checkpoint"),
    *("checkpoint-keys", "checkpoint-shape"),
)
_MEMORY = ("out-of-memory", "trainer-died")


def _fix(code: str, site: str, recipe: Recipe) -> str:
    if code in _LABELS:
        return (
            f"correct classes and background in {site}'s site.yml; fedfms check-data there shows "
            "the values in its labels"
        )
    if code in _CHECKPOINTS:
        known = BACKBONES.get(recipe.backbone)
        name = known.file_name if known and known.sha256 == recipe.backbone_sha256 else "the file"
        return (
            f"put {name} with the SHA-256 {recipe.backbone_sha256[:12]}… into the folder of "
            f"checkpoints at {site}"
        )
    if code in _MEMORY:
        return (
            f"set a larger TRAINER_MEMORY in {site}'s .env or micro_batch: 1 in its site.yml, or "
            "submit with a smaller image_size or batch_size"
        )
    return f"look at errors.log and the trainer's log at {site}, and run fedfms check-site there"
