"""Shared by the unit tests: the command line, called in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

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
