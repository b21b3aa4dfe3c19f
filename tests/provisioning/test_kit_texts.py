"""The plain texts in a kit say what is true."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from project_files import REPOSITORY, Made
from typer.testing import CliRunner

from fedfms.cli import app
from fedfms.config import Policy
from fedfms.errors import ConfigError
from fedfms.flare.kit import AUTHORIZATION
from fedfms.provisioning.render import TEMPLATES, new_site

SCRIPTS = [TEMPLATES / "site/check-site", TEMPLATES / "archive/load.sh"]


@pytest.mark.parametrize("kind", ["site", "server"])
def test_env_explains_every_variable_of_the_compose_files_and_no_other(kind: str) -> None:
    compose = "".join(path.read_text() for path in (TEMPLATES / kind).glob("compose*.yml"))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", compose))
    explained = re.findall(r"^(?:# )?([A-Z_]+)=", (TEMPLATES / kind / "env").read_text(), re.M)
    of_compose = {"COMPOSE_FILE"} if kind == "site" else set()  # Compose's own
    assert set(explained) == used | of_compose
    assert len(explained) == len(set(explained))


@pytest.mark.parametrize("kind", ["site", "server"])
def test_what_stands_in_a_comment_of_env_is_the_default(kind: str) -> None:
    compose = "".join(path.read_text() for path in (TEMPLATES / kind).glob("compose*.yml"))
    defaults = dict(re.findall(r"\$\{([A-Z_]+):?-([^}]*)\}", compose))
    stated = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", (TEMPLATES / kind / "env").read_text(), re.M))
    examples = {"SERVER_EXTRA_HOST", "SITE_PROXY"}  # off by default; the line shows how
    for name, value in stated.items():
        if name in defaults and name not in examples:
            assert value == defaults[name], name


def test_the_sites_authorization_is_the_one_of_the_kits() -> None:
    text = (TEMPLATES / "site/policy/authorization.json").read_text()
    assert json.loads(text) == AUTHORIZATION


def test_templates_are_part_of_the_package() -> None:
    files = [p.relative_to(TEMPLATES.parents[1]) for p in TEMPLATES.rglob("*") if p.is_file()]
    pattern = "provisioning/templates/**/*"
    assert pattern in (REPOSITORY / "pyproject.toml").read_text()
    # a name that begins with a dot is not matched by a star
    assert not [path for path in files if path.name.startswith(".")]
    assert {path.name for path in files} >= {"env", "check-site", "load.sh", "authorization.json"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(script)], check=True)
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(("fails", "code"), [("", 0), ("trainer", 1), ("flare", 1)])
def test_check_site_asks_both_containers_and_fails_if_one_does(
    provisioned: Made, tmp_path: Path, fails: str, code: int
) -> None:
    """With a program called docker that writes down how it was called."""
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$PWD: $*" >> "{tmp_path}/calls"\n'
        f'case "$*" in *site-1-{fails or "none"}*) exit 3;; esac\n'
    )
    docker.chmod(0o755)
    kit = provisioned.home / "kits" / "site-1"
    done = subprocess.run(
        ["sh", str(kit / "check-site"), "--json"],
        cwd="/",
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == code
    run = f"{kit}: compose run --rm --no-deps"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{run} site-1-trainer check-site --json",
        f"{run} site-1-flare check-site --json",
    ]


def test_a_new_site_gets_the_files_that_a_kit_has(provisioned: Made, tmp_path: Path) -> None:
    new_site("site-1", tmp_path / "mine")
    kit = provisioned.home / "kits" / "site-1"
    written = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    names = {path.relative_to(tmp_path / "mine").as_posix() for path in written}
    assert names == {
        *(".env", "compose.yml", "compose.gpu.yml", "site.yml", "checkpoints/README.md"),
        *("policy/privacy.json", "policy/authorization.json"),
    }
    for name in names:  # the kit's server is the example's
        assert (tmp_path / "mine" / name).read_bytes() == (kit / name).read_bytes()
    assert Policy.from_folder(tmp_path / "mine" / "policy").min_cases == 3
    compose = yaml.safe_load((tmp_path / "mine/compose.yml").read_text())
    assert "site-1-trainer" in compose["services"]
    with pytest.raises(ConfigError, match="no file is overwritten"):
        new_site("site-1", tmp_path / "mine")
    with pytest.raises(ConfigError, match="letters, digits, - and _"):
        new_site("site 1", tmp_path / "other")


def test_the_command_prints_a_table_and_says_what_to_do(tmp_path: Path) -> None:
    project = shutil.copy(REPOSITORY / "provisioning/demo.yml", tmp_path / "demo.yml")
    command = ["provision", str(project), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    row = next(line.split() for line in done.output.splitlines() if "site-1 " in line)
    assert row[:3] == ["site-1", "site", "new"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row[3])
    assert "certificate authority SHA256:" in done.output
    done = CliRunner().invoke(app, [*command, "--revoke", "site-2"])
    assert "fedfms revoke site-2 --kit ADMINKIT" in done.output
