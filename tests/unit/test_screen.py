"""What a terminal and a log show of a run now: three sites, a hundred, and no news."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console

from fedfms.cli import common, jobs, screen
from fedfms.cli.screen import Clock, Screen, StatusLines, status_line, time_left
from fedfms.contracts.now import SiteNow
from fedfms.flare.progress import Event

AT = 1_000_000.0
DIED = "its trainer ended in the middle of its work (trainer-died); fix: ask the site"
THREE = (
    SiteNow(name="site-1", phase="answered", since=AT - 5, heard=AT - 1),
    SiteNow(name="site-2", phase="train", since=AT - 20, done=40, total=120, heard=AT - 1),
    SiteNow(name="site-3", phase="failed", since=AT - 9, failure=DIED, heard=AT - 9),
)


def event(*sites: SiteNow, **more: Any) -> Event:
    names = tuple(one.name for one in sites)
    answered = tuple(one.name for one in sites if one.phase == "answered")
    values = {"round": 3, "rounds": 8, "time": AT, "began": AT - 42, "left": (200.0, 330.0)}
    return Event("train", sites=names, answered=answered, now=sites, **{**values, **more})


def hundred() -> list[SiteNow]:
    sites = [
        SiteNow(name=f"site-{n:03d}", phase="train", done=n, total=100, since=AT - 9, heard=AT)
        for n in range(1, 61)
    ]
    sites += [SiteNow(name=f"site-{n:03d}", phase="answered", since=AT) for n in range(61, 98)]
    sites += [
        SiteNow(name="site-098", phase="gone", heard=AT - 300, connected=False),
        SiteNow(name="site-099", phase="failed", failure=DIED),
        SiteNow(name="site-100", phase="train", done=90, total=100, gpu="lost"),
    ]
    return sites


def drawn(what: Event, height: int = 24, width: int = 80) -> list[str]:
    seen = Screen()
    seen.show(what)
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=False)
    console.print(seen)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_line_of_a_log_says_what_each_of_three_sites_does() -> None:
    line = status_line(Clock(event(*THREE)))
    assert line == (
        "round 3 (4 of 8), 42 s: 1 of 3 sites in; 3 to 6 min left; site-3 failed: "
        "its trainer ended in the middle of its work (trainer-died); site-2 trains 40 of 120"
    )


def test_a_line_of_a_log_names_the_worst_of_a_hundred_sites_and_counts_the_others() -> None:
    line = status_line(Clock(event(*hundred())))
    assert "site-099 failed: its trainer" in line
    assert "site-098 is gone, last heard 5 min ago" in line
    assert "site-100 trains 90 of 100, its GPU is lost" in line
    assert line.endswith("97 others: 60 train (1 to 60 %), 37 have answered")
    assert len(line) < 400


def test_a_screen_shows_three_sites_worst_first() -> None:
    lines = drawn(event(*THREE))
    assert lines[0][2:] == "round 3 (4 of 8), 42 s: 1 of 3 sites in; 3 to 6 min left"
    assert [line.split()[0] for line in lines[1:]] == ["site-3", "site-2", "site-1"]
    assert "━━━━────────" in lines[2] and "trains 40 of 120, 20 s" in lines[2]


@pytest.mark.parametrize(("height", "width"), [(24, 80), (12, 60), (50, 200)])
def test_a_screen_holds_a_hundred_sites(height: int, width: int) -> None:
    lines = drawn(event(*hundred()), height, width)
    assert len(lines) <= height - 3
    assert all(len(line) <= width for line in lines)
    sites = [line.split()[0] for line in lines if line.startswith("  site-")]
    assert sites[:3] == ["site-099", "site-100", "site-098"]
    assert lines[-1].startswith("  and ") and "have answered" in lines[-1]


def test_a_run_that_waits_says_so_in_the_place_of_a_time() -> None:
    waits = "the run waits: it needs 2 sites, and site-2 is gone"
    line = status_line(Clock(event(*THREE, left=None, waits=waits)))
    assert waits in line and "left" not in line


@pytest.mark.parametrize(
    ("left", "passed", "words"),
    [
        ((10.0, 30.0), 0, "10 to 30 s left"),
        ((10.0, 10.0), 0, "about 10 s left"),
        ((100.0, 300.0), 60, "0 to 4 min left"),
        ((5000.0, 9000.0), 0, "1.3 to 2.5 h left"),
        ((1.0, 5.0), 60, "about 0 s left"),
        (None, 0, ""),
    ],
)
def test_the_time_left_in_words(left: Any, passed: float, words: str) -> None:
    assert time_left(event(left=left), passed) == words


def test_a_log_has_something_new_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "STATUS_SECONDS", 1.0)
    monkeypatch.setattr(screen, "SILENT_SECONDS", 2.5)
    said: list[str] = []
    lines = StatusLines(said.append)
    lines.start()
    time.sleep(1.5)
    lines.show(event(*THREE))
    deadline = time.monotonic() + 15
    while not (said and "nothing heard" in said[-1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines.stop()
    assert said[0].startswith("waiting, ")
    assert any(line.startswith("round 3 (4 of 8), 4") for line in said)
    assert "nothing heard from the server for" in said[-1]
    assert len(set(said)) == len(said)


def test_json_is_one_event_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with common.watching(False, {}, as_json=True) as tell:
        assert tell is not None
        tell(event(*THREE))
        tell(event(*hundred(), text="a sentence"))
    first, second = (json.loads(line)["event"] for line in capsys.readouterr().out.splitlines())
    assert first["now"][1]["done"] == 40 and first["left"] == [200.0, 330.0]
    assert second.pop("text") == "a sentence"
    assert Event.from_dict(second) == event(*hundred())


def test_the_status_of_a_job_lists_every_site(capsys: pytest.CaptureFixture[str]) -> None:
    from fedfms.flare.session import JobState

    state = JobState("RUNNING", "", "0123", "fedmsa", "2026-11-27T00:00:00", "ann@a.org")
    jobs._show_job(state, event(*hundred(), missed=("site-099 missed round 1: x",)), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith("site-") for line in lines) == 101
    assert "site-099" in lines[3] and DIED in lines[3]
