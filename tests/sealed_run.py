"""A run with real kits, receipts and a seal, in seconds and without a federation.

Kits are FLARE's own. Receipts are made, logged and signed by the trainer's code, countersigned by
the FLARE client's, and written by the server's. Only training is made up: differences are drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from nvflare.apis.shareable import Shareable
from torch import Tensor

from fedfms import __version__
from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.messages import Task
from fedfms.contracts.receipt import SignedReceipt
from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.round_guard import RoundGuard, close_round
from fedfms.exchange.strategies import find_strategy
from fedfms.exchange.tensors import payload_bytes, save_tensors, update_norm
from fedfms.flare.kept_answers import begin_to_keep_answers, keep_answers
from fedfms.flare.receipts import KitSigner, countersign, receipt_of, result_files
from fedfms.flare.simulate import SERVER, provision
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Judged,
    RoundDone,
    RoundStarted,
)
from fedfms.records.write import RecordWriter
from fedfms.trainer.kept import Outcome
from fedfms.trainer.receipts import Began, Receipts

JOB = "0b1f3b9e-7a52-4a7d-9d34-7c2f4f1f9a10"
SITES = ("site-1", "site-2")
SLICES = 7  # of each
RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256=BACKBONES["vit_demo"].sha256,
    classes=("lesion",),
    rounds=2,
    image_size=128,
)
PICTURE = bytes.fromhex(  # the smallest PNG: one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da6360000000020001e527defc0000000049454e44ae426082"
)


def make_kits(folder: Path) -> Path:
    """A folder with a kit of each of two sites and a server, all of one new authority."""
    return provision(folder / "kits", SITES, 8002)


class Site:
    """A site's trainer and FLARE client, as far as receipts go."""

    def __init__(self, name: str, folder: Path, kits: Path) -> None:
        self.name, self.work = name, folder / name / "work"
        self.policy = folder / name / "policy"
        self.policy.mkdir(parents=True, exist_ok=True)
        (self.policy / "privacy.json").write_text(json.dumps({"min_cases": 1}))
        self.signer = KitSigner(kits / name, "client")
        self.restart()

    def restart(self) -> None:
        """A new process of the trainer."""
        self.receipts = Receipts(self.work, self.policy)

    def answer(
        self,
        task: Task,
        model: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        pictures: Sequence[bytes] = (),
    ) -> tuple[Shareable, Contribution]:
        """What goes to the server: a message with the receipt, and the report."""
        signed, report = self.give(task, model, tensors, pictures)
        message = Shareable()
        countersign(message, signed, self.signer)
        return message, report

    def give(
        self,
        task: Task,
        model: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        pictures: Sequence[bytes] = (),
    ) -> tuple[SignedReceipt, Contribution]:
        """The trainer's part of it."""
        report = report_of(task, tensors)
        began = Began()
        self.receipts.begin(began, model)
        outcome = Outcome(report, dict(tensors), list(pictures))
        return self.receipts.give(task, outcome, began), report


def task_of(site: str, kind: str, number: int, recipe: Recipe = RECIPE) -> Task:
    """A round, or the evaluation of the final model."""
    return Task(
        kind=kind,
        site=site,
        job=JOB,
        round=number,
        model="round" if kind == "train" else "final",
        recipe=recipe,
        submitter="ada@hospital.example",
        job_name="fedmsa",
    )


def report_of(task: Task, tensors: Mapping[str, Tensor]) -> Contribution:
    """A site's report with numbers that have many digits."""
    trains = task.kind == "train"
    return Contribution(
        site=task.site,
        kind=task.kind,
        role="train",
        round=task.round,
        model=task.model,
        recipe_sha256=task.recipe.sha256,
        backbone_sha256=task.recipe.backbone_sha256,
        package_version=__version__,
        training_slices=SLICES if trains else 0,
        training_cases=3 if trains else 0,
        evaluated_cases=4,
        metrics=(
            Metric(class_name="lesion", metric="dice", mean=0.1 + 0.2, std=0.25, cases=4, empty=0),
        ),
        loss=1 / 3 if trains else None,
        seconds={"train": 2},
        update_norm=update_norm(tensors) if trains else None,
    )


def difference(seed: int) -> dict[str, Tensor]:
    """What a site might have learnt."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "decoder.bias": torch.randn(7, generator=generator),
        "decoder.weight": torch.randn(3, 5, generator=generator),
    }


def write_run(folder: Path, kits: Path, sites_folder: Path, answers: Path | None = None) -> Path:
    """A results folder of two rounds at two sites, as a server leaves it.

    Args:
        answers: where the server keeps them, too. Its guard closes the rounds then, and scales a
            difference of the second site down, which is far too long in the second round.
    """
    folder.mkdir(parents=True)
    sites = [Site(name, sites_folder, kits) for name in SITES]
    writer = RecordWriter(folder / "records.jsonl")
    writer.write(JobRecord(job_id=JOB, name="fedmsa", recipe_sha256=RECIPE.sha256, sites=SITES))
    model = {name: torch.zeros_like(tensor) for name, tensor in difference(0).items()}
    guard, strategy = RoundGuard(RECIPE), find_strategy(RECIPE)
    if answers is not None:
        begin_to_keep_answers(answers, model)
    for number in range(RECIPE.rounds):
        writer.write(RoundStarted(round=number))
        differences, weights = {}, {}
        for seed, site in enumerate(sites):
            tensors = difference(10 * number + seed)
            if answers is not None and (number, site.name) == (1, SITES[1]):
                tensors = {name: 20 * tensor for name, tensor in tensors.items()}
            differences[site.name] = tensors
            counted = report_of(task_of(site.name, "train", number), tensors)
            weights[site.name] = weight_of(RECIPE, counted)
            message, report = site.answer(task_of(site.name, "train", number), model, tensors)
            writer.write(
                ContributionRecord(
                    round=number,
                    site=site.name,
                    accepted=True,
                    bytes_down=payload_bytes(model),
                    bytes_up=payload_bytes(tensors),
                    contribution=report,
                    receipt=receipt_of(message),
                )
            )
        if answers is not None:
            keep_answers(answers, number, differences, RECIPE.transfer_precision)
            slices = dict.fromkeys(SITES, SLICES)
            closed = close_round(guard, strategy, number, slices, differences, weights)
            writer.write(Judged(round=number, acts=guard.acts, sites=closed.verdicts))
            change = closed.change
        else:
            change = {
                name: sum(one[name] for one in differences.values()) / len(differences)
                for name in model
            }
        model = {name: tensor + change[name] for name, tensor in model.items()}
        writer.write(RoundDone(round=number, sites=SITES))
    (folder / "recipe.json").write_text(RECIPE.to_json())
    save_tensors(folder / "global_model.safetensors", model, "fp32")
    (folder / "pictures").mkdir()
    for site in sites:
        name = f"pictures/{site.name}-final-0.png"
        (folder / name).write_bytes(PICTURE)
        task = task_of(site.name, "evaluate", RECIPE.rounds)
        message, report = site.answer(task, model, {}, [PICTURE])
        writer.write(
            EvaluationRecord(
                site=site.name,
                model="final",
                contribution=report,
                pictures=(name,),
                receipt=receipt_of(message),
            )
        )
    writer.write(JobDone(status="completed"))
    writer.seal(result_files(folder), KitSigner(kits / SERVER, "server"))
    return folder


def reseal(folder: Path, records: Sequence[dict], signer: KitSigner) -> None:
    """Write these records anew, as a server might that wants another past: chained and sealed."""
    path = folder / "records.jsonl"
    lines, previous = [], "0" * 64
    for record in records:
        line = json.dumps({**record, "previous": previous}).encode()
        previous = hashlib.sha256(line).hexdigest()
        lines.append(line + b"\n")
    path.write_bytes(b"".join(lines))
    RecordWriter(path).seal(result_files(folder), signer)


def without_seal(folder: Path) -> list[dict]:
    """The records of a run but its seal."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:-1]]
