"""Every parser of what another party wrote, a minute in all: its own error, and soon.

Where atheris is installed, coverage guides each parser for two seconds of processor time; elsewhere
so many changed seeds are tried.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import Feeder, Tally, changed_seeds
from targets import Target, names, opened

SECONDS = 2  # of processor time for each parser, guided
INPUTS = 500  # of each parser where nothing guides: in all about half a minute on one core
MAX_BYTES = 400 << 20  # that the process may grow by while one parser runs; most need nothing
MAX_SECONDS = 5.0  # of processor time for one input
GUIDES = importlib.util.find_spec("atheris") is not None

Tallies = Mapping[str, dict[str, Any]]


def check(tally: Mapping[str, Any]) -> None:
    assert tally["unexpected"] == {}
    assert tally["accepted"], "no seed is what the product reads"
    assert tally["memory"] < MAX_BYTES
    assert tally["slowest"] < MAX_SECONDS


@pytest.fixture(scope="module")
def guided(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tallies:
    """What came of the parsers of this session's tests, by name, from the runner of make fuzz."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = sorted({one["parser"] for one in asked if "parser" in one})
    output = tmp_path_factory.mktemp("fuzzing")
    runner = Path(__file__).with_name("run.py")
    done = subprocess.run(
        [sys.executable, runner, "--seconds", str(SECONDS), "--output", output, *chosen],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("guided by coverage"), done.stdout + done.stderr
    files = {name: output / f"{name.replace(' ', '-')}.json" for name in chosen}
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def tally_of_changed_seeds(parser: str) -> Mapping[str, Any]:
    with opened(parser) as target:
        feeder = Feeder(target)
        feeder.read_seeds()
        for data in changed_seeds(target, INPUTS):
            feeder.test(data)
        assert feeder.tally.inputs == len(target.seeds) + INPUTS
        return feeder.tally.to_dict()


@pytest.mark.timeout(1800)  # the first waits for all
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of the tensors that nobody sends
@pytest.mark.parametrize("parser", names())
def test_a_parser_ends_with_its_own_error_or_a_value(
    request: pytest.FixtureRequest, parser: str
) -> None:
    if not GUIDES:
        check(tally_of_changed_seeds(parser))
        return
    tally = request.getfixturevalue("guided")[parser]
    check(tally)
    assert tally["cpu"] > 0 and len(tally["coverage"]) > 1  # places reached, as they grew
    first, *_, last = tally["coverage"]
    assert last[1] >= first[1] > 0


def test_another_exception_than_a_parsers_own_is_told_with_its_place() -> None:
    def parse(data: bytes) -> object:
        if data == b"own":
            raise ValueError
        return 1 // (len(data) - 5) or None

    target = Target("one", (b"seeds",), parse, (ValueError,), lambda *_: b"", "anybody")
    feeder = Feeder(target)
    for data in (b"own", b"fives", b"fiver", b"sixsix"):
        feeder.test(data)
    tally: Tally = feeder.tally
    assert (tally.inputs, tally.accepted, tally.codes) == (4, 1, {"ValueError": 1})
    ((what, count),) = tally.unexpected.items()
    assert what.startswith("ZeroDivisionError at test_fuzz.py:") and count == 2
    with pytest.raises(AssertionError):
        check(tally.to_dict())
