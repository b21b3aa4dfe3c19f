"""Scores go to FLARE's receivers beside the run, and never in its way."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.dxo import from_shareable
from nvflare.app_common.widgets.streaming import AnalyticsReceiver

from fedfms.flare.tracking import RECEIVERS, Tracking, start_tracking, values_of
from fedfms.records.schema import ContributionRecord, Note

sys.path.append(str(Path(__file__).parents[1] / "watch"))
sys.path.append(str(Path(__file__).parents[2] / "jobs"))
from flare_context import Engine
from pretended_runs import contribution

RECORD = ContributionRecord(
    round=3,
    site="site-2",
    accepted=True,
    bytes_down=10,
    bytes_up=20,
    contribution=contribution("site-2", 3, 1),
)


class Kept(AnalyticsReceiver):  # type: ignore[misc]
    """A receiver as FLARE's own are, that keeps what it is given."""

    def __init__(self, seconds: float = 0.0, fails: bool = False) -> None:
        super().__init__()
        self.got: list[tuple[str, str, float, int]] = []
        self.said: list[str] = []
        self.seconds, self.fails = seconds, fails

    def initialize(self, fl_ctx: Any) -> None:
        self.said.append("start")

    def save(self, fl_ctx: Any, shareable: Any, record_origin: str) -> None:
        time.sleep(self.seconds)
        if self.fails:
            raise RuntimeError("its server does not answer")
        data = AnalyticsData.from_dxo(from_shareable(shareable))
        self.got.append((record_origin, data.tag, data.value, data.step))

    def finalize(self, fl_ctx: Any) -> None:
        self.said.append("end")


def test_a_receiver_gets_each_number_of_a_site_under_its_name(tmp_path: Path) -> None:
    receiver = Kept()
    tracking = Tracking([receiver], Engine(tmp_path, "server", {}))
    tracking.tell(RECORD)
    tracking.tell(Note(kind="waits", text="the run waits"))
    tracking.end()
    assert receiver.said == ["start", "end"]
    assert receiver.got == list(values_of(RECORD))
    assert ("site-2", "bytes_up", 20.0, 3) in receiver.got
    names = {name for _, name, _, _ in receiver.got}
    assert names >= {"dice", "loss", "seconds_train", "bytes_down"}


@pytest.mark.parametrize("receiver", [Kept(seconds=0.2), Kept(fails=True)])
def test_a_receiver_that_is_slow_or_fails_does_not_hold_the_run(
    tmp_path: Path, receiver: Kept
) -> None:
    tracking = Tracking([receiver], Engine(tmp_path, "server", {}))
    began = time.monotonic()
    for _ in range(5000):
        tracking.tell(RECORD)  # more than the queue holds
    assert time.monotonic() - began < 5
    assert tracking._waiting.qsize() <= tracking._waiting.maxsize


@pytest.mark.parametrize("name", sorted(RECEIVERS))
def test_what_is_not_installed_is_said_with_what_to_install(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    engine = Engine(tmp_path, "server", {})
    monkeypatch.setenv("FEDFMS_TRACKING", name)
    path = RECEIVERS[name][0].rpartition(".")[0]
    monkeypatch.setitem(sys.modules, path, None)  # what an import of a missing package comes to
    with engine.new_context() as fl_ctx, caplog.at_level(logging.ERROR):
        assert start_tracking(fl_ctx) is None
    assert f"pip install {name}" in caplog.text


def test_without_a_word_in_the_environment_nothing_is_tracked(tmp_path: Path) -> None:
    with Engine(tmp_path, "server", {}).new_context() as fl_ctx:
        assert start_tracking(fl_ctx) is None
