"""Kits that do not start: turned by `nvflare deploy prepare`, or of another format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from project_files import SERVER, Made

from fedfms import __version__
from fedfms.errors import ConfigError
from fedfms.flare.internals.state import CertificateState
from fedfms.kits.about import KIT_FORMAT
from fedfms.kits.checksums import write_sums
from fedfms.preflight.kit import check_kit

RUNTIMES = {
    "Docker": "runtime: docker\nparent: {docker_image: 'fedfms:0.1.0'}\n",
    "Kubernetes": "runtime: k8s\nparent: {docker_image: 'fedfms:0.1.0'}\n",
    "Slurm": "runtime: slurm\njob_launcher: {sandbox: none, python_path: /usr/bin/python3}\n",
}
START_AS_IT_CAME = "start the kit as it came from fedfms provision, with fedfms server or"


def prepare(kit: Path, runtime: str, folder: Path) -> Path:
    """What FLARE's own command makes of a kit."""
    (folder / "config.yaml").write_text(RUNTIMES[runtime])
    subprocess.run(
        [
            *(sys.executable, "-m", "nvflare.cli", "deploy", "prepare", str(kit)),
            *("--output", str(folder / "turned"), "--config", str(folder / "config.yaml")),
        ],
        env={**os.environ, "HOME": str(folder)},
        check=True,
        capture_output=True,
    )
    return folder / "turned"


def call(*arguments: str, program: str = "fedfms") -> subprocess.CompletedProcess[str]:
    start = {"fedfms": ("-c", "from fedfms.cli import main; main()"), "flare": ("-m",)}[program]
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=100
    )


# --------------------------------------------------------------------------------------- turned


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("name", "role"), [("site-1", "client"), (SERVER, "server")])
def test_a_kit_that_deploy_prepare_turned_is_refused_in_one_sentence(
    provisioned: Made, tmp_path: Path, runtime: str, name: str, role: str
) -> None:
    turned = prepare(provisioned.kit(name), runtime, tmp_path)
    assert not (turned / "local" / "resources.json").exists()  # with what protects the site
    with pytest.raises(ConfigError, match=f"turned the kit in .* for {runtime}, which") as caught:
        check_kit(turned, role)
    assert caught.value.code == "kit-turned"
    assert caught.value.fix.startswith(START_AS_IT_CAME)
    check_kit(provisioned.kit(name), role)  # the kit itself is as it was


def test_the_command_of_a_role_and_check_site_refuse_a_turned_kit(
    provisioned: Made, tmp_path: Path
) -> None:
    turned = prepare(provisioned.kit("site-1"), "Docker", tmp_path)
    places = []
    for name in ("policy", "workspace", "exchange"):
        (tmp_path / name).mkdir()
        places += [f"--{name}", str(tmp_path / name)]
    done = call("flare", "--kit", str(turned), *places[:4])
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: nvflare deploy prepare turned the kit")
    assert not list((tmp_path / "workspace").iterdir())
    done = call("check-site", "--role", "flare", "--json", "--kit", str(turned), *places)
    assert "nvflare deploy prepare turned the kit" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "program", "options"),
    [
        ("site-1", "client.client_train", ["-s", "fed_client.json", "--set", "uid=site-1"]),
        (SERVER, "server.server_train", ["-s", "fed_server.json", "--set"]),
    ],
)
def test_what_deploy_prepare_starts_ends_with_that_sentence_before_it_connects(
    provisioned: Made, tmp_path: Path, name: str, program: str, options: list[str]
) -> None:
    """Its start scripts call FLARE's own programs, past everything of ours but one component."""
    turned = prepare(provisioned.kit(name), "Kubernetes", tmp_path)
    shutil.rmtree(turned / "helm_chart")  # a pod has startup/ and local/ alone
    done = call(
        f"nvflare.private.fed.app.{program}",
        *("-m", str(turned), *options, "secure_train=true", "config_folder=config", "org=hospital"),
        program="flare",
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line]
    assert said[-2].startswith("error: nvflare deploy prepare turned the kit in this workspace")
    assert START_AS_IT_CAME in said[-1]
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------- other formats


def of_format(made: Made, name: str, number: int | None) -> Path:
    """A kit of the real provisioning with another number or none, signed as it was."""
    kit = made.kit(name)
    values = json.loads((kit / "fedfms.json").read_text())
    assert values.pop("kit_format") == KIT_FORMAT
    if number is not None:
        values["kit_format"] = number
    (kit / "fedfms.json").write_text(json.dumps(values))
    write_sums(kit, CertificateState.read(made.state).root_key)
    return kit


@pytest.mark.parametrize(("name", "role"), [("site-1", "client"), (SERVER, "server")])
def test_a_kit_from_before_kits_had_a_format_must_be_made_again(
    made: Made, name: str, role: str
) -> None:
    kit = of_format(made, name, None)
    with pytest.raises(ConfigError) as caught:
        check_kit(kit, role)
    assert caught.value.code == "kit-format"
    assert caught.value.problem == (
        f"the kit in {kit} was made by fedfms {__version__} in format 1, and this version of "
        f"fedfms ({__version__}) uses kits of format {KIT_FORMAT}"
    )
    assert caught.value.fix.startswith("it must be made again: ask the coordinator to run fedfms")


def test_a_kit_of_a_later_format_asks_for_the_version_that_knows_it(made: Made) -> None:
    with pytest.raises(ConfigError, match=f"format {KIT_FORMAT + 1}, and this") as caught:
        check_kit(of_format(made, "site-1", KIT_FORMAT + 1), "client")
    assert caught.value.fix == "install the version of fedfms that the coordinator uses"


def test_the_command_of_a_role_and_check_site_tell_it_of_an_old_kit(
    made: Made, tmp_path: Path
) -> None:
    kit = of_format(made, "site-1", None)
    places = []
    for name in ("policy", "workspace", "exchange"):
        (tmp_path / name).mkdir()
        places += [f"--{name}", str(tmp_path / name)]
    done = call("flare", "--kit", str(kit), *places[:4])
    assert done.returncode == 1 and "it must be made again" in done.stderr
    done = call("check-site", "--role", "flare", "--json", "--kit", str(kit), *places)
    assert "it must be made again" in done.stdout + done.stderr


def test_provisioning_once_more_makes_an_old_kit_new_under_the_same_certificate(
    made: Made, run: Callable[..., object]
) -> None:
    kit = of_format(made, "site-1", None)
    before = (kit / "startup" / "client.crt").read_bytes()
    run()
    assert check_kit(kit, "client").about.kit_format == KIT_FORMAT
    assert (kit / "startup" / "client.crt").read_bytes() == before
