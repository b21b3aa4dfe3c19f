"""Several processes at one gradient: the parts of it that each computes, and how they meet.

Data-parallel training: a batch is cut into one share a rank, each rank computes the gradient of its
share, and rank 0 has their sum. What it is divided by is the batch's, known to all before, so the
sum is the gradient of one process that computes the shares one after the other: with two ranks to
the last bit, with more to the order of a sum. Rank 0 alone has the optimizer and the method's way
of making a step; the others hold nothing that it does not give them anew for each gradient.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute
from fedfms.control import Control
from fedfms.errors import ConfigError
from fedfms.training.device import torch_device

POLL_SECONDS = 0.0005  # between two looks at what the other ranks do

# `accumulate_gradients`, in this process or in several
Gradient = Callable[[nn.Module, Mapping[str, Tensor], Recipe, int, Control], float]


class RoundOfRanks(Protocol):
    """What one round asks of the ranks beside it."""

    @property
    def size(self) -> int:
        """How many there are, with this one."""
        ...

    def gradient_of(self, step: int, slices: int) -> Gradient:
        """How the gradient of one step of the round is made, of so many slices in all ranks.

        What it gives is called as `accumulate_gradients` is, with the share of rank 0.
        """
        ...


class ShareOfBatches(Sampler[list[int]]):
    """Of each batch what one rank computes: neighbours, as many as the others or one more.

    Args:
        batches: of all ranks, the same at each.
        rank: from 0, which never has fewer than another.
        size: how many ranks there are.
    """

    def __init__(self, batches: Sampler[list[int]], rank: int, size: int) -> None:
        self._batches, self._rank, self._size = batches, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield share(batch, self._rank, self._size)


def share(batch: list[int], rank: int, size: int) -> list[int]:
    """What one rank has of a batch; empty where there are more ranks than slices."""
    each, more = divmod(len(batch), size)
    first = rank * each + min(rank, more)
    return batch[first : first + each + (rank < more)]


def rank_devices(compute: Compute, recipe: Recipe) -> list[torch.device]:
    """The device of each rank; one rank alone where nothing else is asked for.

    `device: auto` takes every GPU that is visible, if this torch has NCCL, by which they talk. A
    device that is named is one rank's, and those after it are the others'. There are never more
    ranks than slices in a batch.

    Raises:
        ConfigError: code no-gpu.
    """
    first = torch_device(compute)
    if first.type != "cuda":
        return [first] * min(compute.ranks or 1, recipe.batch_size)
    count = torch.cuda.device_count() - first.index
    every = compute.device == "auto" and dist.is_nccl_available()
    wanted = compute.ranks or (count if every else 1)
    if wanted > count:
        raise ConfigError(
            f"ranks is {wanted}, and torch finds {count} CUDA device(s) here from {first} on",
            f"set ranks: {count} in site.yml, or let the trainer see more devices",
            code="no-gpu",
        )
    of_all = [torch.device("cuda", first.index + rank) for rank in range(wanted)]
    return of_all[: recipe.batch_size]


# --------------------------------------------------------------------------------- what they tell


def join(backend: str, store: Path, rank: int, size: int, timeout_seconds: float) -> None:
    """Meet the other ranks, over the loopback interface alone, and a file that all of them know.

    Args:
        backend: gloo, or nccl for GPUs.
        store: a file that is not there, or was made by another rank of this group.
        timeout_seconds: for all to come, and for each message.
    """
    # gloo and NCCL make sockets of their own, which choose an interface by name
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def learning(model: nn.Module) -> list[nn.Parameter]:
    """Its parameters that learn, in the order of the network, which is the same in each rank."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(model: nn.Module) -> list[Tensor]:
    """All else that it holds: parameters that do not learn, and buffers."""
    fixed = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return [*fixed, *model.buffers()]


@torch.no_grad()
def spread(tensors: Iterable[Tensor], wait: Callable[[dist.Work], None]) -> None:
    """The values of rank 0 into the same tensors of all ranks, together for each type."""
    for some in _by_type(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        wait(_work(dist.broadcast(flat, 0, async_op=True)))
        if dist.get_rank():
            for tensor, part in zip(
                some, torch.split(flat, [one.numel() for one in some]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], wait: Callable[[dist.Work], None]) -> None:
    """The sum of all ranks' gradients into those of rank 0; of a parameter without one it is 0."""
    for some in _by_type(parameters):
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in some]
        flat = torch.cat([part.reshape(-1) for part in parts])
        wait(_work(dist.reduce(flat, 0, async_op=True)))
        if not dist.get_rank():
            for one, part in zip(
                some, torch.split(flat, [one.numel() for one in some]), strict=True
            ):
                if one.grad is not None:  # of none that has no part in the loss
                    one.grad.copy_(part.view_as(one))


def wait_for(work: dist.Work, look: Callable[[], None] = lambda: None) -> None:
    """Wait for a message between ranks, and call `look`, which may raise, meanwhile."""
    while not work.is_completed():
        look()
        time.sleep(POLL_SECONDS)
    look()
    work.wait()


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None  # this process is in the group
    return work


def _by_type(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    yield from found.values()
