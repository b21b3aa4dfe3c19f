"""FLARE's model selector, made to compare scores of the same sites and classes.

FLARE compares means over whichever sites answered a round, so that a round that the weakest site
missed looks like the best one. Here a model is compared with the best one so far over what both
have a score of: the classes of training sites.
"""

from __future__ import annotations

import math

from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector

from fedfms.contracts.contribution import Contribution
from fedfms.flare.job import CONTRIBUTION
from fedfms.records.scores import class_dice

Scores = dict[str, dict[str, float]]  # Dice by site and class


class BestModelSelector(IntimeModelSelector):  # type: ignore[misc]
    """Says which global model is the best so far by the training sites' Dice; takes no argument."""

    def __init__(self) -> None:
        super().__init__(key_metric="val_dice")
        self._best: Scores = {}

    def _reset_stats(self) -> None:
        super()._reset_stats()
        self._scores: Scores = {}  # of this round

    def _before_accept(self, fl_ctx: FLContext) -> bool:
        if not super()._before_accept(fl_ctx):
            return False
        answer = fl_ctx.get_peer_context().get_prop(FLContextKey.SHAREABLE)
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
        self._scores[said.site] = class_dice(said.metrics)
        return True

    def _before_aggregate(self, fl_ctx: FLContext) -> bool:
        if self._scores and _is_better(self._scores, self._best):
            self._best = self._scores
            self.best_val_metric = float("-inf")  # FLARE's own comparison then says yes
            return bool(super()._before_aggregate(fl_ctx))
        self._reset_stats()
        return False


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
