"""A federation in this process, without FLARE: the product's own trainers, door and average."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.exchange.strategies import Strategy, combine
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import SiteFolders, TaskRunner

Tensors = Mapping[str, Tensor]


def first_model(recipe: Recipe, checkpoints: Path | None = None) -> dict[str, Tensor]:
    """What the server sends first."""
    return read_travelling(build_model(recipe, find_checkpoint(recipe, checkpoints)))


def trainer_of(
    site: Path,
    folder: Path,
    policy: Path | Mapping[str, Any],
    *,
    kept: Collection[str] = (),
    **settings: Any,
) -> TaskRunner:
    """A site's trainer that begins anew: nothing asked, nothing spent.

    Args:
        site: the folder with its site.yml; it has the site's name.
        folder: for its work, and for its policy where that is not a folder but what its
            privacy.json says.
        kept: what stays of an earlier trainer's work, such as "prepared".
        settings: of SiteFolders, such as checkpoints; an order of slices from the seed, unless
            `order_from_seed` says otherwise.
    """
    if not isinstance(policy, Path):
        file = folder / "policy" / "privacy.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(policy))
        policy = file.parent
    work = folder / "work"
    for old in work.glob("*"):
        if old.name not in kept:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    work.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"data_root": None, "checkpoints": None, "order_from_seed": True}
    return TaskRunner(
        SiteFolders(
            name=site.name,
            config=site / "site.yml",
            policy=policy,
            work=work,
            **{**given, **settings},
        )
    )


def ask(
    trainers: Mapping[str, TaskRunner],
    name: str,
    kind: Literal["train", "evaluate"],
    number: int,
    recipe: Recipe,
    model: Tensors,
) -> Outcome:
    """A site's answer to a round's model, or what it scores of the final one."""
    which: Any = "round" if kind == "train" else "final"
    task = Task(kind=kind, site=name, job="run", round=number, model=which, recipe=recipe)
    return trainers[name].run(task, lambda: dict(model), Control())


def unscored(recipe: Recipe) -> Recipe:
    """The same, but that no round's model is scored before it is trained on."""
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds)


def train_round(
    trainers: Mapping[str, TaskRunner],
    strategy: Strategy,
    number: int,
    recipe: Recipe,
    model: Tensors,
) -> dict[str, Tensor]:
    """The model after a round with every site that is no holdout."""
    answers = {
        name: ask(trainers, name, "train", number, recipe, model)
        for name in trainers
        if name not in recipe.holdout
    }
    slices = {name: one.contribution.training_slices for name, one in answers.items()}
    sent = {name: one.tensors for name, one in answers.items()}
    change = combine(strategy, number, slices, sent)
    return {name: tensor + change[name] for name, tensor in model.items()}
