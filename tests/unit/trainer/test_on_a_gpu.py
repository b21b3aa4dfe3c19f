"""The commands and the trainer on a machine with two GPUs, as far as none is needed for it.

tests/unit/fake_cuda makes torch believe in them. It refuses what CUDA refuses, above all whatever
is asked of a device before CUDA is initialized, so that the order of the questions is tested on
every machine. Each test starts a fresh process: only there is CUDA not initialized yet.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from trainer_process import Place, TrainerProcess

from fedfms.contracts.messages import Task
from fedfms.contracts.now import SiteProgress
from fedfms.contracts.recipe import Recipe
from fedfms.errors import TaskAborted, TrainingError
from fedfms.exchange.tensors import save_tensors
from fedfms.flare.report_now import Reporter
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping

REPOSITORY = Path(__file__).resolve().parents[3]
FORMS = {"auto": 0, "cuda": 0, "cuda:1": 1}  # device in site.yml to the GPU's number


@dataclasses.dataclass
class Machine:
    """What the fake GPUs noted, and the file that makes one fail."""

    log: Path
    fault: Path
    lost: Path  # while it is there, no process can open the driver's device

    def used(self, what: str) -> set[int]:
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return {int(device) for name, device in rows if name == what}


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path / "cuda.log", tmp_path / "fault.txt", tmp_path / "lost")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests/unit/fake_cuda"))
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    monkeypatch.setenv("FAKE_CUDA_LOG", str(machine.log))
    monkeypatch.setenv("FAKE_CUDA_FAULT", str(machine.fault))
    monkeypatch.setenv("FAKE_CUDA_LOST", str(machine.lost))
    return machine


def fedfms(*arguments: object, python: object = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(python or sys.executable),
            "-c",
            "from fedfms.cli import main; main()",
            *map(str, arguments),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def settings(recipe: Recipe, **changes: object) -> list[str]:
    values = {"classes": ",".join(recipe.classes), "rounds": 1, "image_size": 64, **changes}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("device", FORMS)
def test_train_local_trains_on_the_gpu_that_the_site_names(device, gpus, place, recipe):
    place.set_site(device=device, data_root=str(place.data), workers=int(device == "cuda:1"))
    site = place.data / "site.yml"
    done = fedfms("train-local", "jobs/fedmsa", "--site", site, *settings(recipe, local_epochs=1))
    assert done.returncode == 0, done.stderr
    assert "round 1:" in done.stdout
    for what in ("image", "current", "stats", "reset"):  # its helper threads go where it is
        assert gpus.used(what) == {FORMS[device]}, what


@pytest.mark.parametrize("device", FORMS)
def test_a_trainer_trains_and_scores_on_the_gpu_that_the_site_names(
    device, gpus, place, start, train_task, global_model
):
    place.set_site(device=device)
    start()
    assert ping(place.exchange).device == "cuda"
    assert not gpus.log.exists()  # a trainer that waits takes no memory of a GPU
    trained = run_task(place.exchange, train_task, global_model)
    assert set(trained.contribution.peak_memory_bytes.values()) == {64 * 2**20}
    score = dataclasses.replace(train_task, kind="evaluate", round=3, model="final")
    assert run_task(place.exchange, score, global_model).pictures
    for what in ("image", "current", "stats", "reset"):
        assert gpus.used(what) == {FORMS[device]}, what


@pytest.mark.parametrize("device", FORMS)
def test_predict_works_on_the_gpu_that_is_named(
    device, gpus, place, tmp_path, recipe, checkpoints, global_model
):
    model = trained_folder(tmp_path / "model", recipe, global_model)
    done = fedfms(
        "predict", model, place.data / "images", tmp_path / "masks",
        "--device", device, "--checkpoints", checkpoints,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert gpus.used("image") == gpus.used("current") == {FORMS[device]}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose every process has the fake GPUs; a study hands no PYTHONPATH on."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "fake.pth").write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests/unit/fake_cuda')!r})\n"
        + "".join(f"import site; site.addsitedir({path!r})\n" for path in here)
    )
    return folder / "bin/python"


@pytest.mark.slow
def test_a_study_trains_and_scores_on_the_second_gpu(gpus, place, tmp_path, recipe, python):
    sites = tmp_path / "sites"
    for name in ("site-1", "site-2"):
        shutil.copytree(place.data, sites / name)
        text = yaml.safe_load((sites / name / "site.yml").read_text())
        text["device"] = "cuda:1"
        (sites / name / "site.yml").write_text(yaml.safe_dump(text))
    (tmp_path / "study.yml").write_text(
        yaml.safe_dump(
            {
                "title": "on a GPU",
                "sites": "sites",
                "methods": {"fedmsa": {"job": str(REPOSITORY / "jobs/fedmsa")}},
                "regimes": ["federated", "central"],
                "holdout": "none",
                "engine": "loop",
                "seeds": [0],
                "set": {
                    "classes": list(recipe.classes),
                    "rounds": 1,
                    "local_epochs": 1,
                    "image_size": 64,
                },
            }
        )
    )
    done = fedfms("study", tmp_path / "study.yml", "--output", tmp_path / "out", python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert gpus.used("image") == gpus.used("stats") == {1}


ASSERT = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
    "reported at some other API call.\nCompile with `TORCH_USE_CUDA_DSA` ..."
)


def test_a_failure_of_the_gpu_is_one_sentence_and_a_fix(
    gpus, place, tmp_path, recipe, checkpoints, global_model
):
    place.set_site(device="cuda", data_root=str(place.data))
    gpus.fault.write_text("CUDA error: no kernel image is available for execution on the device\n")
    site = place.data / "site.yml"
    done = fedfms("train-local", "jobs/fedmsa", "--site", site, *settings(recipe))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "no code for this GPU (Fake GPU has compute capability 9.0; the build:" in done.stderr
    assert "device: cpu" in done.stderr

    gpus.fault.write_text(ASSERT)
    model = trained_folder(tmp_path / "model", recipe, global_model)
    done = fedfms(
        "predict", model, place.data / "images", tmp_path / "masks", "--checkpoints", checkpoints,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.count("error:") == 2  # ours, and CUDA's own; not one for each image
    assert "device-side assert triggered\n  fix: run once with device: cpu" in done.stderr


def test_a_trainer_whose_gpu_failed_says_so_and_its_next_process_trains(
    gpus, place, start: Callable[..., TrainerProcess], train_task: Task, global_model
):
    place.set_site(device="cuda")
    trainer = start()
    gpus.fault.write_text(ASSERT)
    with pytest.raises(TrainingError) as caught:
        run_task(place.exchange, train_task, global_model)
    assert caught.value.code == "gpu-failed"
    assert trainer.process.wait(30) == 72  # whoever supervises it starts it again
    said = (place.work / "errors.log").read_text()
    assert "device-side assert triggered\n  fix:" in said and "Traceback" in said
    start()
    assert run_task(place.exchange, train_task, global_model).tensors


def health(place: Place) -> subprocess.CompletedProcess[str]:
    """What the container engine's probe of the trainer says."""
    return fedfms("health", "trainer", "--exchange", place.exchange)


def wait_for_gpu(place: Place, state: str) -> None:
    deadline = time.monotonic() + 30
    while (told := ping(place.exchange).gpu) != state:
        assert time.monotonic() < deadline, told
        time.sleep(0.2)


def test_a_trainer_that_lost_its_gpu_is_not_healthy(gpus, place, start, long_task, global_model):
    """Its process goes on computing with what it has opened, and nobody else can."""
    place.set_site(device="cuda")
    start()
    wait_for_gpu(place, "present")
    assert "answers, with its GPU, waiting" in health(place).stdout
    gpus.lost.touch()
    wait_for_gpu(place, "lost")
    probe = health(place)
    assert probe.returncode == 1
    assert "has lost its GPU: /dev/nvidiactl cannot be opened (Operation not perm" in probe.stderr
    assert "--force-recreate site-1-trainer" in probe.stderr
    heard = []  # the same of a round that runs meanwhile, on its way to the server
    first = SiteProgress(kind="train", round=0, phase="start")
    with Reporter(heard.append, place.exchange, first) as reporter, pytest.raises(TaskAborted):
        run_task(
            place.exchange,
            long_task,
            global_model,
            on_progress=reporter.on_progress,
            aborted=lambda: bool(heard) and heard[-1].gpu == "lost",
        )
    assert heard[-1].gpu == "lost"
    gpus.lost.unlink()
    wait_for_gpu(place, "present")
    assert health(place).returncode == 0


def test_a_trainer_on_the_processor_has_no_gpu_to_lose(gpus, place, start):
    place.set_site(device="cpu")
    start()
    assert ping(place.exchange).gpu == "none"  # and whatever the driver says is nobody's business
    gpus.lost.touch()
    assert health(place).returncode == 0
    assert ping(place.exchange).gpu == "none"


def trained_folder(folder: Path, recipe: Recipe, tensors: dict) -> Path:
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    save_tensors(folder / "global_model.safetensors", tensors, "fp32")
    return folder
