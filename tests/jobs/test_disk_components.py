"""The server's components on a disk that is full, and on one that cannot be written."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import JOBS
from flare_context import Engine
from nvflare.apis.fl_constant import FLContextKey
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.tensors import load_tensors
from fedfms.flare.job import result_folder
from fedfms.flare.persistor import SafeTensorsPersistor
from fedfms.flare.run_state import NOTED
from small_disk import small_disk

MODEL = {"w": torch.arange(2.0**20)}  # 4 MiB


class Heard:
    """Notes, as the recorder gets them."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.waits, self.goes_on = threading.Event(), threading.Event()

    def handle_event(self, event_type: str, fl_ctx) -> None:
        if event_type == NOTED:
            note = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
            self.notes.append((note.kind, note.text))
            (self.waits if note.kind == "waits" else self.goes_on).set()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "60m") as folder:
        yield folder


@pytest.fixture
def engine(disk: Path) -> Engine:
    engine = Engine(disk, "server", {"persistor": SafeTensorsPersistor(), "heard": Heard()})
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    (engine.config_folder() / "recipe.json").write_text(recipe.to_json())
    return engine


def save(engine: Engine) -> None:
    with engine.new_context() as fl_ctx:
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
        engine.components["persistor"].save_model(make_model_learnable(MODEL, {}), fl_ctx)


def fill(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    with filler.open("wb") as file:
        free = subprocess.check_output(["stat", "-f", "-c", "%a %S", disk]).split()
        file.write(b"\0" * (int(free[0]) * int(free[1]) - leave))
    return filler


def test_a_model_that_does_not_fit_waits_for_room(engine: Engine, disk: Path) -> None:
    heard: Heard = engine.components["heard"]
    filler = fill(disk, 2 * 2**20)
    saving = threading.Thread(target=save, args=(engine,))
    saving.start()
    assert heard.waits.wait(20)
    assert saving.is_alive()
    filler.unlink()
    saving.join(20)
    assert [kind for kind, _ in heard.notes] == ["waits", "goes_on"]
    assert str(disk) in heard.notes[0][1] and "It goes on by itself" in heard.notes[0][1]
    with engine.new_context() as fl_ctx:
        folder = result_folder(fl_ctx)
    assert torch.equal(load_tensors(folder / "global_model.safetensors")["w"], MODEL["w"])
    assert not list(disk.rglob("*.part"))
    assert not engine.panics


def test_a_round_begins_when_its_model_can_be_kept(engine: Engine, disk: Path) -> None:
    heard: Heard = engine.components["heard"]
    filler = fill(disk, 20 * 2**20)

    def begin() -> None:
        with engine.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
            model = make_model_learnable({"w": MODEL["w"][: 2**18]}, {})
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True)
            engine.fire_event(AppEventType.ROUND_STARTED, fl_ctx)

    beginning = threading.Thread(target=begin)
    beginning.start()
    assert heard.waits.wait(20)
    assert "has 20 MiB free, about 41 MiB are needed" in heard.notes[0][1]
    filler.unlink()
    beginning.join(20)
    assert heard.goes_on.is_set() and not beginning.is_alive()


def test_a_disk_that_cannot_be_written_ends_the_run_with_a_sentence(
    engine: Engine, disk: Path
) -> None:
    with engine.new_context() as fl_ctx:
        result_folder(fl_ctx)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        save(engine)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert "cannot write" in engine.panics[0] and "Read-only file system" in engine.panics[0]
    assert "fix: look at that disk" in engine.panics[0]
    assert not engine.components["heard"].notes
