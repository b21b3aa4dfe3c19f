"""The demo starts the very files that a kit holds; what differs is set beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedfms import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = REPOSITORY / "src/fedfms/provisioning/templates"
SITES = ("site-1", "site-2", "site-3", "site-4")


def filled(template: str, **values: str) -> str:
    text = (TEMPLATES / template).read_text()
    for name, value in {"version": __version__, **values}.items():
        text = text.replace(f"__{name.upper()}__", value)
    return text


@pytest.mark.parametrize("site", SITES)
def test_a_site_of_the_demo_is_a_hospitals_site(site: str) -> None:
    expected = filled("site/compose.yml", site=site)
    assert (REPOSITORY / "sites" / site / "compose.yml").read_text() == expected


def test_the_server_of_the_demo_is_a_coordinators_server() -> None:
    expected = filled("server/compose.yml", server_host="server", server_port="8002")
    assert (REPOSITORY / "provisioning/server/compose.yml").read_text() == expected


@pytest.mark.parametrize("site", SITES)
def test_what_the_demo_adds_is_volumes_an_order_of_starts_and_no_way_out(site: str) -> None:
    added = yaml.safe_load((REPOSITORY / "sites" / site / "demo.yml").read_text())
    assert set(added) == {"services", "volumes", "networks"}
    assert added["networks"] == {site: {"internal": True}}
    assert {key for service in added["services"].values() for key in service} == {
        "attach",
        "depends_on",
        "environment",
        "volumes",
    }
    environments = [service.get("environment") for service in added["services"].values()]
    assert environments == [{"FEDFMS_ORDER_FROM_SEED": "1"}, None]  # and no hospital's


def test_the_gpu_overlay_of_the_demo_is_that_of_each_site() -> None:
    overlay = yaml.safe_load((REPOSITORY / "docker/compose.gpu.yml").read_text())
    expected = {}
    for number, site in enumerate(SITES, start=1):
        text = filled("site/compose.gpu.yml", site=site)
        text = text.replace("${GPU_DEVICE:-0}", f"${{SITE_{number}_GPU:-0}}")
        expected.update(yaml.safe_load(text)["services"])
    assert overlay["services"] == expected


def compose_files() -> dict[str, dict[str, Any]]:
    """Every compose file of the tree and of the kits, by name."""
    found = {}
    for path in sorted(REPOSITORY.glob("**/*.yml")):
        inside = path.relative_to(REPOSITORY)
        if {".venv", "workspace", "build"} & set(inside.parts):
            continue
        values = yaml.safe_load(path.read_text())
        if isinstance(values, dict) and "services" in values:
            found[inside.as_posix()] = values
    return found


def test_no_mount_makes_a_folder_on_the_host() -> None:
    """The short form of a mount makes what it does not find, as root."""
    files = compose_files()
    assert {
        "docker-compose.yml",
        "sites/site-4/compose.yml",
        "sites/site-4/demo.yml",
        "provisioning/server/demo.yml",
        "src/fedfms/provisioning/templates/site/compose.yml",
        "src/fedfms/provisioning/templates/server/compose.yml",
    } <= set(files)
    for name, values in files.items():
        for service in values["services"].values():
            for mount in service.get("volumes", []):
                if isinstance(mount, str):  # a volume, or what is part of the checkout
                    source = mount.split(":")[0]
                    here = (REPOSITORY / name).parent / source
                    is_volume = re.fullmatch(r"[A-Za-z0-9_-]+", source)
                    assert is_volume or (source.startswith("./") and here.is_dir()), (name, mount)
                else:
                    assert mount["bind"] == {"create_host_path": False}, (name, mount)


def test_no_container_swaps_or_runs_a_file_that_it_wrote_into_memory() -> None:
    for name, values in compose_files().items():
        for service, settings in values["services"].items():
            limits = (settings.get("mem_limit"), settings.get("memswap_limit"))
            assert limits[0] == limits[1], (name, service)
            assert limits[0] or "read_only" not in settings, (name, service)  # an overlay
            for mount in settings.get("tmpfs", []):
                assert set(mount.split(":")[1].split(",")) >= {"noexec", "nosuid", "nodev"}
        for volume in values.get("volumes", {}).values():
            options = ((volume or {}).get("driver_opts") or {}).get("o")
            assert options is None or set(options.split(",")) >= {"noexec", "nosuid", "nodev"}


def test_a_site_opens_no_port_and_sees_no_socket_of_the_engine() -> None:
    text = filled("site/compose.yml", site="a")
    services = yaml.safe_load(text)["services"]
    assert not [name for name, service in services.items() if "ports" in service]
    assert "docker.sock" not in text
    assert services["a-trainer"]["network_mode"] == "none"
    assert "SITE_DATA" not in str(services["a-flare"]["volumes"])
