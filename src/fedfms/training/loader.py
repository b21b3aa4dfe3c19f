"""Slices to batches: grey levels come from the disk, and become a network's input on the device.

Two ways, by what computes. On a processor a slice is resized once as 8-bit levels, kept
(data/slices.py), and normalised here into the batch's own memory. To a GPU go the levels at native
size, a few kilobytes instead of 12 megabytes, and all else is done there: what the GPU's arithmetic
makes of the resized levels is at most one of 255 levels from the processor's.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute
from fedfms.data.slices import Slices, located
from fedfms.geometry import input_of
from fedfms.training.augment import (
    Change,
    Variation,
    changed_pictures,
    changed_targets,
    pad_outside,
)
from fedfms.user import end_with

log = logging.getLogger(__name__)

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as a container sees its own
_SHARED_MEMORY = Path("/dev/shm")
_WORKER_BYTES = 128 * 1024**2  # of shared memory: two batches on their way, at native size


class Loader:
    """The batches of a dataset, round after round, by worker processes that stay for all of them.

    Workers are forked at the first round and end with this object, or with the process.

    Args:
        dataset: of one site or of several together, all with this recipe.
        recipe: the job's.
        compute: for its workers; none: see `workers_here`.
        device: that the batches are for, ready.
    """

    def __init__(
        self, dataset: Slices, recipe: Recipe, compute: Compute, device: torch.device
    ) -> None:
        self._recipe, self._device = recipe, device
        self._canvas: Tensor | None = None  # that batches are made in, one after the other
        self._order = _Order()
        native = device.type != "cpu"
        workers = workers_here(device) if compute.workers is None else compute.workers
        self._batches: DataLoader[_Batch | None] = DataLoader(
            _Pictures(dataset, native),
            batch_sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_together,
            worker_init_fn=partial(as_worker, os.getpid()),
            generator=torch.Generator(),  # or a round would draw of the process's own for workers
            pin_memory=device.type == "cuda",
        )

    def batches(
        self, order: Sampler[list[int]], variation: Variation | None = None
    ) -> Iterator[dict[str, Tensor] | None]:
        """The batches of one round, on the device, but "annotated", which is on the processor.

        Args:
            order: which slices make each batch; of an empty one comes None.
            variation: what becomes of the slices of each step; None: they are as they are.

        Yields:
            the values of which hold until the next is asked for:
            image (B, 3 or contrasts, S, S) float32 normalised, target (B, K, M, M) float32 of 0
            and 1, or of (B, K + 1, M, M) with void pixels last,
            annotated (B, K) float32 of 0 and 1.
        """
        self._order.now = order
        for step, batch in enumerate(self._batches):
            if batch is None:
                yield None
                continue
            changes = None
            if variation is not None:
                turn = variation.turn(step)
                changes = [variation.change(item, turn) for item in batch.items]
            yield self._ready(batch, changes)

    def _ready(self, batch: _Batch, changes: Sequence[Change] | None) -> dict[str, Tensor]:
        levels = batch.levels.to(self._device, non_blocking=True)
        parts = torch.split(levels, [math.prod(shape) for shape in batch.shapes])
        pictures = [part.view(shape) for part, shape in zip(parts, batch.shapes, strict=True)]
        target = batch.target.to(self._device, non_blocking=True)
        insides: list[Tensor | None] = []
        if changes is not None:
            pictures, insides = changed_pictures(pictures, batch.covered, changes, self._recipe)
            target = changed_targets(target, batch.covered, changes, self._recipe)
        image = input_of(pictures, batch.covered, self._recipe, self._device, self._canvas)
        if changes is not None:
            pad_outside(image, insides)
        on_processor = self._device.type == "cpu"  # a GPU may still read the batch before
        if on_processor and (self._canvas is None or len(image) > len(self._canvas)):
            self._canvas = image
        return {
            "image": image,
            "target": target.float(),
            "annotated": batch.annotated,
        }


def workers_here(device: torch.device) -> int:
    """How many processes prepare slices where the site does not say.

    None where a processor computes, whose every core has something better to do. For a GPU as many
    as this container has CPUs beside the one that feeds the GPU, and no more than 4 or than have
    room in shared memory, through which slices are passed on.
    """
    if device.type == "cpu":
        return 0
    return max(0, min(4, cpus_here() - 1, _shared_memory() // _WORKER_BYTES))


def cpus_here() -> int:
    """CPUs that this container, or this process, may use; at least 1."""
    allowed = float(len(psutil.Process().cpu_affinity() or [0]))
    try:
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            allowed = min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return max(1, math.floor(allowed))


def _shared_memory() -> int:
    """Bytes."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).total
    except OSError:
        return 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Slices of any sizes in one piece of memory each for pictures and masks."""

    levels: Tensor  # (N,) uint8, all pictures one after the other
    shapes: tuple[tuple[int, int, int], ...]  # (1, 3 or contrasts, h, w) of each
    covered: tuple[tuple[int, int], ...]  # rows and columns of the input that each covers
    target: Tensor  # (B, K, M, M) bool, or (B, K + 1, M, M) with void pixels last
    annotated: Tensor  # (B, K) float32
    items: tuple[int, ...]  # of the dataset

    def pin_memory(self) -> _Batch:
        """As torch's thread asks for: in memory that a GPU can read by itself."""
        return _Batch(
            self.levels.pin_memory(),
            self.shapes,
            self.covered,
            self.target.pin_memory(),
            self.annotated.pin_memory(),
            self.items,
        )


class _Pictures(Dataset[Any]):
    """The slices of a dataset as levels, at native size or resized."""

    def __init__(self, dataset: Slices, native: bool) -> None:
        self._dataset, self._native = dataset, native

    def __getitem__(self, item: int) -> Any:
        dataset, number = located(self._dataset, item)
        return *dataset.levels(number, native=self._native), item


class _Order(Sampler[list[int]]):
    """The order of the round that is on: a loader with lasting workers has one sampler for all."""

    def __init__(self) -> None:
        self.now: Sampler[list[int]] | Sequence[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.now)


def _together(slices: Sequence[Any]) -> _Batch | None:
    if not slices:
        return None
    pictures, covered, targets, annotated, items = zip(*slices, strict=True)
    return _Batch(
        torch.cat([picture.reshape(-1) for picture in pictures]),
        tuple(tuple(picture.shape) for picture in pictures),
        covered,
        torch.stack(targets),
        torch.stack(annotated),
        items,
    )


def as_worker(parent: int, number: int) -> None:
    """Of a process that a loader has forked: it ends with its parent, if that is killed too."""
    end_with(parent)
