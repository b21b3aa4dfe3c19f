"""The gradient of some slices, whatever fits into memory at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import TrainingError
from fedfms.models.encoder import checkpoint_blocks, is_checkpointed
from fedfms.training.device import free_unused_memory, halved
from fedfms.training.losses import loss_per_class, masked_sum

log = logging.getLogger(__name__)


def accumulate_gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    recipe: Recipe,
    micro_batch: int,
    control: Control,
    over: float | None = None,
) -> float:
    """Add the gradient of the batch's loss to the parameters; the micro-batch changes nothing.

    Args:
        batch: "target", "annotated", and "image" or, of a network that has a frozen part, what that
            made of the pictures: "features".
        over: what the sum of the losses is divided by; None: their number, for the mean.

    Returns:
        the sum over all pairs of slice and annotated class of the batch (losses.masked_sum), so
        divided; 0 where no class is annotated.
    """
    device = next(model.parameters()).device
    pairs = batch["annotated"].sum().clamp(min=1) if over is None else torch.tensor(over)
    divisor = pairs.to(device, non_blocking=True)
    parts = part_losses(model, batch, recipe, micro_batch, control, divisor)
    return sum((finite(part.item()) for part in parts), 0.0)


def part_losses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    recipe: Recipe,
    micro_batch: int,
    control: Control,
    divisor: Tensor,
) -> Iterator[Tensor]:
    """As `accumulate_gradients`, one micro-batch at a time; nothing here waits for a GPU.

    Yields:
        the loss of each, over `divisor`, when its gradient is on its way.
    """
    device = next(model.parameters()).device
    kept = "features" in batch
    keys = ("features" if kept else "image", "target", "annotated")
    for part in zip(*(torch.split(batch[key], micro_batch) for key in keys), strict=True):
        control.check()
        given, target, annotated = (tensor.to(device, non_blocking=True) for tensor in part)
        logits = model(given, from_prefix=True) if kept else model(given)
        losses = loss_per_class(logits, target, recipe)
        loss = masked_sum(losses, annotated) / divisor
        torch.autograd.backward(loss)
        yield loss.detach()  # a GPU has the whole step to do before it is asked


def smaller_step(model: nn.Module, micro_batch: int) -> int:
    """What to try after memory ran out: half the micro-batch, and at last checkpointing.

    Args:
        model: whose blocks are checkpointed where a single slice did not fit.
        micro_batch: that did not fit.

    Returns:
        the micro-batch to go on with.

    Raises:
        TrainingError: code out-of-memory; nothing smaller is left.
    """
    if micro_batch == 1 and not is_checkpointed(model) and checkpoint_blocks(model, True):
        free_unused_memory()
        log.warning("memory ran out with a single slice in memory; going on with checkpointing")
        return 1
    return halved(micro_batch, "with a single slice in memory", "with")


def finite(value: float) -> float:
    """The value of a loss or of a gradient's norm.

    Raises:
        TrainingError: code non-finite-loss.
    """
    if math.isfinite(value):
        return value
    raise TrainingError(
        f"the training loss or its gradient became {value}",
        "lower learning_rate in recipe.json, or set clip_grad_norm to 1.0; if this is the first "
        "step of the first round, look for unusual values in the images with fedfms check-data",
        code="non-finite-loss",
    )
