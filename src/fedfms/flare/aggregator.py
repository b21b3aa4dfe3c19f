"""FLARE's weighted aggregator, made independent of the order in which sites answer.

FLARE adds each contribution in fp32 as it arrives, so that two runs may differ in the last bit. And
neither a guard that compares the sites of a round nor weights that were rounded as in the paper can
do with less than the whole round. Here FLARE still decides what it accepts (kind, round, one answer
a site); the accepted differences wait on the server's disk until the round is over, and are judged
and combined then (`exchange.round_guard`), one file at a time. So the server's memory holds a few
copies of the model, whatever the number of sites.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from torch import Tensor

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Verdict
from fedfms.errors import FedfmsError
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.round_guard import RoundGuard, close_round, weigh
from fedfms.exchange.round_guard import acts as guard_acts
from fedfms.exchange.strategies import Strategy, find_strategy
from fedfms.exchange.waiting import WaitingRoom
from fedfms.flare.internals.job import put_sums
from fedfms.flare.job import CONTRIBUTION, read_recipe
from fedfms.flare.kept_answers import answers_of, are_kept, keep_answers, keep_patiently
from fedfms.flare.run_state import JUDGED, KEEP_STATE, kept_folder, restored, to_keep
from fedfms.flare.secure_sums import SecureSums
from fedfms.records.schema import Judged

_WAITING = "waiting"  # folder of a run


class OrderedAggregator(InTimeAccumulateWeightedAggregator):  # type: ignore[misc]
    """Judges and combines a round's differences when it is over; takes no argument."""

    def __init__(self) -> None:
        super().__init__(expected_data_kind=DataKind.WEIGHT_DIFF)
        self._strategy: Strategy | None = None  # there from the start of a run, as what follows
        self._guard: RoundGuard | None = None
        self._waiting: WaitingRoom | None = None
        self._sums: SecureSums | None = None  # of a recipe that asks for them
        self._judged: Judged | None = None  # of the round that was summed up last
        self._recipe: Recipe | None = None
        # of each answer of the open round what it counts for, where that is no number of slices
        self._weights: dict[str, int] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Put this project's sums into the aggregator that FLARE makes at the start of a job."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            try:
                self._start(fl_ctx)
            except FedfmsError as error:
                self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
        elif event_type == AppEventType.ROUND_STARTED and self._sums is not None:
            try:
                self._sums.begin(int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)), fl_ctx)
            except FedfmsError as error:
                self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
        elif event_type == KEEP_STATE and self._strategy is not None and self._guard is not None:
            keeping = to_keep(fl_ctx)
            keeping.strategy = self._strategy.state_dict()
            keeping.state.guard = self._guard.to_keep()
        elif event_type == EventType.END_RUN and self._waiting is not None:
            self._waiting.close()

    def _start(self, fl_ctx: FLContext) -> None:
        recipe = self._recipe = read_recipe(fl_ctx)
        self._strategy, self._guard = find_strategy(recipe), RoundGuard(recipe)
        if before := restored(fl_ctx):
            self._strategy.load_state_dict(before.strategy())
            self._guard.go_on(before.state.guard)
        try:
            self._waiting = WaitingRoom(kept_folder(fl_ctx) / _WAITING)
        except OSError as error:
            self._in_memory(fl_ctx, error)
        if recipe.sums_only:
            self._sums = SecureSums(kept_folder(fl_ctx), recipe.holdout)
            unmask = functools.partial(self._unmask, fl_ctx, recipe, self._sums, self._strategy)
            put_sums(self, unmask, functools.partial(self._add, fl_ctx))
            return
        close = functools.partial(self._close, fl_ctx, recipe, self._guard, self._strategy)
        put_sums(self, close, functools.partial(self._keep, fl_ctx))

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """As FLARE does; of a site that is not in the round's sum its mask would never come off."""
        site = str(shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, ""))
        if self._sums is not None and not self._sums.takes(site):
            self.log_error(fl_ctx, f"{site} answered, and is in no sum", fire_event=False)
            return False
        if not super().accept(shareable, fl_ctx):
            return False
        if self._recipe is not None and self._recipe.weigh_by != "slices":
            said = Contribution.from_dict(from_shareable(shareable).get_meta_prop(CONTRIBUTION))
            self._weights[said.site] = weight_of(self._recipe, said)
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The change of the model; what the guard found goes to the records."""
        self._judged = None
        result = super().aggregate(fl_ctx)
        self._weights = {}
        if self._judged is not None:
            self.fire_event_with_data(JUDGED, fl_ctx, FLContextKey.EVENT_DATA, self._judged)
        return result

    def _keep(self, fl_ctx: FLContext, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Where a difference waits: on the disk, and in memory where that cannot be."""
        if self._waiting is None:
            return tensors
        try:
            return self._waiting.put(tensors)
        except OSError as error:
            self._in_memory(fl_ctx, error)
            return tensors

    def _add(self, fl_ctx: FLContext, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add an accepted answer to the round's sum; masked as it is, it waits until that closes.

        It is needed once more where it does not count after all, for what its site says it weighs.
        """
        if tensors and self._sums is not None:
            self._sums.add(tensors)
        return self._keep(fl_ctx, tensors)

    def _unmask(
        self,
        fl_ctx: FLContext,
        recipe: Recipe,
        sums: SecureSums,
        strategy: Strategy,
        number: int,
        weights: Mapping[str, float],
        differences: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What to add to the global model, where the server sees the sum alone.

        What sites count for is in clear. A site that says far more than the others is left out: its
        answer holds its weight, and cannot be made to count for less.
        """
        slices = {
            site: self._weights.get(site, round(weight))
            for site, weight in weights.items()
            if weight > 0
        }
        acts = guard_acts(recipe)
        heavy: list[Verdict] = []
        if not sums.is_asked:
            heavy = weigh(slices, recipe.confirmed_weights, acts=acts)
        left_out = [one.site for one in heavy] if acts else []
        counted = {site: count for site, count in slices.items() if site not in left_out}
        try:
            mean = sums.change(counted, fl_ctx, [differences[site] for site in left_out])
            return strategy.change(mean) if mean else {}
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return {}
        finally:
            if self._waiting is not None:
                self._waiting.clear()
            if heavy:
                self._judged = Judged(round=number, acts=acts, sites=tuple(heavy))

    def _in_memory(self, fl_ctx: FLContext, error: OSError) -> None:
        self.log_warning(
            fl_ctx, f"answers wait in memory: {error.strerror or error}", fire_event=False
        )

    def _close(
        self,
        fl_ctx: FLContext,
        recipe: Recipe,
        guard: RoundGuard,
        strategy: Strategy,
        number: int,
        weights: Mapping[str, float],
        differences: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What to add to the global model; nothing where no training site answered.

        Args:
            fl_ctx: of the start of the run.
            recipe: of the job.
            guard, strategy: of the recipe.
            number: of the round.
            weights: a site's number of training slices, which the guard wrote into the answer.
            differences: fp32 tensors, as the guard let them pass; none of a holdout.
        """
        slices = {site: round(weight) for site, weight in weights.items()}
        closed = close_round(guard, strategy, number, slices, differences, self._weights)
        folder = answers_of(fl_ctx)
        if are_kept(folder):
            keep_patiently(
                self,
                fl_ctx,
                folder,
                lambda: keep_answers(folder, number, differences, recipe.transfer_precision),
                f"the averages cannot be checked from round {number} on",
            )
        if self._waiting is not None:
            self._waiting.clear()
        self._judged = Judged(round=number, acts=guard.acts, sites=closed.verdicts)
        return closed.change
