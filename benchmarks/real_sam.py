"""Whole federations on real SAM weights (`vit_t`, MobileSAM), beside zero-shot, local and vit_demo.

    python benchmarks/real_sam.py hippocampus nuclei --data FOLDER --checkpoints FOLDER
    python benchmarks/real_sam.py phantoms --checkpoints FOLDER --device cpu --cases 10 --size 512

--data holds hippocampus/ and nuclei/ with a folder a site, as sites/examples names them;
--checkpoints what tools/mobile_sam_checkpoint.py made, or mobile_sam.pt. One site never trains.
Sites train in this process, one after the other, by the product's own trainer, door and average.

Rows of a data set, a line of JSON each, and a table at the end:
  zero-shot    each of SAM's four mask tokens, untrained; the one with the best mean at the training
               sites is what the other rows start from (`mask_token`)
  decoder      the mask decoder alone (`adapter_blocks=last:0`)
  token 0      the same from SAM's first token, where another is the best
  fedmsa, fedsam, lora
  local        the decoder alone at each training site alone
  vit_demo     FedMSA of jobs/fedmsa, at 128 pixels, the same rounds
Dice is the mean over cases, then over sites: training sites' validation cases, and all cases of
the unseen site.

On a GPU four rows run side by side (--jobs). A row that would begin after --seconds is left out and
said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from in_process import ask, first_model, train_round, trainer_of, unscored

from fedfms.contracts.recipe import MASK_TOKENS, Recipe, read_job_recipe
from fedfms.exchange.strategies import find_strategy
from fedfms.files import file_sha256
from fedfms.local.synthetic import CLASS_NAME, FEDERATION, write_phantom_site
from fedfms.models.sam import CHECKPOINT_SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("decoder", "fedmsa", "token 0", "local", "vit_demo", "fedsam", "lora")  # after zero-shot
# class, and the site that never trains
DATA = {
    "phantoms": (CLASS_NAME, "site-3"),
    "hippocampus": ("hippocampus", "scanner-c"),
    "nuclei": ("nucleus", "histology-320"),
}
# a machine of one's own: what may leave is bounded by nothing, and few cases are enough
POLICY = {
    "min_cases": 1,
    "min_training_patients": 1,
    "min_batch_size": 1,
    "min_steps": 1,
    "max_asks_of_a_model": 1000,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one data set's federation is."""

    data: str
    sites: Path  # a folder with site.yml for each site
    work: Path
    checkpoints: Path
    unseen: str

    @property
    def names(self) -> list[str]:
        """Of all sites."""
        return sorted(path.name for path in self.sites.iterdir())

    @property
    def training(self) -> list[str]:
        """Of those that train."""
        return [name for name in self.names if name != self.unseen]


# ------------------------------------------------------------------------------------------- sites


def lay_out(data: str, source: Path | None, folder: Path, cases: int, device: str) -> None:
    """A folder with site.yml, images and labels for each site; `cases` of each, by name."""
    for number, (site, style) in enumerate(FEDERATION.items()):
        if data == "phantoms":
            write_phantom_site(folder / site, style, cases=cases, seed=number)
            _set(folder / site / "site.yml", device=device, min_cases=1, **_workers(device))
    if data == "phantoms":
        return
    assert source is not None
    for example in sorted((ROOT / "sites/examples" / data).iterdir()):
        place = folder / example.name
        for kind in ("images", "labels"):
            (place / kind).mkdir(parents=True)
            for file in sorted((source / data / example.name / kind).iterdir())[:cases]:
                shutil.copy(file, place / kind / file.name)
        shutil.copy(example / "site.yml", place / "site.yml")
        _set(
            place / "site.yml",
            data_root=str(place),
            device=device,
            min_cases=1,
            validation_fraction=0.3,
            **_workers(device),
        )


def _workers(device: str) -> dict[str, int]:
    return {} if device == "cpu" else {"workers": 2}  # of each site of each row


def _set(file: Path, **values: Any) -> None:
    said = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**said, **values}))


# -------------------------------------------------------------------------------------- federation


def federate(recipe: Recipe, place: Place, work: Path, evaluated: Sequence[int]) -> dict[str, Any]:
    """Train a recipe's rounds with every site that is no holdout.

    Args:
        recipe: at least one site is no holdout.
        place: its sites.
        work: what is prepared there, and features, stay for the next.
        evaluated: after so many rounds the model is scored.

    Returns:
        "dice" by rounds and site, seconds of training and of all, megabytes a round and direction.
    """
    trainers = {
        name: trainer_of(
            place.sites / name,
            work / name,
            POLICY,
            kept=("prepared", "features"),
            checkpoints=place.checkpoints,
        )
        for name in place.names
    }
    recipe = unscored(recipe)
    strategy, weights = find_strategy(recipe), first_model(recipe, place.checkpoints)
    size = sum(tensor.numel() for tensor in weights.values()) * 4 / 1e6
    began = time.monotonic()
    dice: dict[int, dict[str, float | None]] = {}
    training = 0.0
    for number in range(recipe.rounds + 1):
        if number in evaluated:
            dice[number] = {
                name: _dice(ask(trainers, name, "evaluate", number, recipe, weights))
                for name in trainers
            }
        if number == max(evaluated):
            break
        since = time.monotonic()
        weights = train_round(trainers, strategy, number, recipe, weights)
        training += time.monotonic() - since
    return {
        "dice": dice,
        "train_seconds": round(training, 1),
        "seconds": round(time.monotonic() - began, 1),
        "megabytes": round(size, 2),
    }


def _dice(outcome: Any) -> float | None:
    means = [
        one.mean
        for one in outcome.contribution.metrics
        if one.metric == "dice" and one.mean is not None
    ]
    return round(statistics.fmean(means), 4) if means else None


# -------------------------------------------------------------------------------------------- rows


def recipe_of(options: argparse.Namespace, place: Place, **values: Any) -> Recipe:
    """The recipe of a row on real weights."""
    name, unseen = DATA[place.data]
    plain: dict[str, Any] = {
        "method": "fedmsa",
        "backbone": "vit_t",
        "backbone_sha256": _real_weights(options.checkpoints),
        "classes": (name,),
        "rounds": options.rounds,
        "image_size": options.size,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "loss": "dice_bce",
        "precision": options.precision,
        "holdout": (unseen,),
        "seed": options.seed,
    }
    return Recipe(**{**plain, **values})


def rows_of(options: argparse.Namespace, place: Place, token: int) -> list[tuple[str, Recipe]]:
    """Name and recipe of each row that trains, the most telling ones first."""

    def real(**values: Any) -> Recipe:
        return recipe_of(options, place, **{"mask_token": token, **values})

    alone = {"adapter_blocks": "last:0"}
    rows = [("decoder", real(**alone)), ("fedmsa", real())]
    if token != 0:
        rows.append(("token 0", real(**alone, mask_token=0)))
    for site in place.training:
        others = tuple(name for name in place.names if name != site)
        rows.append((f"local {site}", real(**alone, holdout=others)))
    demo = read_job_recipe(ROOT / "jobs" / "fedmsa")
    rows.append(
        (
            "vit_demo",
            dataclasses.replace(
                demo,
                classes=(DATA[place.data][0],),
                rounds=options.rounds,
                local_epochs=1,
                augment=False,
                holdout=(place.unseen,),
                seed=options.seed,
            ),
        )
    )
    rows += [("fedsam", real(method="fedsam")), ("lora", real(method="lora"))]
    chosen = options.rows.split(",") if options.rows else []
    return [
        (name, one)
        for name, one in rows
        if not chosen or (name if name in ROWS else name.partition(" ")[0]) in chosen
    ]


def one_row(
    name: str, recipe: Recipe, place: Place, work: Path, evaluated: Sequence[int], threads: int
) -> dict[str, Any]:
    """Run a row; what of the sites' Dice is of interest."""
    torch.set_num_threads(threads)
    found = federate(recipe, place, work, evaluated)
    dice = found.pop("dice")
    told: dict[str, Any] = {"data": place.data, "row": name}
    for rounds, by_site in dice.items():
        trained = [by_site[site] for site in place.training if by_site[site] is not None]
        told[f"training_after_{rounds}"] = round(statistics.fmean(trained), 4) if trained else None
        told[f"unseen_after_{rounds}"] = by_site[place.unseen]
    return {**told, "by_site": dice, **found}


def measure(
    options: argparse.Namespace, place: Place, out: Any, end: float
) -> list[dict[str, Any]]:
    """All rows of a data set."""
    done: list[dict[str, Any]] = []
    side_by_side = options.jobs > 1

    def say(row: dict[str, Any]) -> None:
        done.append(row)
        out(json.dumps(row))

    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

        def begin(name: str, recipe: Recipe, evaluated: Sequence[int]) -> Future[dict[str, Any]]:
            work = place.work / (name.replace(" ", "-") if side_by_side else "all")
            return pool.submit(one_row, name, recipe, place, work, evaluated, options.threads)

        tokens = {
            token: begin(
                f"zero-shot {token}",
                recipe_of(options, place, adapter_blocks="last:0", mask_token=token),
                [0],
            )
            for token in range(MASK_TOKENS)
        }
        scores = {}
        for token, one in tokens.items():
            row = one.result()
            say(row)
            scores[token] = row["training_after_0"] or 0.0
        best = max(scores, key=lambda token: (scores[token], -token))
        say({"data": place.data, "row": "token", "mask_token": best, "by_token": scores})
        waiting = rows_of(options, place, best)
        running: list[Future[dict[str, Any]]] = []
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name, recipe = waiting.pop(0)
                if time.monotonic() > end:
                    out(json.dumps({"data": place.data, "row": name, "left_out": "time"}))
                    continue
                after = (
                    [1, recipe.rounds]
                    if name.startswith(("decoder", "token", "fedmsa"))
                    else [recipe.rounds]
                )
                running.append(begin(name, recipe, sorted(set(after))))
            for one in [one for one in running if one.done()]:
                say(one.result())
                running.remove(one)
            time.sleep(0.05)
    return done


def as_table(rows: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """Markdown."""
    lines = [
        "| data | row | training sites, after 1 round | after all | unseen, after all | MB a round "
        "and direction, fp32 | s training | s in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "by_site" not in row:
            continue
        last = 0 if "training_after_0" in row else rounds
        cells = [row["data"], row["row"], row.get("training_after_1", "")]
        cells += [row[f"training_after_{last}"], row[f"unseen_after_{last}"]]
        cells += [row["megabytes"], row["train_seconds"], row["seconds"]]
        lines.append("| " + " | ".join("" if one is None else str(one) for one in cells) + " |")
    return "\n".join(lines)


def _real_weights(folder: Path) -> str:
    """SHA-256 of the one checkpoint that is not the package's own."""
    found = [
        path for path in sorted(folder.iterdir()) if path.suffix.lower() in CHECKPOINT_SUFFIXES
    ]
    if len(found) != 1:
        sys.exit(f"{folder} holds {len(found)} checkpoints; one is needed, of vit_t")
    return file_sha256(found[0])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=list(DATA))
    parser.add_argument("--data", type=Path, help="folder with hippocampus/ and nuclei/")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", type=int, default=12, help="of each site, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--precision", help="bf16 on a GPU, fp32 on a processor")
    parser.add_argument("--rows", default="", help=f"some of {', '.join(ROWS)}, with commas")
    parser.add_argument("--jobs", type=int, help="rows side by side; 4 on a GPU, else 1")
    parser.add_argument("--threads", type=int, help="of a row; 4 on a GPU, else 1")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no row begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the lines here, too")
    options = parser.parse_args()
    if unknown := {*options.rows.split(",")} - {"", *ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}: choose of {', '.join(ROWS)}")
    on_gpu = options.device != "cpu"
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    options.jobs = options.jobs or (4 if on_gpu else 1)
    options.threads = options.threads or (4 if on_gpu else 1)
    if options.data is None and set(options.sets) != {"phantoms"}:
        parser.error("--data is needed for real images")
    end = time.monotonic() + options.seconds

    def out(line: str) -> None:
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(line + "\n")

    rows: list[dict[str, Any]] = []
    for data in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            sites, work = Path(folder, "sites"), Path(folder, "work")
            sites.mkdir()
            lay_out(data, options.data, sites, options.cases, options.device)
            place = Place(data, sites, work, options.checkpoints, DATA[data][1])
            rows += measure(options, place, out, end)
    out(as_table(rows, options.rounds))


if __name__ == "__main__":
    main()
