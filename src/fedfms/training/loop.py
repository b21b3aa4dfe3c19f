"""One local round: the site's training slices, once or more, through one optimizer."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.features import FeatureFolder
from fedfms.data.slices import SliceDataset
from fedfms.errors import TrainingError
from fedfms.models.build import hold_frozen
from fedfms.models.methods import Step, find_method, plain_step
from fedfms.training.adam import Adam
from fedfms.training.augment import Variation
from fedfms.training.device import (
    failures_explained,
    is_out_of_memory,
    ready_device,
    set_products,
    slices_at_once,
)
from fedfms.training.frozen import Frozen
from fedfms.training.gradients import accumulate_gradients, finite, smaller_step
from fedfms.training.graphed import GraphedGradient, graphed
from fedfms.training.interrupt import interruptible
from fedfms.training.loader import Loader
from fedfms.training.private import PatientSteps
from fedfms.training.proximal import Proximal
from fedfms.training.ranks import Gradient, RoundOfRanks, ShareOfBatches

log = logging.getLogger(__name__)

# image (B, 3 or contrasts, S, S) or features (B, …), target (B, K or K + 1, M, M), annotated (B, K)
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a local round leaves beside the trained model."""

    loss: float  # mean over the round's steps, each counted with its number of slices
    steps: int  # optimizer steps
    seconds: float  # wall clock
    micro_batch: int  # slices in memory at once, after out-of-memory halvings
    optimizer: torch.optim.Optimizer  # to be handed into the next round, or dropped


@failures_explained()
def train_round(
    model: nn.Module,
    dataset: SliceDataset | ConcatDataset[dict[str, Tensor]] | Subset[dict[str, Tensor]],
    recipe: Recipe,
    site: SiteConfig,
    *,
    round_number: int,
    optimizer: torch.optim.Optimizer | None,
    control: Control,
    micro_batch: int | None = None,
    secret: bytes | None = None,
    loader: Loader | None = None,
    ranks: RoundOfRanks | None = None,
    features: FeatureFolder | None = None,
) -> RoundResult:
    """Train the model's parameters that require a gradient, in place, for one round.

    The same arguments give the same numbers: slices are shuffled, and where the recipe augments
    changed, from (secret, recipe.seed, round_number) alone, and the learning rate depends on the
    step alone. The model stays on the
    site's device. It is half trained, and to be thrown away, when an error leaves this function.

    Args:
        model: images (B, 3, S, S) to logits (B, K, M, M).
        dataset: the training slices, of one site or of several together.
        site: for its device, threads, workers and micro-batch.
        round_number: from 0.
        optimizer: of the round before on this same model, to keep its moments; None for a new one.
        control: asked inside every step; told ("train", steps done, steps).
        micro_batch: most slices in memory at once, where the round before found less than the
            site's own setting to fit.
        secret: of the site, without which nobody knows the order of its slices; None: whoever knows
            the recipe does.
        loader: of this dataset, from the round before; None for one of this round. A model with a
            frozen part reads its features instead.
        ranks: that compute shares of each gradient beside this process, which is rank 0; None: it
            is alone. Steps of patients and of a model with a frozen part are always its own.
        features: of the model's frozen part, if it has one; None: computed anew each time. The
            result is the same.

    Raises:
        TrainingError: "non-finite-loss", "out-of-memory" with a single slice in memory, or what
            `failures_explained` makes of a failing GPU.
        TaskAborted: `control.abort()` was called.
    """
    started = time.monotonic()
    device = ready_device(site)
    model.to(device).train()
    hold_frozen(model)
    set_products(recipe, device)
    optimizer = adam(model, recipe) if optimizer is None else _of_this_model(optimizer, model)
    micro_batch = min(micro_batch or recipe.batch_size, slices_at_once(recipe, site, device))

    proximal = Proximal.of(model, recipe)
    frozen = Frozen.of(model, features)

    if recipe.patient_rate is not None:
        return _round_of_patients(
            *(model, dataset, recipe, round_number, optimizer, control, micro_batch, started),
            *(frozen, proximal, secret),
        )
    seed = round_seed(recipe, round_number, secret)
    batches = ShuffledBatches(len(dataset), recipe, round_number, secret)
    steps_per_round = len(batches)
    variation = Variation.of(dataset, recipe, round_number, secret, keeps=frozen is not None)
    given: Iterator[Batch | None]
    if frozen is not None:
        given = frozen.batches(dataset, batches, site, variation)
    else:
        loader = loader or Loader(dataset, recipe, site, device)
        own = batches if ranks is None else ShareOfBatches(batches, 0, ranks.size)
        given = loader.batches(own, variation)
    loss_sum, trained = 0.0, 0
    graphs: GraphedGradient | None = None
    try:
        with _seeded(seed, device), interruptible(model, control):
            control.report("train", 0, steps_per_round)
            make_step = find_method(recipe.method).start_round(model, recipe)
            # a method with steps of its own may keep a gradient while it asks for the next
            if ranks is None and make_step is plain_step:
                graphs = graphed(model, device)
            for step, batch in enumerate(given):
                assert batch is not None  # no step is without slices, and rank 0 never is
                slices = batches.slices_of(step)
                gradient: Gradient = accumulate_gradients if graphs is None else graphs
                if ranks is not None:
                    gradient = ranks.gradient_of(step, slices)
                global_step = round_number * steps_per_round + step
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, global_step, steps_per_round)
                loss, micro_batch = train_step(
                    *(model, optimizer, batch, recipe, micro_batch, control),
                    *(make_step, gradient, proximal),
                )
                loss_sum += loss * slices
                trained += slices
                control.report("train", step + 1, steps_per_round)
    finally:
        optimizer.zero_grad(set_to_none=True)  # the gradients' memory, as large as what travels
        if graphs is not None:
            graphs.end()

    result = RoundResult(
        loss=loss_sum / trained,
        steps=steps_per_round,
        seconds=time.monotonic() - started,
        micro_batch=micro_batch,
        optimizer=optimizer,
    )
    log.info(
        "round %d: %d steps, mean loss %.4f, %.1f s",
        round_number,
        result.steps,
        result.loss,
        result.seconds,
    )
    return result


def _round_of_patients(
    model: nn.Module,
    dataset: Dataset[Batch],
    recipe: Recipe,
    round_number: int,
    optimizer: torch.optim.Optimizer,
    control: Control,
    micro_batch: int,
    started: float,
    frozen: Frozen | None,
    proximal: Proximal | None,
    secret: bytes | None,
) -> RoundResult:
    """As `train_round`, with steps of patients that are drawn (training/private.py)."""
    make_step = find_method(recipe.method).start_round(model, recipe)
    if make_step is not plain_step:  # it may take more than one gradient, which is not counted
        raise TrainingError(
            f"{recipe.method} makes its own steps, and patient_rate needs plain ones",
            "leave patient_rate, patient_clip_norm and patient_noise out, or name another method",
            code="steps-of-patients",
        )
    if not isinstance(dataset, SliceDataset):
        raise TrainingError(
            "patient_rate needs the slices of one site, with their patients",
            "leave patient_rate, patient_clip_norm and patient_noise out of pooled training",
            code="steps-of-patients",
        )
    count = recipe.steps_of_patients
    variation = Variation.of(dataset, recipe, round_number, secret, keeps=frozen is not None)
    steps = PatientSteps(model, dataset, recipe, control, micro_batch, frozen, variation)
    device = next(model.parameters()).device

    def gradients() -> float:
        loss = steps.gradients()
        if proximal is not None:
            proximal.add()
        return loss

    try:
        with _seeded(round_seed(recipe, round_number), device), interruptible(model, control):
            control.report("train", 0, count)
            for step in range(count):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, round_number * count + step, count)
                make_step(optimizer, gradients)
                control.report("train", step + 1, count)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return RoundResult(
        loss=steps.loss_sum / max(1.0, steps.pairs),
        steps=count,
        seconds=time.monotonic() - started,
        micro_batch=steps.micro_batch,
        optimizer=optimizer,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    micro_batch: int,
    control: Control,
    make_step: Step = plain_step,
    gradient: Gradient = accumulate_gradients,
    proximal: Proximal | None = None,
) -> tuple[float, int]:
    """One optimizer step over the whole batch, in as many micro-batches as memory asks for.

    Args:
        make_step: the method's own way from a gradient to a step.
        gradient: of the batch, in this process or in several.
        proximal: what holds the weights to those that were received.

    Returns:
        the batch's loss before the step, without the proximal term; the micro-batch that fitted.
    """

    def gradients() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = gradient(model, batch, recipe, micro_batch, control)
        if proximal is not None:
            proximal.add()
        _clip(optimizer, recipe)
        return loss

    while True:
        try:
            return make_step(optimizer, gradients), micro_batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here is the error gone, and with it the frames that held the batch's activations.
        optimizer.zero_grad(set_to_none=True)
        micro_batch = smaller_step(model, micro_batch)


def adam(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) over what requires a gradient, as in FedFMS.

    Fused: one pass over the numbers, four times as fast as torch's default on 94 million values.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Adam(trained, lr=recipe.learning_rate, fused=True)


def learning_rate(recipe: Recipe, step: int, steps_per_round: int) -> float:
    """Learning rate of one optimizer step, a function of nothing else.

    A linear rise over the first `warmup_steps`, at most over the first round, so that a site with
    few steps a round reaches the full rate there too; times half a cosine over all rounds if asked.

    Args:
        step: from 0, counted over all rounds.
        steps_per_round: optimizer steps this site makes in a round.
    """
    warmup_steps = min(recipe.warmup_steps, steps_per_round)
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    share = min(1.0, step / (recipe.rounds * steps_per_round))
    return recipe.learning_rate * rise * recipe.falls_to(share)


def round_seed(recipe: Recipe, round_number: int, secret: bytes | None = None) -> int:
    """Seed of one round for torch; neighbouring rounds and recipe seeds share nothing."""
    return int.from_bytes(_round_digest(recipe, round_number, secret)[:8], "big") >> 1  # 63 bits


def _round_digest(recipe: Recipe, round_number: int, secret: bytes | None) -> bytes:
    text = f"round {round_number} of seed {recipe.seed}".encode()
    if secret is None:
        return hashlib.sha256(text).digest()
    return hmac.digest(secret, text, "sha256")  # RFC 2104


class ShuffledBatches(Sampler[list[int]]):
    """Which slices make each step of a round; every slice once an epoch, the last batch smaller.

    Made one epoch at a time, however many the recipe has. Where the order is a secret, it is not
    torch's: of a seed its generator on a processor keeps 32 bits, few enough to try them all.

    Args:
        slices: of the site.
        recipe: for its epochs, its batch and its seed.
        round_number: from 0.
        secret: see `train_round`.
    """

    def __init__(
        self, slices: int, recipe: Recipe, round_number: int, secret: bytes | None = None
    ) -> None:
        self._slices, self._recipe = slices, recipe
        self._round, self._secret = round_number, secret

    def __len__(self) -> int:
        return self._recipe.local_epochs * math.ceil(self._slices / self._recipe.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        size = self._recipe.batch_size
        for order in self._orders():
            for first in range(0, self._slices, size):
                yield order[first : first + size]

    def slices_of(self, step: int) -> int:
        """How many slices a step of the round has, from 0."""
        in_epoch = step % math.ceil(self._slices / self._recipe.batch_size)
        return min(self._recipe.batch_size, self._slices - in_epoch * self._recipe.batch_size)

    def _orders(self) -> Iterator[list[int]]:
        """Of each epoch the order of all slices."""
        if self._secret is None:
            generator = torch.Generator().manual_seed(round_seed(self._recipe, self._round))
            for _ in range(self._recipe.local_epochs):
                yield torch.randperm(self._slices, generator=generator).tolist()
            return
        digest = _round_digest(self._recipe, self._round, self._secret)
        shuffled = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        for _ in range(self._recipe.local_epochs):
            yield shuffled.permutation(self._slices).tolist()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the round, here and on its device, and leave its generators as before.

    What comes after, such as a site's noise, must not follow from a seed that everybody knows.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device.index] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:  # not torch.manual_seed, which seeds every GPU and could restore this one only
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _clip(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    if recipe.clip_grad_norm is None:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_grad_norm)
    finite(norm.item())


def _of_this_model(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained != {id(p) for group in optimizer.param_groups for p in group["params"]}:
        raise ValueError("this optimizer belongs to another model, and would train that one")
    return optimizer
