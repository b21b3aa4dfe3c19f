"""`--notify`: what who watches is told, once each."""

from __future__ import annotations

from fedfms.cli.telling import tell_end, telling
from fedfms.flare.progress import Event
from fedfms.flare.session import JobState
from fedfms.notify import Notifier


class Told(Notifier):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def tell(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def close(self, seconds: float = 0.0) -> None:
        self.sentences.append("closed")


def test_each_wait_and_each_going_on_is_told_once_and_then_the_end() -> None:
    told, shown = Told(), []
    tell = telling(told, "0123456789abcdef", shown.append)
    waits, goes_on = "14:02 the run waits", "14:30 enough sites are there again"
    events = [
        Event("train"),
        Event("train", notes=("14:00 site-2 is gone", waits), alarms=(waits,)),
        Event("train", alarms=(waits,)),
        Event("train", alarms=(waits, goes_on)),
    ]
    for event in events:
        tell(event)
    assert shown == events
    tell_end(told, JobState("FINISHED:ABORTED", "", "0123456789abcdef"))
    assert told.sentences == [
        f"run 01234567: {waits}",
        f"run 01234567: {goes_on}",
        "run 01234567: it was stopped; it goes on with fedfms resume 01234567",
        "closed",
    ]
