"""Nothing of a site runs as root in a container, and nobody is led there."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfms.errors import FedfmsError
from fedfms.flare.start import run_client, run_server
from fedfms.kits.kit import read_kit
from fedfms.preflight.kit import check_files
from fedfms.trainer.__main__ import main as run_trainer
from fedfms.user import how_to_read, refuse_root

Run = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[2]

COMMANDS = (
    ("server",),
    ("flare",),
    ("trainer", "--site", "a", "--config", "c", "--policy", "p", "--work", "w", "--exchange", "e"),
    ("check-site",),
    ("check-site", "--role", "trainer", "--json"),
    ("dry-run",),
    ("gpu-check",),
    ("train-local", "jobs/fedmsa", "--site", "site.yml"),
    ("check-data", "site.yml"),
    ("submit", "jobs/fedmsa", "--kit", "kit"),
    ("status", "--kit", "kit"),
    ("provision", "project.yml"),
    ("predict", "model", "in", "out"),
)


@pytest.fixture
def root_in_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFMS_IN_CONTAINER", "1")
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_root_is_refused_whatever_it_asks_for(
    command: tuple[str, ...], run: Run, root_in_a_container: None
) -> None:
    code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert "runs as root" in err
    assert "fix: set FEDFMS_UID in .env" in err and "chown -R 1000 ." in err


def test_a_role_that_is_started_past_the_command_refuses_root_too(
    root_in_a_container: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FedfmsError, match="runs as root"):
        run_server(tmp_path, tmp_path)
    with pytest.raises(FedfmsError, match="runs as root"):
        run_client(tmp_path, tmp_path, tmp_path)
    assert run_trainer(COMMANDS[2][1:]) == 2
    assert "runs as root" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_user_and_a_developers_own_machine_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("FEDFMS_IN_CONTAINER", raising=False)
    refuse_root()
    monkeypatch.setenv("FEDFMS_IN_CONTAINER", "1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refuse_root()


@pytest.mark.parametrize("role", ["trainer", "flare", "server", "coordinator", "dry-run", "help"])
def test_the_entrypoint_refuses_root_before_anything_runs(role: str, tmp_path: Path) -> None:
    for name, says in (("id", "0"), ("fedfms", "started")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {says}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SITE_NAME": "a"}
    command = ["sh", str(REPOSITORY / "docker/entrypoint"), role]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 77 and done.stdout == ""
    assert "runs as root" in done.stderr and "FEDFMS_UID" in done.stderr
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "started\n")


def test_the_image_says_that_it_is_one() -> None:
    assert re.search(r"\bFEDFMS_IN_CONTAINER=1\b", (REPOSITORY / "docker/Dockerfile").read_text())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
def test_what_root_owns_is_given_away_and_never_read_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "kit" / "startup" / "client.key"
    key.parent.mkdir(parents=True)
    key.write_text("secret")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    fix = how_to_read(key)
    assert "chown -R 1234 ." in fix and "FEDFMS_UID=0" not in fix
    os.chown(key, 4242, -1)
    assert how_to_read(key).startswith("set FEDFMS_UID=4242 in .env")
    os.chown(key, 1234, -1)
    assert "chmod" in how_to_read(key)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_kit_that_root_unpacked_says_chown(tmp_path: Path) -> None:
    """In a process of another user, which cannot read it."""
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    (kit / "fedfms.json").write_text("{}")
    kit.chmod(0o700)
    child = os.fork()
    if child == 0:
        os.setgid(10001)
        os.setuid(1234)
        said = []
        for check in (read_kit, check_files):
            try:
                check(kit)
            except FedfmsError as error:
                said.append(f"{error.code}: {error}")
        good = len(said) == 2 and all("sudo chown -R 1234 ." in text for text in said)
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
