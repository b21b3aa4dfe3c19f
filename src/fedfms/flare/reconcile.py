"""A server that was started again tells the truth about the jobs that ran when it ended.

FLARE 2.9 goes on with no job after a restart, and leaves such a job RUNNING for ever: it can be
neither aborted, fetched nor deleted, and the scheduler may wait for it.
"""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from fedfms.flare.internals.server import give_up_unfinished_jobs


class JobReconciler(FLComponent):  # type: ignore[misc]
    """Marks those jobs as FINISHED:ABANDONED while the server starts, before it starts any job."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Wait for the start."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            give_up_unfinished_jobs(fl_ctx)
