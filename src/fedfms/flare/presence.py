"""Sites that died before the last workflow do not hold it up.

FLARE 2.9 keeps the list of sites that are gone for each workflow, and reports a death once. Without
help the evaluation at the end waits for a site that died in training until its own time-out.
"""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.widget import Widget

from fedfms.flare.internals.job import report_gone


class Presence(Widget):  # type: ignore[misc]
    """Tells each new workflow which sites gave no answer in the last round.

    FLARE then gives them up after its grace period. A site that is only slow takes itself off the
    list with its next sign of life.
    """

    def __init__(self) -> None:
        super().__init__()
        self._silent: set[str] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow who answers, and report at the start of a workflow."""
        if event_type == AppEventType.ROUND_STARTED:
            self._silent = {client.name for client in fl_ctx.get_engine().get_clients()}
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            self._silent.discard(fl_ctx.get_peer_context().get_identity_name())
        elif event_type == EventType.START_WORKFLOW:
            workflow = fl_ctx.get_engine().get_component(fl_ctx.get_prop(FLContextKey.WORKFLOW))
            for site in sorted(self._silent):
                report_gone(workflow, site, fl_ctx)
