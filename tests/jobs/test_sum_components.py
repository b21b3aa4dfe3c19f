"""Secure sums in FLARE's hands: the aggregator asks by FLARE's messages, and the guard looks on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import JOBS
from flare_context import JOB_ID, Engine
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from fedfms import __version__
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.sums import SumsAsk
from fedfms.errors import ContributionRefused, DoorClosed
from fedfms.exchange.averaging import average
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.secure_sum import is_for_few_in_a_sum
from fedfms.exchange.strategies import find_strategy
from fedfms.exchange.tensors import shapes_of
from fedfms.flare import secure_sums
from fedfms.flare.aggregator import OrderedAggregator
from fedfms.flare.job import CONTRIBUTION
from fedfms.flare.run_state import JUDGED, KEEP_STATE, start_keeping
from fedfms.records.schema import Judged
from fedfms.trainer.own_key import own_key
from fedfms.trainer.sums import Sums

RECIPE = dataclasses.replace(
    Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json"), secure_sum=True, holdout=("site-9",)
)
SITES = ("site-1", "site-2", "site-3", "site-4")


class Federation(Engine):
    """The server's engine, with trainers at the other end of its messages."""

    def __init__(
        self, folder: Path, sites: tuple[str, ...] = SITES, recipe: Recipe = RECIPE
    ) -> None:
        super().__init__(folder / "server", "server", {"aggregator": OrderedAggregator()})
        (self.config_folder() / "recipe.json").write_text(recipe.to_json())
        peers = folder / "peers.json"
        peers.write_text(json.dumps({name: own_key(folder / name).public for name in sites}))
        self.sums = {name: Sums(name, folder / name, peers) for name in sites}
        self.gone: set[tuple[str, str]] = set()  # site and step that gets no answer
        self.asked: list[tuple[str, str]] = []

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in (*self.sums, *RECIPE.holdout)]

    def send_aux_request(
        self, targets: list[str], topic: str, request: Shareable, timeout: float, fl_ctx: FLContext
    ) -> dict[str, Shareable]:
        (site,) = targets
        assert topic == secure_sums.TOPIC
        ask = SumsAsk.from_dict(request[secure_sums.SAID])
        self.asked.append((site, ask.step))
        if (site, ask.step) in self.gone or (site, "") in self.gone:
            return {site: make_reply(ReturnCode.COMMUNICATION_ERROR)}
        try:
            answer = self.sums[site].answer(ask)
        except DoorClosed:
            return {site: make_reply(ReturnCode.EXECUTION_EXCEPTION)}
        reply = make_reply(ReturnCode.OK)
        reply[secure_sums.SAID] = answer.to_dict()
        return {site: reply}


class Witness(FLComponent):  # type: ignore[misc]
    """Hears what the guard of a round found."""

    def __init__(self, judged: list[Judged]) -> None:
        super().__init__()
        self._judged = judged

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == JUDGED:
            self._judged.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_sums, "KEYS_SECONDS", 0.0)
    monkeypatch.setattr(secure_sums, "LATER_SECONDS", 0.0)
    monkeypatch.setattr(secure_sums, "AGAIN_SECONDS", 0.0)


def begin(engine: Federation, fl_ctx: FLContext, number: int) -> OrderedAggregator:
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
    engine.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
    aggregator: OrderedAggregator = engine.components["aggregator"]
    return aggregator


def accepted(
    aggregator: OrderedAggregator,
    fl_ctx: FLContext,
    site: str,
    slices: int,
    tensors: Any,
    said: dict[str, Any] | None = None,
) -> bool:
    meta: dict[str, Any] = {MetaKey.NUM_STEPS_CURRENT_ROUND: float(slices), CONTRIBUTION: said}
    shareable = DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta).to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, fl_ctx.get_prop("current_round"))
    return aggregator.accept(shareable, fl_ctx)


def accept(
    aggregator: OrderedAggregator,
    fl_ctx: FLContext,
    site: str,
    slices: int,
    tensors: Any,
    said: dict[str, Any] | None = None,
) -> None:
    assert accepted(aggregator, fl_ctx, site, slices, tensors, said)


def difference(site: str) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(SITES.index(site))
    return {"w": torch.randn(9973, generator=numbers) * 0.01}


WEIGHTS = {"site-1": 701, "site-2": 2900, "site-3": 997, "site-4": 2000}  # none far above the rest


@pytest.mark.parametrize("lost", ["nobody", "keys", "shares", "take", "answer", "unmask"])
def test_a_round_is_the_plain_average_of_those_who_answered(tmp_path: Path, lost: str) -> None:
    engine = Federation(tmp_path)
    if lost in ("keys", "shares", "take", "unmask"):
        engine.gone.add(("site-4", lost))
    out = {"keys", "shares", "take", "answer"}  # what keeps a site from the sum
    arrived = [site for site in SITES if site != "site-4" or lost not in out]
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        for number in range(2):
            aggregator = begin(engine, fl_ctx, number)
            for site in arrived:
                masked = engine.sums[site].masked(JOB_ID, number, difference(site), WEIGHTS[site])
                accept(aggregator, fl_ctx, site, WEIGHTS[site], masked)
            accept(aggregator, fl_ctx, "site-9", 0, {})
            result = from_shareable(aggregator.aggregate(fl_ctx)).data
            expected = average(
                {site: difference(site) for site in arrived},
                {site: WEIGHTS[site] for site in arrived},
            )
            assert torch.equal(result["w"], expected["w"])
            assert result["w"].dtype == torch.float32
    assert engine.panics == []
    assert not any(site == "site-9" for site, _ in engine.asked)
    assert [*tmp_path.rglob("*.values")] == []


@pytest.mark.parametrize("strategy", ["server_momentum", "server_adam"])
def test_an_optimizer_at_the_server_goes_by_the_sum_alone(tmp_path: Path, strategy: str) -> None:
    """Each site adds itself once, whatever it has: weights are equal."""
    recipe = dataclasses.replace(RECIPE, strategy=strategy, weigh_by="equal")
    engine, expected = Federation(tmp_path, recipe=recipe), find_strategy(recipe)
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        for number in range(3):
            aggregator = begin(engine, fl_ctx, number)
            for site in SITES:
                masked = engine.sums[site].masked(JOB_ID, number, difference(site), 1)
                said = report(site, number, WEIGHTS[site])
                accept(aggregator, fl_ctx, site, WEIGHTS[site], masked, said)
            result = from_shareable(aggregator.aggregate(fl_ctx)).data
            mean = average({site: difference(site) for site in SITES}, dict.fromkeys(SITES, 1))
            assert torch.equal(result["w"], expected.change(mean)["w"])
        keeping = start_keeping(fl_ctx, 3)
        aggregator.handle_event(KEEP_STATE, fl_ctx)
    assert {*keeping.strategy} == {*expected.state_dict()} and keeping.strategy
    assert engine.panics == []


def report(site: str, number: int, slices: int) -> dict[str, Any]:
    return Contribution(
        site=site,
        kind="train",
        role="train",
        round=number,
        model="round",
        recipe_sha256="0" * 64,
        backbone_sha256="0" * 64,
        package_version=__version__,
        training_slices=slices,
        training_cases=9,
        evaluated_cases=0,
    ).to_dict()


def test_a_round_in_32_bits_is_the_mean_of_what_was_rounded_to_them(tmp_path: Path) -> None:
    engine = Federation(tmp_path)
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        aggregator = begin(engine, fl_ctx, 0)
        units = torch.zeros(9973, dtype=torch.float64)
        for site in SITES[:3]:  # one of four does not answer
            weight = WEIGHTS[site]
            masked = engine.sums[site].masked(JOB_ID, 0, difference(site), weight, 32)
            assert masked["w"].dtype == torch.int32
            accept(aggregator, fl_ctx, site, weight, masked)
            units += (difference(site)["w"].double() * (weight * 2**17)).round()
        result = from_shareable(aggregator.aggregate(fl_ctx)).data
    total = sum(WEIGHTS[site] for site in SITES[:3])
    assert torch.equal(result["w"], (units / (2**17 * total)).float())


@pytest.mark.parametrize(
    ("asked", "counts"),
    [
        ({}, False),
        ({"guard": "record"}, True),
        ({"confirmed_weights": ("site-2",)}, True),
    ],
)
def test_a_site_that_says_far_more_slices_than_the_others_is_not_in_the_mean(
    tmp_path: Path, asked: dict[str, Any], counts: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, **asked)
    engine = Federation(tmp_path)
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    judged: list[Judged] = []
    engine.components["witness"] = Witness(judged)
    weights = WEIGHTS | {"site-2": 10**6}
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        aggregator = begin(engine, fl_ctx, 0)
        for site in SITES:
            masked = engine.sums[site].masked(JOB_ID, 0, difference(site), weights[site])
            accept(aggregator, fl_ctx, site, weights[site], masked)
        result = from_shareable(aggregator.aggregate(fl_ctx)).data
    counted = {site: weights[site] for site in SITES if counts or site != "site-2"}
    expected = average({site: difference(site) for site in counted}, counted)
    assert torch.equal(result["w"], expected["w"])
    named = [one for round_ in judged for one in round_.sites]
    if "confirmed_weights" in asked:
        assert named == []
        return
    (one,) = named
    assert (one.site, one.slices, one.findings) == ("site-2", 10**6, ("weight",))
    assert (one.counted_slices, one.factor) == ((10**6, 1.0) if counts else (0, 0.0))
    assert [*tmp_path.rglob("*.values")] == []


def test_a_round_whose_masks_stay_on_is_tried_again_with_the_answers_that_it_has(
    tmp_path: Path,
) -> None:
    """Each site would refuse a next round of the same model, so the job does not go on to it."""
    engine = Federation(tmp_path)
    masked = {}
    for gone, late in ((("site-1", "site-2"), "site-4"), (("site-1", "site-3"), ""), ((), "")):
        engine.components["aggregator"] = OrderedAggregator()
        engine.gone = {(site, "unmask") for site in gone}
        engine.panics.clear()
        with engine.new_context() as fl_ctx:
            engine.fire_event(EventType.START_RUN, fl_ctx)
            aggregator = begin(engine, fl_ctx, 0)
            for site in SITES:
                masked[site] = engine.sums[site].masked(JOB_ID, 0, difference(site), 5)
                if site != late and (site != "site-4" or late):
                    accept(aggregator, fl_ctx, site, 5, masked[site])
            if not late:  # its answer came in no earlier attempt: that sum has none of it
                assert not accepted(aggregator, fl_ctx, "site-4", 5, masked["site-4"])
            result = from_shareable(aggregator.aggregate(fl_ctx)).data
        assert bool(result) == (not gone)
        assert [is_for_few_in_a_sum(reason) for reason in engine.panics] == [True] * bool(gone)
    three = [site for site in SITES if site != "site-4"]
    expected = average({site: difference(site) for site in three}, dict.fromkeys(three, 5))
    assert torch.equal(result["w"], expected["w"])


def test_an_answer_of_a_site_that_is_in_no_sum_spoils_none(tmp_path: Path) -> None:
    engine = Federation(tmp_path)
    engine.gone = {("site-4", "shares")}
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        aggregator = begin(engine, fl_ctx, 0)
        noise = {"w": torch.full((9973,), 2**62)}
        assert not accepted(aggregator, fl_ctx, "site-4", 5, noise)
        arrived = [site for site in SITES if site != "site-4"]
        for site in arrived:
            masked = engine.sums[site].masked(JOB_ID, 0, difference(site), 5)
            accept(aggregator, fl_ctx, site, 5, masked)
        result = from_shareable(aggregator.aggregate(fl_ctx)).data
    expected = average({site: difference(site) for site in arrived}, dict.fromkeys(arrived, 5))
    assert torch.equal(result["w"], expected["w"])


def test_too_few_sites_for_a_sum_end_the_job_and_it_is_said_why(tmp_path: Path) -> None:
    engine = Federation(tmp_path)
    engine.gone = {("site-1", ""), ("site-2", "")}
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        begin(engine, fl_ctx, 0)
    assert len(engine.panics) == 1
    assert "round 0 has 2 sites for its sum, it needs 3" in engine.panics[0]
    assert is_for_few_in_a_sum(engine.panics[0])


def test_a_server_that_starts_again_in_the_middle_of_a_round_goes_on(tmp_path: Path) -> None:
    engine = Federation(tmp_path)
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        begin(engine, fl_ctx, 0)
    masked = {s: engine.sums[s].masked(JOB_ID, 0, difference(s), 5) for s in SITES}
    engine.components["aggregator"] = OrderedAggregator()
    engine.asked.clear()
    with engine.new_context() as fl_ctx:
        engine.fire_event(EventType.START_RUN, fl_ctx)
        aggregator = begin(engine, fl_ctx, 0)
        assert {step for _, step in engine.asked} == {"take"}
        for site in SITES:
            accept(aggregator, fl_ctx, site, 5, masked[site])
        result = from_shareable(aggregator.aggregate(fl_ctx)).data
    expected = average({site: difference(site) for site in SITES}, dict.fromkeys(SITES, 5))
    assert torch.equal(result["w"], expected["w"])


# ---------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize(
    ("bits", "change", "code"),
    [
        (64, lambda w: w, None),
        (64, lambda w: w.float(), "wrong-type"),
        (64, lambda w: w.int(), "wrong-type"),
        (64, lambda w: w[:-1], "wrong-shape"),
        (64, lambda w: w.to("meta"), "wrong-type"),
        (64, lambda w: w.to_sparse(), "wrong-type"),
        (32, lambda w: w.int(), None),
        (32, lambda w: w, "wrong-type"),
    ],
)
def test_the_guard_takes_masked_integers_of_the_models_shape_and_nothing_else(
    bits: int, change: Callable[[torch.Tensor], torch.Tensor], code: str | None
) -> None:
    recipe = dataclasses.replace(RECIPE, secure_sum_bits=bits)
    shapes = shapes_of({"w": torch.zeros(8)})
    said = Contribution(
        site="site-1",
        kind="train",
        role="train",
        round=0,
        model="round",
        recipe_sha256=recipe.sha256,
        backbone_sha256=recipe.backbone_sha256,
        package_version=__version__,
        training_slices=7,
        training_cases=3,
        evaluated_cases=0,
    )
    masked = {"w": change(torch.arange(8) * 2**59)}
    if code is None:
        taken = check_contribution(shapes, recipe, __version__, masked, said)
        assert torch.equal(taken["w"], masked["w"])
        return
    with pytest.raises(ContributionRefused) as raised:
        check_contribution(shapes, recipe, __version__, masked, said)
    assert raised.value.code == code
