"""When a recorded gradient is used and when it is not; recording itself needs a GPU (tests/gpu).

In the place of a CUDA graph stands one that runs the recorded function again and puts what it gives
where the first run put it: the same tensors each time, as a graph has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

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
from fedfms.errors import TaskAborted, TrainingError
from fedfms.training import loop
from fedfms.training.graphed import GraphedGradient, graphed
from fedfms.training.loop import train_round

# 7 slices: shapes 3, 3, 1 in each of three epochs, so that each is seen a third time
RECIPE = little_recipe(local_epochs=3, clip_grad_norm=1.0)


class Rerun:
    """Records by running, launches by running again; counts both."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorded = self.launched = 0
        self.times = 1.0  # of the gradient, to give a wrong one

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        function()
        own = [parameter.grad for parameter in self.model.parameters()]

        def launch() -> None:
            self.launched += 1
            function()
            for kept, parameter in zip(own, self.model.parameters(), strict=True):
                kept.copy_(parameter.grad * self.times)
                parameter.grad = None

        return launch


def run_round(model: nn.Module, recipe=RECIPE, control: Control | None = None):
    site = little_site()
    return train_round(
        model,
        disc_dataset(recipe, site),
        recipe,
        site,
        round_number=0,
        optimizer=None,
        control=control or Control(),
    )


@pytest.fixture
def plain() -> nn.Module:
    model = LittleNet()
    run_round(model)
    return model


def with_graphs(monkeypatch, record=None, has_room=lambda: True, model=None):
    model = model or LittleNet()
    record = record or Rerun(model)
    made = []

    def of_round(of, device):
        made.append(GraphedGradient(of, record, has_room))
        return made[-1]

    monkeypatch.setattr(loop, "graphed", of_round)
    return model, record, made


def test_a_round_with_graphs_learns_what_a_round_without_does(monkeypatch, plain):
    model, record, made = with_graphs(monkeypatch)
    result = run_round(model)
    assert result.steps == 9
    # three slices: the third time, then three more; one slice: the third time, and never again
    assert (record.recorded, record.launched) == (2, 1 + 3 + 1)
    assert largest_difference(values_of(model), values_of(plain)) == 0
    assert made[0].recorded == 0 and all(one.grad is None for one in model.parameters())


def test_a_graphs_gradient_is_held_by_fedprox_and_blind_to_void_pixels_as_a_plain_one(monkeypatch):
    recipe = little_recipe(local_epochs=3, clip_grad_norm=1.0, proximal_weight=1.0, loss="dice_bce")
    ends = []
    for void, of in (((), recipe), ((), RECIPE), ((2,), recipe)):  # 2: amid a disc
        site = little_site(void=void, classes={"disc": (1,), "cup": (3,)})
        pair = []
        for has_graphs in (False, True):
            model = LittleNet()
            _, record, _ = with_graphs(monkeypatch, model=model, has_room=lambda on=has_graphs: on)
            train_round(
                *(model, disc_dataset(of, site), of, site),
                round_number=0,
                optimizer=None,
                control=Control(),
            )
            assert record.launched == (5 if has_graphs else 0)
            pair.append(values_of(model))
        assert largest_difference(*pair) == 0
        ends.append(pair[1])
    assert largest_difference(ends[0], ends[1]) > 0 and largest_difference(ends[0], ends[2]) > 0


def test_micro_batches_are_recorded_together(monkeypatch):
    model, record, _ = with_graphs(monkeypatch)
    other = LittleNet()
    site = little_site(micro_batch=2)
    for one in (model, other):
        train_round(
            one,
            disc_dataset(RECIPE, site),
            RECIPE,
            site,
            round_number=0,
            optimizer=None,
            control=Control(),
        )
        monkeypatch.setattr(loop, "graphed", lambda *_: None)
    assert record.launched == 5
    assert largest_difference(values_of(model), values_of(other)) == 0


def test_a_graph_that_gives_something_else_is_not_used(monkeypatch, plain, caplog):
    model, record, _ = with_graphs(monkeypatch)
    record.times = 1.1
    with caplog.at_level(logging.INFO, "fedfms.training.graphed"):
        run_round(model)
    assert (record.recorded, record.launched) == (1, 1)
    (line,) = [line for line in caplog.messages if "CUDA graphs" in line]
    assert line.endswith("a graph gave a gradient that is 1.0e-01 from plain")
    assert largest_difference(values_of(model), values_of(plain)) == 0


def test_what_cannot_be_recorded_is_computed(monkeypatch, plain, caplog):
    def record(function):
        raise RuntimeError("operation not permitted when stream is capturing\nadvice below")

    model, _, made = with_graphs(monkeypatch, record)
    with caplog.at_level(logging.INFO, "fedfms.training.graphed"):
        run_round(model)
    assert made[0].recorded == 0
    (line,) = [line for line in caplog.messages if "CUDA graphs" in line]
    assert line.endswith("RuntimeError: operation not permitted when stream is capturing")
    assert largest_difference(values_of(model), values_of(plain)) == 0


def test_without_room_for_a_graph_and_a_step_nothing_is_recorded(monkeypatch, plain):
    model, record, _ = with_graphs(monkeypatch, has_room=lambda: False)
    run_round(model)
    assert record.recorded == 0
    assert largest_difference(values_of(model), values_of(plain)) == 0


class FullOnce(LittleNet):
    """Memory runs out at one call, of a single slice while a graph of three is held."""

    failed = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == 1 and len(self.held) and self.held[0].recorded and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return super().forward(images)


def test_graphs_make_room_before_a_step_is_made_smaller(monkeypatch, plain):
    model, record, made = with_graphs(monkeypatch, model=FullOnce())
    model.held = made
    result = run_round(model)
    assert model.failed and made[0].recorded == 0
    assert result.micro_batch == 3  # it was not halved
    assert record.recorded == 1
    assert largest_difference(values_of(model), values_of(plain)) == 0


def test_an_abort_is_heeded_before_a_graph_is_launched(monkeypatch):
    control = Control()
    model, record, _ = with_graphs(monkeypatch)

    def report(phase, done, total):
        if record.launched == 2:
            control.abort()

    control = Control(report)
    with pytest.raises(TaskAborted):
        run_round(model, control=control)
    assert record.launched == 2


def test_a_loss_that_is_not_finite_ends_a_round_of_graphs(monkeypatch):
    model, record, _ = with_graphs(monkeypatch)

    def report(phase, done, total):
        if record.launched == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    with pytest.raises(TrainingError) as error:
        run_round(model, control=Control(report))
    assert error.value.code == "non-finite-loss"


@pytest.mark.parametrize("changes", [{"patient_rate": 0.5}, {"method": "of two gradients"}])
def test_only_plain_steps_of_whole_batches_have_graphs(monkeypatch, changes):
    model, _, made = with_graphs(monkeypatch)
    if "method" in changes:
        monkeypatch.setattr(loop, "find_method", lambda _: OfTwoGradients())
        run_round(model)
    else:
        private = {"patient_clip_norm": 1.0, "patient_noise": 1.0, "classes": ("disc", "cup")}
        run_round(model, little_recipe(**changes, **private))
    assert not made


class OfTwoGradients:
    """A method that makes its own steps."""

    def start_round(self, model, recipe):
        def step(optimizer, gradients):
            gradients()
            loss = gradients()
            optimizer.step()
            return loss

        return step


def test_a_processor_has_no_graphs_nor_has_a_plain_gpu(monkeypatch):
    assert graphed(LittleNet(), torch.device("cpu")) is None
    gpu = torch.device("cuda", 0)
    assert graphed(LittleNet(), gpu) is not None
    monkeypatch.setenv("FEDFMS_PLAIN_GPU", "1")
    assert graphed(LittleNet(), gpu) is None
