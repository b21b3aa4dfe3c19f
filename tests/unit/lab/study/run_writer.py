"""Writes a study's folder with seeded synthetic scores, as the runner leaves it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fedfms.records.rows import RoundRow, write_rounds, write_rows
from fedfms_lab.study.record import (
    FORMAT,
    MODEL_FILE,
    PICTURES_FOLDER,
    RECIPE_FILE,
    ROUNDS_FILE,
    RUN_FILE,
    RUNS_FOLDER,
    SCORES_FILE,
    STUDY_FILE,
    Phase,
    RunKey,
    RunRecord,
    ScoreRow,
    SiteFacts,
    record_to_dict,
)

START = 1_790_300_800.0
SITES = ("site-1", "site-2", "site-3", "site-4")

# A site's difficulty, and what distance in appearance costs a model trained elsewhere alone.
CEILING = {"site-1": 0.902, "site-2": 0.878, "site-3": 0.861, "site-4": 0.834}
PLACE = {"site-1": 0.0, "site-2": 0.3, "site-3": 0.9, "site-4": 1.0}
METHOD = {"fedsam": 0.012, "fedmsa": 0.0}
BYTES = {"fedsam": 374_941_908, "fedmsa": 42_428_928}  # a site, a round, one way: ViT-B, fp32
SECONDS = {"fedsam": 96.0, "fedmsa": 41.0}  # of training, a site and round
MEMORY = {"fedsam": 11_800_000_000, "fedmsa": 6_400_000_000}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def random(*words: object) -> np.random.Generator:
    return np.random.default_rng(int(sha(" ".join(map(str, words)))[:12], 16))


@dataclass
class StudyFolder:
    """A study whose runs can be bent before they are written."""

    sites: tuple[str, ...] = SITES
    methods: tuple[str, ...] = ("fedsam", "fedmsa")
    regimes: tuple[str, ...] = ("federated", "central", "local")
    holdouts: tuple[str | None, ...] = SITES
    seeds: tuple[int, ...] = (0, 1, 2)
    classes: tuple[str, ...] = ("hippocampus",)
    rounds: int = 8
    cases: int = 15  # at each site
    title: str = "Hippocampus at four hospitals"
    target_dice: float | None = None
    units: Mapping[str, str] = field(default_factory=dict)  # of HD95 by site; mm else
    empty_sites: tuple[str, ...] = ()  # nothing drawn and nothing found there
    not_annotated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by site
    paper_compat: bool = False
    unfinished: Callable[[RunKey], bool] = lambda key: False
    strategies: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()  # tried with the first seed
    pictures: tuple[str, ...] = SITES[:3]
    picture_side: int = 192  # pixels
    _written: dict[RunKey, list[ScoreRow]] = field(default_factory=dict)

    def run_keys(self) -> list[RunKey]:
        keys = []
        for method in self.methods:
            for seed in self.seeds:
                for regime in self.regimes:
                    if regime == "local":
                        keys += [
                            RunKey(
                                method=method,
                                regime=regime,
                                holdout=None,
                                trained_on=(site,),
                                seed=seed,
                            )
                            for site in self.sites
                        ]
                        continue
                    for holdout in self.holdouts if regime != "zero-shot" else (None,):
                        keys += [
                            RunKey(
                                method=method,
                                regime=regime,
                                strategy=strategy,
                                holdout=holdout,
                                seed=seed,
                                trained_on=()
                                if regime == "zero-shot"
                                else tuple(s for s in sorted(self.sites) if s != holdout),
                            )
                            for strategy in (
                                "",
                                *(self.strategies if regime == "federated" else ()),
                            )
                        ]
        return keys

    def try_keys(self) -> list[RunKey]:
        return [
            dataclasses.replace(key, rate=rate)
            for key in self.run_keys()
            if key.seed == self.seeds[0]
            for rate in self.rates
        ]

    # ------------------------------------------------------------------------------- the numbers

    def ability(self, key: RunKey, site: str) -> float:
        """Mean Dice that a run's final model comes to at a site."""
        if not key.trained_on:
            return 0.4
        distance = min(abs(PLACE[site] - PLACE[trained]) for trained in key.trained_on)
        lost = {"central": 0.0, "federated": 0.008, "local": 0.021}.get(key.regime, 0.015)
        far = 0.06 if key.regime != "local" else 0.42
        noise = random("seed", key.name, site).normal(0, 0.006)
        return CEILING[site] + METHOD[key.method] - lost - far * distance + noise

    def case_names(self, site: str) -> list[tuple[str, str, str]]:
        """(case, patient, split): every third patient has two cases, a third is for validation."""
        found = []
        for number in range(self.cases):
            patient = number - 1 if number % 4 == 1 else number
            split = "validation" if patient % 3 == 0 else "train"
            found.append((f"{site}-case-{number:02d}", f"{site}-patient-{patient:02d}", split))
        return found

    def scores(self, key: RunKey) -> list[ScoreRow]:
        if key in self._written:
            return self._written[key]
        rows = []
        for site in self.sites:
            trained = site in key.trained_on
            for case, patient, split in self.case_names(site):
                if trained and split == "train":
                    continue
                for index, name in enumerate(self.classes):
                    if name in self.not_annotated.get(site, ()):
                        continue
                    rows.append(self.row(key, site, trained, case, patient, split, name, index))
        self._written[key] = rows
        return rows

    def row(self, key, site, trained, case, patient, split, name, index) -> ScoreRow:
        where = {
            "site": site,
            "role": "train" if trained else "unseen",
            "split": split,
            "case": case,
            "patient": patient,
            "class_name": name,
            "unit": self.units.get(site, "mm"),
        }
        if site in self.empty_sites:
            return ScoreRow(
                **where,
                dice=None,
                iou=None,
                hd95=None,
                empty=True,
                drawn=False,
                dice_slice=None,
                iou_slice=None,
                slices=0,
            )
        hard = random("patient", patient).normal(0, 0.03) + random("case", case).normal(0, 0.01)
        own = random("own", key.name, case, name).normal(0, 0.012)
        dice = float(np.clip(self.ability(key, site) + hard + own - 0.04 * index, 0.02, 0.98))
        return ScoreRow(
            **where,
            dice=dice,
            iou=dice / (2 - dice),
            hd95=14.2 * (1 - dice) + 0.61,
            empty=False,
            drawn=True,
            dice_slice=dice - 0.03,
            iou_slice=dice - 0.1,
            slices=18,
        )

    def round_rows(self, key: RunKey) -> list[RoundRow]:
        rows = []
        final = {
            site: np.mean(
                [r.dice for r in self.scores(key) if r.site == site and r.dice is not None]
                or [np.nan]
            )
            for site in key.trained_on
        }
        for number in range(self.rounds if key.regime not in ("zero-shot", "ensemble") else 0):
            for site in self.sites:
                trains = site in key.trained_on
                if not trains and key.regime != "federated":
                    continue
                dice = None
                if trains and np.isfinite(final[site]):
                    pace = {"central": 0.75, "federated": 0.55}.get(key.regime, 0.6)
                    pace *= 1.0 if key.method == "fedmsa" else 0.8
                    dice = float(final[site] - (final[site] - 0.3) * np.exp(-pace * number))
                moves = key.regime == "federated"
                rows.append(
                    RoundRow(
                        round=number,
                        site=site,
                        role="train" if trains else "holdout",
                        accepted=True,
                        dice=dice,
                        loss=float(0.8 * np.exp(-0.4 * number) + 0.1) if trains else None,
                        bytes_down=BYTES[key.method] if moves else 0,
                        bytes_up=BYTES[key.method] if moves and trains else 0,
                        seconds={"train": SECONDS[key.method], "evaluate": 4.4} if trains else {},
                    )
                )
        return rows

    def record(self, key: RunKey, files: Mapping[str, str]) -> RunRecord:
        sites = len(key.trained_on)
        work = self.rounds * sites
        jitter = 1 + random("time", key.name).normal(0, 0.03)
        rounds = self.round_rows(key)
        seconds = SECONDS[key.method] * work * jitter
        phases = {
            "prepare": Phase(seconds=3.2 * sites, peak_memory_bytes=900_000_000),
            "train": Phase(seconds=seconds, peak_memory_bytes=MEMORY[key.method]),
            "evaluate": Phase(seconds=4.4 * work, peak_memory_bytes=3_100_000_000),
        }
        if key.regime == "federated":
            phases["exchange"] = Phase(seconds=0.6 * work, peak_memory_bytes=1_200_000_000)
        phases["score"] = Phase(seconds=31.0, peak_memory_bytes=3_100_000_000)
        return RunRecord(
            study="demo",
            key=key,
            engine="flare" if key.regime == "federated" else None,
            recipe_sha256=sha(f"recipe {key.method} {key.holdout} {key.seed}"),
            backbone_sha256=sha("backbone"),
            versions={
                "fedfms": "0.2.0",
                "nvflare": "2.9.0",
                "torch": "2.13.0+cpu",
                "numpy": "2.3.1",
                "python": "3.11.2",
            },
            machine={"device": "cpu", "threads": 2},
            sites={
                site: SiteFacts(
                    manifest_sha256=sha(f"manifest {site}"),
                    config_sha256=sha(f"config {site}"),
                    cases=self.cases,
                    validation_cases=sum(s == "validation" for _, _, s in self.case_names(site)),
                )
                for site in self.sites
            },
            started=START,
            seconds=seconds / (sites if key.regime == "federated" else 1) + 60,
            phases=phases,
            bytes_down=sum(row.bytes_down or 0 for row in rounds),
            bytes_up=sum(row.bytes_up or 0 for row in rounds),
            opened={site: self.cases if site in key.trained_on else 0 for site in self.sites},
            files=files,
        )

    # ------------------------------------------------------------------------------- the folders

    def write(self, folder: Path) -> Path:
        """Write the folder and return it."""
        for key in (*self.run_keys(), *self.try_keys()):
            if not self.unfinished(key):
                self.write_run(folder / RUNS_FOLDER / key.name, key)
        self.write_question(folder)
        return folder

    def write_question(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "name": "demo",
            "title": self.title,
            "sites": list(self.sites),
            "methods": list(self.methods),
            "regimes": list(dict.fromkeys(key.way for key in self.run_keys())),
            "holdouts": list(self.holdouts),
            "seeds": list(self.seeds),
            "engine": "flare",
            "target_dice": self.target_dice,
            "planned": [key.name for key in self.run_keys()],
            "tries": [key.name for key in self.try_keys()],
        }
        (folder / STUDY_FILE).write_text(json.dumps(values, indent=2))

    def write_run(self, run: Path, key: RunKey) -> None:
        run.mkdir(parents=True)
        (run / RECIPE_FILE).write_text(
            json.dumps(
                {
                    "method": key.method,
                    "rounds": self.rounds,
                    "classes": list(self.classes),
                    "backbone": "vit_b",
                    "seed": key.seed,
                    "paper_compat": self.paper_compat,
                }
            )
        )
        (run / MODEL_FILE).write_bytes(b"\0" * 8)
        write_rows(run / SCORES_FILE, ScoreRow, self.scores(key))
        write_rounds(run / ROUNDS_FILE, self.round_rows(key))
        if key.regime == "federated":
            (run / PICTURES_FOLDER).mkdir()
            for site in self.pictures:
                for number, word in enumerate(("best", "median", "worst"), start=1):
                    name = f"{site}-{number}.png"
                    picture = draw(
                        f"{key.name} {name}", f"case {number} of 3 ({word})", self.picture_side
                    )
                    (run / PICTURES_FOLDER / name).write_bytes(picture)
            (run / "job").mkdir()
            (run / "job" / "report.html").write_text("<!doctype html><title>job</title>")
        files = {
            path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.rglob("*"))
            if path.is_file()
        }
        text = json.dumps(record_to_dict(self.record(key, files)), indent=2)
        (run / RUN_FILE).write_text(text)


def bend(run: Path, change: Callable[[RunRecord], RunRecord]) -> None:
    """Change a written run.json."""
    from fedfms_lab.study.record import read_run

    record = change(read_run(run).record)
    (run / RUN_FILE).write_text(json.dumps(record_to_dict(record)))


def with_facts(record: RunRecord, site: str, **changes: object) -> RunRecord:
    """The record with other facts of one site."""
    facts = dataclasses.replace(record.sites[site], **changes)
    return dataclasses.replace(record, sites={**record.sites, site: facts})


def draw(name: str, caption: str, side: int) -> bytes:
    """A grey blob with two outlines, as an overlay looks like."""
    generator = random("picture", name)
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    shade = 70 + 90 * np.exp(-6 * (rows**2 + columns**2))
    noisy = np.clip(shade + generator.normal(0, 9, (side, side)), 0, 255)
    image = Image.fromarray(noisy.astype(np.uint8)).convert("RGB")
    pen = ImageDraw.Draw(image)
    x, y = (int(v) for v in generator.integers(side // 5, side // 2, 2))
    pen.ellipse((x, y, x + 60, y + 38), outline=(86, 180, 233), width=2)
    pen.ellipse((x + 3, y - 2, x + 64, y + 36), outline=(230, 159, 0), width=2)
    pen.text((4, side - 14), caption, fill=(255, 255, 255))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
