"""A command that is told a sentence: what it gets, and that nothing waits or fails with it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedfms import notify
from fedfms.errors import ConfigError
from fedfms.notify import Notifier

# words that a shell would act on
SENTENCE = "run 1a2b: it needs 2 sites, and $(touch stolen); `id` \"is\" 'gone' && x | y > z"


def script(folder: Path, text: str) -> str:
    path = folder / "tell"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_the_sentence_is_the_last_argument_whatever_is_in_it(tmp_path: Path) -> None:
    command = script(tmp_path, 'printf %s@ "$@" >> heard')
    told = Notifier(f"{command} -s 'two words'")
    told.tell(SENTENCE)
    told.tell("second")
    told.close()
    assert Path("heard").read_text() == f"-s@two words@{SENTENCE}@-s@two words@second@"
    assert not Path("stolen").exists()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_that_hangs_is_ended_with_what_it_started_and_the_next_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "COMMAND_SECONDS", 0.5)
    command = script(tmp_path, '[ "$1" = hang ] && { sleep 60 & echo $! > pid; wait; }; touch "$1"')
    told = Notifier(command)
    began = time.monotonic()
    told.tell("hang")
    assert time.monotonic() - began < 0.2  # who tells does not wait
    told.tell("next")
    told.close(10.0)
    assert Path("next").exists() and not Path("hang").exists()
    stat = Path(f"/proc/{Path('pid').read_text().strip()}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()  # nobody may have waited for it


def test_one_that_fails_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = Notifier(script(tmp_path, "echo no such host >&2; exit 3"))
    told.tell("something")
    told.close()
    assert "ended with code 3: no such host" in caplog.text


@pytest.mark.parametrize("command", ["", "no-such-command me", 'mail "me'])
def test_a_command_that_is_not_there_is_said_at_once(command: str) -> None:
    with pytest.raises(ConfigError, match="name a program") as raised:
        Notifier(command)
    assert raised.value.code == "notify"
