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
from fedfms.models.segmenter import Segmenter
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_own, write_own
from fedfms.records.rows import write_rows
from fedfms.records.scores import mean
from fedfms.training.device import failures_explained, ready_device
from fedfms.training.evaluate import CaseScore, evaluate
from fedfms.training.meter import Meter
from fedfms.training.overlay import site_pictures
from fedfms_lab.study.data import site_config
from fedfms_lab.study.record import (
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
        model: with the run's tensors.
        folder: of the run.
    """

    def __init__(self, model: Segmenter, folder: Path) -> None:
        self._model, self._folder = model, folder / PERSONAL_FOLDER
        self._elsewhere = read_own(model)

    def be_at(self, site: str) -> None:
        """Let the network be that of this site, or of any other where it kept nothing."""
        kept = self._folder / f"{site}.safetensors"
        if self._elsewhere:
            write_own(self._model, load_tensors(kept) if kept.is_file() else self._elsewhere)


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
    trained = load_trained(folder, spec.checkpoints)
    at_sites = AtSites(trained.model, folder)
    for site in spec.sites:
        config = site_config(site)
        at_sites.be_at(site.name)
        prepared, scores, rows = score_site(
            trained.model,
            trained.recipe,
            site.name,
            config,
            trained_here=site.name in spec.key.trained_on,
        )
        yield from rows
        if spec.pictures and _pictures_allowed(site):
            pictures = site_pictures(
                trained.model, prepared, scores, trained.recipe, config, Control()
            )
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
