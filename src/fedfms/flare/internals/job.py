"""A running job at the server: sums, the selection of a model, sites that are gone.

Read in FLARE 2.9.0. ScatterAndGather, the aggregator and the model selector are public; what they
leave no place for is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable
from nvflare.app_common.aggregators.dxo_aggregator import DXOAggregator
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.utils.error_handling_utils import get_error_handling_message
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.private.fed.server.server_command_agent import ServerCommandAgent
from nvflare.private.fed.server.server_commands import SubmitUpdateCommand
from nvflare.private.fed.server.server_runner import ServerRunner
from nvflare.private.fed.utils.fed_utils import extract_participants

from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

_TOO_FEW = "Cannot reach min_responses"
SERVER_MODEL = "SRV_"  # what FLARE puts before the name of a model that a locator gave it

SUMS = Assumption(
    "an aggregator of differences adds by the aggregation_helper of its dxo_aggregators, with "
    "add(data, weight, contributor_name, contribution_round) and get_result()",
    lambda: (
        uses(InTimeAccumulateWeightedAggregator.handle_event, "_initialize")
        and uses(InTimeAccumulateWeightedAggregator._initialize, "dxo_aggregators")
        and uses(DXOAggregator.accept, "aggregation_helper", "add")
        and uses(DXOAggregator.aggregate, "aggregation_helper", "get_result")
        and takes(
            WeightedAggregationHelper.add,
            *("data", "weight", "contributor_name", "contribution_round"),
        )
    ),
)
FIGURES = Assumption(
    "a helper's figures of a round are made by _compute_aggregation_stats() of its history, total "
    "and key_contribution_counts, and kept as last_aggregation_stats",
    lambda: (
        uses(
            WeightedAggregationHelper._compute_aggregation_stats,
            *("history", "total", "key_contribution_counts"),
        )
        and uses(WeightedAggregationHelper.get_result, "last_aggregation_stats", "lock")
    ),
)
SELECTION = Assumption(
    "the model selector forgets by _reset_stats(), hears by _before_accept(fl_ctx), and compares "
    "with best_val_metric in _before_aggregate(fl_ctx)",
    lambda: (
        takes(IntimeModelSelector._reset_stats)
        and takes(IntimeModelSelector._before_accept, "fl_ctx")
        and takes(IntimeModelSelector._before_aggregate, "fl_ctx")
        and uses(IntimeModelSelector._before_aggregate, "best_val_metric", "_reset_stats")
    ),
)
GONE_SITES = Assumption(
    "a workflow's communicator watches sites that process_dead_client_report(client_name, fl_ctx) "
    "names, until client_is_active(client_name, reason, fl_ctx) does",
    lambda: (
        takes(WFCommServer.process_dead_client_report, "client_name", "fl_ctx")
        and uses(WFCommServer.process_dead_client_report, "_dead_clients")
        and uses(WFCommServer._check_dead_clients, "report_time", "_dead_client_grace")
        and takes(WFCommServer.client_is_active, "client_name", "reason", "fl_ctx")
        and uses(WFCommServer.client_is_active, "_dead_clients", "CLIENT_RECONNECTED")
    ),
)
TOO_FEW = Assumption(
    "ScatterAndGather ends a job in whose round too many sites answered with an error, and says so",
    lambda: (
        uses(ScatterAndGather._accept_train_result, "get_error_handling_message", "system_panic")
        and _TOO_FEW in get_error_handling_message(None, "a", "ERROR", 1, "", {"a"}, 2, 2)
    ),
)
EVENTS = Assumption(
    "an answer's events come in this order: before its filters, after them, before it is used",
    lambda: _in_order(
        ServerRunner._process_submission,
        *("BEFORE_TASK_RESULT_FILTER", "AFTER_TASK_RESULT_FILTER", "BEFORE_PROCESS_SUBMISSION"),
    ),
)
SAME_ANSWER = Assumption(
    "an answer is one object, as filters change it in place and as the model selector reads it",
    lambda: (
        uses(SubmitUpdateCommand.process, "SHAREABLE", "process_submission")
        and uses(IntimeModelSelector._before_accept, "SHAREABLE")
    ),
)
SENDER = Assumption(
    "an answer's header FL_CLIENT is the client that the request's token belongs to, whatever the "
    "answer says",
    lambda: (
        uses(ServerCommandAgent._execute_command, "FL_CLIENT", "set_header", "TOKEN")
        and uses(ServerCommandAgent._get_client, "client_manager", "clients")
    ),
)
MODEL_NAMES = Assumption(
    f"a model of the server is called {SERVER_MODEL}NAME in an evaluation",
    lambda: any(
        SERVER_MODEL in function.__code__.co_consts
        for function in vars(CrossSiteModelEval).values()
        if hasattr(function, "__code__")
    ),
)
PARTICIPANTS = Assumption(
    "extract_participants reads every form of a deploy_map's entry",
    lambda: extract_participants([{"sites": ["a"]}, "b"]) == ["a", "b"],
)


def _in_order(function: Any, *names: str) -> bool:
    looked_up = list(function.__code__.co_names)
    places = [looked_up.index(name) for name in names]
    return places == sorted(places)


# ---------------------------------------------------------------------------------- sums


# round, weight of each site, what each site sent by name -> what the round comes to, by name
Combine = Callable[[int, dict[str, float], dict[str, Mapping[str, Any]]], dict[str, Any]]
Keep = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # what a site sent -> the same, as it waits


@rests_on(SUMS)
def put_sums(
    aggregator: InTimeAccumulateWeightedAggregator, combine: Combine, keep: Keep = dict
) -> None:
    """Let an aggregator add in our way; to be called once it has handled START_RUN.

    FLARE has no argument for it, and its own sums depend on the order of arrival.

    Args:
        combine: called once a round.
        keep: called with each accepted contribution when it comes.
    """
    for one in aggregator.dxo_aggregators.values():
        one.aggregation_helper = RoundSums(combine, keep)


class RoundSums(WeightedAggregationHelper):  # type: ignore[misc]
    """Keeps what FLARE accepted in a round, and combines it in one call when the round is over."""

    @rests_on(FIGURES)
    def __init__(self, combine: Combine, keep: Keep = dict) -> None:
        super().__init__()
        self._combine, self._keep = combine, keep

    def add(
        self, data: Mapping[str, Any], weight: float, contributor_name: str, contribution_round: int
    ) -> None:
        """Keep one accepted contribution, and FLARE's books of it."""
        with self.lock:
            self._kept[contributor_name] = self._keep(data)
            for name in data:
                self.key_contribution_counts[name] = self.key_contribution_counts.get(name, 0) + 1
            self.history.append(
                {
                    "contributor_name": contributor_name,
                    "round": contribution_round,
                    "weight": weight,
                }
            )

    def get_result(self) -> dict[str, Any]:
        """What the round comes to; FLARE's figures of it, for its own records, are made too."""
        with self.lock:
            number = int(self.history[0]["round"]) if self.history else 0
            weights = {one["contributor_name"]: one["weight"] for one in self.history}
            result = self.total = self._combine(number, weights, self._kept)
            self.last_aggregation_stats = self._compute_aggregation_stats()
            self.reset_stats()
            return result

    def reset_stats(self) -> None:
        """Forget the round; also called while this object is made."""
        super().reset_stats()
        self._kept: dict[str, Mapping[str, Any]] = {}


# ---------------------------------------------------------------------------- best model


class ComparedModels(IntimeModelSelector):  # type: ignore[misc]
    """FLARE's model selector with the comparison left to a subclass.

    FLARE has no seam for it: what it compares, and when it forgets, are private methods.
    """

    @rests_on(SELECTION)
    def __init__(self, key_metric: str) -> None:
        super().__init__(key_metric=key_metric)

    def forget_round(self) -> None:
        """A new round begins; also called while this object is made."""

    def hear(self, answer: Shareable) -> None:
        """A contribution that FLARE would count for the comparison."""

    def is_best(self) -> bool:
        """Whether the model that the round's contributions scored is the best one so far."""
        raise NotImplementedError

    def _reset_stats(self) -> None:
        super()._reset_stats()
        self.forget_round()

    def _before_accept(self, fl_ctx: FLContext) -> bool:
        if not super()._before_accept(fl_ctx):
            return False
        self.hear(fl_ctx.get_peer_context().get_prop(FLContextKey.SHAREABLE))
        return True

    def _before_aggregate(self, fl_ctx: FLContext) -> bool:
        if self.is_best():
            self.best_val_metric = float("-inf")  # FLARE's own comparison then says yes
            return bool(super()._before_aggregate(fl_ctx))
        self._reset_stats()
        return False


# ----------------------------------------------------------------------------- the sites


@rests_on(TOO_FEW)
def is_for_too_few_answers(reason: str) -> bool:
    """Whether a job ends because sites that were there answered a round with an error."""
    return _TOO_FEW in reason


@rests_on(GONE_SITES)
def report_gone(workflow: Any, site: str, fl_ctx: FLContext, *, at_once: bool = False) -> None:
    """Tell a workflow that a site is gone; it gives the site up after FLARE's grace period.

    FLARE keeps the list for each workflow and reports a death once, to the one that runs then.

    Args:
        at_once: without the grace period: the site is not lost, but has said that it leaves.
    """
    communicator = workflow.communicator
    communicator.process_dead_client_report(site, fl_ctx)
    status = communicator._dead_clients.get(site)
    if at_once and status is not None:
        status.report_time = 0.0


@rests_on(GONE_SITES)
def report_back(workflow: Any, site: str, fl_ctx: FLContext) -> None:
    """Tell a workflow that a site takes part again, before the site's new process has spoken.

    FLARE counts it as gone until then, however long that process takes to start, and ends the job
    if another one's grace period ends meanwhile.
    """
    workflow.communicator.client_is_active(site, "it takes part again", fl_ctx)


@rests_on(PARTICIPANTS)
def participants_of(entry: Any) -> list[str]:
    """The names in one entry of a job's deploy_map, as FLARE reads them.

    Raises:
        ValueError: FLARE would not take it.
    """
    return [str(name) for name in extract_participants(entry)]
