"""Writes the folder of a job as the server's recorder leaves it, with numbers one can follow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.recipe import BACKBONES, Recipe

START = 1_780_300_800.0
BYTES_DOWN, BYTES_UP = 1_812_480, 906_240

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256=BACKBONES["vit_demo"].sha256,
    classes=("hippocampus",),
    rounds=6,
    image_size=128,
    learning_rate=1e-3,
    loss="dice_bce",
    transfer_precision="fp16",
    holdout=("site-4",),
    seed=7,
)

CASES = {"site-1": 14, "site-2": 9, "site-3": 2, "site-4": 12}
SLICES = {"site-1": 412, "site-2": 266, "site-3": 58, "site-4": 0}
CEILING = {"site-1": 0.902, "site-2": 0.871, "site-3": 0.88, "site-4": 0.846}
START_DICE = {"site-1": 0.412, "site-2": 0.365, "site-3": 0.39, "site-4": 0.333}


def dice_of(site: str, rounds: int, class_index: int = 0) -> float:
    """A learning curve that rises to the site's ceiling."""
    gap = CEILING[site] - START_DICE[site]
    return CEILING[site] - gap * float(np.exp(-0.75 * rounds)) - 0.05 * class_index


@dataclass
class Job:
    """A job whose records can be bent before they are written."""

    recipe: Recipe = RECIPE
    sites: tuple[str, ...] = ("site-1", "site-2", "site-3", "site-4")
    withheld: tuple[str, ...] = ("site-3",)
    missed: dict[tuple[int, str], str] = field(
        default_factory=lambda: {
            (2, "site-2"): "TrainerError (trainer-died); the site's own log has the details"
        }
    )
    refused: dict[tuple[int, str], str] = field(default_factory=dict)
    status: str = "completed"
    rounds: int | None = None  # done; none: all of the recipe
    models: tuple[str, ...] = ("final", "best")
    no_evaluation: dict[str, str] = field(default_factory=dict)  # site -> why, of any model
    no_best: dict[str, str] = field(default_factory=dict)  # site -> why, of the best model alone
    not_annotated: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by site
    pictures: tuple[str, ...] = ("site-1", "site-4")
    judged: dict[tuple[int, str], float] = field(default_factory=dict)  # times the usual norm

    def metrics(self, site: str, rounds: int) -> tuple[Metric, ...]:
        found = []
        for index, name in enumerate(self.recipe.classes):
            if name in self.not_annotated.get(site, ()):
                continue
            dice = dice_of(site, rounds, index)
            cases, slices = CASES[site], CASES[site] * 18
            values = {
                "dice": (dice, 0.21 * (1 - dice) + 0.012, cases),
                "iou": (dice / (2 - dice), 0.25 * (1 - dice) + 0.015, cases),
                "hd95": (14.2 * (1 - dice) + 0.61, 1.9 * (1 - dice) + 0.2, cases - 1),
                "dice_slice": (dice - 0.037, 0.141, slices),
                "iou_slice": ((dice - 0.037) / (2.037 - dice), 0.155, slices),
            }
            for metric, (mean, std, count) in values.items():
                keep = site not in self.withheld
                found.append(
                    Metric(
                        class_name=name,
                        metric=metric,
                        mean=mean if keep else None,
                        std=std if keep else None,
                        cases=count,
                        empty=1 if metric == "dice" and site == "site-2" else 0,
                    )
                )
        return tuple(found)

    def contribution(self, site: str, rounds: int, model: str = "round") -> Contribution:
        holdout = site in self.recipe.holdout
        scored = model != "round" or rounds % self.recipe.evaluate_every == 0
        trains = model == "round" and not holdout
        at = self.sites.index(site)
        seconds = {"prepare": 3.1 + at if rounds == 0 else 0.2, "evaluate": 4.4 + 0.31 * at}
        if trains:
            seconds |= {"train": 0.071 * SLICES[site] + 0.4 * rounds, "exchange": 0.18}
        return Contribution(
            site=site,
            kind="train" if model == "round" else "evaluate",
            role="holdout" if holdout else "train",
            round=rounds,
            model=model,
            recipe_sha256=self.recipe.sha256,
            backbone_sha256=self.recipe.backbone_sha256,
            package_version="0.1.0",
            training_slices=SLICES[site] if trains else 0,
            training_cases=CASES[site] * 4 if trains else 0,
            evaluated_cases=CASES[site] if scored else 0,
            metrics=self.metrics(site, rounds) if scored else (),
            distance_unit="mm",
            loss=0.83 * float(np.exp(-0.5 * rounds)) + 0.11 + 0.02 * at if trains else None,
            seconds=seconds,
            peak_memory_bytes={
                phase: 1_204_000_000 + 86_000_000 * at - 10_000_000 * place
                for place, phase in enumerate(seconds)
            },
            micro_batch=4 if trains else 0,
            update_norm=2.4 / (rounds + 1) if trains else None,
        )

    def records(self) -> list[dict[str, Any]]:
        done = self.recipe.rounds if self.rounds is None else self.rounds
        found: list[dict[str, Any]] = [
            {
                "record": "job",
                "job_id": "0f6c3a52-9d1c-4c39-8a5e-5a4f0d1f7b11",
                "name": "fedmsa-hippocampus",
                "started": START,
                "fedfms_version": "0.1.0",
                "nvflare_version": "2.9.0",
                "recipe_sha256": self.recipe.sha256,
                "sites": list(self.sites),
            }
        ]
        time = START + 20
        for number in range(done):
            found.append({"record": "round_started", "round": number, "time": time})
            accepted = []
            for at, site in enumerate(self.sites):
                if (number, site) in self.missed:
                    continue
                reason = self.refused.get((number, site))
                said = self.contribution(site, number).to_dict()
                found.append(
                    {
                        "record": "contribution",
                        "round": number,
                        "site": site,
                        "accepted": reason is None,
                        "reason": reason,
                        "time": time + 30 + at,
                        "bytes_down": BYTES_DOWN,
                        "bytes_up": 0 if site in self.recipe.holdout else BYTES_UP,
                        "contribution": said,
                    }
                )
                if reason is None:
                    accepted.append(site)
            missed = {s: why for (r, s), why in self.missed.items() if r == number}
            missed |= {s: why for (r, s), why in self.refused.items() if r == number}
            if of_round := {s: norm for (r, s), norm in self.judged.items() if r == number}:
                found.append(
                    {
                        "record": "judged",
                        "round": number,
                        "acts": True,
                        "time": time + 40,
                        "sites": [
                            {
                                "site": site,
                                "norm": norm,
                                "usual_norm": 1.0,
                                "cosine": 0.4,
                                "slices": 20,
                                "counted_slices": 20,
                                "factor": 0.5 / norm if norm > 3 else 1.0,
                                "findings": ["norm"] if norm > 3 else [],
                            }
                            for site, norm in of_round.items()
                        ],
                    }
                )
            time += 41.5
            found.append(
                {
                    "record": "round_done",
                    "round": number,
                    "time": time,
                    "sites": accepted,
                    "missed": missed,
                }
            )
        for model in self.models:
            for site in self.sites:
                reason = self.no_evaluation.get(site)
                if model == "best":
                    reason = reason or self.no_best.get(site)
                rounds = done if model == "final" else max(done - 1, 0)
                pictures = [f"pictures/{site}-{model}-{i}.png" for i in range(3)]
                said = None if reason else self.contribution(site, rounds, model).to_dict()
                found.append(
                    {
                        "record": "evaluation",
                        "site": site,
                        "model": model,
                        "contribution": said,
                        "reason": reason,
                        "pictures": pictures if site in self.pictures and not reason else [],
                        "time": time + 8,
                    }
                )
        found.append({"record": "job_done", "status": self.status, "time": time + 9.5})
        return found

    def write(self, folder: Path, records: Iterable[dict[str, Any]] | None = None) -> Path:
        """Write the folder and return it."""
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(self.recipe.to_json())
        records = self.records() if records is None else list(records)
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / "records.jsonl").write_text("".join(lines))
        generator = torch.Generator().manual_seed(7)
        for name in ("global_model", "best_model"):
            tensors = {"decoder.weight": torch.randn(4, 4, generator=generator)}
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / "pictures").mkdir()
        for record in records:
            for name in record.get("pictures", ()):
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                (folder / name).write_bytes(picture(seed))
        return folder


def picture(seed: int, side: int = 256) -> bytes:
    """A grey blob with two outlines, as an overlay looks like."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    shade = 70 + 90 * np.exp(-6 * (rows**2 + columns**2))
    noisy = np.clip(shade + generator.normal(0, 9, (side, side)), 0, 255)
    image = Image.fromarray(noisy.astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    x, y = generator.integers(70, 130, 2)
    draw.ellipse((x, y, x + 70, y + 42), outline=(86, 180, 233), width=2)
    draw.ellipse((x + 3, y - 2, x + 76, y + 40), outline=(230, 159, 0), width=2)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
