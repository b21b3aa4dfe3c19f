"""An engine, an image, and nothing left behind.

Where an engine answers it is used; where none does, engine.sh installs and starts one (Debian, as
root), and it is stopped at the end. Workers beside each other (pytest -n) share both.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from containers import REPOSITORY

HERE = Path(__file__).resolve().parent
IMAGE = "fedfms:test"
OWN = REPOSITORY / "workspace/docker"
STARTED = OWN / "started-by-tests"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    OWN.mkdir(parents=True, exist_ok=True)
    with (OWN / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine with Compose v2."""
    os.environ["PATH"] = f"/usr/bin:{os.environ['PATH']}"  # Debian's client before any other
    with one_at_a_time():
        there = shutil.which("docker") is not None
        if not there or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
            subprocess.run([HERE / "engine.sh", "start"], check=True)
            STARTED.touch()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the engine that these tests started, once all workers have ended."""
    if hasattr(session.config, "workerinput") or not STARTED.exists():
        return
    STARTED.unlink()
    if not os.environ.get("FEDFMS_KEEP_ENGINE"):
        subprocess.run([HERE / "engine.sh", "stop"], check=True)


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The image of this checkout, built by its own Dockerfile, under a tag for the tests."""
    with one_at_a_time():
        subprocess.run(
            [HERE / "build.sh"],
            cwd=REPOSITORY,
            check=True,
            env={**os.environ, "FEDFMS_IMAGE": IMAGE},
        )
    return IMAGE
