"""What happens in a job, at the server, to records.jsonl: the source of every report."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Literal

import nvflare
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector
from nvflare.widgets.widget import Widget

from fedfms import __version__
from fedfms.about import known_image, known_revision
from fedfms.contracts.contribution import Contribution
from fedfms.errors import ContributionRefused, FedfmsError
from fedfms.exchange.tensors import payload_bytes
from fedfms.files import write_whole
from fedfms.flare.job import (
    CONTRIBUTION,
    PICTURES,
    SERVER_MODELS,
    TRAIN_TASK,
    read_recipe,
    reason_of,
    result_folder,
)
from fedfms.flare.progress import JobProgress
from fedfms.flare.result_guard import sender_of
from fedfms.flare.run_state import (
    KEEP_STATE,
    NOTED,
    begin_to_keep,
    keep,
    kept_folder,
    restored,
    start_keeping,
)
from fedfms.records import layout
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Note,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.write import RecordWriter

PROGRESS_GROUP = "fedfms"  # of FLARE's statistics, where a coordinator asks how far a job is

LATE = "the answer came after the round had ended"
GONE = "the site is gone"
SILENT = "no answer from the site in time"

_SENDER, _SAID = "fedfms_sender", "fedfms_said"  # of one answer, kept while FLARE handles it


class Recorder(Widget):  # type: ignore[misc]
    """Writes records.jsonl and pictures/ into the job's result folder; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._writer: RecordWriter | None = None
        self._progress: JobProgress | None = None  # of what was written, for who asks
        self._sites: tuple[str, ...] = ()
        self._gone: set[str] = set()
        self._round: int | None = None
        self._answers: dict[
            str, str | None
        ] = {}  # of this round: site -> None, or why not accepted
        self._bytes_down: dict[str, int] = {}  # of the task a site last got
        self._evaluated: dict[str, set[str]] = {}  # model -> sites that answered
        self._failure: str | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Turn FLARE's events into records."""
        handler = {
            EventType.START_RUN: self._start,
            AppEventType.ROUND_STARTED: self._round_started,
            EventType.AFTER_TASK_DATA_FILTER: self._task_sent,
            EventType.BEFORE_TASK_RESULT_FILTER: self._answer_came,
            EventType.AFTER_TASK_RESULT_FILTER: self._answer_checked,
            AppEventType.AFTER_CONTRIBUTION_ACCEPT: self._answer_used,
            AppEventType.ROUND_DONE: self._round_done,
            AppEventType.VALIDATION_RESULT_RECEIVED: self._evaluation,
            EventType.CLIENT_DISCONNECTED: self._site_gone,
            EventType.CLIENT_RECONNECTED: self._site_back,
            EventType.FATAL_SYSTEM_ERROR: self._failed,
            EventType.END_RUN: self._end,
            NOTED: self._note,
            InfoCollector.EVENT_TYPE_GET_STATS: self._tell_progress,
        }.get(event_type)
        if handler is not None:
            with self._lock:
                handler(fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        self._folder = result_folder(fl_ctx)
        self._writer = RecordWriter(self._folder / layout.RECORDS)
        self._sites = tuple(sorted(one.name for one in fl_ctx.get_engine().get_clients()))
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        ran_before = False
        try:
            ran_before = begin_to_keep(kept_folder(fl_ctx), self._folder)
        except OSError as error:
            self.log_error(fl_ctx, f"the run cannot be kept: {error.strerror}", fire_event=False)
        try:
            recipe = read_recipe(fl_ctx)
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return
        self._progress = JobProgress(self._writer.path, recipe.rounds)
        try:
            before = restored(fl_ctx)
        except FedfmsError:  # the persistor says it, and ends the job
            return
        if ran_before or before is not None:
            self._go_on(before.state.rounds_done if before is not None else 0)
            return
        self._write(
            JobRecord(
                job_id=fl_ctx.get_job_id(),
                name=str(meta.get("name", "")),
                started=time.time(),
                fedfms_version=__version__,
                fedfms_revision=known_revision(),
                image=known_image(),
                nvflare_version=nvflare.__version__,
                recipe_sha256=recipe.sha256,
                sites=self._sites,
            )
        )

    def _go_on(self, number: int) -> None:
        """Take up the records of an earlier process of this job."""
        assert self._progress is not None  # this comes after
        self._progress.read_new()
        jobs = [one for one in self._progress.records if isinstance(one, JobRecord)]
        self._sites = tuple(sorted({*self._sites, *(s for one in jobs for s in one.sites)}))
        self._write(Resumed(round=number))

    def _round_started(self, fl_ctx: FLContext) -> None:
        number = self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        self._answers = {}
        self._write(RoundStarted(round=number))

    def _task_sent(self, fl_ctx: FLContext) -> None:
        site = fl_ctx.get_peer_context().get_identity_name()
        self._bytes_down[site] = _payload(fl_ctx.get_prop(FLContextKey.TASK_DATA))

    def _answer_came(self, fl_ctx: FLContext) -> None:
        """Remember what was said before the guard rewrites or refuses it."""
        answer = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        site = sender_of(answer)
        said = {"bytes_up": _payload(answer), "contribution": _report(answer, site)}
        fl_ctx.set_prop(_SENDER, site, private=True, sticky=False)
        fl_ctx.set_prop(_SAID, said, private=True, sticky=False)

    def _answer_checked(self, fl_ctx: FLContext) -> None:
        answer = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        is_error = answer.get_return_code() not in (None, ReturnCode.OK)
        if is_error and fl_ctx.get_prop(FLContextKey.TASK_NAME) == TRAIN_TASK:
            number = answer.get_cookie(AppConstants.CONTRIBUTION_ROUND)
            self._contribution(fl_ctx, number, reason_of(answer))

    def _answer_used(self, fl_ctx: FLContext) -> None:
        answer = fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
        accepted = bool(fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED))
        number = answer.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        self._contribution(fl_ctx, number, None if accepted else LATE)

    def _contribution(self, fl_ctx: FLContext, number: Any, reason: str | None) -> None:
        site, said = fl_ctx.get_prop(_SENDER), fl_ctx.get_prop(_SAID)
        if self._round is None:
            return  # an answer to a round of before this process
        if type(number) is not int or not 0 <= number <= self._round:  # the site says it
            number = self._round
        if number == self._round:
            if self._answers.get(site, "") is None:
                return  # its first answer was taken; a repeated one changes nothing
            self._answers[site] = reason
        self._write(
            ContributionRecord(
                round=number,
                site=site,
                accepted=reason is None,
                reason=reason,
                bytes_down=self._bytes_down.get(site, 0),
                bytes_up=said["bytes_up"],
                contribution=said["contribution"],
            )
        )

    def _round_done(self, fl_ctx: FLContext) -> None:
        accepted = tuple(sorted(s for s, reason in self._answers.items() if reason is None))
        missed = {
            site: self._answers.get(site) or (GONE if site in self._gone else SILENT)
            for site in self._sites
            if site not in accepted
        }
        assert self._round is not None  # ROUND_STARTED came first
        self._write(RoundDone(round=self._round, sites=accepted, missed=missed))
        keeping = start_keeping(fl_ctx, self._round + 1)
        self.fire_event(KEEP_STATE, fl_ctx)
        try:
            keep(kept_folder(fl_ctx), result_folder(fl_ctx), keeping)
        except OSError as error:
            self.log_error(
                fl_ctx,
                f"round {self._round} could not be kept ({error.strerror}): if this server ended "
                "now, it would be done again",
                fire_event=False,
            )

    def _note(self, fl_ctx: FLContext) -> None:
        """What the server's main process has to say of this job's sites."""
        note: Note = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        if note.kind == "ends" and self._failure is None:
            self._failure = note.text
        self._write(note)

    def _evaluation(self, fl_ctx: FLContext) -> None:
        answer = fl_ctx.get_prop(AppConstants.VALIDATION_RESULT)
        site = fl_ctx.get_prop(AppConstants.DATA_CLIENT)
        model = SERVER_MODELS.get(fl_ctx.get_prop(AppConstants.MODEL_OWNER))
        if model is None:
            return
        self._evaluated.setdefault(model, set()).add(site)
        if answer.get_return_code() not in (None, ReturnCode.OK):
            self._write(EvaluationRecord(site=site, model=model, reason=reason_of(answer)))
            return
        data = from_shareable(answer).data  # the guard has checked it
        names = []
        assert self._folder is not None  # START_RUN came first
        folder = self._folder / layout.PICTURES
        for index, picture in enumerate(data[PICTURES]):
            folder.mkdir(exist_ok=True)
            name = f"{site}-{model}-{index}.png"
            write_whole(folder / name, picture)
            names.append(f"{layout.PICTURES}/{name}")
        said = data[CONTRIBUTION]
        self._write(
            EvaluationRecord(site=site, model=model, contribution=said, pictures=tuple(names))
        )

    def _site_gone(self, fl_ctx: FLContext) -> None:
        self._gone.add(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))

    def _site_back(self, fl_ctx: FLContext) -> None:
        self._gone.discard(fl_ctx.get_prop(FLContextKey.RECONNECTED_CLIENT_NAME))

    def _failed(self, fl_ctx: FLContext) -> None:
        if self._failure is None:  # the first is the cause of the others
            self._failure = str(fl_ctx.get_prop(FLContextKey.EVENT_DATA, "") or "no reason given")

    def _end(self, fl_ctx: FLContext) -> None:
        signal = fl_ctx.get_prop(ReservedKey.RUN_ABORT_SIGNAL)
        aborted = signal is not None and signal.triggered
        if self._failure is None and not aborted:
            for model, answered in sorted(self._evaluated.items()):
                for site in sorted(set(self._sites) - answered):
                    why = GONE if site in self._gone else SILENT
                    self._write(EvaluationRecord(site=site, model=model, reason=why))
        status: Literal["completed", "aborted", "failed"] = "aborted" if aborted else "completed"
        if self._failure is not None:
            status = "failed"
        self._write(JobDone(status=status, reason=self._failure))

    def _tell_progress(self, fl_ctx: FLContext) -> None:
        collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
        if isinstance(collector, GroupInfoCollector) and self._progress is not None:
            self._progress.read_new()
            collector.add_info(group_name=PROGRESS_GROUP, info=self._progress.event().to_dict())

    def _write(self, record: Record) -> None:
        if self._writer is not None:
            self._writer.write(record)


def _payload(shareable: Any) -> int:
    """Bytes of the tensors in a task or an answer."""
    try:
        return payload_bytes(from_shareable(shareable).data)
    except ValueError:
        return 0


def _report(answer: Shareable, site: str) -> Contribution | None:
    """What a site says of its round, if it can be read."""
    try:
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
    except (ValueError, ContributionRefused):
        return None
    return said if said.site == site else None
