"""A full disk at the server: the run waits, says so, and goes on by itself when there is room.

Whoever writes what a run needs writes it by `patiently`; before a round `wait_for_room` sees to it
that the round's model can be kept. Both wait in the thread that drives the rounds, so that nothing
is asked of a site meanwhile, and both end with the run. What is said goes to the run's records by
the event NOTED; the recorder holds it in memory until it can be written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext

from fedfms.data.memory import free_bytes, size_text
from fedfms.files import NO_ROOM, mount_of
from fedfms.flare.run_state import NOTED
from fedfms.records.schema import Note, NoteKind

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks whether there is room
MARGIN_BYTES = 32 * 2**20  # for records, logs and what FLARE writes beside the models
# of the model: last and best of three rounds, those two in FLARE's store, and one being written
RUN_COPIES = 9
ROUND_COPIES = 3  # last and best that a round leaves, and what FLARE holds of them meanwhile

T = TypeVar("T")


def patiently(component: FLComponent, fl_ctx: FLContext, folder: Path, write: Callable[[], T]) -> T:
    """Write something; where the disk is full, again and again until there is room.

    Args:
        component: that says in the run's records that it waits, and that it goes on.
        folder: that is written.
        write: leaves nothing behind where it raises.

    Raises:
        OSError: of another kind, or the run was ended meanwhile.
    """
    with _Waiting(component, fl_ctx, folder) as waiting:
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in NO_ROOM or not waiting.look(0):
                    raise


def wait_for_room(component: FLComponent, fl_ctx: FLContext, folder: Path, needed: int) -> None:
    """Return when there is so much room on a folder's disk, or when the run is ended."""
    with _Waiting(component, fl_ctx, folder) as waiting:
        while free_bytes(folder) < needed and waiting.look(needed):
            pass


def full_disk(folder: Path, needed: int) -> str:
    """What is full, in the words of a sentence.

    Args:
        needed: bytes; 0 where that is not known.
    """
    said = f"the server's disk at {mount_of(folder)} has {size_text(free_bytes(folder))} free"
    return f"{said}, about {size_text(needed)} are needed" if needed else f"{said} and is full"


class _Waiting:
    """Says once that it waits, and once that it goes on."""

    def __init__(self, component: FLComponent, fl_ctx: FLContext, folder: Path) -> None:
        self._component, self._fl_ctx, self._folder = component, fl_ctx, folder
        self._told = False

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, kind: object, *others: object) -> None:
        if self._told and kind is None and not self._is_ended():
            self._say(
                "goes_on", f"there is room at {mount_of(self._folder)} again; the run goes on"
            )

    def look(self, needed: int) -> bool:
        """Wait a moment; false where the run was ended."""
        if not self._told:
            self._told = True
            self._say(
                "waits",
                f"the run waits: {full_disk(self._folder, needed)}. It goes on by itself when "
                "there is room: remove old jobs, or files that are not of this server",
            )
        time.sleep(LOOK_SECONDS)
        return not self._is_ended()

    def _is_ended(self) -> bool:
        signal = self._fl_ctx.get_prop(ReservedKey.RUN_ABORT_SIGNAL)
        return signal is not None and bool(signal.triggered)

    def _say(self, kind: NoteKind, text: str) -> None:
        log.warning("%s", text)
        note = Note(kind=kind, text=text)
        with self._fl_ctx.get_engine().new_context() as fl_ctx:
            self._component.fire_event_with_data(NOTED, fl_ctx, FLContextKey.EVENT_DATA, note)
