"""What each site of a simulated federation reaches without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedfms.cli.common import out, progress
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import StoredCase
from fedfms.data.manifest import find_whole_cases
from fedfms.data.prepare import prepare_cases
from fedfms.local.sites import Site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import write_travelling
from fedfms.records.scores import mean, over_classes
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
    configs = {
        site.name: SiteConfig.from_yaml(site.folder / "site.yml", site.data) for site in sites
    }
    unseen = {name: _all_cases(configs[name]) for name in configs if name in recipe.holdout}
    for name in [name for name in configs if name not in unseen]:
        out.print(f"{name} trains alone, to compare with")
        done: list[PooledRound] = []
        with progress(False) as on_progress:
            control = Control(on_progress)
            tensors = train_pooled(
                alone,
                {name: configs[name]},
                checkpoints=checkpoints,
                control=control,
                on_round=done.append,
            )
            model = build_model(alone, find_checkpoint(alone, checkpoints))
            write_travelling(model, tensors)
            scored = {name: done[-1].metrics[name]}
            for other, cases in unseen.items():
                model.to(ready_device(configs[other]))
                scores = evaluate(model, cases, alone, configs[other], control)
                scored[other] = summarize(scores, 1)
        found[name] = {site: over_classes(metrics, "dice") for site, metrics in scored.items()}
    return found


def _all_cases(site: SiteConfig) -> list[StoredCase]:
    there, left_out = find_whole_cases(site)
    return prepare_cases(there, site, left_out=left_out)


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
    return f"{each}; mean {_score(mean(scores.values()))}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
