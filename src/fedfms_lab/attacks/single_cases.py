"""Scores of single patients from what is told of several: faults of means, spreads and sets."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy.optimize import least_squares

from fedfms.contracts.contribution import Metric
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.contracts.sums import LEAST_SITES
from fedfms.data.manifest import find_cases
from fedfms.errors import FedfmsError
from fedfms.trainer.kept import Outcome
from fedfms_lab.attacks.sites import Attacked, AttackedSite, Refusal, first_model, for_phantoms

CLOSE = 0.01  # a Dice is known where the error is no larger


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an attack says of a single patient."""

    attack: str
    told: str  # what left
    error: float | None  # largest error of the Dice that follows; None: none follows
    not_attacked: str = ""  # why there was no attack, where it was not the policy that refused

    @property
    def shows_something(self) -> bool:
        """Whether a patient's Dice is known."""
        return self.error is not None and self.error <= CLOSE


def all_single_cases(
    job: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> list[Recovered]:
    """The attacks on scores, under a policy."""
    recipe = for_phantoms(job)
    attacks = (mean_and_spread, one_patient_more, one_more_of_a_class, one_training_patient)
    found = []
    for one in attacks:
        try:
            found.append(one(recipe, policy, folder / one.__name__, checkpoints))
        except FedfmsError as error:
            why = Refusal.of(error)
            told = f"refused: {why.by_policy}" if why.by_policy else ""
            name = one.__name__.replace("_", " ")
            found.append(Recovered(name, told, None, why.not_attacked))
    return found


def mean_and_spread(
    recipe: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> Recovered:
    """Three validation cases: mean and spread of Dice and of IoU, which is d / (2 - d) of each."""
    site = AttackedSite(folder, cases=10, slices=1, seed=1, policy=policy, checkpoints=checkpoints)
    told = _metrics(_evaluate(site, recipe, checkpoints))
    truth = np.sort(_dice_by_case(site)[-1])
    dice, iou = told["dice"], told["iou"]
    spread = "no spread" if dice.std is None else f"spread {dice.std}"
    said = f"mean {dice.mean}, {spread}"
    if dice.mean is None or dice.std is None or iou.mean is None or iou.std is None:
        return Recovered("mean and spread of three cases", said, None)
    wanted = np.array([dice.mean, dice.std, iou.mean, iou.std])

    def misses(values: Any) -> Any:
        of_iou = values / (2 - values)
        return np.array([values.mean(), values.std(), of_iou.mean(), of_iou.std()]) - wanted

    starts = itertools.product(np.linspace(0.1, 0.9, 5), repeat=3)
    found = min(
        (least_squares(misses, start, bounds=(0, 1)) for start in starts), key=lambda one: one.cost
    )
    error = float(np.abs(np.sort(found.x) - truth).max())
    return Recovered("mean and spread of three cases", said, error)


def one_patient_more(
    recipe: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> Recovered:
    """Two evaluations of one model, before and after a patient joins."""
    site = AttackedSite(folder, cases=22, slices=1, seed=2, policy=policy, checkpoints=checkpoints)
    joins = _whose_joining_moves_no_other(site)
    aside = folder / "aside"
    aside.mkdir()
    for kind in (site.images, site.images.parent / "labels"):
        (aside / kind.name).mkdir()
        shutil.move(kind / joins, aside / kind.name)
    before = _metrics(_evaluate(site, recipe, checkpoints, "before"))["dice"]
    for kind in (site.images, site.images.parent / "labels"):
        shutil.move(aside / kind.name / joins, kind)
    after = _metrics(_evaluate(site, recipe, checkpoints, "after"))["dice"]
    said = f"{before.mean} of {before.cases}, then {after.mean} of {after.cases}"
    name = "two evaluations, one patient more"
    if before.mean is None or after.mean is None or after.cases != before.cases + 1:
        return Recovered(name, said, None)
    truth = _dice_of(site, joins.split(".")[0])
    return Recovered(name, said, abs(after.cases * after.mean - before.cases * before.mean - truth))


def one_more_of_a_class(
    recipe: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> Recovered:
    """Three patients join a site that is held out, enough for it, and one of them shows a class.

    Four of ten show it before.
    """
    site = AttackedSite(folder, cases=13, slices=1, seed=4, policy=policy, checkpoints=checkpoints)
    held_out = dataclasses.replace(recipe, holdout=("site",))
    labels = site.images.parent / "labels"
    names = sorted(path.name for path in labels.iterdir())
    shows = {*names[:4], names[10]}
    for name in set(names) - shows:
        label = nibabel.load(labels / name)
        nibabel.save(
            nibabel.Nifti1Image(0 * np.asarray(label.dataobj), label.affine), labels / name
        )
    aside = folder / "aside"
    for kind in (site.images, labels):
        (aside / kind.name).mkdir(parents=True)
        for name in names[10:]:
            shutil.move(kind / name, aside / kind.name)
    before = _metrics(_evaluate(site, held_out, checkpoints, "before"))["dice"]
    for kind in (site.images, labels):
        for name in names[10:]:
            shutil.move(aside / kind.name / name, kind)
    after = _metrics(_evaluate(site, held_out, checkpoints, "after"))["dice"]
    said = f"{before.mean} of {before.cases}, then {after.mean} of {after.cases}"
    name = "two evaluations, one patient more who shows a class"
    if before.mean is None or after.mean is None or after.cases <= before.cases:
        return Recovered(name, said, None)
    truth = _dice_of(site, names[10].split(".")[0])
    return Recovered(name, said, abs(after.cases * after.mean - before.cases * before.mean - truth))


def one_training_patient(
    recipe: Recipe, policy: Mapping[str, Any], folder: Path, checkpoints: Path | None = None
) -> Recovered:
    """A difference that is of one patient alone."""
    name = "the difference of one training patient"
    sites = [
        AttackedSite(
            folder / f"site-{n}",
            cases=2,
            slices=8,
            seed=3 + n,
            policy=policy,
            checkpoints=checkpoints,
            name=f"site-{n}",
        )
        for n in range(LEAST_SITES if recipe.sums_only else 1)
    ]
    try:
        seen = Attacked(sites).ask(recipe, 0, first_model(recipe, checkpoints))
    except FedfmsError as error:
        why = Refusal.of(error, size_is_given=True)
        told = f"refused: {why.by_policy}" if why.by_policy else ""
        return Recovered(name, told, None, why.not_attacked)
    if recipe.sums_only:
        said = f"{len(seen.tensors)} tensors, the sum of {len(sites)} sites of one patient each"
        return Recovered(name, said, None)
    return Recovered(name, f"{len(seen.tensors)} tensors", 0.0)


def _evaluate(
    site: AttackedSite, recipe: Recipe, checkpoints: Path | None, job: str = "job"
) -> Outcome:
    model = first_model(recipe, checkpoints)
    return site.ask(recipe, recipe.rounds, model, job=job, kind="evaluate", which="final")


def _metrics(outcome: Outcome) -> dict[str, Metric]:
    return {metric.metric: metric for metric in outcome.contribution.metrics}


def _tables(site: AttackedSite) -> list[list[dict[str, str]]]:
    """The site's own tables of scores, one a job, the last one last."""
    found = []
    paths = (site.work / "scores").glob("*.csv")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        with path.open(newline="") as file:
            found.append(list(csv.DictReader(file)))
    return found


def _dice_by_case(site: AttackedSite) -> list[Any]:
    return [np.array([float(row["dice"]) for row in table]) for table in _tables(site)]


def _dice_of(site: AttackedSite, case: str) -> float:
    return next(float(row["dice"]) for row in _tables(site)[-1] if row["case"] == case)


def _whose_joining_moves_no_other(site: AttackedSite) -> str:
    """The file of a validation case without which the others validate as they do with it."""
    config = SiteConfig.from_yaml(site.images.parent / "site.yml")
    cases = find_cases(config)
    validate = {case.key for case in cases if case.split == "validation"}
    for case in cases:
        if case.key in validate:
            hidden = case.image.with_suffix(".away"), case.label.with_suffix(".away")
            for path, away in zip((case.image, case.label), hidden, strict=True):
                path.rename(away)
            left = {one.key for one in find_cases(config) if one.split == "validation"}
            for path, away in zip((case.image, case.label), hidden, strict=True):
                away.rename(path)
            if left == validate - {case.key}:
                return case.image.name
    raise AssertionError("each patient's joining moves another to the training cases")
