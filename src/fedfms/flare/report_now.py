"""A site tells the server how far its task is, while it runs: a few small messages each minute.

They go from a thread of their own, and only the last state is told: a line that is slow or cut
holds up no training, and what is lost fails no task. What they hold is numbers
(contracts/now.py); FLARE names the site that sends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from nvflare.apis.shareable import Shareable

from fedfms.contracts.now import GpuState, SiteProgress
from fedfms.errors import FedfmsError
from fedfms.trainer.connection import ping

log = logging.getLogger(__name__)

TOPIC = "fedfms.progress"  # of FLARE's messages beside tasks
SAID = "fedfms_progress"  # key in such a message

STEP_SECONDS = 3.0  # between two messages of one phase
GPU_SECONDS = 20.0  # between two questions to the trainer whether its GPU is there
PING_SECONDS = 3.0

_PHASES: dict[str, Literal["start", "prepare", "evaluate", "train"]] = {
    "waiting": "start",  # the trainer's word for a task whose turn has not come
    "prepare": "prepare",
    "evaluate": "evaluate",
    "train": "train",
}

Send = Callable[[SiteProgress], None]


class Reporter:
    """Tells of one task, from its `with` to its end; never raises, never waits.

    Args:
        send: passes one message on; may block or raise.
        exchange: where the site's trainer listens, to ask whether its GPU is there.
        first: what there is to tell when the task has come.
    """

    def __init__(self, send: Send, exchange: Path, first: SiteProgress) -> None:
        self._send = send
        self._exchange = exchange
        self._now = first
        self._gpu: GpuState | None = None
        self._news = threading.Event()  # there is something that does not wait
        self._at_work = threading.Event()  # the trainer is
        self._ended = False

    def __enter__(self) -> Reporter:
        self._news.set()
        threading.Thread(target=self._tell, name="report-now", daemon=True).start()
        threading.Thread(target=self._ask, name="report-gpu", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """The thread tells what is left to tell, and ends."""
        self._ended = True
        self._news.set()
        self._at_work.set()

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """As the trainer says it, about twice a second; a phase without a word is passed over."""
        word = _PHASES.get(phase)
        if word is None:
            return
        if word != "start":
            self._at_work.set()
        is_new = word != self._now.phase
        self._now = dataclasses.replace(self._now, phase=word, done=done, total=total)
        if is_new:
            self._news.set()

    def sends_answer(self) -> None:
        """The trainer is done: from here on the answer travels."""
        self._now = dataclasses.replace(self._now, phase="upload", done=0, total=0)
        self._news.set()

    def failed(self, error: FedfmsError) -> None:
        """The task ended with an error; it says whether the GPU is the reason."""
        if error.code == "gpu-failed":
            self._gpu = "lost"

    def _tell(self) -> None:
        while True:
            self._news.wait(STEP_SECONDS)
            self._news.clear()
            ended, now = self._ended, dataclasses.replace(self._now, gpu=self._gpu)
            try:
                self._send(now)
            except Exception as error:  # whatever a line or FLARE does: nothing follows from it
                log.debug("progress could not be told: %s", type(error).__name__)
            if ended:
                return
            time.sleep(0.2)  # phases of a moment do not make messages of a moment

    def _ask(self) -> None:
        self._at_work.wait()  # a trainer without a task would take it as time to look at its files
        while not self._ended:
            with contextlib.suppress(FedfmsError):
                told = ping(self._exchange, PING_SECONDS)
                if told.gpu != self._gpu and told.gpu is not None:
                    self._gpu = told.gpu
                    self._news.set()
            until = time.monotonic() + GPU_SECONDS
            while not self._ended and time.monotonic() < until:
                time.sleep(0.5)


def sender(engine: Any) -> Send:
    """Sends progress from a site's job process to the job's process at the server."""

    def send(now: SiteProgress) -> None:
        message = Shareable()
        message[SAID] = dataclasses.asdict(now)
        with engine.new_context() as fl_ctx:
            engine.fire_and_forget_aux_request(TOPIC, message, fl_ctx, optional=True)

    return send
