"""Training without a federation: at one site alone, or on the pooled images of several.

One site is what its own images give, and a check of everything but the network before joining a
federation. Several are the centralized training that a federation is compared with; it needs all
images on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import ConcatDataset

from fedfms.contracts.contribution import Metric
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import temporary_folder
from fedfms.data.manifest import find_whole_cases
from fedfms.data.memory import FEATURES_FOLDER
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.training.device import failures_explained, ready_device
from fedfms.training.evaluate import evaluate, summarize
from fedfms.training.frozen import kept_meanwhile
from fedfms.training.loop import RoundResult, train_round
from fedfms.training.meter import Meter
from fedfms.training.plan import planned


@dataclass(frozen=True, slots=True)
class PooledRound:
    """The model after so many rounds of training on all slices together; 0 is before training."""

    rounds_trained: int
    loss: float | None  # mean over the steps of the round that led here
    metrics: Mapping[str, tuple[Metric, ...]]  # of each site's validation cases; none if not due
    seconds: Mapping[str, float]  # wall clock by phase: prepare (before the first), train, evaluate
    training_slices: Mapping[str, int]  # of each site
    peak_memory_bytes: Mapping[str, int]  # by phase: of this process, or of its GPU


@failures_explained()
def train_pooled(
    recipe: Recipe,
    sites: Mapping[str, SiteConfig],
    *,
    checkpoints: Path | None,
    control: Control,
    on_round: Callable[[PooledRound], None],
    folder: Path | None = None,
    from_scratch: bool = False,
) -> dict[str, Tensor]:
    """Run all rounds of a recipe on the training cases of all sites together.

    A round is `recipe.local_epochs` passes over all slices, so that every slice is seen as often as
    in a federation of these sites.

    Args:
        recipe: as in the federation, but `Recipe.alone`; its holdout has no meaning here.
        sites: whose images to use, by name. Device, threads, workers and micro-batch are the first
            one's.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.
        control: progress and abort.
        on_round: called before training and after each round, with scores where they are due.
        folder: for prepared cases, where a site.yml names no cache, see `prepare_cases`. What the
            frozen part of the network makes of slices lies beside it meanwhile.
        from_scratch: the network begins with random weights, drawn from the recipe's seed, in the
            place of its checkpoint.

    Returns:
        the trained tensors, fp32 on the processor: those that would travel.

    Raises:
        FedfmsError: whatever is wrong with the files, the checkpoint or the training.
    """
    machine = next(iter(sites.values()))
    device = ready_device(machine)
    meter = Meter(device)
    with meter("prepare"):
        checkpoint = None if from_scratch else find_checkpoint(recipe, checkpoints)
        model = build_model(recipe, checkpoint).to(device)
        datasets, validation = {}, {}
        with_void = any(site.void for site in sites.values())
        for name, site in sites.items():
            there, left_out = find_whole_cases(site)
            cases = prepare_cases(there, site, control, folder=folder, left_out=left_out)
            training = [case for case in cases if case.case.split == "train"]
            datasets[name] = SliceDataset(training, site, recipe, with_void=with_void)
            validation[name] = [case for case in cases if case.case.split == "validation"]
    micro_batch = planned(model, recipe, machine, device, control).way.micro_batch
    place = temporary_folder() if folder is None else folder.parent / FEATURES_FOLDER
    with kept_meanwhile(model, machine, device, place) as features:
        slices = {name: len(dataset) for name, dataset in datasets.items()}
        pool: ConcatDataset[dict[str, Tensor]] = ConcatDataset(datasets.values())
        result: RoundResult | None = None
        for rounds_trained in range(recipe.rounds + 1):
            if rounds_trained > 0:
                meter = Meter(device)
                keeps = result is not None and recipe.optimizer_state == "keep"
                with meter("train"):
                    result = train_round(
                        model,
                        pool,
                        recipe,
                        machine,
                        round_number=rounds_trained - 1,
                        optimizer=result.optimizer if result is not None and keeps else None,
                        control=control,
                        micro_batch=result.micro_batch if result is not None else micro_batch,
                        features=features,
                    )
            is_due = recipe.evaluates(rounds_trained) or rounds_trained == recipe.rounds
            with meter("evaluate"):
                metrics = {
                    name: summarize(
                        evaluate(model, validation[name], recipe, site, control, features)
                        if is_due
                        else [],
                        1,
                    )
                    for name, site in sites.items()
                }
            on_round(
                PooledRound(
                    rounds_trained,
                    result.loss if result is not None else None,
                    metrics,
                    meter.seconds,
                    slices,
                    meter.peak_memory_bytes,
                )
            )
    return read_travelling(model)
