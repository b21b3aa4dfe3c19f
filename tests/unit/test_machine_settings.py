"""What an operator writes into `.env`: numbers are read, and anything else is said."""

from __future__ import annotations

import pytest

from fedfms.contracts.machine import Machine
from fedfms.errors import ConfigError

GOOD = [
    ("FEDFMS_KEEP_DAYS", "0", "keep_days", 0.0),
    ("FEDFMS_KEEP_DAYS", "", "keep_days", 90.0),
    ("FEDFMS_KEEP_DAYS", "1.5", "keep_days", 1.5),
    ("FEDFMS_MAX_RUNS", "100", "max_runs", 100),
    ("FEDFMS_METRICS_PORT", "9464", "metrics_port", 9464),
    ("FEDFMS_LINK_MB_PER_SECOND", "2.5", "link_megabytes_per_second", 2.5),
]
BAD = [
    ("FEDFMS_KEEP_DAYS", ("x", "-1", "nan", "36501"), "0: never"),
    ("FEDFMS_MAX_RUNS", ("0", "101", "1.5", "1e1", "+3", "nan"), "from 1 to 100"),
    ("FEDFMS_METRICS_PORT", ("0", "65536", "http", "-9464"), "a TCP port"),
    ("FEDFMS_LINK_MB_PER_SECOND", ("0", "inf", "nan", "1 MB"), "megabytes a second"),
]


def test_answers_are_kept_only_where_somebody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDFMS_KEEP_ANSWERS", raising=False)
    assert not Machine.from_environment().keep_answers
    for text, is_so in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FEDFMS_KEEP_ANSWERS", text)
        assert Machine.from_environment().keep_answers is is_so


@pytest.mark.parametrize(("name", "text", "field", "value"), GOOD)
def test_a_number_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, field: str, value: float
) -> None:
    monkeypatch.setenv(name, text)
    read = getattr(Machine.from_environment(), field)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "fix"), [(name, text, fix) for name, texts, fix in BAD for text in texts]
)
def test_what_is_none_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, fix: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as error:
        Machine.from_environment()
    assert error.value.problem == f"{name} is {text}" and fix in error.value.fix
