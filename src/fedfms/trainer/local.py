"""Training at one site alone: what its images give without a federation, and a check of everything
but the network before joining one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedfms.config import Recipe, SiteConfig
from fedfms.control import Control
from fedfms.data.dataset import SliceDataset, prepare_cases
from fedfms.data.manifest import find_cases
from fedfms.exchange.contribution import Metric
from fedfms.exchange.payload import read_travelling, save_tensors
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.training.device import torch_device
from fedfms.training.evaluate import evaluate, summarize
from fedfms.training.loop import train_round


@dataclass(frozen=True, slots=True)
class LocalRound:
    """The model after so many rounds of training at this site; round 0 is before training."""

    rounds_trained: int
    loss: float | None  # mean over the steps of the round that led here
    metrics: tuple[Metric, ...]  # over the validation cases; none where `evaluate_every` skips them
    seconds: float


def train_local(
    recipe: Recipe,
    site: SiteConfig,
    *,
    checkpoints: Path | None,
    output: Path | None,
    control: Control,
    on_round: Callable[[LocalRound], None],
) -> None:
    """Run all rounds of a recipe on one site's training cases, scoring its validation cases.

    Args:
        recipe: as in the federation; its holdout has no meaning here.
        site: whose images to use.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.
        output: file for the trained tensors (safetensors, fp32), or None.
        control: progress and abort.
        on_round: called before training and after each round, with scores where they are due.

    Raises:
        FedfmsError: whatever is wrong with the files, the checkpoint or the training.
    """
    model = build_model(recipe, find_checkpoint(recipe, checkpoints)).to(torch_device(site))
    cases = prepare_cases(find_cases(site), site, control)
    validation = [case for case in cases if case.case.split == "validation"]
    dataset = SliceDataset([case for case in cases if case.case.split == "train"], site, recipe)
    optimizer, loss, micro_batch = None, None, None
    for rounds_trained in range(recipe.rounds + 1):
        started = time.monotonic()
        if rounds_trained > 0:
            result = train_round(
                model,
                dataset,
                recipe,
                site,
                round_number=rounds_trained - 1,
                optimizer=optimizer,
                control=control,
                micro_batch=micro_batch,
            )
            loss, micro_batch = result.loss, result.micro_batch
            optimizer = result.optimizer if recipe.optimizer_state == "keep" else None
        is_due = recipe.evaluates(rounds_trained) or rounds_trained == recipe.rounds
        scores = evaluate(model, validation, recipe, site, control) if is_due else []
        metrics = summarize(scores, 1)  # shown on this machine only
        on_round(LocalRound(rounds_trained, loss, metrics, time.monotonic() - started))
    if output is not None:
        save_tensors(output, read_travelling(model), "fp32")
