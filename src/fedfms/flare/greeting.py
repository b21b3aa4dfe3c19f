"""What a server says of itself to whoever may connect: its version, its clock, who is disabled.

FLARE's registration begins with a challenge, the one question that a participant may ask before it
is registered. The reply gets three more headers, so that `fedfms check-site` learns over the one
port, with mutual TLS, whether a site could join. In the same way it measures its line (link.py).
The registration itself is guarded here as well (instance.py).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from fedfms import __version__
from fedfms.contracts.machine import Machine
from fedfms.flare import link
from fedfms.flare.instance import guard_registrations
from fedfms.flare.internals.server import greet_with

log = logging.getLogger(__name__)

VERSION, TIME, REVOKED = "fedfms_version", "fedfms_time", "fedfms_revoked"


class Greeting(FLComponent):  # type: ignore[misc]
    """Adds its headers to the server's answers to a challenge, and guards registrations.

    A site's component list does not name it, jobs cannot, and it takes no arguments.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take the place of FLARE's callbacks as soon as the server listens."""
        if event_type != EventType.SYSTEM_START:
            return
        server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
        try:
            guard_registrations(server)
        except Exception:
            log.exception("a second copy of a site's kit would not be refused")
        try:
            meter = link.LinkMeter(Machine.from_environment().link_megabytes_per_second)
            greet_with(server, _headers, {link.HEADER: meter.answer})
        except Exception:  # a federation without greetings is better than none
            log.exception("the server will not greet: sites cannot check version and clock")


def _headers(revoked: bool) -> dict[str, Any]:
    return {VERSION: __version__, TIME: time.time(), REVOKED: revoked}
