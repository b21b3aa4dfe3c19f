"""The memory plan: what a training process will take at its peak, and how to stay below a limit.

On a GPU a step that does not fit is an error, after which a smaller one is tried. On a processor it
is the end of the process, without a word: there the plan has to be right beforehand. So the step is
counted before it runs (step_memory.py), and of the ways to compute the same step the first is taken
that fits: the whole batch at once, half of it, and so on to a single slice; then the same with
activation checkpointing, which computes a third more. What a step gives depends on none of them,
but for rounding.

    predicted, processor = LIBRARIES + weights + moments + batch + HEAP * small + MAPPED * large
    predicted, GPU       = CACHED * (weights + moments + batch + work)

where work, small and large are of gradients and activations, at the most. The constants are of
allocators and libraries, not of a configuration: benchmarks/memory_plan.py measures how well they
hold.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from fedfms.contracts.recipe import BACKBONES, NO_BACKBONE, Recipe
from fedfms.contracts.site import Compute
from fedfms.control import Control
from fedfms.data.memory import GIB, Room, allowed_bytes, room, size_text
from fedfms.errors import TrainingError
from fedfms.models.encoder import checkpoint_blocks
from fedfms.models.sam import GEOMETRY
from fedfms.training.augment import bytes_of_change
from fedfms.training.device import slices_at_once
from fedfms.training.loader import workers_here
from fedfms.training.step_memory import StepMemory, count_step

log = logging.getLogger(__name__)

# resident in a trainer that has made its first steps: Python, torch, oneDNN's code, this package
LIBRARIES = 430 * 10**6
# what the C library's heap holds over its tensors at their most: the holes between them
HEAP = 1.5
# the same of tensors with pages of their own
MAPPED = 1.05
# what torch's allocator on a GPU holds over what was asked of it; a process' CUDA context is there
# before anybody asks how much is free
CACHED = 1.1
# of the room that there is, what is left to others and to what is not foreseen
KEPT_FREE = 0.1
# after a kill: what is tried next is predicted to take at most this share of its tensors
CLEARLY_SMALLER = 0.8
MOST_TOO_HIGH = 1.25  # that a prediction is over the peak
MOST_COPIES = 60  # of a token's numbers in a block, see `bound_of_peak`
# a loader's process beside the trainer, without the batches that it keeps ready
WORKER = 100 * 10**6
READY_BATCHES = 2  # of each loader's process, in shared memory

_COUNTED: dict[tuple[Recipe, Way, torch.device], StepMemory] = {}  # by `_counted`


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute a step.

    micro_batch: slices in memory at once.
    checkpointing: whether the encoder's blocks keep their inputs alone.
    """

    micro_batch: int
    checkpointing: bool

    def __str__(self) -> str:
        slices = "1 slice" if self.micro_batch == 1 else f"{self.micro_batch} slices"
        return f"{slices} at once, {'with' if self.checkpointing else 'no'} checkpointing"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a recipe's steps are computed here.

    predicted: bytes at the peak: resident memory of the process, or of the GPU.
    limit: bytes that it may be; see `Room`.
    by: what sets that limit.
    counted: False where a bound was enough: `predicted` is then much too high.
    """

    way: Way
    predicted: int
    limit: int
    by: str
    counted: bool = True

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the limit."""
        return self.predicted <= self.limit

    def __str__(self) -> str:
        peak = "predicted peak" if self.counted else "peak certainly below"
        return (
            f"{self.way}; {peak} {size_text(self.predicted)} of {size_text(self.limit)} ({self.by})"
        )


def ways(recipe: Recipe, site: Compute, device: torch.device) -> tuple[Way, ...]:
    """All ways to compute a step, the fastest first.

    A single slice at once comes before checkpointing: it costs nothing on a processor and less than
    a third on a GPU.
    """
    sizes = [slices_at_once(recipe, site, device)]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    can = (False, True) if recipe.backbone != NO_BACKBONE else (False,)
    return tuple(Way(size, checkpointing) for checkpointing in can for size in sizes)


def predict_peak(memory: StepMemory, device: torch.device, *, in_trainer: bool = True) -> int:
    """Bytes at the peak of a process that trains; of a GPU, of its memory alone.

    Args:
        in_trainer: whether a copy of what travels is kept beside, to take the difference.
    """
    if device.type == "cuda":
        return int(CACHED * memory.peak)
    lasting = memory.weights + memory.moments + memory.batch
    if in_trainer:
        lasting += memory.travelling
    return int(LIBRARIES + lasting + HEAP * memory.small + MAPPED * memory.large)


def room_on(device: torch.device, recipe: Recipe, site: Compute) -> Room:
    """What training may take at its peak on this device, with something left to others.

    On a GPU: what is free there now and what torch holds of it. On a processor: `memory.room`, less
    what loader processes will take.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        there = free + torch.cuda.memory_reserved(device)
        return Room(int((1 - KEPT_FREE) * there), "the GPU's free memory")
    found = room()
    batch = recipe.batch_size * (len(recipe.contrasts) or 3) * 4 * recipe.image_size**2
    workers = workers_here(device) if site.workers is None else site.workers
    # what workers of a `Loader` hand over is changed here; those of a frozen part's slices do it
    changing = bytes_of_change(recipe) if recipe.adapter_blocks != "all" else 0
    beside = workers * (WORKER + READY_BATCHES * batch + changing)
    return Room(max(0, int((1 - KEPT_FREE) * found.bytes) - beside), found.by)


def _counted(recipe: Recipe, way: Way, device: torch.device, control: Control | None) -> StepMemory:
    """As `count_step`, once in a process for each recipe and way."""
    key = (recipe, way, device)
    if key not in _COUNTED:
        _COUNTED[key] = count_step(recipe, way.micro_batch, way.checkpointing, device, control)
    return _COUNTED[key]


def bound_of_peak(recipe: Recipe, micro_batch: int) -> int | None:
    """Bytes that a step on a processor certainly stays below; None of a network without a ViT.

    Then the step is counted: TinyViT's convolutions have no such bound by tokens and width.

    Each token of each block is taken to leave so many times its own numbers, which is twice what it
    leaves where SAM attends over the largest image; weights are counted by a block's 12 C^2.
    """
    if recipe.backbone not in GEOMETRY:
        return None
    size, depth = GEOMETRY[recipe.backbone], BACKBONES[recipe.backbone].depth
    tokens = (recipe.image_size // recipe.patch_size) ** 2
    weights = 4 * (14 * size.width**2 * depth + 3 * tokens * size.width + 10**7)
    activations = 4 * tokens * size.width * depth * MOST_COPIES
    pictures = 16 * recipe.image_size**2 * recipe.batch_size
    if (
        recipe.contrasts
    ):  # those themselves, and the three channels made of them with their gradient
        pictures += 4 * (len(recipe.contrasts) + 6) * recipe.image_size**2 * recipe.batch_size
    return LIBRARIES + 6 * weights + micro_batch * activations + pictures + bytes_of_change(recipe)


def plan_memory(
    recipe: Recipe,
    site: Compute,
    device: torch.device,
    *,
    killed: Plan | None = None,
    only: Way | None = None,
    in_trainer: bool = True,
    exact: bool = True,
    control: Control | None = None,
) -> Plan:
    """The first way to compute a step that fits; the smallest where none does.

    Args:
        recipe: the job's.
        site: says the largest micro-batch, and how many loader processes there are.
        device: made ready.
        killed: with which this process' predecessor was killed; what is planned is clearly smaller.
        only: way that there is, for whoever has chosen.
        in_trainer: see `predict_peak`.
        exact: count also where a bound shows that the first way fits twice over.
        control: checked meanwhile.

    Raises:
        TaskAborted: as `Control.check`.
    """
    there = room_on(device, recipe, site)
    most = there.bytes
    if killed is not None:
        tensors = CLEARLY_SMALLER * max(0, killed.predicted - LIBRARIES)
        most = min(most, int(LIBRARIES + tensors))
    possible = (only,) if only else ways(recipe, site, device)
    if not exact and killed is None and device.type == "cpu":
        bound = bound_of_peak(recipe, possible[0].micro_batch)
        if bound is not None and 2 * bound <= there.bytes:
            return Plan(possible[0], bound, there.bytes, there.by, counted=False)

    def plan_of(way: Way) -> Plan:
        memory = _counted(recipe, way, device, control)
        peak = predict_peak(memory, device, in_trainer=in_trainer)
        return Plan(way, peak, there.bytes, there.by)

    first = plan_of(possible[0])
    if first.predicted <= most:
        return first
    # where not even one slice fits, what lies between need not be counted
    smallest = [first, *(plan_of(way) for way in possible[1:] if way.micro_batch == 1)]
    least = min(smallest, key=lambda plan: plan.predicted)
    if least.predicted > most:
        return least
    plans = (plan_of(way) for way in possible)
    return next(plan for plan in plans if plan.predicted <= most)


def planned(
    model: nn.Module,
    recipe: Recipe,
    site: Compute,
    device: torch.device,
    control: Control,
    *,
    killed: Plan | None = None,
) -> Plan:
    """Plan, say so in one line, and set the network to it.

    Args:
        model: of the recipe; its blocks are checkpointed from now on, or not.
        recipe, site, device, control, killed: as of `plan_memory`.

    Raises:
        TrainingError: code out-of-memory: not even the smallest way can fit, should the prediction
            be as much too high as it ever is.
        TaskAborted: as `plan_memory`.
    """
    plan = plan_memory(recipe, site, device, killed=killed, exact=False, control=control)
    if plan.fits:
        log.info("memory: %s", plan)
    elif plan.predicted > MOST_TOO_HIGH * _ever(device):
        raise TrainingError(
            f"this recipe does not fit into memory: {plan}",
            what_would_fit(recipe, site, device, plan, control),
            code="out-of-memory",
        )
    else:
        log.warning(
            "memory may not be enough: %s; fix: %s",
            plan,
            what_would_fit(recipe, site, device, plan, control),
        )
    checkpoint_blocks(model, plan.way.checkpointing)
    return plan


def what_would_fit(
    recipe: Recipe, site: Compute, device: torch.device, plan: Plan, control: Control | None = None
) -> str:
    """The fix of a plan that does not fit: the largest half, quarter of the image that does.

    Args:
        recipe, site, device, control: as of `plan_memory`.
        plan: that does not fit.

    Raises:
        TaskAborted: as `plan_memory`.
    """
    size, smaller = recipe.image_size // 2, ""
    while size >= 8 * recipe.patch_size and size % recipe.patch_size == 0:
        less = recipe.with_values({"image_size": size}, "the memory plan")
        smallest = ways(less, site, device)[-1]
        if plan_memory(less, site, device, only=smallest, control=control).fits:
            smaller = f"; image_size {size} would fit"
            break
        size //= 2
    need = f"{-(-int(plan.predicted / (1 - KEPT_FREE)) // GIB)} GiB"
    more = "a GPU with" if device.type == "cuda" else "TRAINER_MEMORY in .env and a machine with"
    return (
        f"use {more} {need}, or ask the coordinator for a smaller image_size or backbone, "
        f"precision bf16, or adapter_blocks of the last blocks alone{smaller}"
    )


def _ever(device: torch.device) -> int:
    """What there would be if nothing else used memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return allowed_bytes()
