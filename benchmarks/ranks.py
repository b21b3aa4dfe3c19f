"""How much faster two ranks train than one process, at one thread each, with the same batches.

    python benchmarks/ranks.py                       ViT-B at 256 pixels; some minutes on 2 cores
    python benchmarks/ranks.py --backbone vit_demo --image-size 128 --batch 8

A round of FedMSA on phantoms in one process and one with two ranks, alternating; the network has
random weights. Prints one JSON object with the seconds of each pair, their ratio, and what each
would be on idle cores: the processor seconds of one process by those of rank 0, which computes
half, sums and steps. Ends with 1 where the median ratio of wall clock is below the limit; that
needs two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.local.synthetic import write_phantom_site
from fedfms.models.build import build_model
from fedfms.trainer.ranks import Ranks
from fedfms.training.loop import train_round

LIMIT = 1.6


def main() -> int:
    """Measure, print, compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_b")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--method", default="fedmsa")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom_site(folder / "site", "bright", cases=6, slices=2, seed=1)
        site = SiteConfig.from_yaml(folder / "site/site.yml")
        site = dataclasses.replace(site, threads=1, ranks=2)
        recipe = Recipe(
            method=given.method,
            backbone=given.backbone,
            backbone_sha256="0" * 64,
            classes=tuple(site.classes),
            rounds=1,
            image_size=given.image_size,
            batch_size=given.batch,
        )
        cases = prepare_cases(find_cases(site), site, Control(), folder=folder / "cache")
        dataset = SliceDataset(cases, site, recipe)
        model = build_model(recipe, None)
        ranks = Ranks([torch.device("cpu")] * 2, site)
        alone, together = [], []
        try:
            for pair in range(given.pairs + 1):  # the first is a warm-up
                alone.append(_a_round(model, dataset, recipe, site, None))
                together.append(_a_round(model, dataset, recipe, site, ranks))
                del alone[: pair == 0], together[: pair == 0]
        finally:
            ranks.close()
    ratios = [one[0] / two[0] for one, two in zip(alone, together, strict=True)]
    on_idle = [one[1] / two[1] for one, two in zip(alone, together, strict=True)]
    ratio = statistics.median(ratios)
    print(
        json.dumps(
            {
                "backbone": given.backbone,
                "method": given.method,
                "image_size": given.image_size,
                "batch": given.batch,
                "slices": len(dataset),
                "cpus": psutil.cpu_count(),
                "load": psutil.getloadavg()[0],
                "one_process_seconds": [round(one[0], 2) for one in alone],
                "two_ranks_seconds": [round(two[0], 2) for two in together],
                "times_faster": round(ratio, 2),
                "from_to": [round(min(ratios), 2), round(max(ratios), 2)],
                "times_faster_by_processor_seconds": round(statistics.median(on_idle), 2),
                "limit": LIMIT,
            },
            indent=2,
        )
    )
    return int(ratio < LIMIT)


def _a_round(
    model: torch.nn.Module,
    dataset: SliceDataset,
    recipe: Recipe,
    site: SiteConfig,
    ranks: Ranks | None,
) -> tuple[float, float]:
    """Seconds of a round's steps, and processor seconds of this process for them."""
    control = Control()

    def round_with(beside: object) -> tuple[float, float]:
        started, spent = time.perf_counter(), time.process_time()
        train_round(
            model,
            dataset,
            recipe,
            site,
            round_number=0,
            optimizer=None,
            control=control,
            ranks=beside,  # type: ignore[arg-type]
        )
        return time.perf_counter() - started, time.process_time() - spent

    if ranks is None:
        return round_with(None)
    with ranks.round(model, dataset, recipe, 0, None, control) as beside:
        return round_with(beside)


if __name__ == "__main__":
    sys.exit(main())
