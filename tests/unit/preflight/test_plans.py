"""`fedfms check-site --plan` as a hospital's IT person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fedfms.training.plan as plans
from fedfms.contracts.recipe import JOB_RECIPE, read_job_recipe
from fedfms.contracts.site import Compute
from fedfms.data.memory import Room
from fedfms.shipped import JOBS

Run = Callable[..., tuple[int, str, str]]
GIB = 1024**3


@pytest.fixture
def with_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As in a container of so many bytes, in which nothing else runs."""

    def give(limit: int) -> None:
        monkeypatch.setattr(plans, "room", lambda: Room(limit, "the container's limit"))

    return give


def told(run: Run, tmp_path: Path, *arguments: object) -> list[dict[str, str]]:
    nothing = tmp_path / "no-site.yml"
    code, out, err = run("check-site", "--config", nothing, "--plan", "--json", *arguments)
    assert code == 0, out + err
    return json.loads(out)


def test_it_says_for_one_job_what_a_trainer_would_do(run: Run, tmp_path, with_room) -> None:
    with_room(8 * GIB)
    settings = ("image_size=128", "batch_size=2")
    arguments = [word for setting in settings for word in ("--set", setting)]
    (line,) = told(run, tmp_path, "--job", "fedmsa", *arguments)
    recipe = read_job_recipe(JOBS / "fedmsa", None, settings)
    plan = plans.plan_memory(recipe, Compute(), plans.torch.device("cpu"))
    assert line["status"] == "PASS"
    assert line["text"].startswith("fedmsa (fedmsa, vit_demo, 128 pixels, batch 2, fp32, cpu): ")
    assert line["text"].endswith(str(plan))
    assert "2 slices at once, no checkpointing; predicted peak " in line["text"]
    assert "7.2 GiB (the container's limit)" in line["text"]  # a tenth is left


def test_what_does_not_fit_is_told_with_what_would(run: Run, tmp_path, with_room) -> None:
    with_room(GIB)
    sizes = ("--set", "image_size=1024")
    backbone = ("--set", "backbone=vit_b", "--set", "backbone_sha256=" + "a" * 64)
    (line,) = told(run, tmp_path, "--job", "fedsam", *backbone, *sizes)
    assert line["status"] == "WARN"
    assert "does not fit: fedsam (fedsam, vit_b, 1024 pixels" in line["text"]
    assert "1 slice at once, with checkpointing" in line["text"]
    assert "TRAINER_MEMORY" in line["fix"] and "GiB" in line["fix"]


def test_without_a_job_all_of_the_package_are_planned(run: Run, tmp_path, with_room) -> None:
    with_room(64 * GIB)
    names = [line["text"].split(" ", 1)[0] for line in told(run, tmp_path)]
    trained = {folder.parents[2].name for folder in JOBS.glob(f"*/{JOB_RECIPE}")} - {"evaluate"}
    trained -= {"unet"}  # no method of a new site's policy
    assert set(names) == trained | {path.stem for path in (JOBS / "recipes").glob("*.json")}
