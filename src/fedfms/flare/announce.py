"""What a site announces: what its trainer says of itself, asked for through FLARE.

A site's FLARE client answers FLARE's `report_resources` with it. A coordinator compares a job with
the announcements before it submits, since FLARE leaves a job that cannot run waiting in silence.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.resource_managers.passthrough_resource_manager import (
    PassthroughResourceManager,
)

from fedfms.contracts.announcement import PAUSED, Announcement
from fedfms.contracts.decode import Misfits
from fedfms.contracts.machine import Machine
from fedfms.contracts.messages import public_code
from fedfms.contracts.pause import read_pause
from fedfms.errors import FedfmsError
from fedfms.flare.instance import say_instance
from fedfms.flare.internals.audit import let_audit_wait
from fedfms.flare.internals.client import hear_removals
from fedfms.flare.internals.console import read_cell
from fedfms.flare.internals.streams import forget_in_one_thread
from fedfms.flare.internals.version import FlareChanged
from fedfms.flare.pausing import follow_pause, say_pause
from fedfms.kits.certificates import kit_certificate
from fedfms.trainer.connection import forget, ping

KEY = "fedfms"  # of what report_resources returns
PING_SECONDS = 3.0

FORGOTTEN = "forgotten"  # a site's answer to the removal of a run
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

    It is in every kit, so it also says which instance of the site registers (instance.py), notes
    whether the server takes its signs of life, follows the site's pause (pausing.py), and has a
    run forgotten that the server removes. The GPU is the trainer's, and the FLARE client sees none
    to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._workspace: Path | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the registration and the signs of life."""
        if event_type == EventType.BEFORE_CLIENT_REGISTER:
            self._workspace = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
            say_instance(self._workspace, fl_ctx)
            follow_pause(self._workspace)
            let_audit_wait()
            forget_in_one_thread()
            try:
                hear_removals(_forgotten)
            except FlareChanged as error:
                self.logger.warning("runs are not forgotten at this site: %s", error.problem)
        elif event_type == EventType.BEFORE_CLIENT_HEARTBEAT:
            HEARTBEAT.sent()
            if self._workspace is not None:
                say_pause(self._workspace, fl_ctx)
        elif event_type == EventType.AFTER_CLIENT_HEARTBEAT:
            HEARTBEAT.taken()

    def check_resources(
        self, resource_requirement: dict[str, Any], fl_ctx: FLContext
    ) -> tuple[bool, str]:
        """Agree to a job, unless the site pauses; whether, and a token or why not."""
        pause = read_pause(self._workspace) if self._workspace is not None else None
        if pause is not None:
            return False, f"it paused itself {pause.words}"
        agreed: tuple[bool, str] = super().check_resources(resource_requirement, fl_ctx)
        return agreed

    def report_resources(self, fl_ctx: FLContext) -> dict[str, Any]:
        """The announcement of this site; never raises, since FLARE would not answer then."""
        return {KEY: self._announcement() | _certificate_ends(fl_ctx)}

    def _announcement(self) -> dict[str, Any]:
        """What the trainer says, or why it says nothing."""
        try:
            exchange = Machine.from_environment().exchange
            if exchange is None:
                return _faulty("no-exchange")
            if self._workspace is not None and read_pause(self._workspace) is not None:
                return _faulty(PAUSED)
            return ping(exchange, PING_SECONDS).to_dict()
        except FedfmsError as error:
            return _faulty(public_code(error.code))
        except Exception as error:
            self.logger.debug("no announcement: %s", type(error).__name__)
            return _faulty("unexpected")


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


def _certificate_ends(fl_ctx: FLContext) -> dict[str, float]:
    """Until when this site's certificate is valid; nothing where that cannot be read."""
    with contextlib.suppress(FedfmsError, OSError, AttributeError):
        root = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        if (certificate := kit_certificate(root)) is not None:
            return {"certificate_ends": certificate.not_valid_after_utc.timestamp()}
    return {}


def _forgotten(job_id: str) -> str:
    """Have the trainer forget a run; what the server hears, a code without a name of anything."""
    exchange = Machine.from_environment().exchange
    try:
        if exchange is not None:
            forget(exchange, job_id)
    except FedfmsError as error:
        return public_code(error.code)
    return FORGOTTEN


def _faulty(code: str) -> dict[str, Any]:
    return {"ready": False, "fault": code}
