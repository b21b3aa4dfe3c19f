"""The memory plan: what is counted is what torch holds, and what is chosen fits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from little import little_recipe, little_site
from torch._subclasses.fake_tensor import FakeTensorMode

import fedfms.data.memory as memory
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.data.memory import Room
from fedfms.errors import TaskAborted, TrainingError
from fedfms.models.build import build_model
from fedfms.models.encoder import checkpoint_blocks, is_checkpointed
from fedfms.training import plan as plans
from fedfms.training.gradients import accumulate_gradients, smaller_step
from fedfms.training.loop import adam, train_step
from fedfms.training.plan import (
    HEAP,
    Plan,
    Way,
    bound_of_peak,
    plan_memory,
    planned,
    predict_peak,
    ways,
)
from fedfms.training.step_memory import _batch, _Count, count_step

CPU = torch.device("cpu")


def batch_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    masks = (recipe.batch_size, len(recipe.classes), recipe.mask_size, recipe.mask_size)
    size = (recipe.batch_size, 3, recipe.image_size, recipe.image_size)
    return {
        "image": torch.randn(size, generator=generator),
        "target": (torch.rand(masks, generator=generator) < 0.3).float(),
        "annotated": torch.ones(masks[:2]),
    }


def with_room(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As in a container of so many bytes on a machine with nothing else."""
    monkeypatch.setattr(plans, "room", lambda: Room(limit, "the container's limit"))
    monkeypatch.setattr(plans, "allowed_bytes", lambda: limit)


@pytest.mark.parametrize("method", ["fedmsa", "fedsam"])
def test_what_lasts_is_counted_to_the_byte(method: str) -> None:
    recipe = little_recipe(method=method, classes=("disc",))
    found = count_step(recipe, 3, False, CPU)
    model = build_model(recipe, None)
    held = [*model.parameters(), *model.buffers()]
    weights = sum(one.untyped_storage().nbytes() for one in {id(x): x for x in held}.values())
    assert abs(found.weights - weights) < 0.001 * weights + 2048
    optimizer = adam(model, recipe)
    batch = batch_of(recipe)
    train_step(model, optimizer, batch, recipe, 3, Control())
    moments = [value.nbytes for state in optimizer.state.values() for value in state.values()]
    assert found.moments == sum(moments)
    assert found.batch == sum(tensor.nbytes for tensor in batch.values())


def test_what_is_counted_of_a_step_is_what_torch_saves_for_its_backward_pass() -> None:
    """Checked by other means: autograd's own hooks on what it keeps, with real numbers."""
    recipe = little_recipe(method="fedmsa", image_size=64, batch_size=2)
    model = build_model(recipe, None).train()
    frozen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    batch = batch_of(recipe)
    given = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        accumulate_gradients(model, batch, recipe, 2, Control())
    kept = sum(size for at, (size, _) in saved.items() if at not in given)
    counted = count_step(recipe, 2, False, CPU).work
    assert kept <= counted <= 1.3 * kept


def test_of_several_micro_batches_the_one_that_finds_a_gradient_is_counted() -> None:
    """Checked by making two of them with shapes alone, and counting all that is there."""
    recipe = little_recipe(method="fedsam", image_size=32, batch_size=4)
    with FakeTensorMode(), _Count(Control()) as count:
        model = build_model(recipe, None).train()
        batch = _batch(recipe, 4)
        count.begin()
        accumulate_gradients(model, batch, recipe, 2, Control())
    found = count_step(recipe, 2, False, CPU)
    assert found.work == pytest.approx(count.most[0], rel=1e-3)
    alone = count_step(dataclasses.replace(recipe, batch_size=2), 2, False, CPU)
    assert found.work > alone.work


def test_a_count_stops_when_asked() -> None:
    """It takes seconds on a loaded machine, and an abort has four."""
    recipe = little_recipe(method="fedmsa", backbone="vit_b", image_size=1024, batch_size=8)
    control = Control()
    control.abort()
    with pytest.raises(TaskAborted):
        planned(build_model(little_recipe(), None), recipe, little_site(), CPU, control)
    asked = Control()
    timer = threading.Timer(0.3, asked.abort)
    timer.start()
    with pytest.raises(TaskAborted):
        count_step(recipe, 1, False, CPU, asked)
    assert time.monotonic() - asked.last_sign_of_life < 2  # it asked until then


def test_half_the_slices_take_half_and_checkpointing_less() -> None:
    recipe = little_recipe(method="fedmsa", image_size=128, batch_size=8)
    whole, half = (count_step(recipe, n, False, CPU) for n in (8, 4))
    assert half.work == pytest.approx(whole.work / 2, rel=0.1)
    assert count_step(recipe, 8, True, CPU).work < 0.6 * whole.work
    assert half.batch == whole.batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpointed_step_gives_the_same_gradients(precision: str) -> None:
    recipe = little_recipe(method="fedmsa", batch_size=2, precision=precision)
    gradients = []
    for checkpointing in (False, True):
        model = build_model(recipe, None).train()
        assert checkpoint_blocks(model, checkpointing) == 4
        loss = accumulate_gradients(model, batch_of(recipe), recipe, 2, Control())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append((loss, found))
    (loss, plain), (same_loss, again) = gradients
    assert loss == same_loss and plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_the_fastest_way_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = little_recipe(method="fedmsa", image_size=256, batch_size=2)
    site = little_site()
    possible = (Way(2, False), Way(1, False), Way(2, True), Way(1, True))
    assert ways(recipe, site, CPU) == possible
    peaks = {
        way: predict_peak(count_step(recipe, way.micro_batch, way.checkpointing, CPU), CPU)
        for way in possible
    }
    for way in (Way(2, False), Way(1, False), Way(1, True)):
        with_room(monkeypatch, int(peaks[way] / 0.9) + 10)
        found = plan_memory(recipe, site, CPU)
        assert (found.way, found.predicted, found.fits) == (way, peaks[way], True)
    least = min(peaks.values())
    with_room(monkeypatch, int(0.95 * least / 0.9))
    found = plan_memory(recipe, site, CPU)
    assert not found.fits and found.predicted == least


def test_where_nothing_fits_the_error_says_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = little_recipe(method="fedmsa", image_size=1024, batch_size=1)
    model = build_model(little_recipe(method="fedmsa"), None)
    with_room(monkeypatch, 520 * 10**6)
    with pytest.raises(TrainingError, match="does not fit into memory") as caught:
        planned(model, recipe, little_site(), CPU, Control())
    assert caught.value.code == "out-of-memory"
    assert "TRAINER_MEMORY" in caught.value.fix and "image_size 256 would fit" in caught.value.fix
    assert "adapter_blocks" in caught.value.fix


def test_after_a_kill_the_plan_is_clearly_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = little_recipe(method="fedmsa", image_size=256, batch_size=2)
    with_room(monkeypatch, 20 * 10**9)
    first = plan_memory(recipe, little_site(), CPU)
    second = plan_memory(recipe, little_site(), CPU, killed=first)
    assert first.way == Way(2, False) and second.way == Way(1, False)
    third = plan_memory(recipe, little_site(), CPU, killed=second)
    assert third.predicted < second.predicted


def test_a_bound_spares_the_count_where_all_fits_twice_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for changes in (
        {"method": "fedmsa", "image_size": 128, "batch_size": 8},
        {"method": "fedsam", "image_size": 32, "batch_size": 2},
        {"method": "fedsam", "image_size": 256, "batch_size": 4, "precision": "bf16"},
        {"method": "fedmsa", "backbone": "vit_b", "image_size": 1024, "batch_size": 1},
        {"method": "fedsam", "backbone": "vit_b", "image_size": 256, "batch_size": 2},
    ):
        recipe = little_recipe(**changes)
        counted = count_step(recipe, recipe.batch_size, False, CPU)
        bound = bound_of_peak(recipe, recipe.batch_size)
        assert bound is not None and bound > predict_peak(counted, CPU)
    with_room(monkeypatch, 100 * 10**9)
    monkeypatch.setattr(plans, "count_step", None)
    found = plan_memory(little_recipe(), little_site(), CPU, exact=False)
    assert found.fits and "certainly below" in str(found)


def test_out_of_memory_with_one_slice_turns_checkpointing_on() -> None:
    model = build_model(little_recipe(method="fedmsa"), None)
    assert smaller_step(model, 4) == 2 and not is_checkpointed(model)
    assert smaller_step(model, 1) == 1 and is_checkpointed(model)
    with pytest.raises(TrainingError) as caught:
        smaller_step(model, 1)
    assert caught.value.code == "out-of-memory"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_goes_on_with_checkpointing_and_gives_the_same(precision: str) -> None:
    recipe = little_recipe(method="fedmsa", batch_size=2, precision=precision)
    model, plain = (build_model(recipe, None).train() for _ in range(2))
    block = model.image_encoder.blocks[0]  # type: ignore[union-attr, index]

    def short_of_memory(module: torch.nn.Module, inputs: object) -> None:
        if not block.checkpointed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    block.mlp.register_forward_pre_hook(short_of_memory)
    loss, micro_batch = train_step(
        model, adam(model, recipe), batch_of(recipe), recipe, 2, Control()
    )
    same, _ = train_step(plain, adam(plain, recipe), batch_of(recipe), recipe, 2, Control())
    assert micro_batch == 1 and loss == pytest.approx(same, rel=1e-6)
    found, wanted = (
        torch.cat([one.grad.flatten() for one in network.parameters() if one.grad is not None])
        for network in (model, plain)
    )
    assert (found - wanted).norm() < (1e-5 if precision == "fp32" else 1e-2) * wanted.norm()


# --------------------------------------------------------------------------- of a real process


@pytest.mark.parametrize(
    "configuration",
    [
        ("fedmsa", "vit_demo", "128", "8", "fp32", "8", "0"),
        ("fedsam", "vit_demo", "256", "4", "bf16", "2", "1"),
    ],
    ids=lambda one: "-".join(one),
)
def test_the_peak_of_a_process_is_as_predicted(configuration: tuple[str, ...]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("plan_process.py")), *configuration]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, peak = map(int, done.stdout.split())
    assert peak <= 1.05 * predicted and predicted <= 1.25 * peak, (predicted, peak)


# ------------------------------------------------------------------------------------ the limits


def group_of_version_2(root: Path, limits: dict[str, str]) -> Path:
    for folder, limit in limits.items():
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(limit)
        (place / "memory.current").write_text(str(8 * 10**9))
        (place / "memory.stat").write_text(f"anon 0\nactive_file {10**9}\ninactive_file {10**9}\n")
    (root / "of_process").write_text("0::/hospital/trainer\n")
    return root


def test_the_smallest_limit_of_all_groups_above_counts_less_what_others_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = memory.psutil.Process().memory_info()
    root = group_of_version_2(
        tmp_path, {"": "max", "hospital": str(7 * 10**9), "hospital/trainer": str(9 * 10**9)}
    )
    monkeypatch.setattr(memory, "_V2", root)
    monkeypatch.setattr(memory, "_V1", tmp_path / "none")
    monkeypatch.setattr(memory, "_OF_PROCESS", root / "of_process")
    assert memory.allowed_bytes() == min(memory.psutil.virtual_memory().total, 7 * 10**9)
    # 8 GB are used, 2 of them files that the kernel gives up: 6 GB of others and of this process
    found = memory.room()
    expected = 7 * 10**9 - (6 * 10**9 - (own.rss - own.shared)) + own.shared
    assert abs(found.bytes - expected) < 50 * 10**6
    assert found.by == "the container's limit"


def test_version_1_has_a_number_for_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("9223372036854771712")
    monkeypatch.setattr(memory, "_V2", tmp_path / "none")
    monkeypatch.setattr(memory, "_V1", group)
    assert memory.allowed_bytes() == memory.psutil.virtual_memory().total
    (group / "memory.limit_in_bytes").write_text(str(3 * 10**9))
    assert memory.allowed_bytes() == 3 * 10**9


def test_a_plan_says_all_in_one_line() -> None:
    plan = Plan(Way(1, True), 1500 * 2**20, 3 * 2**30, "the container's limit")
    assert str(plan) == (
        "1 slice at once, with checkpointing; predicted peak 1.5 GiB of 3.0 GiB "
        "(the container's limit)"
    )
    assert HEAP >= 1
