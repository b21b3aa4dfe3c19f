"""A training step on a processor, against what stands for the paper's code."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from paired import Figure, Worker, alternate, figure

TITLE = "The step on a processor"
ABOUT = (
    "ViT-B at 1024 pixels, one picture: forward, loss, backward, Adam. `fp32` is exact, `bf16` is "
    "the recipe's `precision`. Speed is the baseline's time over ours, memory our peak resident "
    "bytes over the baseline's. The baseline's own peak stands beside that of the paper's code, "
    "which was measured on another machine."
)
KIND = "cpu"

TITLES = {"fedmsa": "FedMSA", "fedsam": "FedSAM"}
WORKER = str(Path(__file__).parents[1] / "step_worker.py")
# by precision: least speed, the speed to aim at, most memory; bf16 of FedSAM is faster
LIMITS = {
    ("fedmsa", "fp32"): (1.25, 1.36, 0.55),
    ("fedmsa", "bf16"): (2.5, 2.75, 0.36),
    ("fedsam", "fp32"): (1.25, None, None),
    ("fedsam", "bf16"): (2.7, None, None),
}


def measure(pairs: int) -> list[Figure]:
    """Both methods; wall seconds with all cores, then processor seconds with one thread."""
    figures: list[Figure] = []
    for method in ("fedmsa", "fedsam"):
        for threads, seconds in ((torch.get_num_threads(), "seconds"), (1, "cpu_seconds")):
            figures += _of(method, threads, seconds, pairs)
    return figures


def _of(method: str, threads: int, seconds: str, pairs: int) -> list[Figure]:
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                Worker(WORKER, *name.split(), "--method", method, "--threads", str(threads))
            )
            for name in ("baseline", "ours --precision fp32", "ours --precision bf16")
        }
        turns = alternate(sides, pairs)
    title = TITLES[method]
    unit = "wall s" if seconds == "seconds" else "CPU s"
    figures = []
    baseline = turns.pop("baseline")
    for name, ours in turns.items():
        precision = name.split()[-1]
        least, aim, most = LIMITS[method, precision]
        if precision == "bf16" and not _has_bf16():
            least = aim = None
        figures.append(
            figure(
                f"{title} {precision}",
                f"speed, {unit} of {threads} thread{'s' * (threads > 1)}",
                [turn[seconds] for turn in baseline],
                [turn[seconds] for turn in ours],
                least=least,
                aim=aim,
            )
        )
        if seconds == "seconds":
            figures.append(
                figure(
                    f"{title} {precision}",
                    "peak memory, GB",
                    [turn["peak_bytes"] / 1e9 for turn in ours],
                    [turn["peak_bytes"] / 1e9 for turn in baseline],
                    most=most,
                )
            )
    if seconds == "seconds":
        from baseline import KNOWN_BYTES

        figures.append(
            figure(
                f"{title} baseline / the paper's",
                "peak memory, GB",
                [turn["peak_bytes"] / 1e9 for turn in baseline],
                [KNOWN_BYTES[method] / 1e9] * len(baseline),
                least=0.9,
                most=1.1,
            )
        )
    return figures


def _has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
