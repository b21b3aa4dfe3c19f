"""The bytes of a training step, counted from the network's own shapes before it is trained.

The step that will run is run once with tensors that have shapes and no values (torch's
FakeTensorMode, which torch.compile uses), and every tensor that comes and goes is counted by the
storage that it holds. So the count follows the code: another attention, another precision or a
method of somebody else's is counted as it is written. It takes no memory, and a second or two of a
processor (ViT-B at 1024 pixels), in which it can be stopped.

    tensors at the peak = weights + Adam's moments + slices of the batch
                          + the most that gradients and activations hold at one time

Counted is torch's own; what a kernel allocates inside is not, and is said where the kernel is
(`models.attention.workspace_bytes`). What the allocator adds, plan.py says.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.models.attention import workspace_bytes
from fedfms.models.build import build_model, hold_frozen
from fedfms.models.encoder import checkpoint_blocks
from fedfms.models.methods import find_method
from fedfms.models.travelling import travelling_names
from fedfms.training.augment import bytes_of_change
from fedfms.training.gradients import accumulate_gradients
from fedfms.training.interrupt import in_turn

# from so many bytes on the C library asks the kernel for a tensor alone, and gives it back when it
# is freed; smaller ones lie on the heap (mallopt(3), M_MMAP_THRESHOLD: it rises to this by itself)
LARGE = 32 * 1024**2


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of the tensors of one optimizer step.

    weights: parameters and buffers, frozen or not, in the precision that they are held in.
    moments: Adam's two, of what learns.
    batch: the slices of the batch with their masks, as the loader hands them over.
    work: the most that gradients and activations hold together.
    small, large: the most that those of them below and from LARGE hold, at whatever time.
    travelling: of what leaves the site, as the trainer keeps a copy to take the difference.
    """

    weights: int
    moments: int
    batch: int
    work: int
    small: int
    large: int
    travelling: int

    @property
    def peak(self) -> int:
        """All that a training process holds at the most, the trainer's copy not counted."""
        return self.weights + self.moments + self.batch + self.work


def count_step(
    recipe: Recipe,
    micro_batch: int,
    checkpointing: bool,
    device: torch.device,
    control: Control | None = None,
) -> StepMemory:
    """Count the tensors of a step of this recipe.

    Args:
        recipe: the job's.
        micro_batch: slices in memory at once.
        checkpointing: whether the encoder's blocks keep their inputs alone.
        device: where it is to run; the shapes are the processor's, on which nothing but torch's
            choice of a kernel depends.
        control: checked at every operation.

    Raises:
        ConfigError: as `build_model`.
        TaskAborted: as `Control.check`.
    """
    from fedfms.training.loop import adam, train_step
    from fedfms.training.proximal import Proximal

    control = control or Control()
    (FakeTensorMode,) = in_turn([_shapes_without_values], control, beside=False)  # noqa: N806
    micro_batch = min(micro_batch, recipe.batch_size)
    with FakeTensorMode(), _Count(control) as count:
        model = build_model(recipe, None).train()
        hold_frozen(model)
        checkpoint_blocks(model, checkpointing)
        weights = count.now
        optimizer = adam(model, recipe)
        _begin_moments(optimizer)
        moments = count.now - weights
        batch = _batch(recipe, micro_batch)
        given = count.now - weights - moments
        count.begin()
        make_step = find_method(recipe.method).start_round(model, recipe)
        proximal = Proximal.of(model, recipe)
        several = micro_batch < recipe.batch_size
        train_step(
            *(model, optimizer, batch, recipe, micro_batch, control, make_step),
            gradient=_as_the_second if several else accumulate_gradients,
            proximal=proximal,
        )
        work, small, large = count.most
        parameters = dict(model.named_parameters())
        travelling = sum(4 * parameters[name].numel() for name in travelling_names(model))
    if recipe.patient_rate is not None:
        work, small = work + moments // 2, small + moments // 2  # the sum over a step's patients
    if changing := bytes_of_change(recipe):
        # between two steps: the gradient of one is still there, its activations are not
        between = moments // 2 + changing
        work, small = max(work, between), max(small, between)
    inside = workspace_bytes(recipe, device) * micro_batch
    return StepMemory(
        weights=weights,
        moments=moments,
        batch=given // micro_batch * recipe.batch_size,
        work=work + inside,
        small=small,
        large=large + inside,
        travelling=travelling,
    )


def _shapes_without_values() -> type[AbstractContextManager[Any]]:
    """Torch's mode for it, with all that it imports: two processor seconds, where it is needed."""
    import_module("torch._dynamo.config")  # which that imports when it is made
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode


def _as_the_second(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    recipe: Recipe,
    micro_batch: int,
    control: Control,
) -> float:
    """`accumulate_gradients` of a micro-batch that finds the gradient of one before it.

    Further ones find no more.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return accumulate_gradients(model, batch, recipe, micro_batch, control)


def _begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Adam's moments as its first step makes them, so that they are there in the step counted."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _batch(recipe: Recipe, slices: int) -> dict[str, Tensor]:
    """A batch as the loader makes it, without values."""
    classes = len(recipe.classes)
    return {
        "image": torch.empty(
            slices, len(recipe.contrasts) or 3, recipe.image_size, recipe.image_size
        ),
        "target": torch.empty(slices, classes, recipe.mask_size, recipe.mask_size),
        "annotated": torch.empty(slices, classes),
    }


class _Count(TorchDispatchMode):
    """Counts the bytes of all storages that torch makes inside, until they are freed."""

    def __init__(self, control: Control) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._control = control
        self.now = 0
        self._new = [0, 0]  # since `begin`: below LARGE, and from it on
        self._most = [0, 0, 0]  # of both together, and of each
        self._held: dict[int, weakref.ref[Any]] = {}
        self._begun = False

    def begin(self) -> None:
        """What is held now counts no more in `most`."""
        self._begun = True

    @property
    def most(self) -> tuple[int, int, int]:
        """What was made since `begin`: bytes at the peak; at most in small and in large tensors."""
        both, small, large = self._most
        return both, small, large

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the loss and the gradient's norm are finite; nothing else is asked
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return result  # a question, as for the device: two of three calls, and no tensor
        self._control.check()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        held = (sum(self._new), *self._new)
        self._most = [max(pair) for pair in zip(self._most, held, strict=True)]
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._held:
            return
        size, new = storage.nbytes(), self._begun
        kind = int(size >= LARGE)

        def freed(_: weakref.ref[Any]) -> None:
            self.now -= size
            self._new[kind] -= size if new else 0
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
        self.now += size
        self._new[kind] += size if new else 0
