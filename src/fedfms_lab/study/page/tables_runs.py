"""What ran, on which data, and the overlays that the runs left."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfms.pages.parts import Cell, Column, Picture, Table, embed_png, is_embeddable
from fedfms.records.layout import REPORT_HTML
from fedfms.report import words as shown
from fedfms_lab.study.answer import Answer
from fedfms_lab.study.page import words
from fedfms_lab.study.record import JOB_FOLDER, PICTURES_FOLDER, RUNS_FOLDER, Run

_HASH_DIGITS = 12  # of a hash in a table; run.json has all 64


def overlays(found: Answer) -> dict[str, list[Picture]]:
    """Pictures with the truth, by method, site, role and seed; of a site as few as runs left.

    They are of the federated run of the lowest seed where the site is unseen, else where it
    trained.
    """
    groups = {}
    for method, site in itertools.product(found.study.methods, found.study.sites):
        keys = [
            (site in run.record.key.trained_on, run.record.key.seed, run.record.key.name, run)
            for run in found.runs
            if (run.record.key.method, run.record.key.way) == (method, "federated")
            and any(_picture_files(run, site))
        ]
        if not keys:
            continue
        trained, seed, name, run = min(keys, key=lambda key: key[:3])
        pictures = [
            Picture(f"{RUNS_FOLDER}/{name}/{PICTURES_FOLDER}/{path.name}", embed_png(path))
            for path in _picture_files(run, site)
            if is_embeddable(path)
        ]
        if pictures:
            where = "trained there" if trained else "unseen"
            groups[f"{words.method(method)}, {site}, {where}, seed {seed}"] = pictures
    return groups


def _picture_files(run: Run, site: str) -> list[Path]:
    """The run's overlays of a site, in the order of their numbers: best, median, worst."""
    numbered = re.compile(re.escape(site) + r"-(\d+)\.png")
    found = []
    for path in (run.folder / PICTURES_FOLDER).glob("*.png"):
        match = numbered.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def what_ran(found: Answer) -> list[tuple[str, str]]:
    """Versions, checkpoint, engine and machine of all runs, each state once."""
    facts = []
    for versions in sorted({tuple(run.record.versions.items()) for run in found.runs}):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions)))
    for sha in sorted({run.record.backbone_sha256 for run in found.runs}):
        facts.append(("SAM checkpoint, SHA-256", sha))
    engines = sorted({run.record.engine for run in found.runs if run.record.engine})
    if engines:
        facts.append(("engine of federated runs", ", ".join(engines)))
    machines = {_machine(run.record.machine) for run in found.runs}
    facts += [("training processes", machine) for machine in sorted(machines)]
    return facts


def _machine(values: Mapping[str, Any]) -> str:
    said = {
        name.removesuffix("_bytes"): shown.size(value) if name.endswith("_bytes") else value
        for name, value in values.items()
    }
    return ", ".join(f"{name} {value}" for name, value in sorted(said.items()))


def rate_table(found: Answer) -> Table | None:
    """Which learning rates were tried and taken, by way to train and fold."""
    if not found.choices:
        return None
    rates = sorted({rate for choice in found.choices for rate in choice.dice})
    rows = []
    for choice in found.choices:
        fold = f"without {choice.holdout}" if choice.holdout else "all sites"
        if choice.way == "local":
            fold = choice.trained_on[0]
        cells = [
            Cell(shown.score(choice.dice.get(rate)), tag="taken" if rate == choice.rate else "")
            for rate in rates
        ]
        rows.append([words.way(choice.method, choice.way, False), Cell(fold), *cells])
    return Table(
        "Learning rates",
        [
            Column("Method", "trained", number=False),
            Column("Fold", number=False),
            *(Column(f"{rate:g}", "Dice") for rate in rates),
        ],
        rows,
        note="Mean Dice of the validation cases of the training sites, with the first seed. The "
        "best rate is that of all seeds; no case of an unseen site has a say.",
    )


def data_table(found: Answer) -> Table | None:
    """Cases and hashes of each site."""
    rows = []
    for site in found.study.sites:
        facts = [run.record.sites[site] for run in found.runs if site in run.record.sites]
        for fact in dict.fromkeys(facts):
            rows.append(
                [
                    Cell(site),
                    Cell(shown.count(fact.cases)),
                    Cell(shown.count(fact.validation_cases)),
                    Cell(shown.count(facts.count(fact))),
                    Cell(fact.manifest_sha256, code=True),
                    Cell(fact.config_sha256, code=True),
                ]
            )
    if not rows:
        return None
    return Table(
        "Data of each site",
        [
            Column("Site", number=False),
            Column("Cases", "in all"),
            Column("Cases", "for validation"),
            Column("Runs", "that read them"),
            Column("Images and labels", "SHA-256", number=False),
            Column("site.yml", "SHA-256", number=False),
        ],
        rows,
        note="The first hash is over the names and SHA-256 of all image and label files.",
    )


def run_table(found: Answer) -> Table | None:
    """Every run with its folder, recipe, data and versions."""
    if not found.runs:
        return None
    rows = []
    several = len({tuple(sorted(run.record.versions.items())) for run in found.runs}) > 1
    for run in found.runs:
        record = run.record
        manifests = ", ".join(
            f"{site} {facts.manifest_sha256[:_HASH_DIGITS]}"
            for site, facts in sorted(record.sites.items())
        )
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        report = f"{RUNS_FOLDER}/{record.key.name}/{JOB_FOLDER}/{REPORT_HTML}"
        has_job = (run.folder / JOB_FOLDER / REPORT_HTML).is_file()
        rows.append(
            [
                Cell(record.key.name, link=f"{RUNS_FOLDER}/{record.key.name}/"),
                Cell("job report", link=report) if has_job else Cell(record.engine or shown.NONE),
                Cell(record.recipe_sha256[:_HASH_DIGITS], code=True),
                Cell(manifests, small=versions if several else ""),
                Cell(shown.duration(record.seconds)),
            ]
        )
    return Table(
        "Runs",
        [
            Column("Run", "its folder", number=False),
            Column("Report", "or engine", number=False),
            Column("Recipe", f"SHA-256, {_HASH_DIGITS} of 64 digits", number=False),
            Column(
                "Data of the sites",
                "SHA-256; versions below" if several else "SHA-256",
                number=False,
            ),
            Column("Time", "wall clock"),
        ],
        rows,
        note="Each folder's run.json has the hashes in full, and one of every other file there.",
    )
