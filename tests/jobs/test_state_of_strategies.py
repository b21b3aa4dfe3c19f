"""A run whose strategy and sites remember comes to the same bytes when its server is killed.

The server's components as FLARE calls them, and two real trainers' work, without processes: the
server's objects are thrown away in the middle of a round, and new ones find what was kept. The
sites' are too, one round later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from federations import JOBS, write_sites
from flare_context import JOB_ID, Engine
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.exchange.tensors import to_precision
from fedfms.flare.aggregator import OrderedAggregator
from fedfms.flare.job import result_folder, training_dxo
from fedfms.flare.persistor import SafeTensorsPersistor, TravellingModelGenerator
from fedfms.flare.presence import _go_on
from fedfms.flare.recorder import Recorder
from fedfms.flare.run_state import kept_folder, restored
from fedfms.flare.selector import BestModelSelector
from fedfms.records.layout import BEST_MODEL, GLOBAL_MODEL
from fedfms.trainer.tasks import SiteFolders, TaskRunner

pytestmark = pytest.mark.timeout(600)

RECIPE = dataclasses.replace(
    Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json"),
    rounds=3,
    image_size=64,
    batch_size=8,
    strategy="server_adam",
    personal="norms",
    weigh_by="cases",
    proximal_weight=0.01,
    patience=2,
    best_by="worst",
    site_learning_rates=("site-2:3e-4",),
)
SITES = ("site-1", "site-2")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("sites"), SITES)


class Run:
    """A run's server and sites; each may be made anew, from what is on the disk."""

    def __init__(self, folder: Path, sites: Path, recipe: Recipe) -> None:
        self.folder, self.sites, self.recipe = folder, sites, recipe
        self.start_sites()
        self.start_server()

    def start_sites(self) -> None:
        self.runners = {
            name: TaskRunner(
                SiteFolders(
                    name=name,
                    config=self.sites / name / "site.yml",
                    policy=self.sites / name / "policy",
                    data_root=None,
                    checkpoints=None,
                    work=self.folder / name,
                    order_from_seed=True,
                )
            )
            for name in SITES
        }

    def start_server(self) -> None:
        """As a new process of the job at the server, in a job folder that FLARE has emptied."""
        self.training = ScatterAndGather(num_rounds=self.recipe.rounds)
        self.engine = Engine(
            self.folder / "server",
            "server",
            {
                "persistor": SafeTensorsPersistor(),
                "generator": TravellingModelGenerator(),
                "aggregator": OrderedAggregator(),
                "selector": BestModelSelector(),
                "recorder": Recorder(),
            },
        )
        (self.engine.config_folder() / "recipe.json").write_text(self.recipe.to_json())
        with self.engine.new_context() as fl_ctx:
            for file in result_folder(fl_ctx).glob("*"):
                file.unlink()
            self.engine.fire_event(EventType.START_RUN, fl_ctx)
            fl_ctx.set_prop(AppConstants.NUM_ROUNDS, self.recipe.rounds, private=True)
            self.model = self.engine.components["persistor"].load_model(fl_ctx)
            self.training._current_round, self.training._start_round = 0, 0
            _go_on(self.training, fl_ctx)
        assert not self.engine.panics

    @property
    def round(self) -> int:
        return int(self.training._current_round)

    def answers(self, number: int) -> dict[str, tuple[Mapping[str, torch.Tensor], object]]:
        sent = to_precision(self.model[ModelLearnableKey.WEIGHTS], "fp32")
        found = {}
        for name, runner in self.runners.items():
            task = Task(
                kind="train", site=name, job=JOB_ID, round=number, model="round", recipe=self.recipe
            )
            outcome = runner.run(task, lambda: dict(sent), Control())
            found[name] = (outcome.tensors, outcome.contribution)
        return found

    def do_round(self, *, killed: bool = False) -> None:
        """One round as ScatterAndGather does it; killed, with an answer in and none added."""
        number, parts = self.round, self.engine.components
        with self.engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True)
            fl_ctx.set_prop(AppConstants.START_ROUND, 0, private=True)
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, self.model, private=True)
            fl_ctx.set_prop(FLContextKey.WORKFLOW, "train", private=True)
            self.engine.components["train"] = _Quiet(self.training)
            self.engine.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
            for name, (tensors, said) in self.answers(number).items():
                answer = training_dxo(tensors, said).to_shareable()
                answer.set_peer_props({ReservedKey.IDENTITY_NAME: name})
                answer.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
                answer.set_header(AppConstants.CURRENT_ROUND, number)
                peer = FLContext()
                peer.set_prop(ReservedKey.IDENTITY_NAME, name, private=True)
                peer.set_prop(FLContextKey.SHAREABLE, answer, private=True)
                fl_ctx.set_peer_context(peer)
                parts["selector"].handle_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, fl_ctx)
                assert parts["aggregator"].accept(answer, fl_ctx)
                if killed:
                    return
            self.engine.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
            change = from_shareable(parts["aggregator"].aggregate(fl_ctx))
            whole = DXO(DataKind.WEIGHT_DIFF, data=change.data).to_shareable()
            self.model = parts["generator"].shareable_to_learnable(whole, fl_ctx)
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, self.model, private=True)
            parts["persistor"].save_model(self.model, fl_ctx)
            self.engine.fire_event(AppEventType.ROUND_DONE, fl_ctx)
        self.training._current_round = number + 1
        assert not self.engine.panics

    def files(self) -> dict[str, bytes]:
        with self.engine.new_context() as fl_ctx:
            folder = result_folder(fl_ctx)
            strategy = restored_strategy(fl_ctx)
        files = {name: (folder / name).read_bytes() for name in (GLOBAL_MODEL, BEST_MODEL)}
        for name in SITES:
            (kept,) = sorted((self.folder / name).glob("runs/*/learnt-0002/staying.safetensors"))
            files[name] = kept.read_bytes()
        return {**files, "strategy": strategy}


class _Quiet:
    """The workflow as a component: it hears no event here."""

    def __init__(self, workflow: ScatterAndGather) -> None:
        self._workflow = workflow

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Nothing."""

    def get_persist_state(self, fl_ctx: FLContext) -> dict:
        state: dict = self._workflow.get_persist_state(fl_ctx)
        return state

    def restore(self, state: dict, fl_ctx: FLContext) -> None:
        self._workflow.restore(state, fl_ctx)


def restored_strategy(fl_ctx: FLContext) -> bytes:
    last = max(kept_folder(fl_ctx).glob("round-*"))
    return (last / "strategy.safetensors").read_bytes()


def test_a_killed_server_goes_on_to_the_same_bytes(tmp_path: Path, sites: Path) -> None:
    undisturbed = Run(tmp_path / "undisturbed", sites, RECIPE)
    for _ in range(RECIPE.rounds):
        undisturbed.do_round()

    disturbed = Run(tmp_path / "disturbed", sites, RECIPE)
    disturbed.do_round()
    disturbed.do_round(killed=True)
    disturbed.start_server()
    assert disturbed.round == 1
    disturbed.do_round()
    disturbed.start_sites()
    disturbed.do_round()
    first, second = undisturbed.files(), disturbed.files()
    assert first == second
    with disturbed.engine.new_context() as fl_ctx:
        assert restored(fl_ctx) is not None
    assert first["site-1"] != first["site-2"]  # each keeps its own
    plain = Run(tmp_path / "plain", sites, dataclasses.replace(RECIPE, strategy="mean"))
    plain.do_round()
    assert not torch.equal(*(_first(run.model) for run in (plain, undisturbed)))


def _first(model: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    weights = model[ModelLearnableKey.WEIGHTS]
    return weights[min(weights)]


def test_training_that_stopped_stays_stopped_when_the_server_starts_again(
    tmp_path: Path, sites: Path
) -> None:
    """A rate at which nothing is learnt: no model is better than the first that was trained."""
    still = dataclasses.replace(
        RECIPE,
        patience=1,
        learning_rate=1e-6,
        schedule="constant",
        site_learning_rates=(),
        strategy="mean",
        rounds=8,
    )
    run = Run(tmp_path, sites, still)
    while run.round < run.training._num_rounds:
        run.do_round()
    assert run.round < 8
    run.start_server()
    assert run.training._num_rounds == run.round < 8
    with run.engine.new_context() as fl_ctx:
        text = (result_folder(fl_ctx) / "records.jsonl").read_text()
    assert text.count('"stopped_early"') == 1 and "(patience)" in text
