"""The memory plan: what a training process will take at its peak, and how to stay below a limit.

On a GPU a step that does not fit is an error, after which a smaller one is tried. On a processor it
is the end of the process, without a word: there the plan has to be right beforehand. So the step is
counted before it runs (step_memory.py), and of the ways to compute the same step the first is taken
that fits: the whole batch at once, half of it, and so on to a single slice; then the same with
activation checkpointing, which computes a third more. What a step gives depends on none of them,
but for rounding.

    predicted, processor = LIBRARIES + WORKING * tensors at the peak
    predicted, GPU       = CONTEXT + CACHED * tensors at the peak

The constants are of the allocators and libraries, not of a configuration: benchmarks/memory_plan.py
measures how well they hold.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from fedfms.contracts.recipe import NO_BACKBONE, Recipe
from fedfms.contracts.site import Compute
from fedfms.data.memory import Room, room, size_text
from fedfms.training.device import slices_at_once
from fedfms.training.step_memory import StepMemory, count_step

log = logging.getLogger(__name__)

MIB = 1024**2
# resident in a trainer that has made its first steps: Python, torch, oneDNN's code, this package
LIBRARIES = 400 * MIB
# what the C library's allocator holds over what was asked of it, in pieces that do not fit
WORKING = 1.05
# what torch's allocator on a GPU holds over what was asked of it; and a process' CUDA context,
# which is there before anybody asks how much is free
CACHED = 1.1
# of the room that there is, what is left to others and to what is not foreseen
KEPT_FREE = 0.1
# after a kill: what is tried next is predicted to take at most this share of what was
CLEARLY_SMALLER = 0.8
# a loader's process beside the trainer, without the batches that it keeps ready
WORKER = 100 * MIB
READY_BATCHES = 2  # of each loader's process, in shared memory


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
    """

    way: Way
    predicted: int
    limit: int
    by: str

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the limit."""
        return self.predicted <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.way}; predicted peak {size_text(self.predicted)} of {size_text(self.limit)} "
            f"({self.by})"
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
    copy = memory.travelling if in_trainer else 0
    return int(LIBRARIES + WORKING * (memory.peak + copy))


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
    batch = recipe.batch_size * 3 * 4 * recipe.image_size**2
    beside = site.workers * (WORKER + READY_BATCHES * batch)
    return Room(max(0, int((1 - KEPT_FREE) * found.bytes) - beside), found.by)


@functools.lru_cache(maxsize=64)
def _counted(recipe: Recipe, way: Way, device: torch.device) -> StepMemory:
    return count_step(recipe, way.micro_batch, way.checkpointing, device)


def plan_memory(
    recipe: Recipe,
    site: Compute,
    device: torch.device,
    *,
    killed: Plan | None = None,
    only: Way | None = None,
    in_trainer: bool = True,
) -> Plan:
    """The first way to compute a step that fits; the smallest where none does.

    Args:
        recipe: the job's.
        site: says the largest micro-batch, and how many loader processes there are.
        device: made ready.
        killed: with which this process' predecessor was killed; what is planned is clearly smaller.
        only: way that there is, for whoever has chosen.
        in_trainer: see `predict_peak`.
    """
    there = room_on(device, recipe, site)
    plans: list[Plan] = []
    for way in (only,) if only else ways(recipe, site, device):
        peak = predict_peak(_counted(recipe, way, device), device, in_trainer=in_trainer)
        plan = Plan(way, peak, there.bytes, there.by)
        plans.append(plan)
        if plan.fits and (killed is None or peak <= CLEARLY_SMALLER * killed.predicted):
            return plan
    return min(plans, key=lambda one: one.predicted)
