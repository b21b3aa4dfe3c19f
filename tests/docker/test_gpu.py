"""GPUs without a GPU: what compose would reserve, and how the start fails where there is none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from containers import Project, checkout, docker
from hospitals import fedfms

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

OVERLAY = ("docker-compose.yml", "docker/compose.gpu.yml")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("clone") / "fedfms")


@pytest.fixture
def demo(image: str, clone: Path) -> Iterator[Project]:
    # the tests have no CUDA image; the one for the CPU has the same roles
    environment = {"FEDFMS_IMAGE": image, "FEDFMS_GPU_IMAGE": image, "SITE_2_GPU": "GPU-7f3a"}
    project = Project(clone, "fedfms-gpu", environment, OVERLAY)
    yield project
    project.down()


def reserved(config: str) -> dict[str, list[str]]:
    services = yaml.safe_load(config)["services"]
    found = {}
    for name, service in services.items():
        resources = service.get("deploy", {}).get("resources", {})
        for device in resources.get("reservations", {}).get("devices", []):
            assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
            found[name] = device["device_ids"]
    return found


def test_without_the_overlay_no_gpu_is_asked_for(demo: Project) -> None:
    plain = Project(demo.folder, demo.name, demo.environment)
    assert reserved(plain.run("config").stdout) == {}


def test_the_overlay_reserves_each_sites_own_gpu(demo: Project) -> None:
    assert reserved(demo.run("config").stdout) == {
        "site-1-trainer": ["0"],
        "site-2-trainer": ["GPU-7f3a"],
        "site-3-trainer": ["0"],
        "site-4-trainer": ["0"],
    }
    demo.run("create")
    asked = demo.containers()["site-2-trainer"]["HostConfig"]["DeviceRequests"]
    assert [(one["Driver"], one["DeviceIDs"]) for one in asked] == [("nvidia", ["GPU-7f3a"])]


def test_a_kit_reserves_the_device_that_its_env_names(engine: None, tmp_path: Path) -> None:
    fedfms("new-site", "clinic", tmp_path / "clinic")
    kit = Project(tmp_path / "clinic", "fedfms-gpu-kit")
    with (kit.folder / ".env").open("a") as env:
        env.write(f"SITE_DATA={tmp_path}\n")
    assert reserved(kit.run("config").stdout) == {}
    with (kit.folder / ".env").open("a") as env:
        env.write("COMPOSE_FILE=compose.yml:compose.gpu.yml\nGPU_DEVICE=3\n")
    config = kit.run("config").stdout
    assert reserved(config) == {"clinic-trainer": ["3"]}
    trainer = yaml.safe_load(config)["services"]["clinic-trainer"]
    assert trainer["environment"]["FEDFMS_REQUIRE_GPU"] == "1"


def test_without_a_gpu_the_start_fails_and_says_what_is_missing(demo: Project) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    done = demo.run("up", "-d", "site-1-trainer", check=False)
    assert done.returncode != 0
    assert "site-1-gpu" in done.stdout
    said = demo.logs("site-1-gpu")
    assert "NVIDIA" in said and "fix:" in said
    state = demo.containers()["site-1-trainer"]["State"]
    assert state["Status"] == "created", json.dumps(state)


def test_a_trainer_that_must_have_a_gpu_does_not_start_on_a_cpu(demo: Project) -> None:
    plain = Project(demo.folder, demo.name, demo.environment)
    done = plain.run(
        *("run", "--rm", "--no-deps", "-e", "FEDFMS_REQUIRE_GPU=1", "site-1-trainer", "trainer"),
        check=False,
        seconds=120,
    )
    assert done.returncode == 2
    assert "GPU" in done.stdout and "fix:" in done.stdout


@pytest.mark.gpu
def test_an_image_for_gpus_has_its_kernels_where_nothing_can_be_written_or_compiled(
    engine: None,
) -> None:
    image = os.environ.get("FEDFMS_TEST_CUDA_IMAGE")
    if not image:
        pytest.skip("FEDFMS_TEST_CUDA_IMAGE names no image that was built with TORCH=cuda")
    code = """
import shutil, sys, torch
sys.modules["triton"] = None  # an import of it would be an error
assert not any(map(shutil.which, ("cc", "gcc", "clang")))
from fedfms.models.gpu import kernels
found = [
    kernels.code_of(kernel, capability)
    for capability in kernels.CAPABILITIES
    for kernel in kernels.shipped_kernels(capability)
]
assert all(code.cubin[:4] == b"\\x7fELF" for code in found)
print(len(found))
"""
    done = docker(
        *("run", "--rm", "--read-only", "--network", "none", "--cap-drop", "ALL"),
        *("--tmpfs", "/tmp:noexec", "--tmpfs", "/home/fedfms:noexec"),
        *("--entrypoint", "python", image, "-c", code),
    )
    assert done.strip() == "156"
