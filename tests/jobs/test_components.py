"""FLARE components one at a time: what an executor answers, what the server lets pass."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import threading
import time
import weakref
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import JOBS, of_kind, read_records
from flare_context import Engine
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from fedfms import __version__
from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.pause import Pause, write_pause
from fedfms.contracts.recipe import Recipe
from fedfms.exchange.averaging import average
from fedfms.exchange.tensors import load_tensors
from fedfms.flare.aggregator import OrderedAggregator
from fedfms.flare.executor import (
    EvaluationExecutor,
    FedMSAExecutor,
    FedSAMExecutor,
    TrainingExecutor,
)
from fedfms.flare.job import CONTRIBUTION, PICTURES, REASON, result_folder, training_dxo
from fedfms.flare.persistor import SafeTensorsPersistor
from fedfms.flare.progress import JobProgress
from fedfms.flare.recorder import Recorder
from fedfms.flare.result_guard import ResultGuard, is_for_too_few_usable
from fedfms.flare.run_state import JUDGED, KEEP_STATE, NOTED, start_keeping
from fedfms.flare.selector import BestModelSelector
from fedfms.flare.sentences import GONE, PAUSED, SILENT
from fedfms.records.schema import Judged, Note, RoundStarted

FEDMSA = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")


def task(recipe: Recipe, tensors: dict[str, torch.Tensor] | None = None) -> Shareable:
    shareable = DXO(DataKind.WEIGHTS, data=tensors or {"w": torch.zeros(2)}).to_shareable()
    shareable.set_header(AppConstants.CURRENT_ROUND, 0)
    return shareable


def site_engine(folder: Path, recipe: Recipe) -> Engine:
    engine = Engine(folder, "site-1", {})
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    return engine


@pytest.mark.parametrize(
    ("executor", "reason"),
    [
        (FedSAMExecutor, "ConfigError (other-method)"),
        (FedMSAExecutor, "ConfigError (no-exchange)"),
        (TrainingExecutor, "ConfigError (no-exchange)"),
        (EvaluationExecutor, "TrainerError (bad-task)"),
    ],
)
def test_an_executor_answers_with_the_reason_and_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: type, reason: str
) -> None:
    monkeypatch.delenv("FEDFMS_EXCHANGE", raising=False)
    engine = site_engine(tmp_path, FEDMSA)
    with engine.new_context() as fl_ctx:
        reply = executor().execute("train", task(FEDMSA), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(REASON).startswith(reason)
    assert str(tmp_path) not in reply.get_header(REASON)


def test_an_abort_while_there_is_no_trainer_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFMS_EXCHANGE", str(tmp_path))
    engine = site_engine(tmp_path / "flare", FEDMSA)
    signal = Signal()
    signal.trigger(True)
    started = time.monotonic()
    with engine.new_context() as fl_ctx:
        reply = FedMSAExecutor().execute("train", task(FEDMSA), fl_ctx, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert time.monotonic() - started < 5


def test_while_its_site_pauses_a_task_waits_and_is_no_answer_to_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error would count as the site's answer, and end a run that has no site to spare."""
    monkeypatch.setenv("FEDFMS_EXCHANGE", str(tmp_path / "no-trainer"))
    engine = site_engine(tmp_path / "flare", FEDMSA)
    write_pause(tmp_path / "flare", Pause.begin(None, datetime.now().astimezone()))
    signal, replies = Signal(), []

    def execute() -> None:
        with engine.new_context() as fl_ctx:
            replies.append(FedMSAExecutor().execute("train", task(FEDMSA), fl_ctx, signal))

    working = threading.Thread(target=execute)
    working.start()
    working.join(1.5)
    assert replies == []
    signal.trigger(True)  # the server ends the site's part of the job
    working.join(10.0)
    assert [reply.get_return_code() for reply in replies] == [ReturnCode.TASK_ABORTED]


def test_a_job_without_a_recipe_is_an_error_reply(tmp_path: Path) -> None:
    engine = Engine(tmp_path, "site-1", {})
    with engine.new_context() as fl_ctx:
        reply = FedMSAExecutor().execute("train", task(FEDMSA), fl_ctx, Signal())
    assert reply.get_header(REASON).startswith("ConfigError (config)")


# ------------------------------------------------------------------------------------- recorder


def test_a_site_that_trains_on_other_cases_than_before_is_noted(tmp_path: Path) -> None:
    engine = Engine(tmp_path, "server", {"recorder": Recorder()})
    (engine.config_folder() / "recipe.json").write_text(FEDMSA.to_json())
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        for number, cases in enumerate((28, 28, 27)):
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=False)
            engine.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
            said = report(engine, "site-2", round=number, training_cases=cases)
            shareable = sent(training_dxo({}, said).to_shareable(), "site-2", "train")
            shareable.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: number})
            for event, prop in (
                (EventType.BEFORE_TASK_RESULT_FILTER, FLContextKey.TASK_RESULT),
                (AppEventType.AFTER_CONTRIBUTION_ACCEPT, AppConstants.TRAINING_RESULT),
            ):
                fl_ctx.set_prop(prop, shareable, private=True, sticky=False)
                fl_ctx.set_prop(AppConstants.AGGREGATION_ACCEPTED, True, private=True, sticky=False)
                engine.fire_event(event, fl_ctx)
        folder = result_folder(fl_ctx)
    notes = of_kind(read_records(folder), "note")
    assert [(note["kind"], note["site"], note["text"]) for note in notes] == [
        ("data_changed", "site-2", "site-2 trains on 27 cases now, and on 28 before")
    ]


def test_a_site_that_is_back_before_the_round_ends_missed_it_because_it_had_left(
    tmp_path: Path,
) -> None:
    engine = Engine(tmp_path, "server", {"recorder": Recorder()})
    (engine.config_folder() / "recipe.json").write_text(FEDMSA.to_json())

    def tell(fl_ctx: FLContext, event: str, **props: Any) -> None:
        for name, value in props.items():
            fl_ctx.set_prop(name, value, private=True, sticky=False)
        engine.fire_event(event, fl_ctx)

    def site_note(fl_ctx: FLContext, kind: str) -> None:
        note = Note(kind=kind, site="site-1", text=f"site-1: {kind}")
        tell(fl_ctx, NOTED, **{FLContextKey.EVENT_DATA: note})

    site_2 = {"gone": EventType.CLIENT_DISCONNECTED, "back": EventType.CLIENT_RECONNECTED}
    name_of = {
        "gone": FLContextKey.DISCONNECTED_CLIENT_NAME,
        "back": FLContextKey.RECONNECTED_CLIENT_NAME,
    }
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        for number in range(3):
            tell(fl_ctx, AppEventType.ROUND_STARTED, **{AppConstants.CURRENT_ROUND: number})
            if number < 2:
                what = ("gone", "paused") if number == 0 else ("back", "back")
                tell(fl_ctx, site_2[what[0]], **{name_of[what[0]]: "site-2"})
                site_note(fl_ctx, f"site_{what[1]}")
            engine.fire_event(AppEventType.ROUND_DONE, fl_ctx)
        folder = result_folder(fl_ctx)
    missed = [one["missed"] for one in of_kind(read_records(folder), "round_done")]
    assert missed == [{"site-1": PAUSED, "site-2": GONE}] * 2 + [
        {"site-1": SILENT, "site-2": SILENT}
    ]


# ---------------------------------------------------------------------------------------- guard


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    recipe = dataclasses.replace(FEDMSA, holdout=("site-3",))
    components = {"persistor": SafeTensorsPersistor(), "guard": ResultGuard(min_contributions=2)}
    engine = Engine(tmp_path_factory.mktemp("server"), "server", components)
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    return engine


def report(engine: Engine, site: str, **changes) -> Contribution:
    recipe = Recipe.from_json(engine.config_folder() / "recipe.json")
    holdout = site in recipe.holdout
    values = {
        "site": site,
        "kind": "train",
        "role": "holdout" if holdout else "train",
        "round": 0,
        "model": "round",
        "recipe_sha256": recipe.sha256,
        "backbone_sha256": recipe.backbone_sha256,
        "package_version": __version__,
        "training_slices": 0 if holdout else 7,
        "training_cases": 0 if holdout else 3,
        "evaluated_cases": 4,
        "metrics": (
            Metric(class_name="lesion", metric="dice", mean=0.5, std=0.1, cases=4, empty=0),
        ),
    }
    return Contribution(**{**values, **changes})


def answer(engine: Engine, site: str, contribution: Contribution, *, zeros: bool) -> Shareable:
    """What a site sends for a round: a difference of zeros, or none."""
    with engine.new_context() as fl_ctx:
        model = engine.components["persistor"].start_model(fl_ctx)
    tensors = {name: torch.zeros_like(value) for name, value in model.items()} if zeros else {}
    meta = {CONTRIBUTION: contribution.to_dict(), MetaKey.NUM_STEPS_CURRENT_ROUND: 1e9}
    meta[MetaKey.INITIAL_METRICS] = {"val_dice": 1.0}
    shareable = DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta).to_shareable()
    return sent(shareable, site, "train")


def sent(shareable: Shareable, site: str, task_name: str) -> Shareable:
    shareable.set_header(ServerCommandKey.FL_CLIENT, SimpleNamespace(name=site))
    shareable.set_header(ReservedHeaderKey.TASK_NAME, task_name)
    shareable.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: 0})
    return shareable


def checked(engine: Engine, shareable: Shareable) -> Shareable:
    with engine.new_context() as fl_ctx:
        return engine.components["guard"].process(shareable, fl_ctx)


def test_weight_and_metric_come_from_the_checked_report_and_nowhere_else(server: Engine) -> None:
    came = answer(server, "site-1", report(server, "site-1"), zeros=True)
    meta = from_shareable(checked(server, came)).meta
    assert meta[MetaKey.NUM_STEPS_CURRENT_ROUND] == 7.0
    assert meta[MetaKey.INITIAL_METRICS] == {"val_dice": 0.5}
    # the model selector reads the object that came
    assert from_shareable(came).meta == meta


def test_a_holdout_has_no_weight_and_no_metric_to_select_by(server: Engine) -> None:
    came = answer(server, "site-3", report(server, "site-3"), zeros=False)
    dxo = from_shareable(checked(server, came))
    assert dxo.data == {}
    assert dxo.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] == 0.0
    assert MetaKey.INITIAL_METRICS not in dxo.meta


@pytest.mark.parametrize(
    ("site", "changes", "zeros", "code"),
    [
        ("site-2", {"site": "site-1"}, True, "other-site"),
        ("site-1", {"round": 1}, True, "other-task"),
        ("site-1", {"package_version": "0.0.9"}, True, "other-version"),
        ("site-1", {}, False, "missing-tensor"),
        ("site-3", {}, True, "unknown-tensor"),
        ("site-1", {"training_slices": 0}, True, "no-training-slices"),
    ],
)
def test_what_does_not_fit_becomes_an_error_reply_with_its_code(
    server: Engine, site: str, changes: dict, zeros: bool, code: str
) -> None:
    contribution = report(server, changes.get("site", site))
    contribution = dataclasses.replace(contribution, **changes)
    reply = checked(server, answer(server, site, contribution, zeros=zeros))
    assert reply.get_return_code() == ReturnCode.EXECUTION_RESULT_ERROR
    assert reply.get_header(REASON).startswith(f"ContributionRefused ({code}): {site} ")
    assert reply.get_cookie(AppConstants.CONTRIBUTION_ROUND) == 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"site": "site-1"}, "other-site"),
        ({"model": "best"}, "other-task"),
        ({"kind": "train"}, "other-task"),
        ({"recipe_sha256": "0" * 64}, "other-recipe"),
        ({"package_version": "0.0.9"}, "other-version"),
    ],
)
def test_scores_count_only_in_the_name_of_the_site_that_sent_them(
    server: Engine, changes: dict, code: str | None
) -> None:
    contribution = report(server, "site-2", kind="evaluate", model="final")
    contribution = dataclasses.replace(contribution, **changes)
    dxo = DXO(DataKind.METRICS, data={CONTRIBUTION: contribution.to_dict(), PICTURES: []})
    came = sent(dxo.to_shareable(), "site-2", AppConstants.TASK_VALIDATION)
    came.set_cookie_jar({AppConstants.MODEL_OWNER: "SRV_final"})
    reply = checked(server, came)
    if code is None:
        assert reply.get_return_code() == ReturnCode.OK
    else:
        assert reply.get_header(REASON).startswith(f"ContributionRefused ({code}): site-2 ")


def test_nonsense_is_refused_and_never_raises(server: Engine) -> None:
    for data in ({}, {"DXO": 3}, {"DXO": {"kind": "WEIGHT_DIFF", "data": {}, "meta": {}}}):
        shareable = Shareable(data)
        shareable.set_header(ReservedHeaderKey.CONTENT_TYPE, "DXO")
        for name in ("train", "validate"):
            reply = checked(server, sent(shareable, "site-1", name))
            assert "malformed-report" in reply.get_header(REASON)


@pytest.mark.parametrize(
    "pictures", [[b"no picture"], ["text"], [b"\x89PNG\r\n\x1a\n" + b"x" * 10**7], [b""] * 33]
)
def test_only_small_png_pictures_come_in(server: Engine, pictures: list) -> None:
    said = report(server, "site-1", kind="evaluate", model="final", training_slices=0)
    data = {CONTRIBUTION: said.to_dict(), PICTURES: pictures}
    shareable = sent(DXO(DataKind.METRICS, data=data).to_shareable(), "site-1", "validate")
    shareable.add_cookie(AppConstants.MODEL_OWNER, "SRV_final")
    assert "picture" in checked(server, shareable).get_header(REASON)


def test_a_round_with_too_few_contributions_ends_the_job_and_says_why(server: Engine) -> None:
    server.panics.clear()
    guard = server.components["guard"]
    with server.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
        guard.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
        for site, zeros in (("site-1", True), ("site-3", False)):
            passed = guard.process(answer(server, site, report(server, site), zeros=zeros), fl_ctx)
            fl_ctx.set_prop(AppConstants.TRAINING_RESULT, passed, private=True)
            fl_ctx.set_prop(AppConstants.AGGREGATION_ACCEPTED, True, private=True)
            guard.handle_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, fl_ctx)
        guard.process(answer(server, "site-2", report(server, "site-2"), zeros=False), fl_ctx)
        guard.handle_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    assert len(server.panics) == 1
    assert "round 0 has 1 usable contributions of training sites, it needs 2" in server.panics[0]
    assert "site-2 (missing-tensor)" in server.panics[0]
    assert not is_for_too_few_usable(server.panics[0])  # it would be refused again


def test_a_round_with_too_few_contributions_of_which_none_was_refused_may_be_tried_again(
    server: Engine,
) -> None:
    server.panics.clear()
    guard = server.components["guard"]
    with server.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 1, private=True)
        guard.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
        failed = sent(make_reply(ReturnCode.EXECUTION_EXCEPTION), "site-1", "train")
        assert guard.process(failed, fl_ctx) is failed
        guard.handle_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    assert "round 1 has 0 usable contributions" in server.panics[0]
    assert is_for_too_few_usable(server.panics[0])


def test_the_server_refuses_to_run_other_rounds_than_the_recipe(server: Engine) -> None:
    server.panics.clear()
    with server.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.NUM_ROUNDS, 5, private=True)
        assert server.components["persistor"].load(fl_ctx).is_empty()
    assert "runs 5 rounds, the recipe says 6" in server.panics[0]


# ------------------------------------------------------------------------------------- selector


class Heard:
    """What the selector calls the best model so far, by round."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def handle_event(self, event_type: str, fl_ctx) -> None:
        if event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            self.rounds.append(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))


def best_rounds(
    folder: Path, recipe: Recipe, dice: dict[int, dict[str, dict[str, float]]]
) -> tuple[list[int], Path]:
    """The rounds that the selector calls the best so far, and the file of the best model.

    Args:
        folder: of the server.
        recipe: with as many rounds as are run.
        dice: by round, site and class, of the model received; a site that is not there missed the
            round, a site without a class evaluated nothing.
    """
    heard, guard = Heard(), ResultGuard(min_contributions=1)
    selector = BestModelSelector()
    components = {"persistor": SafeTensorsPersistor(), "selector": selector, "heard": heard}
    engine = Engine(folder, "server", {**components, "guard": guard})
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    with engine.new_context() as fl_ctx:
        selector.handle_event(EventType.START_RUN, fl_ctx)
    for number in range(recipe.rounds):
        with engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
            received = make_model_learnable({"w": torch.full((2,), float(number))}, {})
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, received, private=True)
            engine.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
            for site, scores in dice.get(number, {"site-1": {}, "site-2": {}}).items():
                metrics = tuple(
                    Metric(class_name=name, metric="dice", mean=mean, std=0.1, cases=4, empty=0)
                    for name, mean in scores.items()
                )
                said = report(
                    engine,
                    site,
                    round=number,
                    metrics=metrics,
                    evaluated_cases=4 if scores else 0,
                )
                came = answer(engine, site, said, zeros=True)
                came.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: number})
                if not scores:  # a site may claim what it likes: the report alone counts
                    assert from_shareable(came).get_meta_prop(MetaKey.INITIAL_METRICS)
                passed = guard.process(came, fl_ctx)
                assert passed.get_return_code() in (None, ReturnCode.OK)
                peer = FLContext()
                peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=True)
                peer.set_prop(FLContextKey.SHAREABLE, came, private=True)
                fl_ctx.set_peer_context(peer)
                selector.handle_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, fl_ctx)
            selector.handle_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    with engine.new_context() as fl_ctx:
        return heard.rounds, result_folder(fl_ctx) / "best_model.safetensors"


def test_the_selector_passes_over_rounds_in_which_no_site_evaluates(tmp_path: Path) -> None:
    recipe = dataclasses.replace(FEDMSA, rounds=20, evaluate_every=5)
    # of the model received; that of round 0 is no result
    dice = {number: {"site-1": {"lesion": score}, "site-2": {"lesion": score}} for number, score in
            {0: 0.9, 5: 0.4, 10: 0.3, 15: 0.5}.items()}  # fmt: skip
    rounds, file = best_rounds(tmp_path, recipe, dice)
    assert rounds == [5, 15]
    assert load_tensors(file)["w"].tolist() == [15.0, 15.0]


def test_a_round_that_the_weakest_site_missed_is_not_the_best_for_it(tmp_path: Path) -> None:
    def scores(one: float, other: float | None = None) -> dict[str, dict[str, float]]:
        weak = {} if other is None else {"site-2": {"lesion": other}}
        return {"site-1": {"lesion": one}, **weak}

    recipe = dataclasses.replace(FEDMSA, rounds=6)
    dice = {
        0: scores(0.1, 0.1),
        1: scores(0.8, 0.4),
        2: scores(0.7),  # the mean of whoever answered is higher, the model is not
        3: scores(0.81, 0.5),
        4: scores(0.82),  # better at the site that answered both times
        5: {"site-2": {"lesion": 0.9}},  # nothing to compare with
    }
    rounds, _ = best_rounds(tmp_path, recipe, dice)
    assert rounds == [1, 3, 4]


def test_a_class_without_a_score_in_a_round_does_not_make_it_the_best(tmp_path: Path) -> None:
    recipe = dataclasses.replace(FEDMSA, rounds=4, classes=("disc", "cup"))
    dice = {
        1: {"site-1": {"disc": 0.9, "cup": 0.5}, "site-2": {"disc": 0.8}},
        2: {"site-1": {"disc": 0.89}, "site-2": {"disc": 0.8}},
        3: {"site-1": {"cup": 0.6}, "site-2": {"disc": 0.75}},
    }
    rounds, _ = best_rounds(tmp_path, recipe, dice)
    assert rounds == [1, 3]


# ----------------------------------------------------------------------------------- aggregator


def accepted(aggregator: OrderedAggregator, fl_ctx, site: str, slices: int, tensors, number=0):
    """Hand the aggregator an answer as it is after the guard; whether it was taken."""
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: float(slices)}
    shareable = DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta).to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
    return aggregator.accept(shareable, fl_ctx)


def started(folder: Path, recipe: Recipe, **others) -> tuple[OrderedAggregator, Engine]:
    aggregator = OrderedAggregator()
    engine = Engine(folder, "server", {"aggregator": aggregator, **others})
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    with engine.new_context() as fl_ctx:
        aggregator.handle_event(EventType.START_RUN, fl_ctx)
    return aggregator, engine


@pytest.mark.parametrize(
    ("paper", "weights"),
    [
        (False, {"site-1": 20, "site-2": 4000, "site-4": 2000}),
        (True, {"site-1": 0, "site-2": 66, "site-4": 34}),
    ],
)
def test_the_aggregator_averages_alike_in_whatever_order_sites_answer(
    tmp_path: Path, paper: bool, weights: dict[str, int]
) -> None:
    recipe = dataclasses.replace(FEDMSA, holdout=("site-3",), paper_compat=paper, augment=not paper)
    aggregator, engine = started(tmp_path, recipe)
    generator = torch.Generator().manual_seed(4)
    slices = {"site-1": 20, "site-2": 4000, "site-3": 0, "site-4": 2000}
    long = {site: (count / 4000) ** 0.75 for site, count in slices.items()}  # by its many steps
    for number, order in enumerate(itertools.permutations(slices)):
        given = {
            site: {"w": torch.randn(9973, generator=generator) * long[site]} if count else {}
            for site, count in slices.items()
        }
        expected = average(given, weights)["w"]
        with engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
            for site in order:
                assert accepted(aggregator, fl_ctx, site, slices[site], given[site], number)
                assert not accepted(aggregator, fl_ctx, site, 10**6, given[site], number)  # again
            assert not accepted(aggregator, fl_ctx, "late", 9, {"w": torch.ones(9973)}, number - 1)
            result = from_shareable(aggregator.aggregate(fl_ctx))
            stats = fl_ctx.get_prop(AppConstants.AGGREGATION_STATS)
        assert result.data_kind == DataKind.WEIGHT_DIFF
        assert torch.equal(result.data["w"], expected)
        assert stats["contributors"] == sorted(slices)
        assert (stats["accepted_contributions"], stats["keys_aggregated"]) == (4, 1)
        assert [*tmp_path.rglob("*.values")] == []  # nothing waits any more


def test_what_the_guard_of_a_round_found_is_told_and_kept(tmp_path: Path) -> None:
    heard: list[Judged] = []

    class Hears(FLComponent):
        def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
            if event_type == JUDGED:
                heard.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))

    aggregator, engine = started(tmp_path, FEDMSA, hears=Hears())
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(500, generator=generator)
    for number in range(2):
        with engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
            for site, times in (("site-1", 1.0), ("site-2", 100.0), ("site-3", 1.1)):
                given = {"w": (common + torch.randn(500, generator=generator)) * times}
                assert accepted(aggregator, fl_ctx, site, 10, given, number)
            waits = [*tmp_path.rglob("waiting/*.values")]
            assert len(waits) == 3 and {path.parent.stat().st_mode & 0o777 for path in waits} == {
                0o700
            }
            aggregator.aggregate(fl_ctx)
    assert [one.round for one in heard] == [0, 1] and all(one.acts for one in heard)
    for one in heard:
        assert {verdict.site: verdict.findings for verdict in one.sites} == {
            "site-1": (),
            "site-2": ("norm",),
            "site-3": (),
        }
    with engine.new_context() as fl_ctx:
        keeping = start_keeping(fl_ctx, 2)
        aggregator.handle_event(KEEP_STATE, fl_ctx)
        aggregator.handle_event(EventType.END_RUN, fl_ctx)
    assert keeping.state.guard["slices"] == {"site-1": 10, "site-2": 10, "site-3": 10}
    assert len(keeping.state.guard["seen"]) == 6
    assert [*tmp_path.rglob("waiting")] == []


def test_the_aggregator_keeps_no_difference_of_a_round_that_is_over(tmp_path: Path) -> None:
    aggregator, engine = started(tmp_path, FEDMSA)
    difference = torch.ones(5)
    kept = weakref.ref(difference)
    with engine.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
        assert accepted(aggregator, fl_ctx, "site-1", 3, {"w": difference})
        assert torch.equal(from_shareable(aggregator.aggregate(fl_ctx)).data["w"], torch.ones(5))
    del difference
    gc.collect()
    assert kept() is None


def test_a_site_that_misses_a_round_adds_nothing_of_the_round_before(tmp_path: Path) -> None:
    aggregator, engine = started(tmp_path, FEDMSA)
    for number, sites in enumerate((("site-1", "site-2"), ("site-1",))):
        given = {site: {"w": torch.arange(5.0) + number + len(site)} for site in sites}
        given["site-1"]["w"] += 0.5
        with engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
            for site in sites:
                assert accepted(aggregator, fl_ctx, site, 3, given[site], number)
            change = from_shareable(aggregator.aggregate(fl_ctx)).data["w"]
        assert torch.equal(change, average(given, dict.fromkeys(sites, 3))["w"])


def test_the_aggregator_gives_nothing_for_a_round_without_training_sites(tmp_path: Path) -> None:
    aggregator, engine = started(tmp_path, dataclasses.replace(FEDMSA, holdout=("site-3",)))
    with engine.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
        assert accepted(aggregator, fl_ctx, "site-3", 0, {})
        assert from_shareable(aggregator.aggregate(fl_ctx)).data == {}


def test_an_aggregator_without_a_recipe_ends_the_job_and_says_why(tmp_path: Path) -> None:
    aggregator = OrderedAggregator()
    engine = Engine(tmp_path, "server", {"aggregator": aggregator})
    with engine.new_context() as fl_ctx:
        aggregator.handle_event(EventType.START_RUN, fl_ctx)
    assert any("recipe.json" in text for text in engine.panics)


def test_a_strategy_that_is_not_installed_ends_the_job_and_says_what_is(tmp_path: Path) -> None:
    _, engine = started(tmp_path, dataclasses.replace(FEDMSA, strategy="fedavgm"))
    assert any("no strategy 'fedavgm' here; installed: mean" in text for text in engine.panics)


# ------------------------------------------------------------------------------------- progress


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    reader = JobProgress(path, rounds=4)
    assert reader.read_new() == []
    lines = [
        {"record": "job", "time": 0.0, "sites": ["a", "b"]},
        {"record": "round_started", "time": 10.0, "round": 0},
        {"record": "round_done", "time": 20.0, "round": 0, "sites": ["a", "b"], "missed": {}},
        {"record": "round_started", "time": 20.0, "round": 1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text[:-10])
    assert len(reader.read_new()) == 3
    path.write_text(text)
    assert reader.read_new() == [RoundStarted(round=1, time=20.0)]
    event = reader.event(now=22.0)
    assert (event.phase, event.round, event.sites) == ("train", 1, ("a", "b"))
    assert event.left is not None
    # the rest of this round, two more, and two models whose evaluation took no time so far
    assert sum(event.left) / 2 == pytest.approx(8 + 2 * 10 + 2 * 1)
