"""Shared by all tests: where real data lies, which are slow, and what a skip means in CI."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests are offline; some import onnxruntime themselves
if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker for each core is there already: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what tests/slow.txt lists; a file, or a test with all of its parameters.

    Files that take longest come first, so that no worker is left with one of them at the end.
    """
    listed = {
        line.split()[1]: float(line.split()[0])
        for line in (REPOSITORY / "tests/slow.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, taken in listed.items():
        seconds[name.partition("::")[0]] += taken
    for item in items:
        file, _, rest = item.nodeid.partition("::")
        if listed.keys() & {file, f"{file}::{rest.partition('[')[0]}"}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: -seconds[item.nodeid.partition("::")[0]])


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
