"""What a trainer answers when somebody asks whether it is there."""

from __future__ import annotations

import os
import time

import pytest
import torch
from trainer_process import Place, TrainerProcess

from fedfms import __version__
from fedfms.errors import TrainerError
from fedfms.trainer.announce import SLOW_FILES
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping
from fedfms.trainer.messages import Pong, Task, decode_answer, encode


def test_a_pong_comes_out_as_it_went_in() -> None:
    pong = Pong("s", "1.2", True, None, ("a", "b"), ("c",), ("fedsam",), 3, "cpu")
    assert decode_answer(encode(pong)) == pong
    broken = Pong("s", "1.2", False, "config")
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
        ("methods", ["fedprox"]),
        ("max_rounds", -1),
        ("device", "tpu"),
    ],
)
def test_a_pong_with_a_value_that_cannot_be_is_nonsense(key: str, value: object) -> None:
    import json

    line = {**json.loads(encode(Pong("s", "1", False))), key: value}
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
    place.set_site(data_root="nowhere/patient-7")
    assert ping(place.exchange).fault == "no-data-root"
    place.set_site(data_root=".", device="cuda")
    assert ping(place.exchange).fault == (None if cuda else "no-gpu")
    (place.data / "site.yml").write_text("patient-7: [")
    told = ping(place.exchange)
    assert (told.ready, told.fault, told.classes) == (False, "config", ())
    (place.policy / "privacy.json").unlink()
    assert ping(place.exchange).fault == "config"


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
