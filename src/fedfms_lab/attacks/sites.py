"""Phantom sites under attack: the product's own trainer, one process, no network."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fedfms.contracts.contribution import ModelName
from fedfms.contracts.messages import Kind, Task
from fedfms.contracts.policy import POLICY_FILE
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import Prepared
from fedfms.data.slices import SliceDataset
from fedfms.local.synthetic import CLASS_NAME, write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.trainer.kept import Outcome
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
    "min_training_patients": 1,
    "max_asks_of_a_model": 10**9,
    "min_cases": 1,
    "min_cases_for_spread": 1,
}


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
    ) -> None:
        self._folder, self._remembers = folder, remembers
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
        if self._trainer is None or not self._remembers:
            self._tasks += 1
            self._trainer = TaskRunner(
                SiteFolders(
                    name="site",
                    config=self._folder / "site.yml",
                    policy=self._folder / "policy",
                    data_root=None,
                    checkpoints=None,
                    work=self.work,
                    order_from_seed=self._order_from_seed,
                )
            )
        task = Task(kind=kind, site="site", job=job, round=number, model=which, recipe=recipe)
        return self._trainer.run(task, lambda: model, Control())

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


def for_phantoms(recipe: Recipe) -> Recipe:
    """A recipe for the phantoms' one class."""
    return dataclasses.replace(recipe, classes=(CLASS_NAME,), exclusive_classes=False, holdout=())


def first_model(recipe: Recipe) -> dict[str, Tensor]:
    """The travelling tensors before training."""
    return read_travelling(build_model(recipe, find_checkpoint(recipe, None)))


def averaged(model: Mapping[str, Tensor], came: Sequence[Outcome]) -> dict[str, Tensor]:
    """The model after one round of federated averaging (McMahan et al. 2017)."""
    weights = [one.contribution.training_slices for one in came]
    return {
        name: tensor
        + sum(
            (w / sum(weights) * one.tensors[name] for w, one in zip(weights, came, strict=True)),
            torch.zeros_like(tensor),
        )
        for name, tensor in model.items()
    }
