"""What differential privacy of patients costs in Dice, and what a membership attack then sees.

    python benchmarks/privacy_cost.py phantoms --patients 200
    python benchmarks/privacy_cost.py folder SITE [SITE ...] --classes hippocampus

A row each of `--rows`: `batches` trains as without privacy, `inf` draws and clips patients without
noise, a number is an epsilon.

Sites train together in this process, by the product's own trainer, door and average; the noise of
each row is the smallest with which the account stays below its epsilon at delta 1e-5. A line of
JSON a row: epsilon asked and spent, noise, mean Dice of the validation cases of all sites before
and after, AUC of the attack on the final model (0.5 is guessing).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from in_process import train_round, trainer_of, unscored

from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe, read_job_recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import Prepared
from fedfms.exchange.account import Noised, epsilon
from fedfms.exchange.strategies import find_strategy
from fedfms.local.synthetic import FEDERATION, write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling, write_travelling
from fedfms.trainer.budget import Budget
from fedfms.training.evaluate import evaluate
from fedfms_lab.attacks.membership import loss_of_patients, membership

ROOT = Path(__file__).resolve().parents[1]
DELTA = 1e-5
VALIDATION = 40  # phantoms of each site
ATTACKED = 200  # patients of each site, at most, of whom the attack asks whether they were there
NO_BUDGET = math.inf


def noise_for(limit: float, rate: float, steps: int) -> float:
    """The smallest noise, to a percent, with which so many steps stay below the epsilon."""
    low, high = 0.2, 200.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if epsilon([Noised(middle, rate, steps)], DELTA) > limit:
            low = middle
        else:
            high = middle
    return math.ceil(high * 1000) / 1000


class Site:
    """A site's cases, prepared once for all rows."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.config = SiteConfig.from_yaml(folder / "site.yml")
        self.cases = prepare_cases(find_cases(self.config), self.config)

    def of(self, split: str, most: int) -> list[Prepared]:
        """The first cases of a split."""
        return [one for one in self.cases if one.case.split == split][:most]


def run(recipe: Recipe, sites: dict[str, Site]) -> dict[str, Any]:
    """Train all rounds; the figures of one row."""
    trainers = {
        name: trainer_of(
            site.folder,
            site.work,
            {"patient_epsilon": None},
            kept=("prepared",),
            order_from_seed=False,
        )
        for name, site in sites.items()
    }
    strategy = find_strategy(recipe)
    model = build_model(recipe, find_checkpoint(recipe, None))
    weights = read_travelling(model)

    def dice() -> float:
        found = []
        for site in sites.values():
            scored = site.of("validation", VALIDATION)
            write_travelling(model, weights)
            scores = evaluate(model, scored, recipe, site.config, Control())
            found.append(statistics.fmean(one.dice for one in scores if not one.empty))
        return statistics.fmean(found)

    before = dice()
    for number in range(recipe.rounds):
        weights = train_round(trainers, strategy, number, unscored(recipe), weights)
    after = dice()
    members: list[float] = []
    others: list[float] = []
    for site in sites.values():
        for split, losses in (("train", members), ("validation", others)):
            losses += loss_of_patients(model, site.of(split, ATTACKED), site.config, recipe)
    told = membership(members, others)
    spent, _ = Budget(next(iter(sites.values())).work / "work").spent(Policy(delta=DELTA))
    return {
        "epsilon_spent": round(spent.epsilon, 3) if math.isfinite(spent.epsilon) else None,
        "noise": recipe.patient_noise,
        "dice_before": round(before, 3),
        "dice": round(after, 3),
        "auc": round(told.auc, 3),
        "auc_95": round(told.half_width, 3),
    }


def main() -> None:
    """Print a row for each epsilon."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=("phantoms", "folder"))
    parser.add_argument("sites", nargs="*", type=Path)
    parser.add_argument("--patients", type=int, default=200, help="of each site, to train on")
    parser.add_argument("--classes", default="lesion")
    parser.add_argument("--rows", default="batches,inf,8,4,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="of each round")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = dataclasses.replace(
        read_job_recipe(ROOT / "jobs" / "fedmsa"),
        classes=tuple(options.classes.split(",")),
        rounds=options.rounds,
        local_epochs=options.epochs,
        image_size=options.image_size,
        learning_rate=options.learning_rate,
        warmup_steps=0,
        clip_grad_norm=None,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as name:
        places: dict[str, Path] = {}
        if options.data == "phantoms":
            for number, style in enumerate(list(FEDERATION.values())[:3]):
                site = f"site-{number + 1}"
                places[site] = Path(name) / "data" / site
                share = VALIDATION / (VALIDATION + options.patients)
                write_phantom_site(
                    places[site],
                    style,
                    cases=VALIDATION + options.patients,
                    slices=1,
                    seed=options.seed * 100 + number,
                )
                text = (places[site] / "site.yml").read_text()
                lines = [line for line in text.splitlines() if "validation_fraction" not in line]
                lines.append(f"validation_fraction: {share:.6f}")
                (places[site] / "site.yml").write_text("\n".join(lines) + "\n")
        else:
            places = {place.name: place for place in options.sites}
        sites = {site: Site(place, Path(name) / "work" / site) for site, place in places.items()}
        for row in options.rows.split(","):
            recipe = plain
            if row != "batches":
                limit = float(row)
                sampled = dataclasses.replace(
                    plain, patient_rate=options.rate, patient_clip_norm=options.clip
                )
                steps = sampled.steps_of_patients * options.rounds
                noise = 0.0 if math.isinf(limit) else noise_for(limit, options.rate, steps)
                recipe = dataclasses.replace(sampled, patient_noise=noise)
            began = time.process_time()
            figures = run(recipe, sites)
            seconds = round(time.process_time() - began)
            print(json.dumps({"row": row, **figures, "cpu_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
