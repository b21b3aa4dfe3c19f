"""Commands of other packages: found by their entry points, and their faults are theirs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
import typer
commands = typer.Typer()

@commands.command()
def weigh(site: str) -> None:
    "Say what a site weighs."
    print(f"{site} weighs 3")
"""


def package(folder: Path, name: str, module: str, point: str) -> None:
    """What pip leaves of a package: a module and its entry point."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedfms.commands]\n{point}\n")
    (folder / f"{name}.py").write_text(module)


def fedfms(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that finds the packages of `folder` too."""
    return subprocess.run(
        [sys.executable, "-c", "from fedfms.cli import main; main()", *arguments],
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_command_of_another_package_is_one_of_ours(tmp_path: Path) -> None:
    package(tmp_path, "scales", COMMANDS, "weigh = scales:commands")
    done = fedfms(tmp_path, "weigh", "site-1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "site-1 weighs 3\n", "")
    listed = fedfms(tmp_path, "--help").stdout
    assert "From scales" in listed
    assert "Say what a site weighs." in listed


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise RuntimeError('needs scales of steel')", "needs scales of steel"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("commands = 3", "'int' object has no attribute 'registered_commands'"),
    ],
)
def test_a_broken_package_is_one_line_and_ends_nothing(
    tmp_path: Path, module: str, why: str
) -> None:
    package(tmp_path, "scales", module, "weigh = scales:commands")
    done = fedfms(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("fedfms ")
    assert done.stderr.splitlines() == [f"fedfms weigh is not there: {why}"]


def test_a_healthy_package_beside_a_broken_one_works(tmp_path: Path) -> None:
    package(tmp_path, "broken", "raise RuntimeError('no')", "aaa = broken:commands")
    package(tmp_path, "scales", COMMANDS, "weigh = scales:commands")
    done = fedfms(tmp_path, "weigh", "site-1")
    assert (done.returncode, done.stdout) == (0, "site-1 weighs 3\n")
    assert done.stderr == "fedfms aaa is not there: no\n"


def test_the_command_starts_without_what_only_a_run_needs() -> None:
    """Whoever asks for --help does not wait for torch; benchmarks/startup.py has the seconds."""
    heavy = ["torch", "numpy", "nvflare", "matplotlib", "pydantic", "yaml"]
    code = f"import sys, fedfms.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
