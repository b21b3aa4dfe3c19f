"""What a site announces: what its trainer says of itself, asked for through FLARE.

A site's FLARE client answers FLARE's `report_resources` with it. A coordinator compares a job with
the announcements before it submits, since FLARE leaves a job that cannot run waiting in silence.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.resource_managers.passthrough_resource_manager import (
    PassthroughResourceManager,
)

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.decode import Misfits
from fedfms.contracts.machine import Machine
from fedfms.contracts.messages import public_code
from fedfms.errors import FedfmsError
from fedfms.flare.instance import say_instance
from fedfms.flare.internals.console import read_cell
from fedfms.trainer.connection import ping

KEY = "fedfms"  # of what report_resources returns
PING_SECONDS = 3.0

NOT_TOLD = "not-told"  # code: the site's FLARE client said nothing that can be understood


class Heartbeat:
    """Since when the server has not taken this process's signs of life.

    FLARE sends one each 10 s, or each 5 s while the server refuses them. It takes a server that
    cannot be reached as one that took it; that is another trouble, and the connection shows it.
    """

    def __init__(self) -> None:
        self._refused_since: float | None = None

    def sent(self) -> None:
        """One is on its way."""
        if self._refused_since is None:
            self._refused_since = time.monotonic()

    def taken(self) -> None:
        """The server took it."""
        self._refused_since = None

    @property
    def refused_seconds(self) -> float:
        """How long none was taken; 0 if the last one was."""
        since = self._refused_since
        return 0.0 if since is None else time.monotonic() - since


HEARTBEAT = Heartbeat()  # of the one FLARE client of this process


class SiteResources(PassthroughResourceManager):  # type: ignore[misc]
    """FLARE's resource manager of a site: agrees to every job, and reports what the trainer says.

    It is in every kit, so it also says which instance of the site registers (instance.py), and
    notes whether the server takes its signs of life. The GPU is the trainer's, and the FLARE client
    sees none to count.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the registration and the signs of life."""
        if event_type == EventType.BEFORE_CLIENT_REGISTER:
            workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
            say_instance(Path(workspace.get_root_dir()), fl_ctx)
        elif event_type == EventType.BEFORE_CLIENT_HEARTBEAT:
            HEARTBEAT.sent()
        elif event_type == EventType.AFTER_CLIENT_HEARTBEAT:
            HEARTBEAT.taken()

    def report_resources(self, fl_ctx: FLContext) -> dict[str, Any]:
        """The announcement of this site; never raises, since FLARE would not answer then."""
        try:
            exchange = Machine.from_environment().exchange
            if exchange is None:
                return _faulty("no-exchange")
            told = ping(exchange, PING_SECONDS)
        except FedfmsError as error:
            return _faulty(public_code(error.code))
        except Exception as error:
            self.logger.debug("no announcement: %s", type(error).__name__)
            return _faulty("unexpected")
        return {KEY: told.to_dict()}


def read_announcement(site: str, reported: Any) -> Announcement:
    """What a site's FLARE client reported, or that it cannot be understood; never raises.

    Args:
        site: FLARE's name of the site.
        reported: its cell of FLARE's table, which is Python's text of a dict.
    """
    try:
        told = Announcement.from_dict({**read_cell(reported)[KEY], "site": site})
    except (Misfits, ValueError, KeyError, TypeError, RecursionError, MemoryError):
        return Announcement(site, fault=NOT_TOLD)
    return told if told.version or not told.ready else Announcement(site, fault=NOT_TOLD)


def _faulty(code: str) -> dict[str, Any]:
    return {KEY: {"ready": False, "fault": code}}
