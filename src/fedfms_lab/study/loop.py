"""Federated averaging in a plain loop: FLARE's place taken by forty lines, all else as it is.

The same trainers as processes, the same door and guard, the same average, and the same records for
the same report. It saves FLARE's start, certificates and waiting, which pays where there are many
small runs; numbers are the same (tests/jobs/test_study.py). There is nobody to tolerate here: an
answer that cannot be used ends the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from fedfms import __version__
from fedfms.about import known_image, known_revision
from fedfms.contracts.contribution import ModelName
from fedfms.contracts.messages import Kind, Task
from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError, FedfmsError
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.round_guard import RoundGuard, close_round
from fedfms.exchange.selection import Selection, why_it_stops
from fedfms.exchange.strategies import find_strategy
from fedfms.exchange.tensors import payload_bytes, save_tensors, shapes_of, to_precision
from fedfms.files import write_whole
from fedfms.local.processes import Processes
from fedfms.local.sites import (
    Site,
    images_forgotten,
    start_trainer,
    threads_of_a_trainer,
    trainer_command,
)
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.records.layout import GLOBAL_MODEL, PICTURES, RECIPE, RECORDS
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Judged,
    Note,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import class_dice
from fedfms.records.verdicts import findings
from fedfms.records.write import RecordWriter
from fedfms.trainer.client import TaskResult, run_task

_START_SECONDS = 180.0  # for a trainer to be there


def federate(
    recipe: Recipe,
    sites: Sequence[Site],
    *,
    job: str,
    folder: Path,
    work: Path,
    checkpoints: Path | None,
    settings: Callable[[Site], Mapping[str, str]],
    on_round: Callable[[int], None],
) -> None:
    """Run a recipe's rounds and its final evaluation.

    Args:
        recipe: its holdout sites evaluate and never train.
        sites: all that take part.
        job: name of the run.
        folder: gets recipe.json, records.jsonl, the model and pictures/, as a job's result folder.
        work: for sockets, logs, and the trainers' private folders.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.
        settings: for the environment of a site's trainer.
        on_round: told the number of each finished round, from 0.

    Raises:
        FederationError: a site's answer cannot be used ("site-failed"), naming the site and where
            its own words are.
        FedfmsError: the checkpoint is missing or does not fit.
    """
    strategy, guard = find_strategy(recipe), RoundGuard(recipe)
    selection = Selection(recipe)  # a study scores the final model, so that this only stops it
    weights = read_travelling(build_model(recipe, find_checkpoint(recipe, checkpoints)))
    write_whole(folder / RECIPE, recipe.to_json())
    records = RecordWriter(folder / RECORDS)
    names = tuple(site.name for site in sites)
    threads = {"OMP_NUM_THREADS": str(threads_of_a_trainer(len(sites) - len(recipe.holdout)))}
    stop = threading.Event()
    forgotten = images_forgotten(work / "sites")
    with forgotten, ThreadPoolExecutor(len(sites)) as pool, Processes() as processes:
        for site in sites:
            exchange, private = work / "exchange" / site.name, work / "sites" / site.name
            exchange.mkdir(parents=True, mode=0o700)
            start_trainer(
                processes,
                site,
                trainer_command(site, exchange, private, checkpoints),
                work=private,
                log_file=work / "logs" / f"{site.name}.trainer.log",
                settings={**threads, **settings(site)},
            )

        def ask(
            kind: Kind, number: int, model: ModelName, sent: Mapping[str, Tensor]
        ) -> dict[str, TaskResult]:
            """Every site's answer; the first that fails stops the others."""

            def one(site: Site) -> TaskResult:
                task = Task(
                    kind=kind, site=site.name, job=job, round=number, model=model, recipe=recipe
                )
                exchange = work / "exchange" / site.name
                try:
                    return run_task(
                        exchange,
                        task,
                        sent,
                        aborted=stop.is_set,
                        connect_seconds=_START_SECONDS,
                    )
                except FedfmsError as error:
                    raise FederationError(
                        f"{site.name} failed in round {number}: {error.problem}",
                        f"read {work}/sites/{site.name}/errors.log and "
                        f"{work}/logs/{site.name}.trainer.log",
                        code="site-failed",
                    ) from None

            answers = {site.name: pool.submit(one, site) for site in sites}
            try:
                done, _ = wait(answers.values(), return_when=FIRST_EXCEPTION)
                for answer in done:
                    answer.result()  # raises what ended it
            except BaseException:
                stop.set()
                raise
            return {name: answer.result() for name, answer in answers.items()}

        records.write(
            JobRecord(
                job_id=job,
                name=job,
                started=time.time(),
                fedfms_version=__version__,
                fedfms_revision=known_revision(),
                image=known_image(),
                recipe_sha256=recipe.sha256,
                sites=names,
            )
        )
        for number in range(recipe.rounds):
            records.write(RoundStarted(round=number))
            sent = to_precision(weights, recipe.transfer_precision)
            answers = ask("train", number, "round", sent)
            shapes = shapes_of(weights)
            accepted = {
                name: check_contribution(
                    shapes, recipe, __version__, answer.tensors, answer.contribution
                )
                for name, answer in answers.items()
            }
            for name, answer in answers.items():
                records.write(
                    ContributionRecord(
                        round=number,
                        site=name,
                        accepted=True,
                        bytes_down=payload_bytes(sent),
                        bytes_up=payload_bytes(answer.tensors),
                        contribution=answer.contribution,
                    )
                )
            slices = {name: a.contribution.training_slices for name, a in answers.items()}
            counts = {name: weight_of(recipe, a.contribution) for name, a in answers.items()}
            closed = close_round(guard, strategy, number, slices, accepted, counts)
            judged = Judged(round=number, acts=guard.acts, sites=closed.verdicts)
            records.write(judged)
            for name, text in findings(judged):
                records.write(Note(kind="guarded", site=name, text=text))
            if number > 0:  # what was scored has been trained
                said = {name: answer.contribution for name, answer in answers.items()}
                training = {n: one for n, one in said.items() if one.role == "train"}
                selection.is_best({n: class_dice(one.metrics) for n, one in training.items()})
            weights = {name: weights[name] + closed.change[name] for name in weights}
            stops = selection.reached.stops and number + 1 < recipe.rounds
            if stops:
                text = why_it_stops(recipe, number)
                records.write(Note(kind="stopped_early", text=text))
            records.write(RoundDone(round=number, sites=names))
            on_round(number)
            if stops:
                break
        save_tensors(folder / GLOBAL_MODEL, weights, "fp32")
        sent = to_precision(weights, recipe.scored_precision)
        for name, answer in ask("evaluate", number + 1, "final", sent).items():
            records.write(
                EvaluationRecord(
                    site=name,
                    model="final",
                    contribution=answer.contribution,
                    pictures=_write_pictures(folder, name, answer.pictures),
                )
            )
        records.write(JobDone(status="completed"))


def _write_pictures(folder: Path, site: str, pictures: Sequence[bytes]) -> tuple[str, ...]:
    names = []
    for index, picture in enumerate(pictures):
        name = f"{PICTURES}/{site}-final-{index}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, picture)
        names.append(name)
    return tuple(names)
