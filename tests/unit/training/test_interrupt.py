from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from little import (
    disc_case,
    disc_dataset,
    largest_difference,
    little_recipe,
    little_site,
    values_of,
)
from torch import Tensor, nn

from fedfms.control import Control
from fedfms.errors import TaskAborted
from fedfms.models.build import build_model
from fedfms.training.evaluate import evaluate
from fedfms.training.interrupt import in_turn, interruptible
from fedfms.training.loop import train_round

PAUSE = 0.4  # seconds that one slow block takes; a pass through all of them takes 16


class Slow(torch.autograd.Function):
    """Identity that takes its time."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, pause: Tensor) -> Tensor:
        ctx.pause = pause.tolist()
        time.sleep(ctx.pause[0])
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.pause[1])
        return gradient, None


class SlowBlock(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.pause = torch.tensor([forward, backward])
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return Slow.apply(self.layer(images), self.pause)


class SlowNet(nn.Module):
    """40 blocks that may be slow in either direction."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(SlowBlock(forward, backward) for _ in range(40)))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(nn.functional.avg_pool2d(self.blocks(images), 2))


def seconds_until_aborted(work: Any, control: Control, after: float = 0.6) -> float:
    """Run work, abort after some seconds from another thread; how long the abort took."""
    asked: list[float] = []

    def abort() -> None:
        asked.append(time.monotonic())
        control.abort()

    timer = threading.Timer(after, abort)
    timer.start()
    with pytest.raises(TaskAborted):
        work()
    ended = time.monotonic()
    timer.join()
    return ended - asked[0]


@pytest.mark.parametrize("pauses", [(PAUSE, 0.0), (0.0, PAUSE)], ids=["forward", "backward"])
def test_an_abort_waits_for_one_block_of_a_step_and_not_for_the_step(pauses):
    recipe, site, control = little_recipe(batch_size=7), little_site(), Control()
    dataset = disc_dataset(recipe, site)
    model = SlowNet(*pauses)

    def work() -> None:
        train_round(model, dataset, recipe, site, round_number=0, optimizer=None, control=control)

    assert seconds_until_aborted(work, control) < 5


def test_an_abort_reaches_a_running_evaluation():
    control = Control()
    model = SlowNet(PAUSE, 0.0)
    case = disc_case(0, 3)
    seconds = seconds_until_aborted(
        lambda: evaluate(model, [case], little_recipe(), little_site(), control), control
    )
    assert seconds < 5


class Counting(Control):
    """A control that is aborted at its n-th question."""

    def __init__(self, abort_at: int = 0) -> None:
        super().__init__()
        self.asked = 0
        self.abort_at = abort_at

    def check(self) -> None:
        self.asked += 1
        if self.asked == self.abort_at:
            self.abort()
        super().check()


@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_sam_asks_in_every_block_in_both_directions(method):
    recipe = little_recipe(method=method, image_size=64)
    model = build_model(recipe, None)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    control = Counting()
    with interruptible(model, control):
        logits = model(images)
        forward = control.asked
        logits.square().mean().backward()
    backward = control.asked - forward
    modules = sum(1 for _ in model.image_encoder.modules())
    assert forward > 0.9 * modules
    assert backward > 50

    for abort_at in (1, forward // 2, forward, forward + 1, forward + backward // 2):
        with pytest.raises(TaskAborted), interruptible(model, Counting(abort_at)):
            model(images).square().mean().backward()
    with interruptible(model, Counting(forward + backward + 1)):  # one more than is asked
        model(images).square().mean().backward()


def test_asking_changes_no_number_and_leaves_no_hook():
    recipe = little_recipe(method="fedmsa", image_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients, logits = [], []
    for asking in (False, True):
        model = build_model(recipe, None)
        if asking:
            with interruptible(model, Control()):
                logits.append(model(images))
                logits[-1].square().mean().backward()
        else:
            logits.append(model(images))
            logits[-1].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*logits)
    assert largest_difference(*gradients) == 0.0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_end_with_an_abort_too():
    model = build_model(little_recipe(image_size=64), None)
    before = values_of(model)
    with pytest.raises(TaskAborted), interruptible(model, Counting(5)):
        model(torch.zeros(1, 3, 64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert largest_difference(values_of(model), before) == 0.0


@pytest.mark.parametrize("beside", [False, True])
def test_functions_in_turn_give_raise_or_are_left_behind(beside):
    def numbers(count: int, control: Control):
        return in_turn((lambda n=n: n for n in range(count)), control, beside=beside)

    for count in range(4):
        assert list(numbers(count, Control())) == list(range(count))
    with pytest.raises(ZeroDivisionError):
        list(in_turn([lambda: 1 // 0], Control(), beside=beside))
    control = Control()
    release = threading.Event()
    seconds = seconds_until_aborted(
        lambda: list(in_turn([lambda: release.wait(30)], control, beside=beside)),
        control,
        after=0.1,
    )
    release.set()
    assert seconds < 2


def test_the_next_function_is_made_beside_the_one_before_it():
    made = threading.Event()

    def work():
        yield lambda: made.wait(10)
        made.set()
        yield lambda: "second"

    assert list(in_turn(work(), Control(), beside=True)) == [True, "second"]
