"""What a site's FLARE client does with a task: hand it to the trainer, pass on what comes back.

The executors take no argument and read no path from a job. Where the trainer listens is the site's
matter (FEDFMS_EXCHANGE). Whatever happens to the trainer becomes an error reply for this task: the
job process itself must not die, because that would end the job for all sites.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.fl_context_utils import add_job_audit_event
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor

from fedfms.contracts.contribution import ModelName
from fedfms.contracts.machine import Machine
from fedfms.contracts.messages import Kind, Task
from fedfms.contracts.now import SiteProgress
from fedfms.contracts.pause import Gate
from fedfms.contracts.wire import plain_name
from fedfms.errors import ConfigError, FedfmsError, TaskAborted, TrainerError
from fedfms.flare import secure_sums
from fedfms.flare.internals.audit import let_audit_wait
from fedfms.flare.internals.settings import resend_requests
from fedfms.flare.internals.streams import forget_in_one_thread
from fedfms.flare.job import (
    CONTRIBUTION,
    EVALUATE_TASK,
    PICTURES,
    REASON,
    ROUNDS_TRAINED,
    SERVER_MODELS,
    TRAIN_TASK,
    read_recipe,
    training_dxo,
)
from fedfms.flare.pausing import wait_until_over
from fedfms.flare.receipts import KitSigner, countersign
from fedfms.flare.report_now import Reporter, sender
from fedfms.trainer.client import TaskResult, run_task
from fedfms.trainer.connection import stopped_on_request

CANARY = "a canary: zeros leave, whatever is computed"

# ends of a trainer that may not come again: its supervisor starts it, and it is asked once more
ONCE_MORE = ("trainer-died", "trainer-stopped")


class SiteExecutor(Executor):  # type: ignore[misc]
    """Hands tasks to the site's trainer; its subclasses say which, and jobs name those."""

    tasks: ClassVar[tuple[str, ...]] = ()
    method: ClassVar[str | None] = None  # None: whatever the recipe says

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Teach FLARE to carry tensors as they are, to ask again, and to wait with its audit."""
        if event_type == EventType.START_RUN:
            fobs.register(TensorDecomposer)
            resend_requests()
            let_audit_wait()
            forget_in_one_thread()
            if TRAIN_TASK in self.tasks:
                fl_ctx.get_engine().register_aux_message_handler(
                    secure_sums.TOPIC, secure_sums.answer_for_trainer
                )

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Do one task; an error reply carries the reason in public words as a header."""
        try:
            return self._execute(task_name, shareable, fl_ctx, abort_signal)
        except TaskAborted as error:
            return _error(ReturnCode.TASK_ABORTED, error.public)
        except FedfmsError as error:
            self.log_error(fl_ctx, f"{task_name}: {error.public}", fire_event=False)
            return _error(ReturnCode.EXECUTION_EXCEPTION, error.public)
        except Exception as error:
            name = type(error).__name__
            self.log_error(fl_ctx, f"{task_name}: unexpected {name}", fire_event=False)
            self.logger.debug("unexpected error", exc_info=True)
            return _error(ReturnCode.EXECUTION_EXCEPTION, f"unexpected {name} in the FLARE client")

    def _execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        task, tensors = self._task(task_name, shareable, fl_ctx)
        exchange = Machine.from_environment().exchange
        if exchange is None:
            raise ConfigError(
                "FEDFMS_EXCHANGE is not set",
                "set it to the folder that this site's trainer and FLARE client share",
                code="no-exchange",
            )
        if task.recipe.canary:
            self.log_info(fl_ctx, f"{task_name}: {CANARY}", fire_event=False)
            add_job_audit_event(fl_ctx, msg=CANARY)
        phase_told = ""

        def on_progress(phase: str, done: int, total: int) -> None:
            nonlocal phase_told
            reporter.on_progress(phase, done, total)
            if phase != phase_told:
                phase_told = phase
                self.log_info(fl_ctx, f"{task_name}: {phase}", fire_event=False)

        gate = Gate(Path(fl_ctx.get_engine().get_workspace().get_root_dir()))

        def aborted() -> bool:
            return bool(abort_signal.triggered)

        def ask() -> TaskResult:
            while True:
                if not wait_until_over(gate, aborted):
                    raise stopped_on_request()
                reporter.on_progress("waiting", 0, 0)
                try:
                    return run_task(
                        exchange,
                        task,
                        tensors,
                        aborted=lambda: aborted() or gate.pause() is not None,
                        on_progress=on_progress,
                    )
                except TaskAborted:
                    if aborted() or gate.pause() is None:
                        raise
                self.log_warning(
                    fl_ctx, f"{task_name}: the site pauses, and it is given up", fire_event=False
                )

        first = SiteProgress(kind=task.kind, round=task.round, phase="start")
        with Reporter(sender(fl_ctx.get_engine()), exchange, first) as reporter:
            try:
                result = self._ask(ask, task_name, fl_ctx)
            except FedfmsError as error:
                reporter.failed(error)
                raise
            reporter.sends_answer()
        if task.kind == "train":  # tensors stay in the precision in which they passed the door
            answer = training_dxo(result.tensors, result.contribution).to_shareable()
        else:
            data = {CONTRIBUTION: result.contribution.to_dict(), PICTURES: result.pictures}
            answer = DXO(DataKind.METRICS, data=data).to_shareable()
        root = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        countersign(answer, result.receipt, KitSigner(root, "client"))
        return answer

    def _ask(self, ask: Callable[[], TaskResult], task_name: str, fl_ctx: FLContext) -> TaskResult:
        """Ask the trainer, and once more where it ended and may be there again.

        Raises:
            TrainerError: where none comes again, how the first one ended.
        """
        try:
            return ask()
        except TrainerError as error:
            if error.code not in ONCE_MORE:
                raise
            self.log_warning(
                fl_ctx,
                f"{task_name}: {error.problem}; it is asked once more when it is there again",
                fire_event=False,
            )
            first = error
        try:
            return ask()
        except TrainerError as error:
            raise first if error.code == "no-trainer" else error from None

    def _task(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[Task, dict[str, Tensor]]:
        recipe = read_recipe(fl_ctx)
        if self.method not in (None, recipe.method):
            raise ConfigError(
                f"{type(self).__name__} was given a recipe of {recipe.method}",
                "name fedfms.flare.executor.TrainingExecutor in config_fed_client.json: it does "
                "whatever the recipe says",
                code="other-method",
            )
        dxo = from_shareable(shareable)
        if dxo.data_kind != DataKind.WEIGHTS:
            raise _bad_task("it holds no weights")
        if task_name not in self.tasks:
            raise _bad_task(f"{type(self).__name__} does not do {task_name}")
        kind: Kind
        model: ModelName | None
        if task_name == TRAIN_TASK:
            number = shareable.get_header(AppConstants.CURRENT_ROUND)
            kind, model = "train", "round"
        else:
            number = dxo.get_meta_prop(ROUNDS_TRAINED)
            owner = shareable.get_header(AppConstants.MODEL_OWNER)
            kind, model = "evaluate", SERVER_MODELS.get(owner)
        if not isinstance(number, int) or model is None:
            raise _bad_task("it does not say which model or round it is about")
        task = Task(
            kind=kind,
            site=fl_ctx.get_identity_name(),
            job=fl_ctx.get_job_id(),
            round=number,
            model=model,
            recipe=recipe,
            **_about_the_job(fl_ctx),
        )
        return task, dxo.data


class EvaluationExecutor(SiteExecutor):
    """Answers `validate`: the scores of a given model on this site's cases, whatever the method."""

    tasks = (EVALUATE_TASK,)


class TrainingExecutor(SiteExecutor):
    """Answers `train` and `validate` with this site's trainer, by the method of the recipe.

    A method needs no executor of its own, and no other kit: which may run here, the site's policy
    says.
    """

    tasks = (TRAIN_TASK, EVALUATE_TASK)


class FedSAMExecutor(TrainingExecutor):
    """The name in jobs/fedsam, and in kits that know no TrainingExecutor; takes no other recipe."""

    method = "fedsam"


class FedMSAExecutor(TrainingExecutor):
    """The name in jobs/fedmsa; as `FedSAMExecutor`."""

    method = "fedmsa"


def _about_the_job(fl_ctx: FLContext) -> dict[str, str | None]:
    """Who submitted it and its name, for the site's page; left out where it is no plain name."""
    meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
    said = {
        "submitter": meta.get(JobMetaKey.SUBMITTER_NAME.value),
        "job_name": meta.get(JobMetaKey.JOB_NAME.value),
    }
    return {key: plain_name(value) for key, value in said.items()}


def _error(code: str, reason: str) -> Shareable:
    return make_reply(code, {REASON: reason})


def _bad_task(what: str) -> TrainerError:
    return TrainerError(
        f"the server's task cannot be used: {what}",
        "run the same version of fedfms at the server and every site",
        code="bad-task",
    )
