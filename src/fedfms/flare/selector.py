"""FLARE's model selector, made to compare scores of the same sites and classes.

FLARE compares means over whichever sites answered a round, so that a round that the weakest site
missed looks like the best one. Here a model is compared with the best one so far over what both
have a score of: the classes of training sites.
"""

from __future__ import annotations

import math

from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fedfms.contracts.contribution import Contribution
from fedfms.flare.internals.job import ComparedModels
from fedfms.flare.job import CONTRIBUTION
from fedfms.flare.run_state import KEEP_STATE, restored, to_keep
from fedfms.records.scores import class_dice

Scores = dict[str, dict[str, float]]  # Dice by site and class


class BestModelSelector(ComparedModels):
    """Says which global model is the best so far by the training sites' Dice; takes no argument."""

    def __init__(self) -> None:
        self._best: Scores = {}
        super().__init__(key_metric="val_dice")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """As FLARE; the best scores so far outlive the job's process."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN and (before := restored(fl_ctx)):
            self._best = before.state.best_scores
        elif event_type == KEEP_STATE:
            to_keep(fl_ctx).state.best_scores = self._best

    def forget_round(self) -> None:
        """Nobody has scored the model of the new round yet."""
        self._scores: Scores = {}

    def hear(self, answer: Shareable) -> None:
        """Keep what a training site says of the model that it received."""
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
        self._scores[said.site] = class_dice(said.metrics)

    def is_best(self) -> bool:
        """Whether the model of this round is better than the best one so far, which it then is."""
        if not self._scores or not _is_better(self._scores, self._best):
            return False
        self._best = self._scores
        return True


def _is_better(new: Scores, best: Scores) -> bool:
    """Whether the mean of the sites that have a score of both is higher; the first is the best.

    A site counts by its mean over the classes that it has both times.
    """
    if not best:
        return True
    gains = []
    for site in new.keys() & best.keys():
        both = new[site].keys() & best[site].keys()
        if both:
            gains.append(sum(new[site][name] - best[site][name] for name in both) / len(both))
    return math.fsum(gains) > 0  # the same in whatever order sites answered
