"""What `adapter_blocks: last:k` saves in a step, and what it costs in Dice.

    python benchmarks/adapter_blocks.py speed
    python benchmarks/adapter_blocks.py dice phantoms
    python benchmarks/adapter_blocks.py dice hippocampus FOLDER
    python benchmarks/adapter_blocks.py dice nuclei FOLDER

`speed`: processor seconds of an epoch from the second one on, with one thread, alternately with all
adapters and with the last k: bf16, batches of one slice, ViT-B at 1024 pixels with random weights,
features read from the disk. The ratio is the median over the pairs of the full epoch's seconds by
those of the other; 1 is returned where one is below its limit in LIMITS.

`dice`: sites train together in this process, by the product's own trainer, door and average, with
vit_demo and the recipe of jobs/fedmsa. FOLDER holds a folder a site with images/ and labels/. All
train, and the validation cases of all are scored. A line of JSON a row, and a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from in_process import ask, first_model, train_round, trainer_of, unscored

from fedfms.contracts.recipe import BACKBONES, Recipe, read_job_recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import Shelves, StoredCase
from fedfms.data.features import FeatureFolder
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase
from fedfms.data.slices import SliceDataset
from fedfms.exchange.strategies import find_strategy
from fedfms.local.synthetic import CLASS_NAME, FEDERATION, write_phantom_site
from fedfms.models.build import build_model
from fedfms.training.frozen import space_of
from fedfms.training.loop import train_round as train_site

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"last:4": 3.3, "last:2": 5.0, "last:0": 20.0}
DATA: dict[str, dict[str, Any]] = {  # what site.yml says of each
    "hippocampus": {
        "format": "nifti",
        "images": "images/*.nii.gz",
        "labels": "labels/*.nii.gz",
        "classes": {"hippocampus": [1, 2]},
    },
    "nuclei": {
        "format": "image",
        "images": "images/*.png",
        "labels": "labels/*.png",
        "channels": "rgb",
        "classes": {"nucleus": [255]},
    },
}


# ------------------------------------------------------------------------------------------- speed


class Trainee:
    """A network with its slices, to be trained for one epoch after the other."""

    def __init__(self, recipe: Recipe, cases: list[StoredCase], site: SiteConfig, disk: Path):
        self.recipe, self.site = recipe, site
        self.model = build_model(recipe, None)
        self.dataset = SliceDataset(cases, site, recipe)
        self.features = None
        if self.model.frozen_blocks is not None:
            space = space_of(self.model, torch.device("cpu"))
            self.features = FeatureFolder(disk, space, "benchmark", 20 << 30)
        self.round = 0

    def epoch(self) -> float:
        """Processor seconds of an epoch."""
        began = time.process_time()
        train_site(
            self.model,
            self.dataset,
            self.recipe,
            self.site,
            round_number=self.round,
            optimizer=None,
            control=Control(),
            features=self.features,
        )
        self.round += 1
        return time.process_time() - began


def drawn_case(slices: int, size: int) -> PreparedCase:
    """Noise with a disc."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (slices, size, size)).astype(np.uint8)
    rows, columns = np.mgrid[:size, :size]
    disc = np.hypot(rows - size / 2, columns - size / 2) < size / 5
    labels = np.broadcast_to(disc, images.shape).astype(np.uint8)
    case = Case(key="a", patient="a", image=Path("a"), label=Path("a"), split="train")
    return PreparedCase(case, images, np.ascontiguousarray(labels), (1.0, 1.0, 1.0), True)


def speed(options: argparse.Namespace) -> bool:
    """Print seconds and ratios; whether each ratio keeps its limit."""
    torch.set_num_threads(1)
    site = SiteConfig(
        data_root=Path("nowhere"),
        format="nifti",
        images="*",
        labels="l*",
        classes={"disc": (1,)},
        device="cpu",
        threads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder)
        shelves = Shelves(disk / "prepared")
        cases = [shelves.put(drawn_case(options.slices, 512), "0" * 64)]
        trainees = {}
        for blocks in ("all", *options.blocks.split(",")):
            recipe = Recipe(
                method="fedmsa",
                backbone=options.backbone,
                backbone_sha256=BACKBONES[options.backbone].sha256,
                classes=("disc",),
                rounds=1000,
                batch_size=1,
                image_size=options.image_size,
                precision=options.precision,
                adapter_blocks=blocks,
            )
            trainees[blocks] = Trainee(recipe, cases, site, disk / "features")
            if blocks == "all":
                continue
            first = trainees[blocks].epoch() / options.slices
            row = {"row": blocks, "first_epoch_cpu_seconds_a_slice": round(first, 2)}
            print(json.dumps(row), flush=True)
        found: dict[str, list[float]] = {blocks: [] for blocks in trainees}
        for pair in range(options.pairs):
            for blocks, trainee in trainees.items():
                found[blocks].append(trainee.epoch() / options.slices)
            seconds_of = {blocks: round(seconds[-1], 3) for blocks, seconds in found.items()}
            print(json.dumps({"pair": pair, "cpu_seconds_a_slice": seconds_of}), flush=True)
    kept = True
    table = []
    for blocks, seconds in found.items():
        ratios = [full / own for full, own in zip(found["all"], seconds, strict=True)]
        ratio = statistics.median(ratios)
        limit = LIMITS.get(blocks)
        kept &= limit is None or ratio >= limit
        figures = {
            "row": blocks,
            "cpu_seconds_a_slice": round(statistics.median(seconds), 3),
            "times_faster": round(ratio, 2),
            "from": round(min(ratios), 2),
            "to": round(max(ratios), 2),
            "limit": limit,
            "pairs": options.pairs,
        }
        print(json.dumps(figures))
        table.append(
            f"| {blocks} | {figures['cpu_seconds_a_slice']} | {figures['times_faster']} "
            f"({figures['from']} to {figures['to']}) | {limit or ''} |"
        )
    print("| adapter_blocks | CPU s a slice | times faster | limit |\n|---|---|---|---|")
    print("\n".join(table))
    return kept


# -------------------------------------------------------------------------------------------- Dice


def places_of(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """A site.yml for each site, in a folder of its own."""
    if options.data == "phantoms":
        for number, (site, style) in enumerate(list(FEDERATION.items())[:3]):
            write_phantom_site(folder / site, style, seed=100 * options.seed + number)
        return {site: folder / site for site in list(FEDERATION)[:3]}
    found = {}
    for source in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        found[source.name] = folder / source.name
        found[source.name].mkdir()
        text = yaml.safe_dump({**DATA[options.data], "data_root": str(source.resolve())})
        (folder / source.name / "site.yml").write_text(text)
    return found


def run(recipe: Recipe, places: Mapping[str, Path], work: Path) -> dict[str, Any]:
    """Train all rounds; Dice of the final model, by site."""
    trainers = {
        name: trainer_of(place, work / name, {}, kept=("prepared",))
        for name, place in places.items()
    }
    recipe = unscored(recipe)
    strategy, weights = find_strategy(recipe), first_model(recipe)
    train_seconds = 0.0
    for number in range(recipe.rounds):
        began = time.process_time()
        weights = train_round(trainers, strategy, number, recipe, weights)
        train_seconds += time.process_time() - began
    dice = {}
    for name in trainers:
        scored = ask(trainers, name, "evaluate", recipe.rounds, recipe, weights)
        metrics = scored.contribution.metrics
        means = [one.mean for one in metrics if one.metric == "dice" and one.mean is not None]
        dice[name] = round(statistics.fmean(means), 4)
    return {
        "dice": round(statistics.fmean(dice.values()), 4),
        "by_site": dice,
        "megabytes": round(sum(t.numel() for t in weights.values()) * 4 / 1e6, 3),
        "train_cpu_seconds": round(train_seconds, 1),
    }


def dice(options: argparse.Namespace) -> bool:
    """Print a row for each k."""
    torch.set_num_threads(1)
    name = CLASS_NAME if options.data == "phantoms" else next(iter(DATA[options.data]["classes"]))
    plain = dataclasses.replace(
        read_job_recipe(ROOT / "jobs" / "fedmsa"),
        classes=(name,),
        rounds=options.rounds,
        local_epochs=options.epochs,
        precision=options.precision,
        holdout=(),
        seed=options.seed,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        places = places_of(options, Path(folder) / "data")
        for blocks in options.blocks.split(","):
            recipe = dataclasses.replace(plain, adapter_blocks=blocks)
            row = {"data": options.data, "row": blocks, "seed": options.seed}
            row |= run(recipe, places, Path(folder) / "work")
            print(json.dumps(row), flush=True)
            rows.append(f"| {blocks} | {row['dice']} | {row['megabytes']} |")
    print(f"| adapter_blocks | Dice, {options.data} | MB a round and direction, fp32 |")
    print("|---|---|---|")
    print("\n".join(rows))
    return True


def main() -> None:
    """Either of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--pairs", type=int, default=5)
    fast.add_argument("--slices", type=int, default=1)
    fast.add_argument("--backbone", default="vit_b")
    fast.add_argument("--image-size", type=int, default=1024)
    fast.add_argument("--precision", default="bf16")
    fast.add_argument("--blocks", default="last:4,last:2,last:0")
    good = commands.add_parser("dice")
    good.add_argument("data", choices=("phantoms", *DATA))
    good.add_argument("folder", nargs="?", type=Path)
    good.add_argument("--blocks", default="last:0,last:1,last:2,last:3,all")
    good.add_argument("--rounds", type=int, default=6)
    good.add_argument("--epochs", type=int, default=2, help="of each round")
    good.add_argument("--precision", default="fp32")
    good.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "dice" and options.data != "phantoms" and options.folder is None:
        parser.error(f"name the folder of {options.data}")
    if not (speed if options.command == "speed" else dice)(options):
        sys.exit(1)


if __name__ == "__main__":
    main()
