"""Who takes part in a running job, as its process at the server has to know it.

FLARE 2.9 asks once, when a job starts, who takes part; keeps the list of sites that are gone for
each workflow, and reports a death once. Here the job's process follows what the server's main
process knows (keeper.py): a site that came back has a new token, and is added; one that is gone is
no longer waited for. A job's process that was started again goes on with the round that was open.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.widgets.widget import Widget

from fedfms.errors import FedfmsError
from fedfms.flare.internals.job import report_back, report_gone
from fedfms.flare.internals.rejoin import follow_participants
from fedfms.flare.internals.settings import resend_requests
from fedfms.flare.internals.streams import forget_in_one_thread
from fedfms.flare.internals.version import FlareChanged
from fedfms.flare.notes import NoteReader
from fedfms.flare.run_state import HEARD, NOTED, kept_folder, restored

LOOK_SECONDS = 1.0  # a site's new process asks for its task after three or four


class Presence(Widget):  # type: ignore[misc]
    """Follows who takes part; tells a new workflow who gave no answer in the last round.

    FLARE gives those up after its grace period. A site that is only slow takes itself off the
    list with its next sign of life.
    """

    def __init__(self) -> None:
        super().__init__()
        self._silent: set[str] = set()
        self._ended = threading.Event()
        self._notes: NoteReader | None = None  # there from the start of a run
        self._lock = threading.Lock()  # of its place in the file
        self._workflow: Any = None  # that runs

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow who answers, and report at the start of a workflow."""
        if event_type == EventType.START_RUN:
            resend_requests()
            forget_in_one_thread()
            self._notes = NoteReader(kept_folder(fl_ctx))
            follower = threading.Thread(
                target=self._follow, args=(fl_ctx.get_engine(), fl_ctx.get_job_id()), daemon=True
            )
            follower.start()
        elif event_type == EventType.ABOUT_TO_END_RUN:
            self._ended.set()
            self._tell_notes(fl_ctx.get_engine())  # one may say why it ends
        elif event_type == AppEventType.ROUND_STARTED:
            self._silent = {client.name for client in fl_ctx.get_engine().get_clients()}
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            self._silent.discard(fl_ctx.get_peer_context().get_identity_name())
        elif event_type == EventType.START_WORKFLOW:
            workflow = fl_ctx.get_engine().get_component(fl_ctx.get_prop(FLContextKey.WORKFLOW))
            self._workflow = workflow
            _go_on(workflow, fl_ctx)
            for site in sorted(self._silent):
                report_gone(workflow, site, fl_ctx)

    def _tell_notes(self, engine: Any) -> None:
        with self._lock:
            for note in self._notes.read_notes() if self._notes else ():
                with engine.new_context() as fl_ctx:
                    if note.site and self._workflow is not None:
                        if note.kind == "site_paused":
                            report_gone(self._workflow, note.site, fl_ctx, at_once=True)
                        elif note.kind == "site_back":
                            report_back(self._workflow, note.site, fl_ctx)
                    self.fire_event_with_data(NOTED, fl_ctx, FLContextKey.EVENT_DATA, note)

    def _follow(self, engine: Any, job_id: str) -> None:
        """Once a second until the job ends: who takes part, and what there is to record."""
        while not self._ended.wait(LOOK_SECONDS):
            try:
                if heard := follow_participants(engine, job_id):
                    with engine.new_context() as fl_ctx:
                        self.fire_event_with_data(HEARD, fl_ctx, FLContextKey.EVENT_DATA, heard)
                self._tell_notes(engine)
            except FlareChanged as error:  # the server's main process has said so
                self.logger.warning("sites cannot rejoin this job: %s", error.problem)
                return
            except Exception:
                self.logger.debug("could not follow who takes part", exc_info=True)


def _go_on(workflow: Any, fl_ctx: FLContext) -> None:
    """Let the training begin with the round that was open when an earlier process ended."""
    with contextlib.suppress(FedfmsError):  # the persistor has ended the job
        before = restored(fl_ctx)
        if before is not None and isinstance(workflow, ScatterAndGather):
            done = before.state.rounds_done
            now = {**workflow.get_persist_state(fl_ctx), "current_round": done}
            if before.state.reached.get("stops"):  # it was over when that process ended
                now["num_rounds"] = done
            workflow.restore(now, fl_ctx)


def end_training(fl_ctx: FLContext, rounds: int) -> None:
    """Let the training that runs end after so many rounds; for an event of the last one's end."""
    workflow = fl_ctx.get_engine().get_component(fl_ctx.get_prop(FLContextKey.WORKFLOW))
    workflow.restore({**workflow.get_persist_state(fl_ctx), "num_rounds": rounds}, fl_ctx)
