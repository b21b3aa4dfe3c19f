from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from project_files import PROJECT, Made, write_project

from fedfms.provisioning.provision import provision


@pytest.fixture(scope="session")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The repository's own project.yml, provisioned once; tests do not change it."""
    folder = tmp_path_factory.mktemp("provisioned")
    project = write_project(folder / PROJECT.name)
    return Made(project, folder / "out", provision(project, folder / "out"))


@pytest.fixture
def made(provisioned: Made, tmp_path: Path) -> Made:
    """A copy of it that a test may change."""
    shutil.copytree(provisioned.output, tmp_path / "out", copy_function=shutil.copy2)
    project = tmp_path / PROJECT.name
    shutil.copy2(provisioned.project, project)
    return Made(project, tmp_path / "out", provisioned.result)


@pytest.fixture
def run(made: Made) -> Callable[..., object]:
    """`fedfms provision` once more in that copy."""
    return lambda **options: provision(made.project, made.output, **options)
