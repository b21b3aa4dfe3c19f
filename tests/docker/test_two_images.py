"""A hospital's image holds nothing of the laboratory; the image of the laboratory holds both."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import REPOSITORY, docker

pytestmark = [pytest.mark.docker, pytest.mark.slow]

LABORATORY = "fedfms:laboratory-test"


@pytest.fixture(scope="module")
def laboratory(image: str) -> Iterator[str]:
    subprocess.run(
        [Path(__file__).parent / "build.sh"],
        cwd=REPOSITORY,
        check=True,
        env={**os.environ, "FEDFMS_IMAGE": LABORATORY, "FEDFMS_TARGET": "lab"},
    )
    yield LABORATORY
    docker("rmi", "-f", LABORATORY, check=False)


def said_by(image: str, *command: str) -> str:
    isolated = ("--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp")
    entry, *arguments = command
    return docker("run", *isolated, "--entrypoint", entry, image, *arguments)


def test_no_file_of_the_laboratory_is_in_a_hospitals_image(image: str, laboratory: str) -> None:
    search = ("find", "/opt", "-path", "*fedfms_lab*", "-name", "*.py")
    assert said_by(image, *search) == ""
    assert "/fedfms_lab/study/runner.py" in said_by(laboratory, *search)


def test_studies_are_commands_of_the_laboratorys_image_alone(image: str, laboratory: str) -> None:
    commands = {name: said_by(name, "fedfms", "--help") for name in (image, laboratory)}
    assert "Run a study" in commands[laboratory] and "Run a study" not in commands[image]
    assert "check-site" in commands[laboratory] and "check-site" in commands[image]


def test_each_bill_is_of_its_own_image(image: str, laboratory: str) -> None:
    bills = {
        name: said_by(name, "cat", "/opt/fedfms/sbom.cdx.json") for name in (image, laboratory)
    }
    names = {k: {one["name"] for one in json.loads(v)["components"]} for k, v in bills.items()}
    assert names[laboratory] - names[image] >= {"fedfms-lab", "pandas"}
    assert names[image] < names[laboratory]
