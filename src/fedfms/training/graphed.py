"""The gradient of a batch as one CUDA graph, for batches whose shape comes again.

A step of ViT-B launches some two thousand kernels, and with a few slices a GPU waits for each. A
graph is recorded once and launched whole. What is recorded is forward, loss and backward over the
batch's micro-batches: the numbers of `accumulate_gradients`, by the same kernels. Clipping and
Adam, a few launches, stay outside, so that the optimizer and its learning rate need to know nothing
of it.

A shape is recorded when it comes the third time: by then kernels are chosen and loaded. The graph
is used from then on only if what it gives for that batch is what was computed without it. All else
goes on as without graphs: other shapes, what cannot be recorded, too little memory for a graph
beside a step without one. Graphs of a round end with it. Between two of them an abort is heeded; in
one it waits for its end, which is less than a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.training.device import free_unused_memory, is_out_of_memory
from fedfms.training.gradients import accumulate_gradients, finite, part_losses

log = logging.getLogger(__name__)

SEEN_BEFORE = 2  # batches of a shape that are computed without a graph
# relative L2 distance of a gradient from that without a graph: sums of the GPU have no fixed order
TOLERANCE = 1e-2
# of the memory that a step takes, what must be free for a graph: its own, and a step without one
ROOM = 2.2

# Records what a function launches; gives what launches it all again.
Record = Callable[[Callable[[], None]], Callable[[], None]]
Shape = tuple[object, ...]


class _Graph(NamedTuple):
    """A recorded gradient.

    inputs: into which a batch is copied.
    launch: fills `losses` and `gradients` anew.
    losses: of the micro-batches, (n,).
    gradients: of the parameters that learn, in their order; None of one that has no part.

    All are the same tensors each time.
    """

    inputs: dict[str, Tensor]
    launch: Callable[[], None]
    losses: Tensor
    gradients: list[Tensor | None]


def graphed(model: nn.Module, device: torch.device) -> GraphedGradient | None:
    """For one round on a device; None where it has no graphs, or may not use them."""
    if device.type != "cuda" or Machine.from_environment().plain_gpu:
        return None
    return GraphedGradient(model, _record, lambda: _has_room(device))


class GraphedGradient:
    """`accumulate_gradients` (a `ranks.Gradient`) for one round of one network.

    Args:
        model: whose parameters stay where they are; their values may change.
        record: see `Record`.
        has_room: whether a graph fits beside what a step takes; asked after such a step.
    """

    def __init__(self, model: nn.Module, record: Record, has_room: Callable[[], bool]) -> None:
        self._learning = [one for one in model.parameters() if one.requires_grad]
        self._record, self._has_room = record, has_room
        self._seen: dict[Shape, int] = {}
        self._graphs: dict[Shape, _Graph] = {}
        self._on = True

    @property
    def recorded(self) -> int:
        """How many shapes have a graph."""
        return len(self._graphs)

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        micro_batch: int,
        control: Control,
    ) -> float:
        """As `accumulate_gradients`; the parameters' gradients are empty before.

        They are the graph's own afterwards, until the next call.
        """
        shape = _shape(batch, micro_batch)
        if (graph := self._graphs.get(shape)) is not None:
            control.check()
            return self._launch(graph, batch)
        loss = self._plain(model, batch, recipe, micro_batch, control)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._on and self._seen[shape] > SEEN_BEFORE:
            self._begin(shape, model, batch, recipe, micro_batch, control)
        return loss

    def end(self, why: str | None = None) -> None:
        """Give the graphs' memory back; no more are recorded.

        Args:
            why: for the log, where the round goes on.
        """
        if why is not None and self._on:
            log.info("steps are computed without CUDA graphs: %s", why)
        self._on = False
        if self._graphs:
            for parameter in self._learning:
                parameter.grad = None
            self._graphs.clear()
            free_unused_memory()

    def _plain(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        micro_batch: int,
        control: Control,
    ) -> float:
        """Without a graph; those that there are make room where memory runs out."""
        try:
            return accumulate_gradients(model, batch, recipe, micro_batch, control)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            held = self.recorded
        # only here is the error gone, and with it the frames that held the batch's activations
        for parameter in self._learning:
            parameter.grad = None
        self.end("memory ran out")
        if not held:
            raise torch.OutOfMemoryError(
                "out of memory, without a CUDA graph that could be given up"
            )
        return accumulate_gradients(model, batch, recipe, micro_batch, control)

    def _begin(
        self,
        shape: Shape,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        micro_batch: int,
        control: Control,
    ) -> None:
        """Record a shape; of this batch the gradients stay those that were computed without."""
        if not self._has_room():
            self.end("a graph would take memory that is not free")
            return
        plain = [parameter.grad for parameter in self._learning]
        try:
            graph = self._recorded(model, batch, recipe, micro_batch, control)
            self._launch(graph, batch)
            apart = _distance(graph.gradients, plain)
            if apart <= TOLERANCE:
                self._graphs[shape] = graph
                log.debug("a CUDA graph for %s; its gradient is %.1e from plain", shape, apart)
            else:
                self.end(f"a graph gave a gradient that is {apart:.1e} from plain")
        except (RuntimeError, MemoryError) as error:  # not an abort
            self.end(f"{type(error).__name__}: {error}".splitlines()[0])
        for parameter, gradient in zip(self._learning, plain, strict=True):
            parameter.grad = gradient

    def _recorded(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        micro_batch: int,
        control: Control,
    ) -> _Graph:
        device = self._learning[0].device
        inputs = {name: torch.empty_like(one, device=device) for name, one in batch.items()}
        losses = torch.zeros(-(-len(inputs["target"]) // micro_batch), device=device)

        def gradients() -> None:
            for parameter in self._learning:
                parameter.grad = None  # so that the first micro-batch writes, and does not add
            divisor = inputs["annotated"].sum().clamp(min=1)
            parts = part_losses(model, inputs, recipe, micro_batch, control, divisor)
            losses.copy_(torch.stack(list(parts)))

        for name, one in batch.items():
            inputs[name].copy_(one, non_blocking=True)
        launch = self._record(gradients)
        return _Graph(inputs, launch, losses, [one.grad for one in self._learning])

    def _launch(self, graph: _Graph, batch: Mapping[str, Tensor]) -> float:
        for name, one in batch.items():
            graph.inputs[name].copy_(one, non_blocking=True)
        graph.launch()
        for parameter, gradient in zip(self._learning, graph.gradients, strict=True):
            parameter.grad = gradient
        return sum(
            map(finite, graph.losses.tolist()), 0.0
        )  # a GPU has all to do before it is asked


def _shape(batch: Mapping[str, Tensor], micro_batch: int) -> Shape:
    """All that decides what is launched for a batch."""
    of_tensors = (one for name in batch for one in (name, batch[name].shape, batch[name].dtype))
    return (micro_batch, *of_tensors)


def _distance(found: list[Tensor | None], plain: list[Tensor | None]) -> float:
    """Relative L2 distance of all together; infinite where one has a gradient and the other not."""
    pairs = list(zip(found, plain, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    apart = [(a - b).norm() for a, b in pairs if a is not None and b is not None]
    of_all = [b.norm() for b in plain if b is not None]
    whole = torch.stack(of_all).norm()
    return float((torch.stack(apart).norm() / whole.clamp(min=1e-30)).item())


def _record(function: Callable[[], None]) -> Callable[[], None]:
    """By torch.cuda.CUDAGraph, in memory of its own.

    Other threads may use the GPU meanwhile, as a loader's do: hence "thread_local".
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def _has_room(device: torch.device) -> bool:
    """Whether a graph, and a step without one beside it, fit into what is free on the GPU."""
    held = torch.cuda.memory_allocated(device)
    step = torch.cuda.max_memory_allocated(device) - held
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - held >= ROOM * step
