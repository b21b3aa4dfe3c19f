"""Which build runs is said where it is known, and unknown is said where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedfms.about import known_image, known_revision

REPOSITORY = Path(__file__).parents[2]


def test_an_image_says_its_commit_and_who_starts_it_its_digest(monkeypatch):
    monkeypatch.setenv("FEDFMS_REVISION", "0123abc")
    monkeypatch.setenv("FEDFMS_IMAGE_DIGEST", "sha256:4567")
    assert (known_revision(), known_image()) == ("0123abc", "sha256:4567")
    monkeypatch.setenv("FEDFMS_IMAGE_DIGEST", "")  # as Compose sets what nobody filled in
    assert known_image() is None


def test_a_checkout_says_its_commit_and_whether_the_package_differs_from_it(monkeypatch):
    monkeypatch.setenv("FEDFMS_REVISION", "")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    code = "from fedfms.about import known_revision; print(known_revision())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.strip()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert found.removesuffix("+changes") == head.stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "src/fedfms"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.endswith("+changes") == bool(changed.stdout)


def test_without_git_it_is_unknown(monkeypatch):
    monkeypatch.setenv("FEDFMS_REVISION", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert known_revision() is None or len(known_revision() or "") == 40  # noted by pip
