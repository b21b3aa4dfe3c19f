"""A site's FLARE client follows the site's pause: contracts/pause.py.

Three places see to it. The client's main process says the pause with each sign of life, has the
trainer give its memory back, and takes no new job. A job's process gives the task up that is under
way, and waits. The server (keeper.py) then ends that process, goes on without the site, and starts
it again when the pause is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nvflare.apis.fl_context import FLContext

from fedfms.contracts.machine import Machine
from fedfms.contracts.pause import LOOK_SECONDS, Gate, Pause, read_pause
from fedfms.errors import FedfmsError
from fedfms.trainer.connection import release

log = logging.getLogger(__name__)

PROPERTY = "fedfms_pause"  # public, in the context that a site sends along


def say_pause(workspace: Path, fl_ctx: FLContext) -> None:
    """Put the pause where the server reads it, or that there is none; before a sign of life."""
    pause = read_pause(workspace)
    said = pause.to_dict() if pause is not None else None
    fl_ctx.set_prop(PROPERTY, said, private=False, sticky=False)


def follow_pause(workspace: Path) -> None:
    """Look after the trainer's memory in a thread, as long as this process lives."""
    threading.Thread(target=_follow, args=(workspace,), name="pause", daemon=True).start()


def _follow(workspace: Path) -> None:
    released: Pause | None = None  # for which the trainer has given its memory back
    before: Pause | None = None
    while True:
        pause = read_pause(workspace)
        if pause is not None and pause != before:
            log.warning("this site paused itself %s: it takes no task", pause.words)
        elif pause is None and before is not None:
            log.warning("the pause is over: this site takes part again")
        before = pause
        if pause is not None and pause != released and _release():
            released = pause
        time.sleep(LOOK_SECONDS)


def _release() -> bool:
    exchange = Machine.from_environment().exchange
    if exchange is None:
        return True
    try:
        release(exchange)
    except FedfmsError as error:
        log.info("the trainer still has its memory: %s", error.public)
        return error.code == "no-trainer"  # one that is not there has none
    return True


def wait_until_over(gate: Gate, aborted: Callable[[], bool]) -> bool:
    """Wait while the site pauses; false where the task is no longer wanted."""
    while gate.pause() is not None:
        if aborted():
            return False
        time.sleep(LOOK_SECONDS / 4)
    return not aborted()
