"""Phantom sites under attack: the product's own trainer, one process, no network."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fedfms.contracts.contribution import ModelName
from fedfms.contracts.messages import Kind, Task
from fedfms.contracts.policy import POLICY_FILE, Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import Prepared
from fedfms.data.slices import SliceDataset
from fedfms.errors import FedfmsError
from fedfms.exchange.secure_sum import ServerRound
from fedfms.local.synthetic import CLASS_NAME, write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.trainer.kept import Outcome
from fedfms.trainer.own_key import own_key
from fedfms.trainer.sums import PEERS
from fedfms.trainer.tasks import SiteFolders, TaskRunner

# of a policy that bounds nothing, as before there were bounds; a site's history holds all the same
OPEN: dict[str, Any] = {
    "min_batch_size": 1,
    "min_steps": 1,
    "min_clip_grad_norm": 1e-300,
    "min_learning_rate": 1e-300,
    "max_learning_rate": 1e300,
    "min_positive_weight": 1e-300,
    "max_positive_weight": 1e300,
    "max_local_epochs": 10**9,
    "max_proximal_weight": 1e300,
    "min_probability_threshold": 0.0,
    "max_probability_threshold": 1.0,
    "min_training_patients": 1,
    "max_asks_of_a_model": 10**9,
    "min_cases": 1,
    "min_cases_for_spread": 1,
}


# codes of refusals that a site's policy and its history with the project make; every other one is
# of how the attack was made, and says nothing about the policy
OF_POLICY = frozenset(
    {
        *("batch-too-small", "clip-too-small", "learning-rate-not-allowed"),
        *("positive-weight-not-allowed", "too-many-epochs", "image-size-not-allowed"),
        *("threshold-not-allowed",),
        *("too-many-rounds", "method-not-allowed", "sum-required"),
        *("same-model", "asked-too-often", "rounds-used-up", "evaluations-used-up"),
        *("answered-before", "summed-before", "privacy-budget"),
    }
)


# of sites that are too small, which whoever attacks can make larger
OF_SIZE = frozenset({"too-few-training-patients", "too-few-steps"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there was no answer."""

    by_policy: str  # the sentence of the policy's refusal; empty where it was not the policy's
    not_attacked: str  # else why the attack was not made

    @classmethod
    def of(cls, error: FedfmsError, *, size_is_given: bool = False) -> Refusal:
        """Whether a site's policy refused, or the attack could not be made.

        Args:
            error: what came in the place of an answer.
            size_is_given: whether the attack is about sites that are so small.
        """
        said = f"{error.problem} ({error.code})"
        by_policy = error.code in OF_POLICY or (size_is_given and error.code in OF_SIZE)
        return cls(said, "") if by_policy else cls("", said)


class AttackedSite:
    """A site of phantoms and its trainer.

    Args:
        folder: for its images, its policy and its private folders.
        cases: patients; three in ten validate.
        slices: of each.
        seed: of its phantoms.
        policy: the values of its privacy.json.
        order_from_seed: whether everybody knows the order of its slices.
        remembers: whether it has a history; without, every task meets a site that knows of none.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
        name: of the site; those of one sum need names of their own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cases: int,
        slices: int,
        seed: int,
        policy: Mapping[str, Any],
        order_from_seed: bool = False,
        remembers: bool = True,
        checkpoints: Path | None = None,
        name: str = "site",
    ) -> None:
        self._folder, self._remembers = folder, remembers
        self._checkpoints, self.name = checkpoints, name
        if folder.exists():
            shutil.rmtree(folder)
        write_phantom_site(folder, "bright", cases=cases, slices=slices, seed=seed)
        self.set_policy(policy)
        settings = yaml.safe_load((folder / "site.yml").read_text())
        (folder / "site.yml").write_text(yaml.safe_dump({**settings, "min_cases": 1}))
        self._order_from_seed = order_from_seed
        self._tasks = 0
        self._trainer: TaskRunner | None = None

    def set_policy(self, policy: Mapping[str, Any]) -> None:
        """Write its privacy.json."""
        (self._folder / "policy" / POLICY_FILE).write_text(json.dumps(dict(policy)))

    @property
    def images(self) -> Path:
        """Its images; labels of the same names are in the folder beside."""
        return self._folder / "images"

    @property
    def work(self) -> Path:
        """The trainer's private folder."""
        return self._folder / (f"work-{self._tasks}" if not self._remembers else "work")

    def ask(
        self,
        recipe: Recipe,
        number: int,
        model: Mapping[str, Tensor],
        *,
        job: str = "job",
        kind: Kind = "train",
        which: ModelName = "round",
    ) -> Outcome:
        """What leaves the site in answer to one task.

        Raises:
            DoorClosed: the site's policy refuses.
        """
        trainer = self.trainer()
        task = Task(kind=kind, site=self.name, job=job, round=number, model=which, recipe=recipe)
        return trainer.run(task, lambda: model, Control())

    def trainer(self) -> TaskRunner:
        """The trainer of the next task; of a site that has no history one that knows of none."""
        if self._trainer is None or not self._remembers:
            self._tasks += 1
            self._trainer = TaskRunner(
                SiteFolders(
                    name=self.name,
                    config=self._folder / "site.yml",
                    policy=self._folder / "policy",
                    data_root=None,
                    checkpoints=self._checkpoints,
                    work=self.work,
                    order_from_seed=self._order_from_seed,
                )
            )
        return self._trainer

    def know(self, keys: Mapping[str, str]) -> None:
        """Write the keys of trainers, by site, that may be in a sum with this one."""
        (self._folder / "policy" / PEERS).write_text(json.dumps(dict(keys)))

    def pictures(self, recipe: Recipe) -> Tensor:
        """Its training slices as the network sees them, (N, S, S): what no attack may find."""
        return self.slices(recipe)[0].mean(dim=1)

    def slices(self, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """The same in three channels, (N, 3, S, S), and the outlines, (N, K, M, M) of 0 and 1."""
        dataset = SliceDataset(self.cases("train"), self.config, recipe)
        items = [dataset[number] for number in range(len(dataset))]
        images, targets = ([item[key] for item in items] for key in ("image", "target"))
        return torch.stack(images), torch.stack(targets)

    @property
    def config(self) -> SiteConfig:
        """Its site.yml."""
        return SiteConfig.from_yaml(self._folder / "site.yml")

    def cases(self, *splits: str) -> list[Prepared]:
        """Its cases of these splits."""
        cases = prepare_cases(find_cases(self.config), self.config, Control())
        return [case for case in cases if case.case.split in splits]


def cases_for(patients: int) -> int:
    """The fewest cases of a phantom site, one a patient, of which so many train."""
    return next(n for n in itertools.count(2) if n - math.floor(0.3 * n + 0.5) >= patients)


def enough_patients(policy: Mapping[str, Any], recipe: Recipe) -> int:
    """The fewest patients, of one slice each, on whom a policy lets a recipe train."""
    bounds = Policy(**policy).bounds
    least = bounds.min_training_patients
    if recipe.patient_rate is not None:
        return max(least, math.ceil(bounds.min_batch_size / recipe.patient_rate - 1e-9))
    passes = math.ceil(bounds.min_steps / recipe.local_epochs)  # steps of an epoch
    return max(least, recipe.batch_size * (passes - 1) + 1)


def for_phantoms(recipe: Recipe) -> Recipe:
    """A recipe for the phantoms' one class, on slices as they are: an attacker asks for those."""
    return dataclasses.replace(
        recipe, classes=(CLASS_NAME,), exclusive_classes=False, holdout=(), augment=False
    )


def first_model(recipe: Recipe, checkpoints: Path | None = None) -> dict[str, Tensor]:
    """The travelling tensors before training."""
    return read_travelling(build_model(recipe, find_checkpoint(recipe, checkpoints)))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server has of one answer, or of a sum of several."""

    tensors: Mapping[str, Tensor]  # the difference, or the weighted mean of all
    slices: int  # trained on, together


class Attacked:
    """Sites of which a server sees one answer: a single one, or all that are in a secure sum.

    Args:
        sites: one; under `secure_sum` at least three.
    """

    def __init__(self, sites: Sequence[AttackedSite]) -> None:
        self.sites = tuple(sites)

    def ask(self, recipe: Recipe, number: int, model: Mapping[str, Tensor]) -> Seen:
        """What the server has after a round of training.

        Raises:
            FedfmsError: a site's policy refuses, or the sum cannot be made.
        """
        job = f"job-{recipe.sha256[:8]}"
        if not recipe.sums_only:
            (site,) = self.sites
            outcome = site.ask(recipe, number, model, job=job)
            return Seen(outcome.tensors, outcome.contribution.training_slices)
        trainers = {site.name: site.trainer() for site in self.sites}
        keys = {name: own_key(one.folders.work).public for name, one in trainers.items()}
        for site in self.sites:
            site.know(keys)
        server = ServerRound(job, number)
        ask = server.ask_keys()
        ask = server.ask_shares({n: one.sums.answer(ask) for n, one in trainers.items()})
        asks = server.ask_take({n: one.sums.answer(ask) for n, one in trainers.items()})
        for name, one in asks.items():
            trainers[name].sums.answer(one)
        slices = 0
        for name, trainer in trainers.items():
            task = Task(
                kind="train", site=name, job=job, round=number, model="round", recipe=recipe
            )
            outcome = trainer.run(task, lambda: model, Control())
            server.add(outcome.tensors)
            slices += outcome.contribution.training_slices
        ask = server.ask_unmask(trainers)
        answers = {name: one.sums.answer(ask) for name, one in trainers.items()}
        return Seen(server.unmask(trainers, slices, answers).mean(), slices)


def averaged(model: Mapping[str, Tensor], came: Sequence[Seen]) -> dict[str, Tensor]:
    """The model after one round of federated averaging (McMahan et al. 2017)."""
    weights = [one.slices for one in came]
    return {
        name: tensor
        + sum(
            (w / sum(weights) * one.tensors[name] for w, one in zip(weights, came, strict=True)),
            torch.zeros_like(tensor),
        )
        for name, tensor in model.items()
    }
