"""A run's final model on every case that it did not train on, in a process of its own.

`python -m fedfms_lab.study.score SPEC` writes scores.csv and pictures/ into a run's folder. It is
the only process of a run that opens images of all sites, and it does not train. `fedfms verify`
calls the same code to compute the scores again.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from fedfms.contracts.contribution import MAX_PICTURE_BYTES
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import StoredCase
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import DoorClosed, FedfmsError, unexpected
from fedfms.exchange.bounds import read_policy
from fedfms.exchange.tensors import load_tensors
from fedfms.local.sites import Site
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_own, write_own
from fedfms.records.rows import write_rows
from fedfms.records.scores import mean
from fedfms.training.device import failures_explained, ready_device
from fedfms.training.evaluate import CaseScore, evaluate
from fedfms.training.meter import Meter
from fedfms.training.overlay import site_pictures
from fedfms_lab.study.data import site_config
from fedfms_lab.study.ensemble import Ensemble
from fedfms_lab.study.record import (
    MEMBERS_FOLDER,
    PERSONAL_FOLDER,
    PICTURES_FOLDER,
    SCORES_FILE,
    Phase,
    ScoreRow,
)
from fedfms_lab.study.spec import RunSpec, add_measured

log = logging.getLogger(__name__)


class AtSites:
    """A run's network as each of its sites has it: with its own parts, where it has such.

    Args:
        folder: of the run.
        checkpoints: folder of SAM checkpoints; not needed for vit_demo.

    Raises:
        FedfmsError: as `load_trained`.
    """

    def __init__(self, folder: Path, checkpoints: Path | None) -> None:
        self._folder = folder / PERSONAL_FOLDER
        members = sorted((folder / MEMBERS_FOLDER).glob("*.safetensors"))
        self._trained = [load_trained(file, checkpoints) for file in members or [folder]]
        self._elsewhere = {} if members else read_own(self._trained[0].model)
        self.recipe = self._trained[0].recipe
        self.model: nn.Module = self._trained[0].model
        if members:
            self.model = Ensemble([one.model for one in self._trained])

    def be_at(self, site: str) -> None:
        """Let the network be that of this site, or of any other where it kept nothing."""
        kept = self._folder / f"{site}.safetensors"
        if self._elsewhere:
            own = load_tensors(kept) if kept.is_file() else self._elsewhere
            write_own(self._trained[0].model, own)


def score_site(
    model: nn.Module, recipe: Recipe, name: str, config: SiteConfig, *, trained_here: bool
) -> tuple[list[StoredCase], list[CaseScore], list[ScoreRow]]:
    """Score one site's validation cases, or all of its cases where the model never trained there.

    Raises:
        FedfmsError: as `evaluate`.
    """
    cases = [c for c in find_cases(config) if not trained_here or c.split == "validation"]
    prepared = prepare_cases(cases, config)
    scores = evaluate(model, prepared, recipe, config, Control())
    by_key = {case.key: case for case in cases}
    rows = [
        ScoreRow(
            site=name,
            role="train" if trained_here else "unseen",
            split=by_key[score.key].split,
            case=score.key,
            patient=by_key[score.key].patient,
            class_name=score.class_name,
            dice=_or_none(score.dice),
            iou=_or_none(score.iou),
            hd95=_or_none(score.hd95),
            unit=config.distance_unit,
            empty=score.empty,
            drawn=score.drawn,
            dice_slice=mean(part.dice for part in score.slices),
            iou_slice=mean(part.iou for part in score.slices),
            slices=sum(not math.isnan(part.dice) for part in score.slices),
        )
        for score in scores
    ]
    return prepared, scores, rows


@failures_explained()
def score_run(spec: RunSpec, folder: Path) -> None:
    """Write scores.csv and pictures/ of the run whose model lies in `folder`."""
    device = ready_device(site_config(spec.sites[0]))
    meter = Meter(device)
    with meter("score"):
        write_rows(folder / SCORES_FILE, ScoreRow, _scored(spec, folder))
    seconds, peak = meter.seconds["score"], meter.peak_memory_bytes["score"]
    phase = Phase(seconds=seconds, peak_memory_bytes=peak)
    add_measured(folder, {"score": phase}, device=str(device))


def _scored(spec: RunSpec, folder: Path) -> Iterator[ScoreRow]:
    run = AtSites(folder, spec.checkpoints)
    for site in spec.sites:
        config = site_config(site)
        run.be_at(site.name)
        prepared, scores, rows = score_site(
            run.model,
            run.recipe,
            site.name,
            config,
            trained_here=site.name in spec.key.trained_on,
        )
        yield from rows
        if spec.pictures and _pictures_allowed(site):
            pictures = site_pictures(run.model, prepared, scores, run.recipe, config, Control())
            (folder / PICTURES_FOLDER).mkdir(exist_ok=True)
            for index, picture in enumerate(pictures):
                if len(picture) <= MAX_PICTURE_BYTES:
                    path = folder / PICTURES_FOLDER / f"{site.name}-{index}.png"
                    path.write_bytes(picture)
        log.info("scored %s: %d cases", site.name, len(prepared))


def _pictures_allowed(site: Site) -> bool:
    try:
        return read_policy(site.folder / "policy").pictures
    except DoorClosed:
        return False


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def main(arguments: Sequence[str]) -> int:
    """SPEC FOLDER: score the run in FOLDER."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        score_run(RunSpec.read(Path(arguments[0])), Path(arguments[1]))
    except FedfmsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Exception as error:
        told = unexpected(error, "the run cannot be scored", FedfmsError)
        sys.stderr.write(f"{told.details}{told}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
