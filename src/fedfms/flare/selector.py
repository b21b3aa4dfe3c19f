"""FLARE's model selector, made to compare scores of the same sites and classes.

FLARE compares means over whichever sites answered a round, so that a round that the weakest site
missed looks like the best one. What is compared here says `exchange.selection`. With the recipe's
`patience` the training ends where further rounds gave nothing.
"""

from __future__ import annotations

import dataclasses

from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from fedfms.contracts.contribution import Contribution
from fedfms.errors import FedfmsError
from fedfms.exchange.selection import Reached, Scores, Selection, why_it_stops
from fedfms.flare.internals.job import ComparedModels
from fedfms.flare.job import CONTRIBUTION, read_recipe
from fedfms.flare.presence import end_training
from fedfms.flare.run_state import KEEP_STATE, NOTED, restored, to_keep
from fedfms.records.schema import Note
from fedfms.records.scores import class_dice


class BestModelSelector(ComparedModels):
    """Says which global model is the best so far, and when to stop; takes no argument."""

    def __init__(self) -> None:
        self._selection: Selection | None = None  # there from the start of a run
        self._scores: Scores = {}
        super().__init__(key_metric="val_dice")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """As FLARE; what the run has reached outlives the job's process."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            self._start(fl_ctx)
        elif event_type == AppEventType.ROUND_DONE and self._selection is not None:
            if self._selection.reached.stops:
                self._stop(fl_ctx)
        elif event_type == KEEP_STATE and self._selection is not None:
            to_keep(fl_ctx).state.reached = dataclasses.asdict(self._selection.reached)

    def _start(self, fl_ctx: FLContext) -> None:
        try:
            recipe, before = read_recipe(fl_ctx), restored(fl_ctx)
        except FedfmsError:  # the persistor says it, and ends the job
            return
        reached = Reached(**before.state.reached) if before is not None else None
        self._selection = Selection(recipe, reached)

    def _stop(self, fl_ctx: FLContext) -> None:
        """Let the round that is over be the last one."""
        number = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        recipe = read_recipe(fl_ctx)
        if number + 1 < recipe.rounds_to_run:
            end_training(fl_ctx, number + 1)
            note = Note(kind="stopped_early", text=why_it_stops(recipe, number))
            self.fire_event_with_data(NOTED, fl_ctx, FLContextKey.EVENT_DATA, note)

    def forget_round(self) -> None:
        """Nobody has scored the model of the new round yet."""
        self._scores = {}

    def hear(self, answer: Shareable) -> None:
        """Keep what a training site says of the model that it received."""
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
        self._scores[said.site] = class_dice(said.metrics)

    def is_best(self) -> bool:
        """Whether the model of this round is better than the best one so far, which it then is."""
        return self._selection is not None and self._selection.is_best(self._scores)
