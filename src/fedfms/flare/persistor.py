"""The global model at the server: where it comes from, how it is sent, and where it is kept.

In memory the model is fp32, by name, exactly the travelling tensors. On disk it is safetensors
beside the recipe that made it, in the job's result folder. A job that carries `model.safetensors`
beside its recipe starts from that model, or evaluates it.
"""

from __future__ import annotations

import contextlib

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import (
    ModelLearnable,
    ModelLearnableKey,
    make_model_learnable,
)
from nvflare.app_common.abstract.model_locator import ModelLocator
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (
    FullModelShareableGenerator,
)
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor

from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError, ConfigError, FederationError, FedfmsError
from fedfms.exchange.tensors import (
    find_fault,
    load_tensors,
    payload_bytes,
    save_tensors,
    shapes_of,
    to_precision,
)
from fedfms.files import write_whole
from fedfms.flare.job import (
    ROUNDS_TRAINED,
    START_MODEL_FILE,
    config_folder,
    read_recipe,
    result_folder,
)
from fedfms.flare.kept_answers import (
    answers_of,
    are_kept,
    begin_to_keep_answers,
    keep_patiently,
    keeps_answers,
)
from fedfms.flare.room import (
    MARGIN_BYTES,
    ROUND_COPIES,
    RUN_COPIES,
    patiently,
    wait_for_room,
)
from fedfms.flare.run_state import KEEP_STATE, Restored, restored, to_keep
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.records.layout import BEST_MODEL, GLOBAL_MODEL, RECIPE


class SafeTensorsPersistor(ModelPersistor):  # type: ignore[misc]
    """Makes the first global model, keeps the last and the best one; takes no path from a job."""

    def __init__(self) -> None:
        super().__init__()
        self._initial: dict[str, Tensor] | None = None
        self._final: dict[str, Tensor] | None = None
        self._rounds_trained = 0
        self._best_rounds: int | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep the model that the selector calls the best so far."""
        if event_type == EventType.START_RUN:
            fobs.register(TensorDecomposer)
            try:
                self._go_on(restored(fl_ctx))
            except FedfmsError as error:
                self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
        elif event_type == EventType.END_RUN:
            self._forget_canary(fl_ctx)
        elif event_type == KEEP_STATE:
            to_keep(fl_ctx).state.best_rounds = self._best_rounds
        elif event_type == AppEventType.ROUND_STARTED:
            self._wait_for_room(fl_ctx)
        elif event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            self._write(BEST_MODEL, weights, fl_ctx)
            self._best_rounds = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)

    def _forget_canary(self, fl_ctx: FLContext) -> None:
        """A canary's model, which nothing was added to, is no result and not fetched."""
        with contextlib.suppress(FedfmsError):
            if read_recipe(fl_ctx).canary:
                for name in (GLOBAL_MODEL, BEST_MODEL):
                    (result_folder(fl_ctx) / name).unlink(missing_ok=True)

    def _go_on(self, before: Restored | None) -> None:
        """Take over what an earlier process of this job had reached."""
        if before is not None:
            self._final = before.tensors(GLOBAL_MODEL)
            self._rounds_trained = before.state.rounds_done
            self._best_rounds = before.state.best_rounds

    def _wait_for_room(self, fl_ctx: FLContext) -> None:
        """A round begins when its model can be kept; the first one when the run's models can."""
        model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        copies = ROUND_COPIES if self._final is not None else RUN_COPIES
        if are_kept(answers_of(fl_ctx)):
            copies += len(fl_ctx.get_engine().get_clients())
        needed = copies * payload_bytes(model) + MARGIN_BYTES
        wait_for_room(self, fl_ctx, result_folder(fl_ctx), needed)

    def _write(self, name: str, weights: dict[str, Tensor], fl_ctx: FLContext) -> None:
        """Write a model whole; waits where the disk is full, ends the job where it is broken."""
        path = result_folder(fl_ctx) / name
        try:
            patiently(self, fl_ctx, path.parent, lambda: save_tensors(path, weights, "fp32"))
        except OSError as error:
            self.system_panic(
                f"the server cannot write {path}: {error.strerror}; fix: look at that disk (is it "
                "mounted read-only, does it report errors?)",
                fl_ctx,
            )

    def start_model(self, fl_ctx: FLContext) -> dict[str, Tensor]:
        """The model before the first round, fp32.

        Raises:
            FedfmsError: the recipe, the SAM checkpoint or the given model cannot be used.
        """
        if self._initial is None:
            recipe = read_recipe(fl_ctx)
            folder, text = result_folder(fl_ctx), recipe.to_json()
            patiently(self, fl_ctx, folder, lambda: write_whole(folder / RECIPE, text))
            checkpoint = find_checkpoint(recipe, Machine.from_environment().checkpoints)
            self._initial = read_travelling(build_model(recipe, checkpoint))
            given = config_folder(fl_ctx) / START_MODEL_FILE
            if given.is_file():
                self.log_info(fl_ctx, "the job brings the model to start from")
                self._initial = _fitting(load_tensors(given), self._initial)
        return self._initial

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The model that goes out first: of the round that is open; ends the job where it cannot.

        That is the start model, or what an earlier process of the job had reached.
        """
        try:
            _check_rounds(read_recipe(fl_ctx), fl_ctx.get_prop(AppConstants.NUM_ROUNDS))
            weights = dict(self.start_model(fl_ctx))
            if self._final is not None:
                weights = _fitting(self._final, weights)
            elif keeps_answers(read_recipe(fl_ctx)):
                self._keep_start(weights, fl_ctx)
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return ModelLearnable()
        return make_model_learnable(weights, {})

    def _keep_start(self, weights: dict[str, Tensor], fl_ctx: FLContext) -> None:
        """Keep the first model of a run whose answers are kept, too."""
        folder = answers_of(fl_ctx)
        keep_patiently(
            self,
            fl_ctx,
            folder.parents[1],
            lambda: begin_to_keep_answers(folder, weights),
            "the run's answers are not kept",
        )

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the global model, whole or not at all; called after each round."""
        self._final = dict(model[ModelLearnableKey.WEIGHTS])
        self._rounds_trained = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) + 1
        self._write(GLOBAL_MODEL, self._final, fl_ctx)

    def models(self) -> list[str]:
        """Names of the models there are to evaluate: "final", and "best" where one was selected."""
        return ["final"] if self._best_rounds is None else ["final", "best"]

    def model(self, name: str, fl_ctx: FLContext) -> tuple[dict[str, Tensor], int]:
        """One of `models`, and how many rounds it was trained.

        A job without training evaluates the model that it brings.

        Raises:
            FedfmsError: the job neither trained nor brought a model, or it cannot be read.
        """
        if name == "best" and self._best_rounds is not None:
            return load_tensors(result_folder(fl_ctx) / BEST_MODEL), self._best_rounds
        if self._final is not None:
            return self._final, self._rounds_trained
        if not (config_folder(fl_ctx) / START_MODEL_FILE).is_file():
            raise FederationError(
                "the job holds no model to evaluate",
                f"name one with --model FILE, or put it at app/config/{START_MODEL_FILE}",
                code="no-model",
            )
        weights = self.start_model(fl_ctx)
        self._write(GLOBAL_MODEL, weights, fl_ctx)
        return weights, read_recipe(fl_ctx).rounds


class TravellingModelGenerator(FullModelShareableGenerator):  # type: ignore[misc]
    """Sends the model in the recipe's transfer precision; here it stays fp32."""

    def learnable_to_shareable(self, model: ModelLearnable, fl_ctx: FLContext) -> Shareable:
        """The global model as it goes to all sites, converted once a round."""
        recipe = read_recipe(fl_ctx)
        sent = to_precision(model[ModelLearnableKey.WEIGHTS], recipe.transfer_precision)
        return DXO(DataKind.WEIGHTS, data=sent).to_shareable()


class SafeTensorsLocator(ModelLocator):  # type: ignore[misc]
    """Gives FLARE's global model evaluation the final and the best model."""

    def __init__(self, persistor_id: str = "persistor") -> None:
        super().__init__()
        self.persistor_id = persistor_id

    def get_model_names(self, fl_ctx: FLContext) -> list[str]:
        """What there is to evaluate."""
        return persistor_of(fl_ctx, self.persistor_id).models()

    def locate_model(self, model_name: str, fl_ctx: FLContext) -> DXO | None:
        """A model in the recipe's `scored_precision`; ends the job where there is none."""
        try:
            weights, rounds = persistor_of(fl_ctx, self.persistor_id).model(model_name, fl_ctx)
            sent = to_precision(weights, read_recipe(fl_ctx).scored_precision)
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return None
        return DXO(DataKind.WEIGHTS, data=sent, meta={ROUNDS_TRAINED: rounds})


def persistor_of(fl_ctx: FLContext, persistor_id: str) -> SafeTensorsPersistor:
    """The job's persistor.

    Raises:
        ConfigError: the job's configuration names another component.
    """
    persistor = fl_ctx.get_engine().get_component(persistor_id)
    if not isinstance(persistor, SafeTensorsPersistor):
        raise ConfigError(
            f"the job's component {persistor_id} is no SafeTensorsPersistor",
            "keep the server configuration of jobs/fedmsa",
        )
    return persistor


def _check_rounds(recipe: Recipe, num_rounds: int) -> None:
    if num_rounds != recipe.rounds_to_run:
        raise ConfigError(
            f"ScatterAndGather runs {num_rounds} rounds, the recipe says {recipe.rounds_to_run}",
            "set num_rounds in config_fed_server.json to the recipe's rounds; "
            "fedfms simulate --set rounds=N sets both",
            code="rounds-differ",
        )


def _fitting(given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    if fault := find_fault(shapes_of(expected), given):
        code, problem = fault
        raise CheckpointError(
            f"the given model does not fit the recipe: {problem}",
            "give a model that was trained with the same method, backbone, image size and classes",
            code=code,
        )
    return {name: given[name].float() for name in sorted(given)}
