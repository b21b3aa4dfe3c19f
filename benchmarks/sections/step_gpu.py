"""A training step on a GPU, against what stands for the paper's code; at most five minutes."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from paired import Figure, Worker, alternate, figure

TITLE = "The step on a GPU"
ABOUT = (
    "As on a processor, at 1, 4 and 8 pictures; `checkpointed` keeps the inputs of blocks alone. "
    "Memory is the peak of torch's allocator; seconds end when the loss is known to the processor. "
    "Our step is a CUDA graph."
)
KIND = "gpu"

WORKER = str(Path(__file__).parents[1] / "step_worker.py")
TITLES = {"fedmsa": "FedMSA", "fedsam": "FedSAM"}
LIMIT_S = 5 * 60  # what does not fit is left out, and said
Limits = tuple[float | None, float | None, float | None]
NONE: Limits = (None, None, None)
CHECKPOINTED = "bf16 --checkpointing"
# method, pictures, precision: least speed, one to aim at, most memory; what matters most first
PLAN: tuple[tuple[str, int, dict[str, Limits]], ...] = (
    ("fedmsa", 4, {"fp32": (1.0, None, 0.6), "tf32": NONE, "bf16": (3.5, 4.4, 0.3)}),
    ("fedmsa", 1, {"fp32": (1.0, None, 0.6), "bf16": (3.5, 4.4, None)}),
    (
        "fedmsa",
        8,
        {
            "fp32": (1.0, None, 0.6),
            "bf16": (3.5, 4.4, 0.3),
            CHECKPOINTED: (3.0, None, 4.0 / 64),  # 4 GB of the 64 that the paper's code takes
        },
    ),
    ("fedsam", 4, {"fp32": (1.0, None, None), "bf16": (None, 4.3, 0.35)}),
)
ENTRY_S = 60  # at most, for one line of the plan


def measure(pairs: int) -> list[Figure]:
    """One batch size after the other, as long as there is time."""
    began, figures = time.monotonic(), []
    for method, batch, limits in PLAN:
        if time.monotonic() - began > LIMIT_S - ENTRY_S:
            print(f"bench: no time left for {method} at {batch}", file=sys.stderr)
            continue
        try:
            figures += _of(method, batch, limits, pairs)
        except RuntimeError as error:  # a side that ended: too little memory for all at once
            print(f"bench: {method} at {batch} left out: {error}", file=sys.stderr)
    return figures


def _of(method: str, batch: int, limits: dict[str, Limits], pairs: int) -> list[Figure]:
    common = ("--method", method, "--batch", str(batch), "--device", "cuda:0")
    commands = {"baseline": ("baseline",)}
    commands |= {one: ("ours", "--precision", *one.split()) for one in limits}
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:  # they build their networks side by side
            begun = pool.map(lambda side: Worker(WORKER, *side, *common), commands.values())
            sides = {
                name: stack.enter_context(side) for name, side in zip(commands, begun, strict=True)
            }
        alternate(sides, 3)  # kernels are chosen, graphs recorded, memory is laid out
        turns = alternate(sides, 2 * pairs)
    baseline, figures = turns.pop("baseline"), []
    for precision, (least, aim, most) in limits.items():
        name = precision.replace("--checkpointing", "checkpointed")
        what = f"{TITLES[method]} {name}, {batch} at once"
        ours = turns[precision]
        times = [[turn["seconds"] for turn in side] for side in (baseline, ours)]
        peaks = [[turn["peak_bytes"] / 1e9 for turn in side] for side in (ours, baseline)]
        figures.append(figure(what, "speed, wall s", *times, least=least, aim=aim))
        figures.append(figure(what, "peak memory, GB", *peaks, most=most))
    return figures
