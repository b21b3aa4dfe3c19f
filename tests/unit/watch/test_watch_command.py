"""`fedfms watch --page` as a process: its address, and that it ends when told to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedfms.errors import FederationError
from fedfms.watch import known
from fedfms.watch.known import Watcher

FEDFMS = (sys.executable, "-c", "from fedfms.cli import main; main()")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_there_before_the_server_is_and_ends_when_told(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text(json.dumps({}))
    process = subprocess.Popen(
        [*FEDFMS, "watch", "--page", "--kit", tmp_path, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert b"Runs</h1>" in answer.read()
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "the page has ended; the run goes on" in said


def test_a_server_that_does_not_answer_is_asked_again_and_the_page_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known, "AGAIN_SECONDS", 0.01)
    asked = []

    @contextmanager
    def opened() -> Iterator[None]:
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("a word of a library")
        raise FederationError(
            "cannot connect to the server: no way", "look there", code="no-server"
        )
        yield

    watcher = Watcher(opened, None, {"the certificate of your own kit": 5.0})  # type: ignore[arg-type]
    watcher.start()
    deadline = time.monotonic() + 10
    while len(asked) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watcher.stop()
    seen = watcher.known
    assert "no way; look there" in seen.trouble or "RuntimeError" in seen.trouble
    assert seen.asked is None and seen.runs == ()
    assert seen.certificates == {"the certificate of your own kit": 5.0}
