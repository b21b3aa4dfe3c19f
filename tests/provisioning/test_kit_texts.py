"""The plain texts in a kit say what is true."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from project_files import REPOSITORY, Made
from typer.testing import CliRunner

from fedfms.cli import app
from fedfms.contracts.policy import Policy
from fedfms.errors import ConfigError
from fedfms.flare.kit import SITE_AUTHORIZATION
from fedfms.provisioning.render import TEMPLATES, new_site

SCRIPTS = [TEMPLATES / "site/check-site", TEMPLATES / "archive/load.sh"]


@pytest.mark.parametrize("kind", ["site", "server"])
def test_env_explains_every_variable_of_the_compose_files_and_no_other(kind: str) -> None:
    compose = "".join(path.read_text() for path in (TEMPLATES / kind).glob("compose*.yml"))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", compose))
    explained = re.findall(r"^(?:# )?([A-Z_]+)=", (TEMPLATES / kind / "env").read_text(), re.M)
    assert set(explained) == used | {"COMPOSE_FILE"}  # which is Compose's own
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
    assert json.loads(text) == SITE_AUTHORIZATION


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


DOCKER = """#!/bin/sh
echo "$PWD: $*" >> "$CALLS"
case "$*" in
  *"config --services"*) printf '%s\\n' site-1-trainer site-1-flare $GPU_SERVICE; exit ;;
  *"config --images"*) printf '%s\\n' $IMAGES; exit ;;
  "image inspect"*) echo "sha256:$ID fedfms@sha256:$IN_REGISTRY"; exit ;;
  "compose config") printf '  source: /typo\\n  target: %s\\n' "$TARGET"; exit ;;
esac
case "$*" in *$FAILS*) printf '%s\\n' "$SAYS" >&2; exit "${CODE:-1}" ;; esac
"""


@dataclass(frozen=True)
class Checked:
    """What ./check-site did with a program called docker that writes down how it was called."""

    code: int
    out: str
    err: str
    calls: list[str]


@pytest.fixture
def check_site(provisioned: Made, tmp_path: Path) -> Callable[..., Checked]:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    of_all = provisioned.home / "kits" / "site-1"

    def run(
        *arguments: str, fails: str = "nothing", says: str = "", kit: Path = of_all, **more: str
    ) -> Checked:
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["sh", str(kit / "check-site"), *arguments],
            cwd="/",
            env={
                **os.environ,
                "CALLS": str(calls),
                "FAILS": fails,
                "SAYS": says,
                "GPU_SERVICE": "",
                "TARGET": "/data",
                "IMAGES": "",
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                **more,
            },
            capture_output=True,
            text=True,
        )
        said = [line.removeprefix(f"{kit}: ") for line in calls.read_text().splitlines()]
        runs = [line for line in said if line.startswith("compose run")]
        return Checked(done.returncode, done.stdout, done.stderr, runs)

    return run


@pytest.mark.parametrize(("fails", "code"), [("", 0), ("trainer", 1), ("flare", 1)])
def test_check_site_asks_both_containers_and_fails_if_one_does(
    check_site: Callable[..., Checked], fails: str, code: int
) -> None:
    done = check_site("--json", fails=f"run*site-1-{fails or 'none'}", CODE="1")
    assert done.code == code
    assert done.calls == [
        "compose run --rm --no-deps site-1-trainer check-site --json",
        "compose run --rm --no-deps site-1-flare check-site --json",
    ]


EVERYTHING, TRAINER, FLARE = "compose", "run*trainer", "run*flare"
# what Docker and Compose of several versions say; when; a word of the problem, one of the fix
ENGINE = [
    ("docker: 'compose' is not a docker command.", EVERYTHING, "no Compose v2", "2.20"),
    ("docker: unknown command: docker compose", EVERYTHING, "no Compose v2", "2.20"),
    ("unknown shorthand flag: 'q' in -q", EVERYTHING, "no Compose v2", "2.20"),
    (
        "permission denied while trying to connect to the Docker daemon socket at "
        "unix:///var/run/docker.sock: Get ...",
        *("version", "may not use Docker", "usermod -aG docker"),
    ),
    (
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is it running?",
        *("version", "does not answer", "systemctl start docker"),
    ),
    (
        "error while interpolating services.x: required variable SITE_DATA is missing a value: set",
        *("config -q", "SITE_DATA in .env is empty", "holds your images"),
    ),
    (
        'failed to read /k/.env: line 12: unexpected character "-" in variable name',
        *("config -q", "a line of .env cannot be read", "NAME=value"),
    ),
    ("Error response from daemon: No such image: noimage:1", TRAINER, "noimage:1", "docker load"),
    ("invalid reference format", TRAINER, "no name of an image", "NAME:TAG"),
    (
        "unable to find user jane: no matching entries in passwd file",
        *(TRAINER, "FEDFMS_UID or SITE_DATA_GID", "id -u"),
    ),
    ("unable to find group 0:10001: no matching ...", TRAINER, "FEDFMS_UID", "id -u"),
]


@pytest.mark.parametrize(("says", "fails", "problem", "fix"), ENGINE)
def test_check_site_says_once_in_plain_words_what_docker_says(
    check_site: Callable[..., Checked], says: str, fails: str, problem: str, fix: str
) -> None:
    done = check_site(fails=fails, says=says)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("FAIL") == done.err.count("fix:") == 1
    first, second = done.err.splitlines()[:2]
    assert first.startswith("FAIL ") and problem in first
    assert second.startswith("     fix: ") and fix in second
    assert done.err.count(says) == 1  # Docker's own words, for who can read them


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        ("/data", "is SITE_DATA in .env the right folder?"),
        ("/site/site.yml", "SITE_CONFIG"),
        ("/policy", "SITE_POLICY"),
        ("/kit", "SITE_KIT"),
        ("/checkpoints", "FEDFMS_CHECKPOINTS"),
    ],
)
def test_check_site_says_which_line_of_env_names_a_folder_that_is_not_there(
    check_site: Callable[..., Checked], target: str, fix: str
) -> None:
    says = 'invalid mount config for type "bind": bind source path does not exist: /typo'
    done = check_site(fails=TRAINER, says=f"Error response from daemon: {says}", TARGET=target)
    assert done.code == 1 and len(done.calls) == 2  # the other container can be looked at
    assert "there is no /typo on this machine; nothing was made" in done.err
    assert fix in done.err.splitlines()[1]


def test_check_site_with_a_gpu_asks_for_the_driver_first(
    check_site: Callable[..., Checked],
) -> None:
    gpu = "compose run --rm --no-deps site-1-gpu"
    done = check_site(GPU_SERVICE="site-1-gpu")
    assert done.code == 0 and done.calls[0] == gpu and len(done.calls) == 3
    ours = "error: this host has no NVIDIA driver\n  fix: install the driver"
    done = check_site(GPU_SERVICE="site-1-gpu", fails="run*site-1-gpu", says=ours)
    assert done.code == 1
    assert done.calls == [gpu, "compose run --rm --no-deps site-1-flare check-site"]
    assert done.err.startswith(ours) and "SKIP the trainer side" in done.err
    engine = 'could not select device driver "nvidia" with capabilities: [[gpu]]'
    done = check_site(GPU_SERVICE="site-1-gpu", fails=TRAINER, says=engine)
    assert done.code == 1 and len(done.calls) == 3
    assert "NVIDIA Container Toolkit" in done.err and "nvidia-ctk" in done.err


@pytest.fixture
def own_kit(provisioned: Made, tmp_path: Path) -> Path:
    """A site's unpacked kit that a test may change."""
    return shutil.copytree(provisioned.home / "kits" / "site-1", tmp_path / "site-1")


@pytest.mark.parametrize(
    ("built", "pulled", "word"), [("3f", "00", "PASS"), ("00", "3f", "PASS"), ("00", "00", "WARN")]
)
def test_check_site_says_whether_an_image_is_one_that_the_coordinator_named(
    check_site: Callable[..., Checked],
    own_kit: Path,
    built: str,
    pulled: str,
    word: str,
) -> None:
    (own_kit / "kit/bills/images.txt").write_text(f"sha256:{32 * '3f'}  fedfms:0.1.0\n")
    values = {"IMAGES": "fedfms:0.1.0", "ID": 32 * built, "IN_REGISTRY": 32 * pulled}
    done = check_site(kit=own_kit, **values)
    assert done.code == 0 and len(done.calls) == 2  # it may take part with an image of its own
    assert f"{word} image: fedfms:0.1.0" in done.err
    assert "image:" not in check_site(**values).err  # nobody named one


@pytest.mark.parametrize(
    ("digest", "listed", "said"),
    [
        ("3f", "3f", ""),
        ("4a", "3f", "WARN FEDFMS_IMAGE_DIGEST: the digest in .env is none of those"),
        ("4a", "", "WARN FEDFMS_IMAGE_DIGEST: the digest in .env is of no image that runs here"),
        ("", "3f", ""),
    ],
)
def test_check_site_compares_the_digest_of_receipts_with_the_signed_list(
    check_site: Callable[..., Checked],
    own_kit: Path,
    digest: str,
    listed: str,
    said: str,
) -> None:
    if listed:
        images = f"sha256:{32 * listed}  fedfms:0.1.0\n"
        (own_kit / "kit/bills/images.txt").write_text(images)
    if digest:
        with (own_kit / ".env").open("a") as env:
            env.write(f"FEDFMS_IMAGE_DIGEST=sha256:{32 * digest}\n")
    done = check_site(kit=own_kit, IMAGES="fedfms:0.1.0", ID=32 * "3f", IN_REGISTRY=32 * "00")
    assert done.code == 0 and len(done.calls) == 2
    assert ("IMAGE_DIGEST" in done.err) == bool(said)
    assert said in done.err


def test_check_site_stops_at_root(check_site: Callable[..., Checked]) -> None:
    says = "error: this container runs as root (user 0)\n  fix: set FEDFMS_UID"
    done = check_site(fails=TRAINER, says=says)
    assert done.code == 1 and len(done.calls) == 1 and done.err == f"{says}\n"


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
