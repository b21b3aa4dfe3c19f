"""What each site of a simulated federation reaches without the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfms.cli.common import out, progress
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.local.sites import Site
from fedfms.training.pooled import PooledRound, train_pooled


def each_alone(
    recipe: Recipe, sites: Sequence[Site], checkpoints: Path | None
) -> dict[str, float | None]:
    """Dice on its own validation cases of each site that trains, after all rounds by itself.

    Over the same cases and as many passes as in the federation; a mean over classes. None where no
    validation case shows any.
    """
    found: dict[str, float | None] = {}
    training = [site for site in sites if site.name not in recipe.holdout]
    alone = recipe.alone.with_values({"evaluate_first": recipe.rounds}, "once, at the end")
    for site in training:
        out.print(f"{site.name} trains alone, to compare with")
        config = SiteConfig.from_yaml(site.folder / "site.yml", site.data)
        done: list[PooledRound] = []
        with progress(False) as on_progress:
            train_pooled(
                alone,
                {site.name: config},
                checkpoints=checkpoints,
                control=Control(on_progress),
                on_round=done.append,
            )
        scores = [m.mean for m in done[-1].metrics[site.name] if m.metric == "dice"]
        known = [score for score in scores if score is not None]
        found[site.name] = float(np.mean(known)) if known else None
    return found


def words(alone: dict[str, float | None]) -> str:
    """What is printed of them."""
    each = ", ".join(f"{name} {_score(score)}" for name, score in alone.items())
    known = [score for score in alone.values() if score is not None]
    mean = float(np.mean(known)) if known else None
    return f"each alone, with as many passes: {each}; mean {_score(mean)}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
