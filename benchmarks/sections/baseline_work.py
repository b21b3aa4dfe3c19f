"""Whether the baseline does the work that the paper's code does, no more and no less."""

from __future__ import annotations

from typing import Any

import torch
from paired import Figure, figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

TITLE = "The baseline's operations"
ABOUT = (
    "Twice the multiply-adds of a step with one picture of 1024 pixels, counted and not timed, "
    "over those counted in the paper's own code."
)
KIND = "cpu"

TITLES = {"fedmsa": "FedMSA", "fedsam": "FedSAM"}


def measure(pairs: int) -> list[Figure]:
    """Of both methods; a count needs no pairs."""
    return [_operations(method) for method in TITLES]


def _operations(method: str) -> Figure:
    """Counted without computing anything."""
    from baseline import KNOWN_FLOPS, Baseline, BaselineStep
    from step_worker import make_recipe
    from torch.fx.experimental._config import patch

    recipe = make_recipe(method, "fp32", 1, 1024, "vit_b")
    with torch.device("meta"):
        step = BaselineStep(Baseline(recipe))
        images, target = torch.empty(1, 3, 1024, 1024), torch.empty(1, 1, 256, 256)
        with _Counter() as counter, patch(meta_nonzero_assume_all_nonzero=True):
            step.backward(images, target)
    return figure(
        f"{TITLES[method]} baseline / the paper's",
        "operations, 1e12",
        [counter.operations / 1e12],
        [KNOWN_FLOPS[method] / 1e12],
        least=0.97,
        most=1.03,
    )


class _Counter(TorchDispatchMode):
    """2 x multiply-adds of products, convolutions and attention, by torch's own formulas."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out
