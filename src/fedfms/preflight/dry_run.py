"""The step between the checks and real images: a round of training on phantoms, thrown away."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control, Progress
from fedfms.data.manifest import find_cases
from fedfms.local.synthetic import CLASS_NAME, STYLES, write_phantom_site
from fedfms.training.device import torch_device
from fedfms.training.pooled import PooledRound, train_pooled

CASES, SLICES = 6, 3  # phantoms; enough for a batch and a validation case


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a dry run did."""

    recipe: Recipe
    cases: int
    device: str
    loss: float
    dice_before: float  # on the validation phantoms
    dice_after: float
    seconds: float


def dry_run(job: Path, checkpoints: Path | None, on_progress: Progress | None = None) -> DryRun:
    """Make phantoms, train the job's recipe on them for one round, and remove everything.

    Args:
        job: a job folder; its recipe is used but for its classes and number of rounds.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.

    Raises:
        FedfmsError: whatever would keep this container from training.
    """
    started = time.monotonic()
    recipe = Recipe.from_json(job / "app/config/recipe.json").with_overrides(
        ["rounds=1", f"classes={CLASS_NAME}"]
    )
    rounds: list[PooledRound] = []
    with tempfile.TemporaryDirectory(prefix="fedfms-dry-run-") as folder:
        place = Path(folder) / "site"
        write_phantom_site(place, next(iter(STYLES)), cases=CASES, slices=SLICES)
        site = SiteConfig.from_yaml(place / "site.yml")
        device = torch_device(site)
        train_pooled(
            recipe,
            {"phantoms": site},
            checkpoints=checkpoints,
            control=Control(on_progress),
            on_round=rounds.append,
        )
        cases = len(find_cases(site))
    loss = rounds[-1].loss
    assert loss is not None  # a round was trained
    return DryRun(
        recipe,
        cases,
        str(device),
        loss,
        _dice(rounds[0]),
        _dice(rounds[-1]),
        time.monotonic() - started,
    )


def _dice(result: PooledRound) -> float:
    (metrics,) = result.metrics.values()
    means = [m.mean for m in metrics if m.metric == "dice" and m.mean is not None]
    return means[0] if means else float("nan")
