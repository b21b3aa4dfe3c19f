"""One training step at a time, in a process of its own: python benchmarks/step_worker.py SIDE ...

Reads a line, makes a step, writes what it cost as JSON: wall seconds, processor seconds of all
threads, and the most memory the process (or the GPU's allocator) held while it ran. The first line
is answered by a step that warms up. Side `baseline` is benchmarks/baseline.py, side `ours` is
`fedfms.training.loop.train_step` on a network that trains as in a round; on a GPU as a CUDA graph
from the fourth step on. Launching a graph counts no memory, so that the most is that of all steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from baseline import Baseline, BaselineStep

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.models.build import build_model, hold_frozen
from fedfms.models.encoder import checkpoint_blocks
from fedfms.training.device import set_products
from fedfms.training.gradients import accumulate_gradients
from fedfms.training.graphed import graphed
from fedfms.training.interrupt import interruptible
from fedfms.training.loop import adam, train_step
from fedfms.training.meter import Meter

SEED = 1


def make_recipe(method: str, precision: str, batch: int, image_size: int, backbone: str) -> Recipe:
    """Of one class; paper_compat, so that both sides compute the same function."""
    return Recipe(
        method=method,
        backbone=backbone,  # type: ignore[arg-type]
        backbone_sha256="0" * 64,  # random weights
        classes=("lesion",),
        rounds=1,
        image_size=image_size,
        batch_size=batch,
        precision=precision,  # type: ignore[arg-type]
        paper_compat=True,
    )


def weights(recipe: Recipe) -> dict[str, Tensor]:
    """Of the product's network, random, and none of them zero, so that no work is skipped."""
    model = build_model(recipe, None)
    numbers = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "rel_pos" in name or name.endswith("pos_embed"):
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=numbers))
    return model.state_dict()


def pictures(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) and (B, 1, M, M), a fifth of it foreground."""
    numbers = torch.Generator().manual_seed(SEED)
    batch, size, mask = recipe.batch_size, recipe.image_size, recipe.mask_size
    images = torch.randn(batch, 3, size, size, generator=numbers)
    return images, (torch.rand(batch, 1, mask, mask, generator=numbers) < 0.2).float()


def step_of(
    side: str, recipe: Recipe, device: torch.device, *, checkpointing: bool = False
) -> Callable[[], float]:
    """What makes one step and gives its loss."""
    images, target = pictures(recipe)
    state = weights(recipe)
    if side == "baseline":
        baseline = Baseline(recipe)
        baseline.load(state)
        del state
        step = BaselineStep(baseline.to(device))
        return lambda: step(images, target)
    model = build_model(recipe, None)
    model.load_state_dict(state)
    del state
    model.to(device).train()
    hold_frozen(model)
    set_products(recipe, device)
    checkpoint_blocks(model, checkpointing)
    optimizer, control = adam(model, recipe), Control()
    gradient = graphed(model, device) or accumulate_gradients
    batch = {"image": images, "target": target, "annotated": torch.ones(len(images), 1)}

    def run() -> float:
        with interruptible(model, control):
            loss, _ = train_step(
                model, optimizer, batch, recipe, len(images), control, gradient=gradient
            )
        return loss

    return run


def main() -> int:
    """Answer lines until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["baseline", "ours"])
    parser.add_argument("--method", default="fedmsa")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--backbone", default="vit_b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = make_recipe(
        given.method, given.precision, given.batch, given.image_size, given.backbone
    )
    device = torch.device(given.device)
    step = step_of(given.side, recipe, device, checkpointing=given.checkpointing)
    peak = 0
    for _ in sys.stdin:
        meter, before = Meter(device), time.process_time()
        with meter("step"):
            loss = step()
        peak = max(peak, meter.peak_memory_bytes["step"])
        answer = {
            "seconds": meter.seconds["step"],
            "cpu_seconds": time.process_time() - before,
            "peak_bytes": peak,
            "loss": loss,
        }
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
