"""All runs of a study: what is not done yet, one after the other or side by side, then the answer.

A run is done when its folder stands under runs/; until then it is made beside it, in unfinished/,
which the next start clears. So a study that was interrupted, however hard, goes on with the runs
that are missing, and a finished run is never repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedfms import __version__
from fedfms.about import known_image, known_revision
from fedfms.contracts.recipe import Recipe
from fedfms.data.classes import unknown_classes
from fedfms.errors import ConfigError, FederationError, SiteDataError
from fedfms.files import file_sha256, write_whole
from fedfms.local.processes import Processes, Supervised
from fedfms.local.sites import Site, child_environment
from fedfms.models.sam import find_checkpoint
from fedfms.records.rows import read_rounds
from fedfms_lab.study.data import ManifestRow, read_site, site_config, write_manifest
from fedfms_lab.study.plan import Study
from fedfms_lab.study.process import FAILURE_FILE, PROGRESS_FILE, WORK_FOLDER
from fedfms_lab.study.record import (
    FORMAT,
    MANIFEST_FILE,
    MODEL_FILE,
    ROUNDS_FILE,
    RUN_FILE,
    RUNS_FOLDER,
    STUDY_FILE,
    RunKey,
    RunRecord,
    SiteFacts,
    read_run,
    record_to_dict,
)
from fedfms_lab.study.spec import MEASURED_FILE, SPEC_FILE, RunSpec, read_measured
from fedfms_lab.study.tuning import choices, where
from fedfms_lab.study.watch import opened_files

log = logging.getLogger(__name__)

UNFINISHED_FOLDER, PHANTOMS_FOLDER, LOGS_FOLDER = "unfinished", "phantoms", "logs"
_POLL_SECONDS = 0.3
_MEMORY_MARGIN = 1.25  # of what the largest run needed so far, free before another one starts
_VERSIONS = ("nvflare", "torch", "numpy")


@dataclass(frozen=True, slots=True)
class StudyProgress:
    """How far a study is."""

    planned: int
    done: int  # found finished, or finished now
    running: Mapping[str, float]  # run -> share of its rounds that are over
    finished: tuple[str, float] | None = None  # a run that just ended well, and the seconds it took
    failed: tuple[str, str] | None = None  # a run that just failed, and why


@dataclass(frozen=True, slots=True)
class StudyResult:
    """How a study ended."""

    folder: Path
    planned: int
    repeated: int  # runs that were done before
    done: int  # runs done now
    failed: Mapping[str, str]  # run -> why


@dataclass(slots=True)
class _Running:
    spec: RunSpec
    folder: Path
    process: Supervised
    started: float
    peak_bytes: int = 0
    share: float = 0.0


def run_study(
    study: Study,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    parallel: int | None = None,
    only: Sequence[str] = (),
    on_progress: Callable[[StudyProgress], None] | None = None,
) -> StudyResult:
    """Do every run that is not done yet.

    Args:
        study: what to do.
        folder: of the study; made if it is not there.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.
        parallel: runs side by side; None: as many as the processors and the memory allow.
        only: parts of run names; runs with none of them in their name are left for another time.
        on_progress: told how far it is, several times a second.

    Raises:
        ConfigError: the study cannot be done as it is, or the folder holds another study.
        FederationError: another process is at this study ("study-running").
        KeyboardInterrupt: Ctrl-C; everything that ran has been stopped, finished runs stay.
    """
    tell = on_progress or (lambda progress: None)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
        sites = study.find_sites(folder / PHANTOMS_FOLDER)
        names = [site.name for site in sites]
        keys, tries = study.runs(names), study.tries(names)
        wanted = [key for key in keys if not only or any(part in key.name for part in only)]
        needed = {where(key) for key in wanted}
        wanted_tries = [key for key in tries if where(key) in needed]
        recipes = {key.name: study.recipe_of(key) for key in (*tries, *keys)}  # all, at once
        _check_recipes(recipes.values(), sites, checkpoints)
        data = {site.name: read_site(site) for site in sites}
        _check_same_study(folder, tries or keys, recipes, data)
        _write_study(folder, study, sites, keys, tries)

        def spec_of(key: RunKey) -> RunSpec:
            return RunSpec(
                study=study.name,
                key=key,
                recipe=recipes[key.name],
                job=study.methods[key.method].job,
                engine=study.engine if key.regime == "federated" else None,
                sites=tuple(sites),
                facts={name: facts for name, (facts, _) in data.items()},
                checkpoints=checkpoints.resolve() if checkpoints is not None else None,
                threads=study.threads,
                pictures=key.rate is None
                and key.seed == min(study.seeds)
                and key.regime != "local",
                members=_members(folder, key) if key.regime == "ensemble" else {},
            )

        everything = [*wanted_tries, *wanted]
        missing = [key for key in everything if not _is_done(folder, key)]
        work = _Work(folder, len(everything), len(everything) - len(missing), tell)
        rows = {name: its_rows for name, (_, its_rows) in data.items()}

        def do(keys: Sequence[RunKey]) -> None:
            work.do([spec_of(key) for key in keys], rows, parallel)

        do([key for key in missing if key.rate is not None])
        if tries:
            tried = [read_run(folder / RUNS_FOLDER / k.name) for k in tries if _is_done(folder, k)]
            rates = {choice.where: choice.rate for choice in choices(tried)}
            recipes.update({k.name: study.recipe_of(k, rates.get(where(k))) for k in keys})
            _check_same_study(folder, keys, recipes, data)
        ready = [key for key in missing if key.rate is None]
        failed = {where(key) for key in wanted_tries if key.name in work.failed}
        for key in (key for key in ready if where(key) in failed):
            work.give_up(key, "a run that tries a learning rate for it failed")
        ready = [key for key in ready if where(key) not in failed]
        do([key for key in ready if key.regime != "ensemble"])
        ensembles = [key for key in ready if key.regime == "ensemble"]
        there = {k: all(path.is_file() for path in _members(folder, k).values()) for k in ensembles}
        for key in (key for key in ensembles if not there[key]):
            work.give_up(key, "a model of one site alone that it needs is not there")
        do([key for key in ensembles if there[key]])
        shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
        done_before = len(everything) - len(missing)
        return StudyResult(folder, len(everything), done_before, work.now, work.failed)


def _members(folder: Path, key: RunKey) -> dict[str, Path]:
    """The models of an ensemble by site: of the same method and seed, each trained there alone."""
    return {
        site: folder
        / RUNS_FOLDER
        / dataclasses.replace(key, regime="local", holdout=None, trained_on=(site,)).name
        / MODEL_FILE
        for site in key.trained_on
    }


class _Work:
    """The runs of one start, as many side by side as fit."""

    def __init__(
        self, folder: Path, planned: int, before: int, tell: Callable[[StudyProgress], None]
    ) -> None:
        self.folder = folder
        self.now = 0
        self.failed: dict[str, str] = {}
        self._planned, self._before, self._tell_caller = planned, before, tell
        self._running: list[_Running] = []
        self._largest_bytes: int | None = None  # that a run needed so far

    def do(
        self,
        specs: Sequence[RunSpec],
        rows: Mapping[str, Sequence[ManifestRow]],
        parallel: int | None,
    ) -> None:
        """Do them all; a run that fails does not keep the others from being done."""
        waiting = list(specs)
        with Processes() as processes:
            while waiting or self._running:
                while waiting and self._fits(waiting[0], parallel):
                    self._running.append(self._start(processes, waiting.pop(0), rows))
                self._tell()
                time.sleep(_POLL_SECONDS)
                for one in list(self._running):
                    self._look(one)

    def give_up(self, key: RunKey, why: str) -> None:
        """Count a run as failed that cannot begin."""
        self.failed[key.name] = f"{why}\n  fix: mend that first, and start the study again"
        self._tell(failed=(key.name, self.failed[key.name]))

    def _fits(self, spec: RunSpec, parallel: int | None) -> bool:
        if not self._running:
            return True
        if parallel is not None:
            return len(self._running) < parallel
        if sum(_slots(one.spec) for one in self._running) + _slots(spec) > (os.cpu_count() or 1):
            return False
        if self._largest_bytes is None:
            return False  # nobody knows yet what a run needs
        needed = _MEMORY_MARGIN * self._largest_bytes
        started_now = [one for one in self._running if time.monotonic() - one.started < 20.0]
        return psutil.virtual_memory().available > needed * (1 + len(started_now))

    def _start(
        self, processes: Processes, spec: RunSpec, rows: Mapping[str, Sequence[ManifestRow]]
    ) -> _Running:
        folder = self.folder / UNFINISHED_FOLDER / spec.key.name
        folder.mkdir(parents=True)
        spec.write(folder / SPEC_FILE)
        write_manifest(folder / MANIFEST_FILE, rows)
        settings = {} if spec.threads is None else {"OMP_NUM_THREADS": str(spec.threads)}
        process = processes.start(
            spec.key.name,
            [sys.executable, "-m", "fedfms_lab.study.process", str(folder.resolve())],
            folder=folder,
            log_file=self.folder / LOGS_FOLDER / f"{spec.key.name}.log",
            environment=child_environment(settings),
        )
        return _Running(spec, folder, process, time.time())

    def _look(self, one: _Running) -> None:
        running = one.process.is_running
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            done, rounds = json.loads((one.folder / WORK_FOLDER / PROGRESS_FILE).read_text())
            one.share = done / rounds
        if running:
            one.peak_bytes = max(one.peak_bytes, _memory_bytes(one.process))
            return
        self._running.remove(one)
        self._largest_bytes = max(self._largest_bytes or 0, one.peak_bytes)
        name = one.spec.key.name
        assert one.process.process is not None  # it was started
        code = one.process.process.returncode
        if code == 0:
            finish_run(one.spec, one.folder, self.folder / RUNS_FOLDER / name, one.started)
            self.now += 1
            self._tell(finished=(name, time.time() - one.started))
            return
        work, kept = one.folder / WORK_FOLDER, self.folder / LOGS_FOLDER / name
        said = _last_words(one, code).replace(str(work.resolve()), str(kept))
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError):
            work.rename(kept)
        self.failed[name] = said
        self._tell(failed=(name, said))

    def _tell(
        self,
        finished: tuple[str, float] | None = None,
        failed: tuple[str, str] | None = None,
    ) -> None:
        running = {one.spec.key.name: one.share for one in self._running}
        done = self._before + self.now
        self._tell_caller(StudyProgress(self._planned, done, running, finished, failed))


def finish_run(spec: RunSpec, folder: Path, place: Path, started: float) -> None:
    """Write run.json and move the finished folder to its place; afterwards the run is done."""
    rounds = read_rounds(folder / ROUNDS_FILE)
    work = folder / WORK_FOLDER
    logs = sorted(work.glob("watch*.log"))
    trainers = [path for path in logs if path.stem.removeprefix("watch-") not in _unseen(spec)]
    measured = read_measured(folder)
    opened = opened_files(trainers, [site.name for site in spec.sites])
    shutil.rmtree(work)
    for name in (MEASURED_FILE, SPEC_FILE):
        (folder / name).unlink()
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = RunRecord(
        study=spec.study,
        key=spec.key,
        engine=spec.engine,
        recipe_sha256=spec.recipe.sha256,
        backbone_sha256=spec.recipe.backbone_sha256,
        versions={
            "fedfms": __version__,
            "commit": known_revision() or "unknown",
            "image": known_image() or "unknown",
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
        machine={
            **measured.machine,
            "processors": os.cpu_count() or 1,
            "memory_bytes": psutil.virtual_memory().total,
            "threads": spec.threads,
            "platform": platform.machine(),
        },
        sites=dict(spec.facts),
        started=started,
        seconds=time.time() - started,
        phases=measured.phases,
        bytes_down=sum(row.bytes_down or 0 for row in rounds),
        bytes_up=sum(row.bytes_up or 0 for row in rounds),
        opened=opened,
        files=files,
        recipe=spec.recipe.to_dict(),
    )
    write_whole(folder / RUN_FILE, json.dumps(record_to_dict(record), indent=1) + "\n")
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)


def _unseen(spec: RunSpec) -> set[str]:
    return {site.name for site in spec.sites} - set(spec.key.trained_on)


def _slots(spec: RunSpec) -> int:
    """Processors that a run keeps busy: all where several trainers or threads compute."""
    everything = os.cpu_count() or 1
    if spec.key.regime == "federated" or spec.threads is None:
        return everything
    return min(spec.threads, everything)


def _memory_bytes(process: Supervised) -> int:
    """Resident memory of a process and all below it, now."""
    total = 0
    with contextlib.suppress(psutil.Error):
        assert process.process is not None  # it runs
        parent = psutil.Process(process.process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def _last_words(one: _Running, code: int) -> str:
    """Why a run failed: its own error, or the end of its log where it could not say one."""
    with contextlib.suppress(OSError, ValueError):
        problem, fix = json.loads((one.folder / WORK_FOLDER / FAILURE_FILE).read_text())
        return f"{problem}\n  fix: {fix}"
    end = one.process.last_lines(4).splitlines()
    return "\n  ".join(
        [f"its process ended with exit code {code}", *end, f"all that it said: {one.process.log}"]
    )


# ----------------------------------------------------------------------------- the study's folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(
                f"another process is at the study in {folder}",
                "wait for it, or name another folder with --output",
                code="study-running",
            ) from None
        yield


def _check_recipes(
    recipes: Collection[Recipe], sites: Sequence[Site], checkpoints: Path | None
) -> None:
    """Refuse before the first run what would end every run.

    Raises:
        SiteDataError: a class that one of the sites does not know.
        CheckpointError: a SAM checkpoint that is not here, or another one.
    """
    by_backbone = {(recipe.backbone, recipe.backbone_sha256): recipe for recipe in recipes}
    for recipe in by_backbone.values():
        find_checkpoint(recipe, checkpoints)
    for classes in {recipe.classes for recipe in recipes}:
        for site in sites:
            for problem in unknown_classes(site_config(site), classes):
                raise SiteDataError(
                    f"{site.name}: {problem.problem}", problem.fix, code=problem.code
                )


def _is_done(folder: Path, key: RunKey) -> bool:
    return (folder / RUNS_FOLDER / key.name / RUN_FILE).is_file()


def _check_same_study(
    folder: Path,
    keys: Sequence[RunKey],
    recipes: Mapping[str, Recipe],
    data: Mapping[str, tuple[SiteFacts, list[ManifestRow]]],
) -> None:
    """A finished run counts only if it was made with this recipe and these images.

    Raises:
        ConfigError: code other-study; one was not.
    """
    for key in keys:
        if not _is_done(folder, key):
            continue
        run = read_run(folder / RUNS_FOLDER / key.name)
        changes = []
        if run.record.recipe_sha256 != recipes[key.name].sha256:
            values = recipes[key.name].to_dict()
            changed = sorted(n for n in values if run.recipe.get(n) != values[n])
            changes.append(f"recipe: {', '.join(changed) or 'it'} changed")
        for site, (facts, _) in data.items():
            if run.record.sites.get(site) != facts:
                changes.append(f"the images, labels or site.yml of {site} changed")
        if changes:
            raise ConfigError(
                f"{folder} holds the finished run {key.name}, which was made otherwise: "
                f"{changes[0]}",
                "name a new folder with --output, or remove this one (or that run's folder) to do "
                "it again",
                code="other-study",
            )


def _write_study(
    folder: Path,
    study: Study,
    sites: Sequence[Site],
    keys: Sequence[RunKey],
    tries: Sequence[RunKey],
) -> None:
    holdouts = list(
        dict.fromkeys(key.holdout for key in keys if key.regime not in ("local", "zero-shot"))
    )
    values = {
        "format": FORMAT,
        "name": study.name,
        "title": study.title or study.name,
        "sites": sorted(site.name for site in sites),
        "methods": list(study.methods),
        "regimes": list(dict.fromkeys(key.way for key in keys)),
        "holdouts": holdouts or [None],
        "seeds": list(study.seeds),
        "engine": study.engine,
        "target_dice": study.target_dice,
        "planned": [key.name for key in keys],
        "tries": [key.name for key in tries],
        "asked": study.to_dict(),
    }
    write_whole(folder / STUDY_FILE, json.dumps(values, indent=1) + "\n")
