"""tests/slow.txt names what is there."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_is_listed_as_slow_is_there() -> None:
    lines = (REPOSITORY / "tests/slow.txt").read_text().splitlines()
    for line in lines:
        if line.startswith("#"):
            continue
        seconds, name = line.split()
        file, _, test = name.partition("::")
        text = (REPOSITORY / file).read_text()
        assert float(seconds) > 0
        assert not test or re.search(rf"def {test.rpartition('::')[2]}\(", text), name
