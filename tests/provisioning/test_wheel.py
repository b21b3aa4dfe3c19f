"""The two packages as wheels: the first alone, in an empty folder, does what the README shows."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both packages, built from a copy so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheels")
    copy = folder / "checkout"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("src", "jobs"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([*PIP, *build, copy, copy / "src/fedfms_lab"], check=True)
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


class Installed:
    """The first package alone in an environment of its own, called from an empty folder."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.home = folder / "empty"
        self.home.mkdir()
        environment = folder / "venv"
        venv.create(environment, symlinks=True)
        self.python = environment / "bin/python"
        (packages,) = environment.glob("lib/python*/site-packages")
        others = folder / "others"  # what this Python has, our own packages apart
        others.mkdir()
        for place in filter(lambda path: path.endswith("site-packages"), sys.path):
            for entry in Path(place).iterdir():
                ours = "fedfms" in entry.name or entry.suffix == ".pth"
                if not ours and not (others / entry.name).exists():
                    (others / entry.name).symlink_to(entry)
        (packages / "others.pth").write_text(f"{others}\n", encoding="utf-8")
        install = ["install", "--no-deps", "--no-index", wheel]
        subprocess.run([*PIP, "--python", self.python, *install], check=True)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`fedfms ARGUMENTS`, in the empty folder; nothing of the checkout is on its path."""
        keep = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
        return subprocess.run(
            [self.python.with_name("fedfms"), *arguments],
            cwd=self.home,
            env=keep | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    def done(self, *arguments: str) -> str:
        """What it printed; it has to end well."""
        result = self(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def fedfms(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheels["fedfms_kit"])


def test_a_wheel_has_every_file_of_its_building_and_none_of_the_other(
    wheels: dict[str, Path],
) -> None:
    for name, package in (("fedfms_kit", "fedfms"), ("fedfms_lab", "fedfms_lab")):
        with zipfile.ZipFile(wheels[name]) as wheel:
            packed = {file for file in wheel.namelist() if ".dist-info/" not in file}
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", f"src/{package}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        if not listed:
            pytest.skip("this is no clone of the repository")
        source = {file.removeprefix("src/") for file in listed if (ROOT / file).exists()}
        jobs = {
            f"fedfms/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / "jobs").rglob("*")
            if path.is_file()
        }
        expected = source | jobs if package == "fedfms" else source - {"fedfms_lab/pyproject.toml"}
        assert packed == expected


def imported_packages(folder: Path) -> set[str]:
    """Top names of all imports of a folder, late ones too."""
    tops = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                tops.add(node.module.partition(".")[0])
    return tops - sys.stdlib_module_names


def test_the_wheel_names_its_licence_and_every_package_that_it_imports(
    wheels: dict[str, Path],
) -> None:
    with zipfile.ZipFile(wheels["fedfms_kit"]) as wheel:
        (about,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        text = wheel.read(about).decode()
        assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in wheel.namelist()}
    assert "License-Expression: Apache-2.0" in text
    needed = {name.lower() for name in re.findall(r"^Requires-Dist: ([\w-]+)", text, re.MULTILINE)}
    found_in = packages_distributions()
    # triton comes with torch for CUDA, and only what builds the kernels of the image imports it
    for top in imported_packages(ROOT / "src/fedfms") - {"fedfms", "triton"}:
        names = found_in.get(top, [top])
        distributions = {name.lower().replace("_", "-") for name in names}
        assert distributions & needed, f"{top} is imported and not in pyproject.toml"


def test_a_command_of_the_laboratory_is_said_to_be_there(fedfms: Installed) -> None:
    for command in ("study", "prepare"):
        result = fedfms(command, "anything")
        assert result.returncode == 2
        assert f"fedfms {command} is a command of the package fedfms-lab" in result.stderr
        assert "pip install ./src/fedfms_lab" in result.stderr
    assert "study" not in fedfms.done("--help")
    (fedfms.home / "run").mkdir()
    (fedfms.home / "run" / "run.json").write_text("{}")  # as a run of a study has
    result = fedfms("verify", "run")
    assert result.returncode == 1
    assert "is a run of a study, and their check is in the package fedfms-lab" in result.stderr
    shutil.rmtree(fedfms.home / "run")


@pytest.mark.slow
def test_the_first_package_alone_trains_federates_and_predicts(fedfms: Installed) -> None:
    assert list(fedfms.home.iterdir()) == []
    fedfms.done("synth", "sites", "--cases", "6", "--slices", "2")
    at_site = ("--site", "sites/site-1/site.yml", "--set", "rounds=1")
    trained = fedfms.done("train-local", "fedmsa", *at_site, "--output", "local/model.safetensors")
    assert "round 1: loss" in trained
    fedfms.done("predict", "local/model.safetensors", "sites/site-2/images", "masks")
    images = {path.name for path in (fedfms.home / "sites/site-2/images").iterdir()}
    assert {path.name for path in (fedfms.home / "masks").glob("*.nii.gz")} == images

    federated = ("--set", "rounds=1", "--set", "local_epochs=1", "--set", "holdout=site-4")
    fedfms.done("simulate", "fedmsa", "--sites", "sites", "--workspace", "work", *federated)
    (results,) = (fedfms.home / "work/results").iterdir()
    recipe = json.loads((results / "recipe.json").read_text())
    assert (recipe["method"], recipe["rounds"]) == ("fedmsa", 1)
    assert (results / "report.html").is_file()
    fedfms.done("predict", str(results), "sites/site-4/images", "unseen")
    assert len(list((fedfms.home / "unseen").glob("*.nii.gz"))) == 6
