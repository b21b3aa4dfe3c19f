"""The data path alone: slices a second from prepared cases to a network's input at 1024 pixels.

    python benchmarks/loader.py              about a minute on 2 cores
    python benchmarks/loader.py --native 512 --rounds 7

Batches of 4 gray slices, and of RGB ones, pass through the loader of the trainer and are thrown
away, with 0 and with 2 worker processes: in the first epoch, in which each slice is resized and
kept, and in those after it. Beside it, alternating, the plain way: torch's DataLoader over the
items of the dataset, which makes each slice's 12 MB and copies them into a batch. Prints one JSON
object with medians of wall clock and of processor seconds of all processes together; ends
with 1 where fewer slices a second come than the limit, on the cores this machine has to spare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.cache import CacheFolder
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase
from fedfms.data.slices import SliceDataset
from fedfms.training.loader import Loader
from fedfms.training.loop import ShuffledBatches

LIMIT = 150.0  # slices a second, after the first epoch, gray
CASES, DEPTH = 4, 16
CPU = torch.device("cpu")


def main() -> int:
    """Measure, print, compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--native", type=int, default=384, help="side of a slice in the files")
    parser.add_argument("--rounds", type=int, default=5, help="epochs after the first")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, help="of torch; left out, torch decides")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for channels in ("gray", "rgb"):
            for workers in (0, 2):
                folder = Path(name) / f"{channels}-{workers}"
                rows += _measure(folder, channels, workers, given)
    slowest = min(row["slices_per_second"] for row in rows if row["limit"])
    print(
        json.dumps(
            {
                "native": given.native,
                "image_size": 1024,
                "batch": given.batch,
                "threads": torch.get_num_threads(),
                "cpus": psutil.cpu_count(),
                "limit": LIMIT,
                "slowest": slowest,
                "rows": rows,
            },
            indent=2,
        )
    )
    return int(slowest < LIMIT)


def _measure(
    folder: Path, channels: str, workers: int, given: argparse.Namespace
) -> list[dict[str, Any]]:
    site = SiteConfig(
        data_root=folder,
        format="image",
        images="images/*",
        labels="labels/*",
        classes={"lesion": (1,)},
        channels=channels,
        device="cpu",
        workers=workers,
    )
    recipe = Recipe(
        method="fedmsa",
        backbone="vit_b",
        backbone_sha256="0" * 64,
        classes=("lesion",),
        rounds=1,
        batch_size=given.batch,
    )
    ways: dict[str, tuple[Callable[[int], Iterable[Any]], list[tuple[float, float]]]] = {}
    loaders = []
    for way in ("loader", "plain"):  # each with slices that it keeps itself
        dataset = SliceDataset(_cases(folder / way, channels, given.native), site, recipe)
        if way == "loader":
            loaders.append(loader := Loader(dataset, recipe, site, CPU))

            def batches(number: int, loader: Loader = loader, size: int = len(dataset)) -> Any:
                return loader.batches(ShuffledBatches(size, recipe, number))
        else:

            def batches(number: int, dataset: SliceDataset = dataset) -> Any:
                order = ShuffledBatches(len(dataset), recipe, number)
                return DataLoader(dataset, batch_sampler=order, num_workers=workers)

        ways[way] = batches, []
    count = CASES * DEPTH
    for number in range(given.rounds + 1):
        for epoch, spent in ways.values():
            started, before = time.perf_counter(), _processor_seconds()
            seen = sum(len(batch["image"]) for batch in epoch(number))
            assert seen == count
            spent.append((time.perf_counter() - started, _processor_seconds() - before))
    rows = []
    for way, (_, spent) in ways.items():
        for epoch, some in (("first", spent[:1]), ("later", spent[1:])):
            wall, processor = (statistics.median(one) for one in zip(*some, strict=True))
            rows.append(
                {
                    "way": way,
                    "channels": channels,
                    "workers": workers,
                    "epoch": epoch,
                    "slices_per_second": round(count / wall, 1),
                    "processor_ms_per_slice": round(1000 * processor / count, 2),
                    "limit": (way, channels, epoch) == ("loader", "gray", "later"),
                }
            )
    return rows


def _cases(folder: Path, channels: str, side: int) -> list[Any]:
    """Cases in a cache folder, as training reads them."""
    cache, random = CacheFolder(folder), np.random.default_rng(0)
    shape = (DEPTH, side, side, 3) if channels == "rgb" else (DEPTH, side, side)
    row, column = np.mgrid[:side, :side]
    disc = np.hypot(row - side / 2, column - side / 2) < side / 6
    labels = np.repeat(disc[None].astype(np.uint8), DEPTH, axis=0)
    stored = []
    for number in range(CASES):
        images = random.integers(0, 255, shape, dtype=np.uint8)
        name = f"case-{number}"
        case = Case(name, name, Path(name), Path(name), "train")
        prepared = PreparedCase(case, images, labels, (1.0, 1.0, 1.0), is_volume=True)
        stored.append(cache.put(prepared, f"{number:064d}"))
    return stored


def _processor_seconds() -> float:
    """Of this process, its workers, and those that ended."""
    me = psutil.Process()
    own = me.cpu_times()
    alive = [child.cpu_times() for child in me.children()]
    living = sum(one.user + one.system for one in alive)
    return own.user + own.system + own.children_user + own.children_system + living


if __name__ == "__main__":
    sys.exit(main())
