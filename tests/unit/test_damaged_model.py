"""One damaged byte of a model: whoever would use it says so, and does nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedfms.cli import app
from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError
from fedfms.exchange.tensors import save_tensors
from fedfms.flare.session import prepare_job
from fedfms.models.build import build_model
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_travelling
from fedfms.shipped import JOBS


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A results folder whose model has another value in one place."""
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    model = folder / "global_model.safetensors"
    save_tensors(model, read_travelling(build_model(recipe, None)), "fp32")
    load_trained(folder, None)
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    return folder


USES: dict[str, Callable[[Path, Path], object]] = {
    "export": lambda folder, new: load_trained(folder, None),
    "evaluate": lambda folder, new: prepare_job(
        JOBS / "evaluate", new, model=folder / "global_model.safetensors"
    ),
    "go on from it": lambda folder, new: prepare_job(
        JOBS / "fedmsa", new, model=folder / "global_model.safetensors"
    ),
}


@pytest.mark.parametrize("use", USES)
def test_it_is_an_error_that_says_so(damaged: Path, tmp_path: Path, use: str) -> None:
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        USES[use](damaged, tmp_path / "new" / "job")
    assert caught.value.code == "damaged-model"
    assert "fetch or copy the file again" in caught.value.fix


def test_nothing_is_exported(damaged: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    arguments = ["export", str(damaged), str(output), "--as", "fedfms"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CheckpointError)
    assert not output.exists()
