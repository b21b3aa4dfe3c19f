"""What a trainer answers when somebody asks whether it is there."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from trainer_process import Place, TrainerProcess

from fedfms import __version__
from fedfms.contracts.announcement import Announcement, Slicing
from fedfms.contracts.messages import Task, decode_answer, encode
from fedfms.errors import TrainerError
from fedfms.trainer.announce import SLOW_FILES
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping

SLICING = dataclasses.asdict(Slicing("axial", "gray", "range:0:255"))


def test_a_pong_comes_out_as_it_went_in() -> None:
    pong = Announcement("s", "1.2", True, None, ("a", "b"), ("c",), ("fedsam",), 3, "cpu")
    assert decode_answer(encode(pong)) == pong
    sliced = dataclasses.replace(pong, slicing=Slicing("axial", "gray", "range:0:255", (3, 1, 1)))
    assert decode_answer(encode(sliced)) == sliced
    broken = Announcement("s", "1.2", False, "config")
    assert decode_answer(encode(broken)) == broken
    assert (pong.ready, broken.ready) == (True, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fault", "a file.nii.gz"),
        ("fault", 3),
        ("classes", ["/data/x.nii"]),
        ("classes", "ab"),
        ("classes", ["c"] * 1001),
        ("methods", ["fed prox"]),
        ("max_rounds", -1),
        ("device", "tpu"),
        ("overlapping", "ab"),
        ("overlapping", [["disc"]]),
        ("overlapping", [["disc", "/data/x.nii"]]),
        ("slicing", "axial"),
        ("slicing", {"plane": "axial"}),
        ("slicing", {**SLICING, "plane": "a file.nii"}),
        ("slicing", {**SLICING, "intensity": "percentile:a:b"}),
        ("slicing", {**SLICING, "spacing_mm": [1, 1]}),
        ("slicing", {**SLICING, "spacing_mm": [1, 1, -1]}),
        ("slicing", {**SLICING, "spacing_mm": [1, 1, "Jane Doe"]}),
    ],
)
def test_a_pong_with_a_value_that_cannot_be_is_nonsense(key: str, value: object) -> None:
    import json

    line = {**json.loads(encode(Announcement("s", "1", False))), key: value}
    with pytest.raises(TrainerError) as error:
        decode_answer(json.dumps(line).encode())
    assert error.value.code == "nonsense"


def test_the_trainer_says_what_its_files_say_now(place: Place, start) -> None:
    start()
    cuda = torch.cuda.is_available()
    told = ping(place.exchange)
    assert (told.site, told.version, told.busy, told.fault) == ("site-1", __version__, False, None)
    assert told.device == ("cuda" if cuda else "cpu")
    place.set_policy(methods=["fedsam"], max_rounds=9)
    place.set_site(classes={"disc": [1]}, not_annotated=["cup"])
    told = ping(place.exchange)
    assert (told.methods, told.max_rounds) == (("fedsam",), 9)
    assert (told.classes, told.not_annotated) == (("disc",), ("cup",))
    assert told.overlapping == ()
    place.set_site(classes={"disc": [1, 2], "cup": [2], "rim": [1]}, not_annotated=[])
    overlapping = {frozenset(pair) for pair in ping(place.exchange).overlapping}
    assert overlapping == {frozenset({"disc", "cup"}), frozenset({"disc", "rim"})}
    place.set_site(data_root="nowhere/patient-7")
    assert ping(place.exchange).fault == "no-data-root"
    place.set_site(data_root=".", device="cuda")
    assert ping(place.exchange).fault == (None if cuda else "no-gpu")
    (place.data / "site.yml").write_text("patient-7: [")
    told = ping(place.exchange)
    assert (told.ready, told.fault, told.classes) == (False, "config", ())
    (place.policy / "privacy.json").unlink()
    assert ping(place.exchange).fault == "config"


def told_spacing(place: Place, seconds: float = 20) -> tuple[float, ...] | None:
    """What the trainer tells once it has looked; None if it does not within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if spacing := ping(place.exchange).slicing.spacing_mm:
            return spacing
        time.sleep(0.1)
    return None


def write_volumes(folder: Path, spacings: list[tuple[float, float, float]]) -> None:
    """Volumes of 6 x 8 x 4 voxels; spacings in mm from left to right, back to front, foot to head.

    What the voxels hold does not matter here, only that it is not constant.
    """
    for kind in ("images", "labels"):
        (folder / kind).unlink()
        (folder / kind).mkdir()
        for number, spacing in enumerate(spacings):
            voxels = np.arange(6 * 8 * 4, dtype=np.uint8).reshape(6, 8, 4)
            image = nibabel.Nifti1Image(voxels if kind == "images" else voxels % 2, None)
            image.header.set_xyzt_units("mm")
            image.set_sform(np.diag([*spacing, 1.0]), 1)
            nibabel.save(image, folder / kind / f"anna-{number}.nii.gz")


def test_the_trainer_says_how_slices_are_made_and_roughly_how_far_voxels_are_apart(
    place: Place, start
) -> None:
    # left-right, back-front, foot-head; one scanner of its own among them
    write_volumes(place.data, [(0.712, 0.712, 3.0)] * 3 + [(0.3, 0.3, 9.0)] * 2)
    place.set_site(plane="axial", channels="gray", min_cases=3, patient=None, format="nifti")
    place.set_site(images="images/*.nii.gz", labels="labels/*.nii.gz")
    place.set_site(intensity={"rule": "window", "center": 40, "width": 400})
    start()
    assert told_spacing(place) == (3.0, 0.71, 0.71)  # the median, of two digits
    told = ping(place.exchange).slicing
    assert (told.plane, told.channels, told.intensity) == ("axial", "gray", "window:40:400")
    place.set_site(plane="sagittal", channels="neighbours")
    assert told_spacing(place) == (0.71, 3.0, 0.71)
    place.set_site(min_cases=6)  # there are five
    assert told_spacing(place, 3) is None
    place.set_site(min_cases=1)
    place.set_policy(min_cases=6)
    assert told_spacing(place, 3) is None


def test_pictures_have_neither_plane_nor_spacing(place: Place, start) -> None:
    place.set_site(format="image", images="images/*.png", labels="labels/*.png")
    start()
    told = ping(place.exchange).slicing
    assert (told.plane, told.spacing_mm) == (None, None)


def test_files_that_cannot_be_read_in_time_do_not_hold_up_a_ping(place: Place, start) -> None:
    (place.data / "site.yml").unlink()
    os.mkfifo(place.data / "site.yml")  # to read it blocks, as a dead network share does
    trainer: TrainerProcess = start()
    for _ in range(2):
        at = time.monotonic()
        assert ping(place.exchange).fault == SLOW_FILES
        assert time.monotonic() - at < 3
    trainer.kill(15)
    assert trainer.process.wait(10) == 0


def test_a_job_that_requires_a_gpu_does_not_run_on_a_processor(
    place: Place, start, train_task: Task, global_model
) -> None:
    import dataclasses

    from fedfms.errors import TrainingError

    place.set_site(device="cpu")
    start()
    recipe = dataclasses.replace(train_task.recipe, require_gpu=True)
    for kind, model in (("train", "round"), ("evaluate", "final")):
        task = dataclasses.replace(train_task, recipe=recipe, kind=kind, model=model)
        with pytest.raises(TrainingError) as error:
            run_task(place.exchange, task, global_model)
        assert error.value.code == "no-gpu"
    assert "requires a GPU" in (place.work / "errors.log").read_text()
    assert not (place.work / "scores").exists()  # nothing was computed
    assert run_task(place.exchange, train_task, global_model).tensors
