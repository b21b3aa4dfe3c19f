"""An engine, an image, and nothing left behind.

Where an engine answers it is used; where none does, engine.sh installs and starts one (Debian, as
root), and it is stopped at the end.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import REPOSITORY

HERE = Path(__file__).resolve().parent
IMAGE = "fedfms:test"


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """A Docker engine with Compose v2."""
    os.environ["PATH"] = f"/usr/bin:{os.environ['PATH']}"  # Debian's client before any other
    was_there = subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    if not was_there:
        subprocess.run([HERE / "engine.sh", "start"], check=True)
    yield
    if not was_there and not os.environ.get("FEDFMS_KEEP_ENGINE"):
        subprocess.run([HERE / "engine.sh", "stop"], check=True)


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The image of this checkout, built by its own Dockerfile, under a tag for the tests."""
    subprocess.run(
        [HERE / "build.sh"], cwd=REPOSITORY, check=True, env={**os.environ, "FEDFMS_IMAGE": IMAGE}
    )
    return IMAGE
