"""A site's pause: what is typed, what is kept, what is sent, and when it is over."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedfms.cli import app
from fedfms.contracts.pause import Gate, Pause, pause_of, read_pause, write_pause

BERLIN = timezone(timedelta(hours=2))
NOW = datetime(2026, 6, 1, 14, 2, tzinfo=BERLIN)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "startup").mkdir()
    return tmp_path


def typed(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output + str(done.exception or "")


def test_it_says_times_as_the_sites_clock_shows_them() -> None:
    pause = Pause.begin(NOW.replace(hour=18, minute=0), NOW)
    here = datetime.now().astimezone().utcoffset()
    zone = "" if here == timedelta(hours=2) else " (UTC+2)"
    assert pause.words == f"at 14:02 until 18:00{zone}"
    assert Pause.begin(None, NOW).words == f"at 14:02{zone}"


def test_it_crosses_a_wire_and_nonsense_is_no_pause() -> None:
    pause = Pause.begin(NOW.replace(hour=18), NOW)
    assert pause_of(json.loads(json.dumps(pause.to_dict()))) == pause
    for said in (None, "yes", {}, {"since": "x"}, {"since": -1.0}, {"since": 1.0, "offset": 10**9}):
        assert pause_of(said) is None


def test_an_end_that_has_come_ends_it_by_itself(workspace: Path) -> None:
    now = datetime.now().astimezone()
    write_pause(workspace, Pause.begin(now + timedelta(seconds=0.4), now))
    gate = Gate(workspace)
    assert read_pause(workspace) is not None and gate.pause() is not None
    time.sleep(0.5)
    assert read_pause(workspace) is None
    gate._looked_at = float("-inf")
    assert gate.pause() is None


def test_pause_and_unpause_as_they_are_typed(workspace: Path) -> None:
    until = datetime.now().astimezone() + timedelta(hours=3)
    code, said = typed("pause", "--until", f"{until:%H:%M}", "--workspace", str(workspace))
    assert code == 0 and f"until {until:%H:%M}, in " in said
    kept = read_pause(workspace)
    assert kept is not None and kept.until is not None
    assert abs(kept.until - until.timestamp()) < 60
    assert "takes part again" in typed("unpause", "--workspace", str(workspace))[1]
    assert read_pause(workspace) is None
    assert "it was not paused" in typed("unpause", "--workspace", str(workspace))[1]


def test_a_time_that_has_passed_today_is_tomorrows(workspace: Path) -> None:
    before = datetime.now().astimezone() - timedelta(minutes=2)
    typed("pause", "--until", f"{before:%H:%M}", "--workspace", str(workspace))
    kept = read_pause(workspace)
    assert kept is not None and kept.until is not None
    assert 23 * 3600 < kept.until - time.time() < 24 * 3600


@pytest.mark.parametrize("text", ["6pm", "24:00", "18", "18:60"])
def test_what_is_no_time_of_day_is_refused(workspace: Path, text: str) -> None:
    code, said = typed("pause", "--until", text, "--workspace", str(workspace))
    assert code != 0 and "use HH:MM" in said
    assert read_pause(workspace) is None


def test_it_is_typed_in_the_flare_container(tmp_path: Path) -> None:
    code, said = typed("pause", "--workspace", str(tmp_path))
    assert code != 0 and "docker compose exec SITE-flare fedfms pause" in said
