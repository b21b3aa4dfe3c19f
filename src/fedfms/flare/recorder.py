"""What happened in a job, one JSON object a line, at the server: the source of every report.

`records.jsonl` grows while the job runs; a reader may find its last line cut short. It holds what
sites let out and nothing else. The kinds of records, each with its `time`:

    job            what runs, and the sites it was given to
    round_started  round
    contribution   round, site, accepted, reason, bytes_down, bytes_up (tensors), contribution
    round_done     round, sites (whose answers were accepted), missed {site: reason}
    evaluation     site, model, contribution, reason, pictures
    job_done       status completed, aborted or failed; reason
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

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
from fedfms.contracts.contribution import Contribution
from fedfms.errors import ContributionRefused, FedfmsError
from fedfms.exchange.payload import write_whole
from fedfms.exchange.tensors import payload_bytes
from fedfms.flare.job import (
    CONTRIBUTION,
    PICTURES,
    SERVER_MODELS,
    TRAIN_TASK,
    read_recipe,
    reason_of,
    result_folder,
)
from fedfms.flare.progress import RecordReader
from fedfms.flare.result_guard import sender_of

RECORDS_FILE, PICTURES_FOLDER = "records.jsonl", "pictures"
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
        self._file: Path | None = None
        self._reader: RecordReader | None = None  # of what was written, for who asks how far it is
        self._sites: list[str] = []
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
            InfoCollector.EVENT_TYPE_GET_STATS: self._tell_progress,
        }.get(event_type)
        if handler is not None:
            with self._lock:
                handler(fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        self._file = result_folder(fl_ctx) / RECORDS_FILE
        self._sites = sorted(client.name for client in fl_ctx.get_engine().get_clients())
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        try:
            recipe = read_recipe(fl_ctx)
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return
        self._reader = RecordReader(self._file, recipe.rounds)
        self._write(
            "job",
            job_id=fl_ctx.get_job_id(),
            name=str(meta.get("name", "")),
            started=time.time(),
            fedfms_version=__version__,
            nvflare_version=nvflare.__version__,
            recipe_sha256=recipe.sha256,
            sites=self._sites,
        )

    def _round_started(self, fl_ctx: FLContext) -> None:
        self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        self._answers = {}
        self._write("round_started", round=self._round)

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
        if not isinstance(number, int) or self._round is None or number > self._round:
            number = self._round
        if number == self._round:
            if self._answers.get(site, "") is None:
                return  # its first answer was taken; a repeated one changes nothing
            self._answers[site] = reason
        self._write(
            "contribution",
            round=number,
            site=site,
            accepted=reason is None,
            reason=reason,
            bytes_down=self._bytes_down.get(site, 0),
            bytes_up=said["bytes_up"],
            contribution=said["contribution"],
        )

    def _round_done(self, fl_ctx: FLContext) -> None:
        accepted = sorted(site for site, reason in self._answers.items() if reason is None)
        missed = {
            site: self._answers.get(site) or (GONE if site in self._gone else SILENT)
            for site in self._sites
            if site not in accepted
        }
        self._write("round_done", round=self._round, sites=accepted, missed=missed)

    def _evaluation(self, fl_ctx: FLContext) -> None:
        answer = fl_ctx.get_prop(AppConstants.VALIDATION_RESULT)
        site = fl_ctx.get_prop(AppConstants.DATA_CLIENT)
        model = SERVER_MODELS.get(fl_ctx.get_prop(AppConstants.MODEL_OWNER))
        if model is None:
            return
        self._evaluated.setdefault(model, set()).add(site)
        if answer.get_return_code() not in (None, ReturnCode.OK):
            self._write_evaluation(site, model, None, reason_of(answer), [])
            return
        data = from_shareable(answer).data  # the guard has checked it
        names = []
        assert self._file is not None  # START_RUN came first
        folder = self._file.parent / PICTURES_FOLDER
        for index, picture in enumerate(data[PICTURES]):
            folder.mkdir(exist_ok=True)
            name = f"{site}-{model}-{index}.png"
            write_whole(folder / name, picture)
            names.append(f"{PICTURES_FOLDER}/{name}")
        self._write_evaluation(site, model, data[CONTRIBUTION], None, names)

    def _write_evaluation(
        self,
        site: str,
        model: str,
        contribution: dict[str, Any] | None,
        reason: str | None,
        pictures: list[str],
    ) -> None:
        self._write(
            "evaluation",
            site=site,
            model=model,
            contribution=contribution,
            reason=reason,
            pictures=pictures,
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
        status = "aborted" if signal is not None and signal.triggered else "completed"
        if self._failure is not None:
            status = "failed"
        if status == "completed":
            for model, answered in sorted(self._evaluated.items()):
                for site in sorted(set(self._sites) - answered):
                    why = GONE if site in self._gone else SILENT
                    self._write_evaluation(site, model, None, why, [])
        self._write("job_done", status=status, reason=self._failure)

    def _tell_progress(self, fl_ctx: FLContext) -> None:
        collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
        if isinstance(collector, GroupInfoCollector) and self._reader is not None:
            self._reader.read_new()
            collector.add_info(
                group_name=PROGRESS_GROUP,
                info=self._reader.event().to_dict(),
            )

    def _write(self, record: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"record": record, "time": time.time(), **values}, allow_nan=False)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _payload(shareable: Any) -> int:
    """Bytes of the tensors in a task or an answer."""
    try:
        return payload_bytes(from_shareable(shareable).data)
    except ValueError:
        return 0


def _report(answer: Shareable, site: str) -> dict[str, Any] | None:
    """What a site says of its round, if it can be read."""
    try:
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
    except (ValueError, ContributionRefused):
        return None
    return said.to_dict() if said.site == site else None
