"""Shared by the unit tests: the command line, called in this process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_user import a_plain_user

from fedfms.cli import main


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of `fedfms ARGUMENTS`."""
    monkeypatch.setattr("fedfms.cli.common.out.width", 200, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedfms", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """As tmp_path, but any user can come to it and to what is made in it."""
    with tempfile.TemporaryDirectory() as name:
        before = os.umask(0o022)  # code under test may have set another in this process
        folder = Path(name).resolve()
        folder.chmod(0o755)
        with a_plain_user():
            try:
                list(folder.iterdir())
            except OSError:
                pytest.skip("the folder for temporary files is not open to other users")
        yield folder
        os.umask(before)
        for place, folders, _ in os.walk(folder):
            for one in folders:
                (Path(place) / one).chmod(0o755)
