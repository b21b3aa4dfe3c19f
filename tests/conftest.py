"""Shared by all tests: real data, what is slow, what CI draws of it, what a skip means there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests are offline; some import onnxruntime themselves
if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker for each core is there already: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what tests/slow.txt lists; a file, or a test with all of its parameters.

    Files that take longest come first, so that no worker is left with one of them at the end.
    With FEDFMS_SLOW_SHARE, a share and a word such as "0.3 5bf0a1c", only so much of the slow
    tests' time is spent: on files that the word draws.
    """
    listed = {
        line.split()[1]: float(line.split()[0])
        for line in (REPOSITORY / "tests/slow.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    seconds: dict[str, float] = {}
    for name, taken in listed.items():
        file = name.partition("::")[0]
        seconds[file] = seconds.get(file, 0.0) + taken
    for item in items:
        file, _, rest = item.nodeid.partition("::")
        if listed.keys() & {file, f"{file}::{rest.partition('[')[0]}"}:
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow"):
            seconds.setdefault(file, 1.0)  # marked in the file, and not measured
    items.sort(key=lambda item: _begin_early(item, seconds))
    if share := os.environ.get("FEDFMS_SLOW_SHARE"):
        drawn = _drawn(seconds, float(share.split()[0]), share.split()[1])
        left = [
            item
            for item in items
            if item.get_closest_marker("slow") and item.nodeid.partition("::")[0] not in drawn
        ]
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def _begin_early(item: pytest.Item, seconds: Mapping[str, float]) -> tuple[float, bool]:
    """By the seconds of its file, then federations before the rest."""
    file = item.nodeid.partition("::")[0]
    return -seconds.get(file, 0.0), not file.startswith("tests/jobs")


def _drawn(seconds: Mapping[str, float], share: float, word: str) -> set[str]:
    """Files in an order that follows from the word, until their seconds are the share of all."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{word} {name}".encode()).digest()

    drawn: set[str] = set()
    for name in sorted(seconds, key=place):
        if sum(seconds[one] for one in drawn) >= share * sum(seconds.values()):
            break
        drawn.add(name)
    return drawn


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images beside the checkout; where it is absent the test skips."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images (../shared/data) are not on this machine")
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    strict = os.environ.get("FEDFMS_SKIPS_FAIL") and not item.get_closest_marker("gpu")
    if report.skipped and strict:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as a failure with FEDFMS_SKIPS_FAIL: {reason}"
