"""A training step on a GPU, against what stands for the paper's code; at most eight minutes."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from paired import Figure, Worker, alternate, figure

TITLE = "The step on a GPU"
ABOUT = (
    "As on a processor, at 1, 4 and 8 pictures. Memory is the peak of torch's allocator; seconds "
    "end when the loss is known to the processor."
)
KIND = "gpu"

WORKER = str(Path(__file__).parents[1] / "step_worker.py")
TITLES = {"fedmsa": "FedMSA", "fedsam": "FedSAM"}
LIMIT_S = 7.5 * 60  # what does not fit is left out, and said
# method, pictures, precision: least speed, one to aim at, most memory; what matters most first
PLAN: tuple[tuple[str, int, dict[str, tuple[float | None, float | None, float | None]]], ...] = (
    ("fedmsa", 4, {"fp32": (1.0, None, 0.6), "tf32": (None,) * 3, "bf16": (3.5, 4.4, 0.3)}),
    ("fedmsa", 1, {"fp32": (1.0, None, 0.6), "bf16": (3.5, 4.4, None)}),
    ("fedmsa", 8, {"fp32": (1.0, None, 0.6), "bf16": (3.5, 4.4, 0.3)}),
    ("fedsam", 4, {"fp32": (1.0, None, None), "bf16": (None, 4.3, 0.35)}),
)


def measure(pairs: int) -> list[Figure]:
    """One batch size after the other, as long as there is time."""
    began, figures = time.monotonic(), []
    for method, batch, limits in PLAN:
        if time.monotonic() - began > LIMIT_S - 60:
            print(f"bench: no time left for {method} at {batch}", file=sys.stderr)
            continue
        figures += _of(method, batch, limits, pairs)
    return figures


def _of(
    method: str,
    batch: int,
    limits: dict[str, tuple[float | None, float | None, float | None]],
    pairs: int,
) -> list[Figure]:
    common = ("--method", method, "--batch", str(batch), "--device", "cuda")
    with ExitStack() as stack:
        sides = {"baseline": stack.enter_context(Worker(WORKER, "baseline", *common))}
        for precision in limits:
            side = Worker(WORKER, "ours", "--precision", precision, *common)
            sides[precision] = stack.enter_context(side)
        alternate(sides, 2)  # kernels are chosen and memory is laid out
        turns = alternate(sides, 2 * pairs)
    baseline, figures = turns.pop("baseline"), []
    for precision, (least, aim, most) in limits.items():
        what = f"{TITLES[method]} {precision}, {batch} at once"
        ours = turns[precision]
        times = [[turn["seconds"] for turn in side] for side in (baseline, ours)]
        peaks = [[turn["peak_bytes"] / 1e9 for turn in side] for side in (ours, baseline)]
        figures.append(figure(what, "speed, wall s", *times, least=least, aim=aim))
        figures.append(figure(what, "peak memory, GB", *peaks, most=most))
    return figures
