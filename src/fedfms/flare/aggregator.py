"""FLARE's weighted aggregator, made independent of the order in which sites answer.

FLARE adds each contribution in fp32 as it arrives, so that two runs may differ in the last bit. And
weights that were rounded as in the paper need every site's count before the first addition. Here
FLARE still decides what it accepts (kind, round, one answer a site); the accepted differences wait
until the round is over, and go to the recipe's strategy then (`exchange.strategies`). That holds
one model for each site in the server's memory, 4 bytes a value: 0.37 GB a site for FedSAM on ViT-B,
0.04 GB for FedMSA.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from nvflare.apis.dxo import DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from torch import Tensor

from fedfms.errors import FedfmsError
from fedfms.exchange.strategies import Strategy, combine, find_strategy
from fedfms.flare.internals.job import put_sums
from fedfms.flare.job import read_recipe
from fedfms.flare.run_state import KEEP_STATE, restored, to_keep


class OrderedAggregator(InTimeAccumulateWeightedAggregator):  # type: ignore[misc]
    """Hands a round's differences to the strategy in the order of names; takes no argument."""

    def __init__(self) -> None:
        super().__init__(expected_data_kind=DataKind.WEIGHT_DIFF)
        self._strategy: Strategy | None = None  # there from the start of a run

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Put this project's sums into the aggregator that FLARE makes at the start of a job."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            try:
                self._strategy = strategy = find_strategy(read_recipe(fl_ctx))
                if before := restored(fl_ctx):
                    strategy.load_state_dict(before.strategy())
            except FedfmsError as error:
                self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
                return
            put_sums(self, functools.partial(_combined, strategy))
        elif event_type == KEEP_STATE and self._strategy is not None:
            to_keep(fl_ctx).strategy = self._strategy.state_dict()


def _combined(
    strategy: Strategy,
    number: int,
    weights: Mapping[str, float],
    differences: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """What to add to the global model; nothing where no training site answered.

    Args:
        strategy: of the recipe.
        number: of the round.
        weights: a site's number of training slices, which the guard wrote into the answer.
        differences: fp32 tensors, as the guard let them pass; none of a holdout.
    """
    slices = {site: round(weight) for site, weight in weights.items()}
    return combine(strategy, number, slices, differences)
