"""The server's waiting for the steps of a sum ends with the job."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from nvflare.apis.client import Client
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.signal import Signal

from fedfms.errors import FederationError
from fedfms.flare.secure_sums import ASK_SECONDS, SecureSums


class SilentSites:
    """An engine whose clients are known and never answer, as where their line is cut."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._contexts = FLContextManager(engine=self, identity_name="server", job_id="job")

    def get_clients(self) -> list[Client]:
        return [Client(f"site-{number}", f"token-{number}") for number in range(1, 4)]

    def new_context(self) -> FLContext:
        return self._contexts.new_context()

    def send_aux_request(self, *, timeout: float, **asked: object) -> dict[str, object]:
        self.asked.set()
        time.sleep(timeout)
        return {}


def test_a_job_that_is_aborted_waits_for_no_answer(tmp_path: Path) -> None:
    engine, signal = SilentSites(), Signal()
    with engine.new_context() as context:
        context.set_prop(ReservedKey.RUN_ABORT_SIGNAL, signal, private=True, sticky=False)
        sums = SecureSums(tmp_path, ())
        ended: list[float] = []

        def begin() -> None:
            with pytest.raises(FederationError, match="sum"):
                sums.begin(0, context)
            ended.append(time.monotonic())

        thread = threading.Thread(target=begin)
        thread.start()
        assert engine.asked.wait(10)
        aborted = time.monotonic()
        signal.trigger("abort")
        thread.join(2 * ASK_SECONDS)
    assert ended and ended[0] - aborted < 5
