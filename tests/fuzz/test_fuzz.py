"""Every parser of what another party wrote, over changed seeds: its own error, and soon."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import Feeder, changed_seeds
from targets import names, opened

INPUTS = 500  # of each parser: in all about half a minute on one core
MAX_BYTES = 400 << 20  # that the process may grow by while one parser runs; most need nothing
MAX_SECONDS = 5.0  # of processor time for one input


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of the tensors that nobody sends
@pytest.mark.parametrize("name", names())
def test_a_parser_ends_with_its_own_error_or_a_value(name: str) -> None:
    with opened(name) as target:
        feeder = Feeder(target)
        feeder.read_seeds()
        assert feeder.tally.accepted, "no seed is what the product reads"
        for data in changed_seeds(target, INPUTS):
            feeder.test(data)
    tally = feeder.tally
    assert tally.unexpected == {}
    assert tally.inputs == len(target.seeds) + INPUTS
    assert tally.memory < MAX_BYTES
    assert tally.slowest < MAX_SECONDS
