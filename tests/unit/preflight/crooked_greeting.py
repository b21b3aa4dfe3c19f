"""A server component that greets some sites as another server would: of another version, with a
wrong clock, or not at all. The test server loads it in the place of `Greeting`."""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, IdentityChallengeKey

from fedfms.flare.greeting import REVOKED, TIME, VERSION, Greeting


class CrookedGreeting(Greeting):
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type != EventType.SYSTEM_START:
            return
        cell = fl_ctx.get_prop(FLContextKey.SITE_OBJ).cell
        place = {"channel": CellChannel.SERVER_MAIN, "topic": CellChannelTopic.Challenge}
        honest = cell.core_cell.req_reg.find(*place.values()).cb

        def crooked(request):
            reply = honest(request)
            name = request.get_header(IdentityChallengeKey.COMMON_NAME)
            if name == "other-clock":
                reply.set_header(TIME, reply.get_header(TIME) + 90)
            elif name == "other-version":
                reply.set_header(VERSION, "9.9.9")
            elif name == "no-greeting":
                for header in (VERSION, TIME, REVOKED):
                    reply.headers.pop(header)
            return reply

        cell.register_request_cb(cb=crooked, **place)
