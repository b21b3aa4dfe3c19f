"""How far two fp32 computations of one function may be apart: as far as rounding puts them.

No fixed number holds on every processor: AVX2, AVX-512 and AMX add in other orders, and so do one
thread and two. What does hold: computed in fp64, the function has one value to fifteen digits, and
a rewriting of it that is right is as near to that value as the original is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 2.0**-23  # of fp32
# On top of what the original is off, which can be nothing by luck: some last digits of the largest.
_LAST_DIGITS = 32


def exactly(module: nn.Module, *inputs: Tensor) -> Any:
    """What the module would give without rounding: a copy of it in fp64, on the same numbers."""
    with in_fp64():
        return copy.deepcopy(module).double()(*(value.double() for value in inputs))


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Within this context `float()`, by which our networks leave bf16, leaves fp64 as it is."""
    to_fp32 = Tensor.float

    def keep(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_fp32(tensor, *args, **kwargs)

    Tensor.float = keep
    try:
        yield
    finally:
        Tensor.float = to_fp32


def assert_as_right(ours: Any, theirs: Any, exact: Any, what: str = "") -> None:
    """Ours and theirs are the same function, and ours is at most twice as far off as theirs.

    Args:
        ours, theirs: of any shape, in fp32.
        exact: the same in fp64.
    """
    ours, theirs, exact = (
        torch.as_tensor(value).detach().double() for value in (ours, theirs, exact)
    )
    assert ours.shape == theirs.shape == exact.shape
    largest = float(exact.abs().max())
    off, theirs_off = (float((value - exact).abs().max()) for value in (ours, theirs))
    assert theirs_off <= 1e-4 * largest, f"{what} in fp64 is another function than in fp32"
    bound = 2 * theirs_off + _LAST_DIGITS * EPSILON * largest
    assert off <= bound, f"{what} {off:.3g} off, {off / bound:.3g} of what rounding explains"


def assert_gradients_as_right(ours: nn.Module, theirs: nn.Module, exact: nn.Module) -> None:
    """As `assert_as_right` for the gradient of each parameter that learns, by its norm.

    A gradient that is next to nothing beside the others, as of the biases of attention keys, which
    softmax cancels, is a sum of parts of their size, and is rounded as they are.
    """
    others, truths = dict(theirs.named_parameters()), dict(exact.named_parameters())
    learning = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    total = sum(float(truths[name].grad.norm()) ** 2 for name in learning) ** 0.5
    for name, parameter in learning.items():
        truth = truths[name].grad
        assert truth is not None and parameter.grad is not None, name
        size = max(float(truth.norm()), 1e-3 * total)
        off, theirs_off = (
            float((p.grad.double() - truth).norm()) for p in (parameter, others[name])
        )
        assert theirs_off <= 1e-3 * size, name
        assert off <= 2 * theirs_off + _LAST_DIGITS * EPSILON * size, name
