from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from little import (
    LittleNet,
    disc_dataset,
    largest_difference,
    little_recipe,
    little_site,
    values_of,
)
from torch import nn

from fedfms.control import Control
from fedfms.data.slices import SliceDataset
from fedfms.errors import TaskAborted, TrainingError
from fedfms.models.build import build_model
from fedfms.models.travelling import travelling_names
from fedfms.training.loop import (
    ShuffledBatches,
    accumulate_gradients,
    learning_rate,
    round_seed,
    train_round,
    train_step,
)
from fedfms.training.losses import loss_per_class
from rounding import assert_as_right, assert_gradients_as_right, in_fp64


def run_round(model: nn.Module, recipe=None, site=None, round_number=0, optimizer=None, **more):
    recipe, site = recipe or little_recipe(), site or little_site()
    return train_round(
        model,
        disc_dataset(recipe, site),
        recipe,
        site,
        round_number=round_number,
        optimizer=optimizer,
        control=more.pop("control", Control()),
        **more,
    )


def batch_of(dataset: SliceDataset, items: list[int]) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([dataset[item] for item in items])


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: values.double() for key, values in batch.items()}


# ------------------------------------------------------------------------- the gradient of a step


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", ["bce", "dice_bce"])
def test_micro_batches_add_up_to_the_gradient_of_the_full_batch(micro_batch, loss):
    recipe = little_recipe(loss=loss)
    batch = batch_of(disc_dataset(recipe, little_site()), [0, 3, 1, 6, 5])
    batch["annotated"] = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 1], [1, 1]])  # 6 of 10 pairs

    whole, parts, exact = LittleNet(), LittleNet(), LittleNet().double()
    losses = []
    for model, values in ((whole, batch), (exact, doubled(batch))):
        pairs = loss_per_class(model(values["image"]), values["target"], recipe)
        losses.append(pairs[batch["annotated"].bool()].mean())
        losses[-1].backward()
    got = accumulate_gradients(parts, batch, recipe, micro_batch, Control())

    assert_as_right(got, *losses)
    assert_gradients_as_right(parts, whole, exact)


def test_micro_batches_do_not_change_what_sam_learns():
    recipe = little_recipe(method="fedmsa", image_size=64, batch_size=4)
    batch = batch_of(disc_dataset(recipe, little_site()), [0, 1, 2, 3])
    exact = build_model(recipe, None).double()
    with in_fp64():
        accumulate_gradients(exact, doubled(batch), recipe, 4, Control())
    models = {}
    for micro_batch in (4, 1, 3):
        models[micro_batch] = build_model(recipe, None)
        accumulate_gradients(models[micro_batch], batch, recipe, micro_batch, Control())
    moved = {name for name, p in models[4].named_parameters() if p.grad is not None}
    assert moved == set(travelling_names(models[4]))
    assert_gradients_as_right(models[1], models[4], exact)
    assert_gradients_as_right(models[3], models[4], exact)


def test_a_batch_without_an_annotated_class_changes_nothing():
    batch = batch_of(disc_dataset(little_recipe(), little_site()), [0, 1])
    batch["annotated"] = torch.zeros(2, 2)
    model = LittleNet()
    before = values_of(model)
    loss, _ = train_step(
        model, torch.optim.Adam(model.parameters()), batch, little_recipe(), 2, Control()
    )
    assert loss == 0.0
    assert largest_difference(values_of(model), before) == 0.0


def test_clipping_bounds_the_gradient_of_the_whole_step():
    recipe = little_recipe(clip_grad_norm=1e-3)
    batch = batch_of(disc_dataset(recipe, little_site()), [0, 1, 2])
    model = LittleNet()
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, recipe, 1, Control())
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


# ----------------------------------------------------------------------------------- a whole round


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_two_rounds_equal_a_plain_loop_over_the_same_slices(micro_batch):
    # 7 slices in batches of 3: the last batch has one slice
    recipe = little_recipe(local_epochs=2, schedule="cosine", warmup_steps=4, clip_grad_norm=1.0)
    site = little_site(micro_batch=micro_batch)
    model, plain = LittleNet(), LittleNet()
    optimizer, losses = None, []
    for number in range(2):
        result = run_round(model, recipe, site, number, optimizer)
        optimizer = result.optimizer
        losses.append(result.loss)

    dataset = disc_dataset(recipe, site)
    adam = torch.optim.Adam(plain.parameters(), foreach=False, fused=False)
    step, expected = 0, []
    for number in range(2):
        generator = torch.Generator().manual_seed(round_seed(recipe, number))
        total = 0.0
        for _ in range(2):
            order = torch.randperm(7, generator=generator).tolist()
            for items in (order[:3], order[3:6], order[6:]):
                batch = batch_of(dataset, items)
                adam.param_groups[0]["lr"] = (
                    1e-2 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 24)) / 2
                )
                adam.zero_grad()
                loss = loss_per_class(plain(batch["image"]), batch["target"], recipe).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                adam.step()
                total += loss.item() * len(items)
                step += 1
        expected.append(total / 14)

    assert result.steps == 6
    assert losses == pytest.approx(expected, abs=1e-6)
    assert largest_difference(values_of(model), values_of(plain)) < 2e-6


def test_two_runs_are_equal_to_the_last_bit():
    recipe = little_recipe(method="fedmsa", image_size=64, learning_rate=1e-3)
    outcomes = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)  # what else the process drew must not matter
        model = build_model(recipe, None)
        losses = [run_round(model, recipe, round_number=number).loss for number in range(2)]
        outcomes.append((losses, values_of(model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert largest_difference(outcomes[0][1], outcomes[1][1]) == 0.0


def test_data_loader_processes_change_nothing():
    one, two = LittleNet(), LittleNet()
    run_round(one)
    run_round(two, site=little_site(workers=2))
    assert largest_difference(values_of(one), values_of(two)) == 0.0


@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_rounds_and_seeds_shuffle_differently_and_epochs_see_every_slice_once(secret):
    recipe = little_recipe(local_epochs=2)

    def order(number: int, recipe=recipe, secret=secret) -> list[list[int]]:
        return list(ShuffledBatches(7, recipe, number, secret))

    first = order(0)
    assert [len(batch) for batch in first] == [3, 3, 1, 3, 3, 1]
    assert len(ShuffledBatches(7, recipe, 0, secret)) == 6
    assert sorted(chain(*first[:3])) == sorted(chain(*first[3:])) == list(range(7))
    assert first[:3] != first[3:]
    assert first == order(0)
    assert first != order(1)
    other = little_recipe(seed=6)
    assert order(0) != order(0, other)
    assert round_seed(recipe, 1) not in (round_seed(other, 0), round_seed(other, 1))
    assert first != order(0, secret=b"t" * 32)
    assert round_seed(recipe, 0, secret) != round_seed(recipe, 0, b"t" * 32)


def test_a_round_of_a_billion_epochs_begins_at_once_and_stops_when_asked():
    recipe, control, steps = little_recipe(local_epochs=10**9), None, []

    def stop_soon(phase: str, done: int, total: int) -> None:
        steps.append(total)
        if done == 2:
            control.abort()

    control = Control(stop_soon)
    started = time.monotonic()
    with pytest.raises(TaskAborted):
        run_round(LittleNet(), recipe, control=control)
    assert time.monotonic() - started < 5
    assert steps[0] == 3 * 10**9


def test_a_round_leaves_the_random_numbers_of_the_process_alone():
    model = LittleNet()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run_round(model)
    assert torch.equal(torch.rand(3), expected)


def test_only_what_requires_a_gradient_moves():
    model = LittleNet(frozen=True)
    before = values_of(model)
    result = run_round(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"second.weight", "second.bias"}
    assert len(result.optimizer.param_groups[0]["params"]) == 2


def test_a_kept_optimizer_keeps_its_moments_and_a_new_one_does_not():
    kept, fresh = LittleNet(), LittleNet()
    optimizer = run_round(kept).optimizer
    run_round(fresh)
    assert run_round(kept, round_number=1, optimizer=optimizer).optimizer is optimizer
    run_round(fresh, round_number=1)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {6.0}
    assert largest_difference(values_of(kept), values_of(fresh)) > 1e-5


def test_an_optimizer_of_another_model_is_refused():
    optimizer = run_round(LittleNet()).optimizer
    with pytest.raises(ValueError, match="another model"):
        run_round(LittleNet(), optimizer=optimizer)


def test_progress_is_told_step_by_step():
    told = []
    run_round(LittleNet(), control=Control(lambda *step: told.append(step)))
    assert told == [("train", 0, 3), ("train", 1, 3), ("train", 2, 3), ("train", 3, 3)]


def test_ten_rounds_learn_the_discs():
    recipe = little_recipe(local_epochs=8, rounds=10, loss="bce")
    model = LittleNet()
    losses = [run_round(model, recipe, round_number=number).loss for number in range(10)]
    assert losses[-1] < 0.25 * losses[0]


# ----------------------------------------------------------------------------------- learning rate


def test_learning_rate_rises_in_the_first_round_and_falls_over_all():
    constant = little_recipe(learning_rate=1.0, rounds=5, warmup_steps=4)
    assert [learning_rate(constant, step, 10) for step in (0, 1, 3, 4, 49)] == [
        *(0.25, 0.5, 1.0, 1.0, 1.0)
    ]
    cosine = little_recipe(learning_rate=2.0, rounds=5, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 2.0
    assert learning_rate(cosine, 25, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 46, 10) == pytest.approx(1 + math.cos(math.pi * 0.92))
    assert learning_rate(cosine, 49, 10) == pytest.approx(2.0 * 0.01)  # and not to nothing
    both = little_recipe(learning_rate=1.0, rounds=5, schedule="cosine", warmup_steps=4)
    assert learning_rate(both, 1, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 50)) / 2)


def test_a_site_with_few_steps_a_round_reaches_the_full_rate_in_its_first_round():
    recipe = little_recipe(learning_rate=1.0, warmup_steps=100)
    assert [learning_rate(recipe, step, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


# --------------------------------------------------------------------------------- running out


class Hungry(nn.Module):
    """Has memory for `fits` slices at once, forward or backward."""

    def __init__(self, fits: int, where: str = "forward") -> None:
        super().__init__()
        self.net = LittleNet()
        self.fits = fits
        self.where = where
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) <= self.fits:
            return self.net(images)
        if self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        logits = self.net(images)
        logits.register_hook(self.fail)
        return logits

    @staticmethod
    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(where):
    recipe = little_recipe(batch_size=7, local_epochs=2)
    hungry, plain = Hungry(1, where), LittleNet()
    result = run_round(hungry, recipe)
    run_round(plain, recipe)
    assert result.micro_batch == 1
    assert result.steps == 2
    # 7 and 3 fail; the first batch starts again, and the second knows
    assert hungry.sizes == [7, 3] + 14 * [1]
    assert largest_difference(values_of(hungry.net), values_of(plain)) < 2e-6


def test_out_of_memory_in_the_middle_of_a_batch_leaves_no_half_gradient():
    class Later(Hungry):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.fits = 1 if len(self.sizes) == 1 else self.fits
            return super().forward(images)

    recipe, site = little_recipe(batch_size=7), little_site(micro_batch=3)
    hungry, plain = Later(3), LittleNet()
    run_round(hungry, recipe, site)
    run_round(plain, recipe)
    assert hungry.sizes == [3, 3] + 7 * [1]
    assert largest_difference(values_of(hungry.net), values_of(plain)) < 2e-6


def test_a_round_may_start_with_what_fitted_before():
    hungry = Hungry(2)
    result = run_round(hungry, little_recipe(batch_size=7), micro_batch=2)
    assert result.micro_batch == 2
    assert hungry.sizes == [2, 2, 2, 1]


def test_out_of_memory_with_one_slice_says_what_to_change():
    with pytest.raises(TrainingError, match="smaller image_size") as caught:
        run_round(Hungry(0))
    assert caught.value.code == "out-of-memory"


def test_another_runtime_error_is_not_taken_for_out_of_memory():
    class Broken(LittleNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 3) @ torch.zeros(2, 3)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_round(Broken())


def test_a_real_allocation_failure_is_survived():
    """In a process of its own whose address space is limited: 4 slices do not fit, 1 does."""
    program = textwrap.dedent(
        """
        import resource, sys
        import torch
        from little import LittleNet, disc_dataset, little_recipe, little_site
        from fedfms.control import Control
        from fedfms.training.loop import train_round

        class Wasteful(LittleNet):
            def forward(self, images):
                waste = torch.empty(len(images), 256 * 2**20, dtype=torch.uint8)  # 256 MiB a slice
                return super().forward(images) + 0.0 * waste[:, :1, None, None]

        recipe, site = little_recipe(batch_size=4), little_site(threads=1)
        dataset = disc_dataset(recipe, site)
        arguments = dict(round_number=0, optimizer=None, control=Control())
        train_round(LittleNet(), dataset, recipe, site, **arguments)  # loads what torch loads late
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + 450 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(train_round(Wasteful(), dataset, recipe, site, **arguments).micro_batch)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "1", done.stderr


# ------------------------------------------------------------------------------- stopping, failing


def test_a_loss_that_is_no_number_stops_the_round_before_the_weights_move():
    class Bad(LittleNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * float("nan")

    model = Bad()
    before = values_of(model)
    with pytest.raises(TrainingError, match="lower learning_rate") as caught:
        run_round(model)
    assert caught.value.code == "non-finite-loss"
    assert largest_difference(values_of(model), before) == 0.0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_no_number_stops_the_round_where_gradients_are_clipped():
    class Steep(LittleNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            if logits.requires_grad:
                logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits

    model = Steep()
    before = values_of(model)
    with pytest.raises(TrainingError) as caught:
        run_round(model, little_recipe(clip_grad_norm=1.0))
    assert caught.value.code == "non-finite-loss"
    assert largest_difference(values_of(model), before) == 0.0


def test_an_abort_ends_the_round_between_micro_batches():
    class Stopping(LittleNet):
        control = Control()
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                self.control.abort()
            return super().forward(images)

    model = Stopping()
    with pytest.raises(TaskAborted):
        run_round(model, little_recipe(), little_site(micro_batch=1), control=model.control)
    assert model.calls == 4
    assert all(parameter.grad is None for parameter in model.parameters())
