"""One run of a study from its specification to its finished folder, as a process of its own.

`python -m fedfms_lab.study.process FOLDER`: the folder holds spec.json. Central and local training
happen here; a federated run has its own processes. Scoring is another process, so that what trains
never opens an image that it must not see. How far a run is, and why it failed, stand in work/.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fedfms.contracts.contribution import METRICS
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.errors import FederationError, FedfmsError, unexpected
from fedfms.exchange.tensors import save_tensors
from fedfms.export.fedfms import write_fedfms
from fedfms.local.sites import Site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.trained import Trained
from fedfms.models.travelling import read_travelling, write_travelling
from fedfms.records.layout import GLOBAL_MODEL, ROUNDS
from fedfms.records.rows import RoundRow, write_rounds
from fedfms.records.scores import class_dice, over_classes
from fedfms.report.collect import load_result
from fedfms.training.pooled import PooledRound, train_pooled
from fedfms_lab.study.data import read_manifest, site_config
from fedfms_lab.study.record import (
    JOB_FOLDER,
    MANIFEST_FILE,
    MEMBERS_FOLDER,
    MODEL_FILE,
    PERSONAL_FOLDER,
    RECIPE_FILE,
    ROUNDS_FILE,
    Phase,
)
from fedfms_lab.study.spec import SPEC_FILE, RunSpec, add_measured
from fedfms_lab.study.watch import WATCH_VARIABLE, WATCHED_TRAINER, watch_files, write_watch

log = logging.getLogger(__name__)

WORK_FOLDER = "work"  # of what a run needs while it runs
# in WORK_FOLDER: [rounds done, rounds], and [problem, fix]
PROGRESS_FILE, FAILURE_FILE = "progress.json", "failure.json"
_PHASES = ("prepare", "train", "evaluate", "exchange")


def do_run(spec: RunSpec, folder: Path) -> None:
    """Train and score, leaving all files of a run but run.json in the folder.

    Raises:
        FedfmsError: training or scoring failed.
    """
    work = folder / WORK_FOLDER
    (folder / RECIPE_FILE).write_text(spec.recipe.to_json())
    if spec.key.regime == "federated":
        _federated(spec, folder, work)
    elif spec.key.regime == "ensemble":
        _ensemble(spec, folder)
    elif spec.key.regime == "zero-shot":
        _untrained(spec, folder)
    else:
        _pooled(spec, folder, work)
    _score(folder, work)


def _untrained(spec: RunSpec, folder: Path) -> None:
    """The network as every way to train but from scratch begins."""
    model = build_model(spec.recipe, find_checkpoint(spec.recipe, spec.checkpoints))
    save_tensors(folder / MODEL_FILE, read_travelling(model), "fp32")
    write_rounds(folder / ROUNDS_FILE, [])


def _ensemble(spec: RunSpec, folder: Path) -> None:
    """The finished models of the sites alone, linked into the run's folder, or copied."""
    members = folder / MEMBERS_FOLDER
    members.mkdir()
    for site in spec.key.trained_on:
        place = members / f"{site}.safetensors"
        try:
            place.hardlink_to(spec.members[site])
        except OSError:  # not every file system has links
            shutil.copyfile(spec.members[site], place)
    shutil.copyfile(folder / RECIPE_FILE, members / RECIPE_FILE)
    write_rounds(folder / ROUNDS_FILE, [])


def _pooled(spec: RunSpec, folder: Path, work: Path) -> None:
    """Central or local training, here; from now on this process opens training sites only."""
    from_scratch = spec.key.regime == "scratch"
    watch_files(_write_watch(spec, folder, work / "watch.json", spec.key.trained_on))
    training = {s.name: site_config(s) for s in spec.sites if s.name in spec.key.trained_on}
    rounds: list[PooledRound] = []

    def on_round(done: PooledRound) -> None:
        rounds.append(done)
        _tell(work, done.rounds_trained, spec.recipe.rounds)

    tensors = train_pooled(
        spec.recipe,
        training,
        checkpoints=spec.checkpoints,
        control=Control(),
        on_round=on_round,
        from_scratch=from_scratch,
    )
    if from_scratch:  # nothing of the network is in a checkpoint
        model = build_model(spec.recipe, None)
        write_travelling(model, tensors)
        file = folder / MODEL_FILE
        write_fedfms(Trained(spec.recipe, model, file), None, file)
    else:
        save_tensors(folder / MODEL_FILE, tensors, "fp32")
    write_rounds(folder / ROUNDS_FILE, _pooled_rows(rounds, training))
    add_measured(folder, {name: _summed(rounds, name) for name in _PHASES if name != "exchange"})


def _summed(rounds: Sequence[PooledRound] | Sequence[RoundRow], phase: str) -> Phase:
    """Seconds of all rounds, and sites, together; the highest peak of any."""
    return Phase(
        seconds=sum(done.seconds.get(phase, 0.0) for done in rounds),
        peak_memory_bytes=max(done.peak_memory_bytes.get(phase, 0) for done in rounds),
    )


def _pooled_rows(
    rounds: Sequence[PooledRound], training: Mapping[str, SiteConfig]
) -> list[RoundRow]:
    """Rows as of a federation: round r has the scores before its training, and its loss.

    The scores after the last round are those of scores.csv, as there.
    """
    rows = []
    for before, after in itertools.pairwise(rounds):
        for site in training:
            means: dict[str, Any] = {m: over_classes(before.metrics[site], m) for m in METRICS}
            rows.append(
                RoundRow(
                    round=before.rounds_trained,
                    site=site,
                    role="train",
                    accepted=True,
                    loss=after.loss,
                    class_dice=class_dice(before.metrics[site]),
                    **means,
                    training_slices=before.training_slices[site],
                    bytes_down=0,
                    bytes_up=0,
                    peak_memory_bytes=after.peak_memory_bytes,
                )
            )
    return rows


def _federated(spec: RunSpec, folder: Path, work: Path) -> None:
    def settings(site: Site) -> dict[str, str]:
        watch = work / f"watch-{site.name}.json"
        return {WATCH_VARIABLE: str(_write_watch(spec, folder, watch, [site.name]))}

    sites = [dataclasses.replace(site, trainer=WATCHED_TRAINER) for site in spec.sites]
    job = folder / JOB_FOLDER
    if spec.engine == "flare":
        from fedfms.flare.simulate import simulate

        simulate(
            spec.job,
            sites,
            recipe=folder / RECIPE_FILE,
            results=job,
            workspace=work,
            checkpoints=spec.checkpoints,
            settings=settings,
            on_event=lambda event: _tell(work, len(event.finished), spec.recipe.rounds),
        )
    else:
        from fedfms.report.write import write_results
        from fedfms_lab.study.loop import federate

        raw = work / "result"
        raw.mkdir()
        federate(
            spec.recipe,
            sites,
            job=spec.key.name,
            folder=raw,
            work=work,
            checkpoints=spec.checkpoints,
            settings=settings,
            on_round=lambda number: _tell(work, number + 1, spec.recipe.rounds),
        )
        write_results(raw, job)
    (job / GLOBAL_MODEL).rename(folder / MODEL_FILE)
    if spec.recipe.personal != "none":
        _keep_personal(spec, folder, work)
    shutil.copyfile(job / ROUNDS, folder / ROUNDS_FILE)
    rows = load_result(job).rounds
    if missed := [row for row in rows if not row.accepted]:
        raise FederationError(
            f"{missed[0].site} missed round {missed[0].round}: {missed[0].reason}",
            "mend that site and start the study again; a run in which a site is missing in some "
            "rounds answers another question",
            code="site-failed",
        )
    add_measured(folder, {name: _summed(rows, name) for name in _PHASES})


def _keep_personal(spec: RunSpec, folder: Path, work: Path) -> None:
    """Keep what each training site kept for itself, with which it is scored."""
    (folder / PERSONAL_FOLDER).mkdir(exist_ok=True)
    for name in spec.key.trained_on:
        kept = [path for path in work.rglob("learnt-*/staying.safetensors") if name in path.parts]
        if kept:
            last = max(kept, key=lambda path: path.parent.name)
            shutil.copyfile(last, folder / PERSONAL_FOLDER / f"{name}.safetensors")


def _write_watch(spec: RunSpec, folder: Path, path: Path, allowed: Sequence[str]) -> Path:
    manifest = read_manifest(folder / MANIFEST_FILE)
    roots = {site.name: site_config(site).data_root for site in spec.sites}
    files = {
        site: [root / name for row in manifest[site] for name in (row.image, row.label)]
        for site, root in roots.items()
    }
    write_watch(path, files, allowed, path.with_suffix(".log"))
    return path


def _score(folder: Path, work: Path) -> None:
    with (work / "score.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "fedfms_lab.study.score", str(folder / SPEC_FILE), str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        said = (work / "score.log").read_text(errors="replace").splitlines()[-6:]
        raise FederationError(
            "\n  ".join(["the trained model could not be scored:", *said]),
            f"the whole log is {work / 'score.log'}",
            code="not-scored",
        )


def _tell(work: Path, done: int, rounds: int) -> None:
    (work / PROGRESS_FILE).write_text(json.dumps([done, rounds]))


def main(arguments: Sequence[str]) -> int:
    """FOLDER: do the run whose specification lies there."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    folder = Path(arguments[0])
    failure = folder / WORK_FOLDER / FAILURE_FILE
    failure.parent.mkdir()
    started = time.monotonic()
    try:
        do_run(RunSpec.read(folder / SPEC_FILE), folder)
    except FedfmsError as error:
        log.error("%s", error)
        failure.write_text(json.dumps([error.problem, error.fix]))
        return 1
    except Exception as error:
        told = unexpected(error, "the run cannot go on", FedfmsError)
        sys.stderr.write(told.details)  # into the run's log
        fix = f"{told.fix}; they stand at the end of its log"
        failure.write_text(json.dumps([told.problem, fix]))
        return 1
    except KeyboardInterrupt:
        return 130
    log.info("done in %.1f s", time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
