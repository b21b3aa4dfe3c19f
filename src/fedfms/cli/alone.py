"""What each site of a simulated federation reaches without the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fedfms.cli.common import out, progress
from fedfms.contracts.contribution import Metric
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_whole_cases
from fedfms.data.prepare import prepare_cases
from fedfms.local.sites import Site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import write_travelling
from fedfms.training.device import ready_device
from fedfms.training.evaluate import evaluate, summarize
from fedfms.training.pooled import PooledRound, train_pooled

# Dice, a mean over classes, of a model: by the site that trained it, and where it is scored; None
# where no case shows any class
Scores = Mapping[str, Mapping[str, float | None]]


def each_alone(recipe: Recipe, sites: Sequence[Site], checkpoints: Path | None) -> Scores:
    """Dice of a model from each site that trains, after all rounds by itself.

    Over as many passes as in the federation: on the site's own validation cases, and on all cases
    of the sites that never train.
    """
    found: dict[str, Mapping[str, float | None]] = {}
    alone = recipe.alone.with_values({"evaluate_first": recipe.rounds}, "once, at the end")
    unseen = [site for site in sites if site.name in recipe.holdout]
    for site in sites:
        if site in unseen:
            continue
        out.print(f"{site.name} trains alone, to compare with")
        done: list[PooledRound] = []
        with progress(False) as on_progress:
            control = Control(on_progress)
            tensors = train_pooled(
                alone,
                {site.name: _config(site)},
                checkpoints=checkpoints,
                control=control,
                on_round=done.append,
            )
            elsewhere = {
                other.name: _dice(_scored(alone, tensors, _config(other), checkpoints, control))
                for other in unseen
            }
        found[site.name] = {site.name: _dice(done[-1].metrics[site.name]), **elsewhere}
    return found


def _config(site: Site) -> SiteConfig:
    return SiteConfig.from_yaml(site.folder / "site.yml", site.data)


def _scored(
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    site: SiteConfig,
    checkpoints: Path | None,
    control: Control,
) -> tuple[Metric, ...]:
    """Of all cases of a site that trained nothing of these tensors."""
    model = build_model(recipe, find_checkpoint(recipe, checkpoints)).to(ready_device(site))
    write_travelling(model, tensors)
    there, left_out = find_whole_cases(site)
    cases = prepare_cases(there, site, control, left_out=left_out)
    return summarize(evaluate(model, cases, recipe, site, control), 1)


def _dice(metrics: Iterable[Metric]) -> float | None:
    return _mean(m.mean for m in metrics if m.metric == "dice")


def words(alone: Scores) -> list[str]:
    """What is printed of them, in lines."""
    lines = [
        "each alone, with as many passes, on its own validation cases: "
        + _listed({name: scores[name] for name, scores in alone.items()})
    ]
    for unseen in sorted({other for scores in alone.values() for other in scores} - set(alone)):
        there = {name: scores[unseen] for name, scores in alone.items()}
        lines.append(f"their models at {unseen}, which never trains: {_listed(there)}")
    return lines


def _listed(scores: Mapping[str, float | None]) -> str:
    each = ", ".join(f"{name} {_score(score)}" for name, score in scores.items())
    return f"{each}; mean {_score(_mean(scores.values()))}"


def _mean(scores: Iterable[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known else None


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
