"""`fedfms check-site` in the container with the images: whatever is broken, that line fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from site_kits import FEDFMS, in_namespace

from fedfms.contracts.recipe import BACKBONES
from fedfms.errors import FedfmsError
from fedfms.local.synthetic import STYLES, write_phantom_site
from fedfms.preflight.items import Item, Worry
from fedfms.preflight.machine import (
    MachineError,
    check_capability,
    check_disk,
    check_driver,
    check_memory,
)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "site"
    write_phantom_site(folder, next(iter(STYLES)), cases=18, slices=1)
    return folder


@pytest.fixture
def site(phantoms: Path, tmp_path: Path) -> Path:
    """A folder with data/, site.yml, policy/, checkpoints/, work/ and exchange/."""
    shutil.copytree(phantoms, tmp_path / "data")
    shutil.move(tmp_path / "data" / "site.yml", tmp_path / "site.yml")
    shutil.move(tmp_path / "data" / "policy", tmp_path / "policy")
    for name in ("checkpoints", "work", "exchange"):
        (tmp_path / name).mkdir()
    return tmp_path


Check = Callable[..., list[Item]]


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    """Runs the command as often as told, in user, mount and network namespaces of its own."""
    if subprocess.run(["unshare", "-rmn", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine makes no namespaces for this user")
    with subprocess.Popen(
        ["unshare", "-rmn", sys.executable, str(Path(__file__).parent / "many_checks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def check(site: Path, runner: subprocess.Popen[str]) -> Check:
    """The check in a place like the trainer's container: no network, images read-only."""

    def run(*more: str, mounts: Sequence[str] = (), **environment: str) -> list[Item]:
        case = {
            "mounts": [*usual_mounts(site), *mounts],
            "arguments": [*arguments(site), *more],
            "environment": environment,
        }
        runner.stdin.write(json.dumps(case) + "\n")
        runner.stdin.flush()
        answer = json.loads(runner.stdout.readline())
        items = [Item(**values) for values in json.loads(answer["output"])]
        assert answer["code"] == int(any(item.status == "FAIL" for item in items))
        return items

    return run


def usual_mounts(site: Path) -> list[str]:
    return [
        f"mount --bind {site / 'data'} {site / 'data'}",
        f"mount -o remount,bind,ro {site / 'data'}",
        f"mount -t tmpfs -o size=2g none {site / 'exchange'}",
    ]


def arguments(site: Path) -> list[str]:
    return [
        *("check-site", "--role", "trainer", "--json", "--config", str(site / "site.yml")),
        *("--policy", str(site / "policy"), "--data", str(site / "data")),
        *("--checkpoints", str(site / "checkpoints"), "--work", str(site / "work")),
        *("--exchange", str(site / "exchange")),
    ]


def fails(items: list[Item], code: str, fix: str) -> list[Item]:
    failed = [item for item in items if item.status == "FAIL"]
    assert {item.code for item in failed} == {code}, failed
    assert re.search(fix, failed[0].fix), failed[0].fix
    return failed


def test_a_site_in_order_passes_every_line(site, check):
    items = check()
    statuses = {item.code: item.status for item in items}
    assert statuses.pop("gpu") == "SKIP"  # nobody asked for one
    assert set(statuses.values()) == {"PASS"}, items


def test_no_site_yml(site, check):
    (site / "site.yml").unlink()
    items = check()
    fails(items, "site-yml", "SITE_CONFIG")
    assert {item.code for item in items if item.status == "SKIP"} == {
        *("data", "patients", "gpu", "shared-memory")
    }


def test_a_site_yml_with_a_mistake(site, check):
    path = site / "site.yml"
    path.write_text(path.read_text().replace("images:", "image:"))
    fails(check(), "site-yml", "did you mean images")


def test_no_policy(site, check):
    (site / "policy" / "privacy.json").unlink()
    fails(check(), "privacy", "SITE_POLICY")


def test_a_method_that_is_not_installed_is_pointed_out(site, check):
    path = site / "policy" / "privacy.json"
    path.write_text(json.dumps({"methods": ["fedmsa", "fedmas"]}))
    (item,) = [item for item in check() if item.code == "privacy"]
    assert item.status == "WARN"
    assert "fedmas, and installed here are" in item.text


def test_a_site_with_too_few_patients_reads_so_before_its_first_round(site, check):
    path = site / "policy" / "privacy.json"
    path.write_text(json.dumps({"min_training_patients": 14}))
    (item,) = [item for item in check() if item.code == "patients"]
    assert item.status == "WARN"  # it may score
    for part in ("nothing is trained here", "14 patients (min_training_patients)", "13 are there"):
        assert part in item.text
    assert "lower min_training_patients in privacy.json" in item.fix
    path.write_text(json.dumps({"patient_epsilon": 8.0, "delta": 0.1}))
    (item,) = [item for item in check() if item.code == "patients"]
    assert item.status == "WARN" and "delta is 0.1: of 13 patients" in item.text


def test_the_data_in_one_line_of_numbers(site, check):
    items = {item.code: item for item in check()}
    assert items["data"].text.startswith("18 cases; 18 patients, 13 to train and 5 to validate")
    path = site / "site.yml"
    path.write_text(path.read_text() + "min_cases: 6\n")
    read, finding = [item for item in check() if item.code in ("data", "data-read")]
    assert (read.code, read.status, read.text) == ("data-read", "PASS", items["data"].text)
    assert (finding.code, finding.status) == ("data", "WARN")
    assert finding.reason == "few-validation-cases"


def test_every_problem_of_the_data_has_its_line(site, check):
    next(iter(sorted((site / "data" / "labels").iterdir()))).unlink()
    next(iter(sorted((site / "data" / "images").iterdir(), reverse=True))).write_bytes(b"")
    failed = fails(check(), "data", "")
    assert len({item.reason for item in failed}) == 2


def test_a_class_of_the_job_that_the_site_does_not_have(site, check):
    fails(check("--classes", "lesion,vessel"), "data", "vessel|not_annotated")


def test_data_that_can_be_written(site, check):
    remount = f"mount -o remount,bind,rw {site / 'data'}"
    fails(check(mounts=(remount,)), "data-read-only", "read_only: true")


def test_a_container_with_a_network(site):
    items = in_namespace("-rm", usual_mounts(site), arguments(site))
    if not [name for name in os.listdir("/sys/class/net") if name != "lo"]:  # noqa: PTH208
        pytest.skip("this machine has no network")
    fails(items, "network", "network_mode: none")


def test_a_gpu_that_is_not_there(site, check):
    fails(check(FEDFMS_REQUIRE_GPU="1", CUDA_VISIBLE_DEVICES=""), "gpu", "nvidia-smi")
    path = site / "site.yml"
    path.write_text(path.read_text() + "device: cuda\n")
    fails(check(CUDA_VISIBLE_DEVICES=""), "gpu", "device: cpu")


def test_a_checkpoint_that_is_another_file(site, check):
    (site / "checkpoints" / BACKBONES["vit_b"].file_name).write_bytes(b"not SAM")
    [item] = fails(check(), "checkpoints", "sha256sum")
    assert hashlib.sha256(b"not SAM").hexdigest() in item.text


@pytest.mark.parametrize(
    ("folder", "code", "fix"),
    [("work", "work-disk", "free room"), ("exchange", "exchange-size", "EXCHANGE_SIZE")],
)
def test_a_small_volume(site, folder, code, fix, check):
    fails(check(mounts=(f"mount -t tmpfs -o size=10m none {site / folder}",)), code, fix)


@pytest.mark.parametrize("folder", ["work", "exchange"])
def test_a_volume_that_cannot_be_written(site, folder, check):
    read_only = f"mount -t tmpfs -o ro none {site / folder}"
    items = check(mounts=(read_only,))
    fails(items, folder, "FEDFMS_UID")


def test_memory_for_the_largest_backbone(tmp_path):
    assert "needed" in check_memory(None, on_gpu=False)
    with (tmp_path / BACKBONES["vit_h"].file_name).open("wb") as file:
        file.truncate(2**43)  # a hole: no machine has so much memory
    with pytest.raises(FedfmsError, match="may use") as caught:
        check_memory(tmp_path, on_gpu=True)
    assert "TRAINER_MEMORY=" in caught.value.fix


def test_memory_for_the_images_and_labels():
    assert "1.5 GiB needed, 512 MiB of it for images and labels" in check_memory(
        None, on_gpu=True, data=2**29
    )
    with pytest.raises(FedfmsError, match="GiB of it for images and labels") as caught:
        check_memory(None, on_gpu=True, data=2**43)
    assert "TRAINER_MEMORY=8193g" in caught.value.fix


def test_shared_memory_for_worker_processes(site, check):
    small = ("mount -t tmpfs -o size=64m none /dev/shm",)
    items = {item.code: item for item in check(mounts=small)}
    assert items["shared-memory"].status == "PASS"  # without workers nothing passes through it
    path = site / "site.yml"
    path.write_text(path.read_text() + "workers: 2\n")
    fails(check(mounts=small), "shared-memory", "TRAINER_SHM=1g in .env, or workers: 0")
    assert "FAIL" not in {item.status for item in check()}


def test_an_exchange_for_the_largest_backbone(site, check):
    """With ViT-H's checkpoint there, FedSAM needs more than the usual volume; FedMSA does not."""
    with (site / "checkpoints" / BACKBONES["vit_h"].file_name).open("wb") as file:
        file.truncate(2**30)
    items = {item.code: item for item in check()}
    assert items["exchange-size"].status == "WARN"
    assert "EXCHANGE_SIZE=3g" in items["exchange-size"].fix


def test_a_host_without_a_driver(tmp_path):
    done = subprocess.run([*FEDFMS, "gpu-check"], capture_output=True, text=True, timeout=60)
    if Path("/proc/driver/nvidia/version").exists():
        assert done.returncode == 0 and "NVRM" in done.stdout
    else:
        assert done.returncode == 1
        assert "no NVIDIA driver" in done.stderr and "fix:" in done.stderr


@pytest.mark.parametrize(
    ("driver", "cuda", "needs"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "13.0", 580),
        ("NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "13.0", 580),
        ("NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2", "12.6", 525),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "13.0", None),
        ("NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "12.6", None),
        ("NVIDIA UNIX Open Kernel Module for x86_64  1000.10  Release Build", "13.0", None),
        ("NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "14.0", None),
    ],
)
def test_a_driver_is_compared_with_what_the_images_cuda_needs(tmp_path, driver, cuda, needs):
    version = tmp_path / "version"
    version.write_text(f"NVRM version: {driver}\nGCC version:\n")
    if needs is None:
        assert check_driver(cuda, version).startswith("NVRM version: NVIDIA")
        return
    with pytest.raises(FedfmsError, match=rf"CUDA {cuda}, which needs {needs} or later") as caught:
        check_driver(cuda, version)
    assert "newer driver" in caught.value.fix and "TORCH=cu126" in caught.value.fix


def test_a_driver_of_windows_is_not_called_missing(tmp_path):
    kernel = tmp_path / "osrelease"
    kernel.write_text("5.15.167.4-microsoft-standard-WSL2\n")
    assert "Windows" in check_driver("13.0", tmp_path / "none", kernel)
    kernel.write_text("6.1.0-28-amd64\n")
    with pytest.raises(FedfmsError, match="no NVIDIA driver"):
        check_driver("13.0", tmp_path / "none", kernel)


def test_an_image_for_processors_is_not_one_for_gpus(tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n")
    with pytest.raises(FedfmsError, match="for processors only") as caught:
        check_driver(None, version)
    assert "FEDFMS_GPU_IMAGE" in caught.value.fix


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "kernels", "works"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((6, 1), CUDA_13, False),  # GTX 10xx, P40
        ((6, 0), CUDA_13, False),  # P100
        ((7, 5), CUDA_13, True),  # T4
        ((8, 9), CUDA_13, True),  # L4: by the code for 8.0
        ((13, 0), CUDA_13, True),  # by the code that the driver translates
        ((6, 1), CUDA_12, True),
        ((12, 0), CUDA_12, False),  # newer than the build, and nothing to translate
        ((7, 0), [], True),  # a build that does not say
    ],
)
def test_a_gpu_is_compared_with_what_torch_is_made_for(capability, kernels, works):
    if works:
        check_capability("this GPU", capability, kernels)
        return
    with pytest.raises(FedfmsError, match="compute capability") as caught:
        check_capability("this GPU", capability, kernels)
    assert "device: cpu" in caught.value.fix


def test_an_empty_folder_of_images_is_probably_the_wrong_one(site, check):
    shutil.rmtree(site / "data")
    (site / "data").mkdir()
    fails(check(), "data-folder", "is SITE_DATA in .env the right folder")


def test_a_trainer_that_must_have_a_gpu_does_not_start_without(site):
    done = subprocess.run(
        [
            *(*FEDFMS, "trainer", "--site", "site-1", "--config", str(site / "site.yml")),
            *("--policy", str(site / "policy"), "--exchange", str(site / "exchange")),
            *("--work", str(site / "work")),
        ],
        env={**os.environ, "FEDFMS_REQUIRE_GPU": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "started with the GPU overlay" in done.stderr and "COMPOSE_FILE" in done.stderr


def test_a_dry_run_trains_on_phantoms_and_leaves_nothing(tmp_path):
    job = Path(__file__).parents[3] / "jobs" / "fedmsa"
    done = subprocess.run(
        [*FEDFMS, "dry-run", str(job)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"Dice (\d\.\d+) before and (\d\.\d+)", done.stdout)[0])
    assert after > before > 0.1
    assert [path.name for path in tmp_path.iterdir() if "fedfms" in path.name] == []


def test_a_line_without_a_traceback_for_what_nobody_foresaw(check):
    from fedfms.preflight.items import Checklist, NotHere

    def broken() -> str:
        return json.loads("{")

    def worry() -> str:
        raise Worry("hm", "look")

    def absent() -> str:
        raise NotHere("not asked for")

    checks = Checklist()
    checks.check("a", broken)
    checks.check("b", lambda: "fine", needs=["a"])
    checks.check("c", worry)
    checks.check("d", lambda: "fine", needs=["c"])
    checks.check("e", absent)
    assert [item.status for item in checks.items] == ["FAIL", "SKIP", "WARN", "PASS", "SKIP"]
    assert checks.items[0].reason == "unexpected" and "JSONDecodeError" in checks.items[0].text


def test_the_private_folder_needs_room_for_prepared_images(tmp_path):
    assert "1.0 GiB needed" in check_disk(tmp_path)
    with pytest.raises(MachineError) as caught:
        check_disk(tmp_path, data=2**60)
    assert caught.value.code == "disk-full"
    assert "for prepared images and labels" in caught.value.problem
    assert "cache in site.yml" in caught.value.fix
