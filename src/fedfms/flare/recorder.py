"""What happens in a job, at the server, to records.jsonl: the source of every report."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, Literal

import nvflare
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector
from nvflare.widgets.widget import Widget

from fedfms import __version__
from fedfms.about import known_image, known_revision
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.decode import Misfits
from fedfms.contracts.now import SiteProgress
from fedfms.errors import ContributionRefused, FedfmsError
from fedfms.exchange.secure_sum import is_for_few_in_a_sum
from fedfms.exchange.tensors import payload_bytes
from fedfms.files import write_whole
from fedfms.flare import feed
from fedfms.flare.internals.audit import let_audit_wait
from fedfms.flare.internals.job import is_for_too_few_answers
from fedfms.flare.job import (
    CONTRIBUTION,
    PICTURES,
    PROGRESS_GROUP,
    SERVER_MODELS,
    TRAIN_TASK,
    read_recipe,
    reason_of,
    result_folder,
)
from fedfms.flare.kept_answers import keeps_answers
from fedfms.flare.live import Live
from fedfms.flare.progress import JobProgress
from fedfms.flare.receipts import KitSigner, receipt_of, result_files
from fedfms.flare.report_now import SAID, TOPIC
from fedfms.flare.result_guard import is_for_too_few_usable, sender_of
from fedfms.flare.room import LOOK_SECONDS, MARGIN_BYTES, patiently, wait_for_room
from fedfms.flare.run_state import (
    HEARD,
    JUDGED,
    KEEP_STATE,
    NOTED,
    begin_to_keep,
    keep,
    kept_folder,
    restored,
    start_keeping,
)
from fedfms.flare.sentences import GONE, LATE, PAUSED, SILENT
from fedfms.flare.tracking import Tracking, start_tracking
from fedfms.records import layout
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Judged,
    Note,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.verdicts import findings
from fedfms.records.write import RecordWriter, clock

LAST_RECORDS_SECONDS = 10.0  # for a full disk to take the last records of an aborted run

_SENDER, _SAID = "fedfms_sender", "fedfms_said"  # of one answer, kept while FLARE handles it


class Recorder(Widget):  # type: ignore[misc]
    """Writes records.jsonl and pictures/ into the job's result folder; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._engine: Any = None  # from the start of a run, as what follows
        self._folder: Path | None = None
        self._writer: RecordWriter | None = None
        self._progress: JobProgress | None = None  # of what was written, for who asks
        self._sites: tuple[str, ...] = ()
        self._gone: set[str] = set()
        self._paused: set[str] = set()
        self._left: dict[str, str] = {}  # sites that went away in this round, with why
        self._round: int | None = None
        self._answers: dict[
            str, str | None
        ] = {}  # of this round: site -> None, or why not accepted
        self._bytes_down: dict[str, int] = {}  # of the task a site last got
        self._evaluated: dict[str, set[str]] = {}  # model -> sites that answered
        self._failure: str | None = None
        self._tracking: Tracking | None = None
        self.live = Live()  # what sites do now
        self._cases: dict[str, int] = {}  # that a site trained on when it was last heard

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
            JUDGED: self._judged,
            HEARD: self._heard,
            InfoCollector.EVENT_TYPE_GET_STATS: self._tell_progress,
        }.get(event_type)
        if handler is not None:
            with self._lock:
                handler(fl_ctx)
        if event_type == AppEventType.ROUND_DONE:
            self._keep(fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        let_audit_wait()
        self._engine = fl_ctx.get_engine()
        self._folder = result_folder(fl_ctx)
        self._writer = RecordWriter(self._folder / layout.RECORDS)
        self._tracking = start_tracking(fl_ctx)
        self._sites = tuple(sorted(one.name for one in fl_ctx.get_engine().get_clients()))
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        ran_before = False
        kept, folder = kept_folder(fl_ctx), self._folder
        try:
            ran_before = patiently(self, fl_ctx, kept, lambda: begin_to_keep(kept, folder))
        except OSError as error:
            self.log_error(fl_ctx, f"the run cannot be kept: {error.strerror}", fire_event=False)
        try:
            recipe = read_recipe(fl_ctx)
        except FedfmsError as error:
            self.system_panic(f"{error.problem}; fix: {error.fix}", fl_ctx)
            return
        self._progress = JobProgress(self._writer.path, recipe.rounds_to_run, recipe.evaluates)
        fl_ctx.get_engine().register_aux_message_handler(TOPIC, self._site_told)
        try:
            fl_ctx.get_engine().register_app_command(feed.TOPIC, self._tell_records)
        except Exception as error:  # whoever watches sees less; the run goes on
            self.log_warning(fl_ctx, f"nobody can ask for records: {error}", fire_event=False)
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
                started=clock(),
                fedfms_version=__version__,
                fedfms_revision=known_revision(),
                image=known_image(),
                nvflare_version=nvflare.__version__,
                recipe_sha256=recipe.sha256,
                sites=self._sites,
                answers_kept=keeps_answers(recipe),
            )
        )

    def _go_on(self, number: int) -> None:
        """Take up the records of an earlier process of this job."""
        assert self._progress is not None  # this comes after
        self._progress.read_new()
        if self._tracking is not None:  # FLARE has emptied the folder of what came before
            for one in self._progress.records:
                self._tracking.tell(one)
        jobs = [one for one in self._progress.records if isinstance(one, JobRecord)]
        self._sites = tuple(sorted({*self._sites, *(s for one in jobs for s in one.sites)}))
        for one in self._progress.records:
            if isinstance(one, ContributionRecord) and one.accepted and one.said is not None:
                self._cases[one.site] = one.said.training_cases
        self._write(Resumed(round=number))

    def _round_started(self, fl_ctx: FLContext) -> None:
        number = self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        self._answers = {}
        self._left = dict.fromkeys(self._gone, GONE) | dict.fromkeys(self._paused, PAUSED)
        self._write(RoundStarted(round=number))

    def _task_sent(self, fl_ctx: FLContext) -> None:
        site = fl_ctx.get_peer_context().get_identity_name()
        self._bytes_down[site] = _payload(fl_ctx.get_prop(FLContextKey.TASK_DATA))
        trains = fl_ctx.get_prop(FLContextKey.TASK_NAME) == TRAIN_TASK
        kind, number = ("train", self._round or 0) if trains else ("evaluate", 0)
        if trains:
            self._left.pop(site, None)
        self.live.task_sent(site, kind, number, time.time())

    def _site_told(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """A site says how far it is; whatever it says, it does no harm."""
        with contextlib.suppress(Misfits):
            told = SiteProgress.from_dict(request.get(SAID))
            site = fl_ctx.get_peer_context().get_identity_name()
            self.live.progress(site, told, time.time())
        return make_reply(ReturnCode.OK)

    def _answer_came(self, fl_ctx: FLContext) -> None:
        """Remember what was said before the guard rewrites or refuses it."""
        answer = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        site = sender_of(answer)
        self.live.answer_came(site, time.time())
        said = {
            "bytes_up": _payload(answer),
            "contribution": _report(answer, site),
            "receipt": receipt_of(answer),
        }
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
        if reason is None:
            self._compare_cases(site, said["contribution"])
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
                receipt=said["receipt"],
            )
        )

    def _why_silent(self, site: str) -> str:
        """Also of a site that is back before the round ends, but has no task of it."""
        return self._left.get(site, SILENT)

    def _compare_cases(self, site: str, said: Contribution | None) -> None:
        """Note that a site trains on another number of cases than before."""
        if said is None or said.role != "train":
            return
        before = self._cases.get(site)
        self._cases[site] = said.training_cases
        if before is not None and before != said.training_cases:
            text = f"{site} trains on {said.training_cases} cases now, and on {before} before"
            self._write(Note(kind="data_changed", site=site, text=text))

    def _round_done(self, fl_ctx: FLContext) -> None:
        accepted = tuple(sorted(s for s, reason in self._answers.items() if reason is None))
        missed = {
            site: self._answers.get(site) or self._why_silent(site)
            for site in self._sites
            if site not in accepted
        }
        assert self._round is not None  # ROUND_STARTED came first
        self._write(RoundDone(round=self._round, sites=accepted, missed=missed))

    def _keep(self, fl_ctx: FLContext) -> None:
        """Keep what the rounds to come follow from; others may record while this waits for room."""
        assert self._round is not None  # ROUND_STARTED came first
        keeping = start_keeping(fl_ctx, self._round + 1)
        self.fire_event(KEEP_STATE, fl_ctx)
        kept, results = kept_folder(fl_ctx), result_folder(fl_ctx)
        try:
            patiently(self, fl_ctx, kept, lambda: keep(kept, results, keeping))
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
        if note.kind == "site_paused" and note.site:
            self._paused.add(note.site)
            self._left[note.site] = PAUSED
        elif note.kind == "site_back" and note.site:
            self._paused.discard(note.site)
        self._write(note)

    def _judged(self, fl_ctx: FLContext) -> None:
        """What the guard of a round found, as figures and in words."""
        judged: Judged = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        self._write(judged)
        for site, text in findings(judged):
            self._write(Note(kind="guarded", site=site, text=text))

    def _heard(self, fl_ctx: FLContext) -> None:
        self.live.heart_beats(fl_ctx.get_prop(FLContextKey.EVENT_DATA))

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
            try:
                write_whole(folder / name, picture)
            except OSError as error:
                self.log_error(fl_ctx, f"a picture is lost: {error.strerror}", fire_event=False)
                continue
            names.append(f"{layout.PICTURES}/{name}")
        said = data[CONTRIBUTION]
        self._write(
            EvaluationRecord(
                site=site,
                model=model,
                contribution=said,
                pictures=tuple(names),
                receipt=receipt_of(answer),
            )
        )

    def _site_gone(self, fl_ctx: FLContext) -> None:
        site = fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME)
        self._gone.add(site)
        self._left.setdefault(site, GONE)
        self.live.is_gone(site, True)

    def _site_back(self, fl_ctx: FLContext) -> None:
        site = fl_ctx.get_prop(FLContextKey.RECONNECTED_CLIENT_NAME)
        self._gone.discard(site)
        self.live.is_gone(site, False)

    def _failed(self, fl_ctx: FLContext) -> None:
        if self._failure is None:  # the first is the cause of the others
            self._failure = str(fl_ctx.get_prop(FLContextKey.EVENT_DATA, "") or "no reason given")

    def _end(self, fl_ctx: FLContext) -> None:
        signal = fl_ctx.get_prop(ReservedKey.RUN_ABORT_SIGNAL)
        aborted = signal is not None and signal.triggered
        if self._failure is None and not aborted:
            for model, answered in sorted(self._evaluated.items()):
                for site in sorted(set(self._sites) - answered):
                    why = self._why_silent(site)
                    self._write(EvaluationRecord(site=site, model=model, reason=why))
        if self._is_to_be_tried_again():
            self._write(Note(kind="waits", text=self._why_again()))
            return  # no word of an end: the keeper starts the job again
        status: Literal["completed", "aborted", "failed"] = "aborted" if aborted else "completed"
        if self._failure is not None:
            status = "failed"
        if not aborted and self._folder is not None:  # FLARE copies all of it into its store now
            files = (path for path in self._folder.parent.rglob("*") if path.is_file())
            needed = sum(path.stat().st_size for path in files) + MARGIN_BYTES
            wait_for_room(self, fl_ctx, self._folder, needed)
        self._write(JobDone(status=status, reason=self._failure))
        deadline = time.monotonic() + LAST_RECORDS_SECONDS
        while self._writer is not None and not self._writer.write_held():
            if aborted and time.monotonic() > deadline:
                break
            time.sleep(LOOK_SECONDS)
        self._seal(fl_ctx)
        if self._tracking is not None:
            self._tracking.end()

    def _seal(self, fl_ctx: FLContext) -> None:
        """Sign what the run has come to, with the key of the server's certificate."""
        if self._writer is None or self._folder is None or self._writer.held:
            return
        signer = KitSigner(Path(fl_ctx.get_engine().get_workspace().get_root_dir()), "server")
        if not signer.is_there:
            return
        try:
            self._writer.seal(result_files(self._folder), signer)
        except (OSError, FedfmsError) as error:
            self.log_error(fl_ctx, f"the records could not be sealed: {error}", fire_event=False)

    def _is_to_be_tried_again(self) -> bool:
        """Whether a later round failed at too many sites: each of them did it before.

        In the first round it is more likely that they never can, and somebody is to know it now.
        """
        why = self._failure or ""
        is_for_few = is_for_too_few_answers(why) or is_for_too_few_usable(why)
        return bool(self._round) and (is_for_few or is_for_few_in_a_sum(why))

    def _why_again(self) -> str:
        why = [
            f"{site}: {self._answers.get(site) or self._why_silent(site)}"
            for site in self._sites
            if self._answers.get(site, "") is not None
        ]
        return (
            f"the run waits: too few sites could answer round {self._round} "
            f"({'; '.join(why) or self._failure}). It is tried again by itself"
        )

    def _tell_progress(self, fl_ctx: FLContext) -> None:
        collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
        if isinstance(collector, GroupInfoCollector) and self._progress is not None:
            self._progress.read_new()
            held = self._writer.held if self._writer is not None else []
            event = self._progress.event(now=clock(), live=self.live.snapshot(), held=held)
            collector.add_info(group_name=PROGRESS_GROUP, info=event.to_dict())

    def _tell_records(self, topic: str, asked: Any, fl_ctx: FLContext) -> dict[str, Any]:
        """A piece of the records, for a coordinator's page; lines are added, never changed."""
        return feed.read_piece(self._folder, asked) if self._folder is not None else {}

    def _write(self, record: Record) -> None:
        if self._tracking is not None:
            self._tracking.tell(record)
        if self._writer is None:
            return
        try:
            self._writer.write_or_hold(record)
        except OSError as error:
            path, self._writer = self._writer.path, None
            with self._engine.new_context() as fl_ctx:
                self.system_panic(
                    f"the server cannot write the records of this run, {path}: {error.strerror}; "
                    "fix: look at that disk (is it mounted read-only, does it report errors?)",
                    fl_ctx,
                )


def _payload(shareable: Any) -> int:
    """Bytes of the tensors in a task or an answer."""
    try:
        return payload_bytes(from_shareable(shareable).data)
    except (ValueError, TypeError, AttributeError, KeyError):
        return 0


def _report(answer: Shareable, site: str) -> Contribution | None:
    """What a site says of its round, if it can be read."""
    try:
        said = Contribution.from_dict(from_shareable(answer).get_meta_prop(CONTRIBUTION))
    except (ValueError, TypeError, AttributeError, KeyError, ContributionRefused):
        return None
    return said if said.site == site else None
