"""A trainer that sends something else each round: what the server's guard must refuse.

Rounds: 0 NaN, 1 a tensor is missing, 2 trained with a recipe that this site changed, 3 another
backbone. It does the work of a real trainer and changes what leaves it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path

from fedfms.trainer.kept import Outcome
from fedfms.trainer.server import TrainerServer
from fedfms.trainer.tasks import SiteFolders, TaskRunner


class RogueRunner(TaskRunner):
    kit: Path  # of the site's FLARE client, whose copy of the recipe this site can change

    def run(self, task, received, control) -> Outcome:
        outcome = super().run(task, received, control)
        tensors, contribution = dict(outcome.tensors), outcome.contribution
        if task.kind == "train":
            first = sorted(tensors)[0]
            if task.round == 0:
                tensors[first] = tensors[first] * float("nan")
            elif task.round == 1:
                del tensors[first]
                self.set_learning_rate(0.5)
            elif task.round == 2:
                self.set_learning_rate(task_rate(self.kit))
            elif task.round == 3:
                contribution = dataclasses.replace(contribution, backbone_sha256="b" * 64)
        return Outcome(contribution, tensors, outcome.pictures)

    def set_learning_rate(self, rate: float) -> None:
        for path in self.kit.glob("*/app_*/config/recipe.json"):
            recipe = json.loads(path.read_text())
            original = path.with_name("original.json")
            if not original.exists():
                original.write_text(path.read_text())
            scratch = path.with_name(f"recipe.{os.getpid()}")
            scratch.write_text(json.dumps({**recipe, "learning_rate": rate}))
            scratch.replace(path)


def task_rate(kit: Path) -> float:
    """The learning rate that the job came with."""
    original = next(kit.glob("*/app_*/config/original.json"))
    return json.loads(original.read_text())["learning_rate"]


if __name__ == "__main__":
    name, site, exchange, work, kit = sys.argv[1:]
    runner = RogueRunner(
        SiteFolders(
            name=name,
            config=Path(site) / "site.yml",
            policy=Path(site) / "policy",
            data_root=None,
            checkpoints=None,
            work=Path(work),
            order_from_seed=True,
        )
    )
    runner.kit = Path(kit)
    asyncio.run(TrainerServer(runner, Path(exchange)).run())
