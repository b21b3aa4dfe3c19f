"""benchmarks/: the baseline computes what the product does, and ratios are what they say."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from fedfms.control import Control
from fedfms.models.build import build_model
from fedfms.training.gradients import accumulate_gradients

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
from baseline import Baseline, BaselineStep  # noqa: E402
from paired import Section, Worker, alternate, figure, interval  # noqa: E402
from step_worker import make_recipe, pictures, weights  # noqa: E402


@pytest.mark.parametrize("method", ["fedmsa", "fedsam"])
def test_the_baseline_and_the_product_compute_the_same(method):
    recipe = make_recipe(method, "fp32", 2, 128, "vit_demo")
    state = weights(recipe)
    baseline = Baseline(recipe)
    baseline.load(state)
    model = build_model(recipe, None)
    model.load_state_dict(state)
    images, target = pictures(recipe)
    with torch.no_grad():
        expected = baseline(images)
        assert (model(images) - expected).abs().max() <= 1e-5
    loss = BaselineStep(baseline).backward(images, target)
    batch = {"image": images, "target": target, "annotated": torch.ones(2, 1)}
    ours = accumulate_gradients(model, batch, recipe, 2, Control())
    assert ours == pytest.approx(float(loss), rel=1e-6)
    theirs = dict(baseline.named_parameters())
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    one, other = (
        torch.cat([of[name].grad.flatten() for name in learning]) for of in (learning, theirs)
    )
    assert (one - other).norm() <= 1e-5 * other.norm()
    for name, parameter in theirs.items():  # what it computes for nothing changes nothing
        if name not in learning and parameter.grad is not None:
            assert not parameter.grad.any(), name


def test_an_interval_holds_the_median_as_often_as_it_says():
    """Of all orders of above and below, each as likely: at least 93 of 100 hold the median."""
    for count in (5, 6, 9):
        values = list(range(count))
        low, high = interval(values)
        held = 0
        for below in itertools.product((True, False), repeat=count):
            median = sum(below)  # so many values lie below it
            held += low < median <= high
        assert held / 2**count >= 0.93
    assert interval([1.0, 2.0, 3.0]) == (1.0, 3.0)


def test_a_ratio_is_the_median_of_pairs_and_not_of_sides():
    one, other = [1.0, 10.0, 3.0], [2.0, 10.0, 1.0]
    found = figure("a / b", "s", one, other, least=1.0)
    assert found.ratio == statistics.median([0.5, 1.0, 3.0])
    assert (found.one, found.other, found.kept) == (3.0, 2.0, True)
    assert figure("a / b", "s", one, other, least=1.1).kept is False
    assert figure("a / b", "s", one, other, most=0.9).kept is False
    assert figure("a / b", "s", one, other).kept is None


def test_sides_take_turns_and_change_places():
    said = []
    sides = {name: lambda name=name: said.append(name) or {"s": 1.0} for name in "ab"}
    turns = alternate(sides, 3)
    assert said == list("abbaab")
    assert {name: len(of) for name, of in turns.items()} == {"a": 3, "b": 3}


def test_a_worker_makes_steps_that_learn():
    command = ["ours", "--backbone", "vit_demo", "--image-size", "64", "--threads", "1"]
    with Worker(str(BENCHMARKS / "step_worker.py"), *command) as worker:
        losses = [worker()["loss"] for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3


def test_the_page_and_the_plot_have_every_section(tmp_path):
    known = bench.sections()
    assert "step_cpu" in known and "step_gpu" in known
    limited = figure("a <b>", "s", [3.0, 3.2], [1.0, 1.0], least=3.5, aim=4.0)
    section = Section(
        name="step_cpu",
        title="t",
        about="a",
        machine="two cores",
        commit="abc",
        command="make bench",
        date="2026-01-01",
        figures=(limited,),
    )
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))) == section
    bench.write(known, {"step_cpu": section}, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| a <b> | s | 3.1 | 1 | **3.1** | 3 to 3.2 | 2 | ≥ 3.5, aim 4 | **no** |" in page
    assert f"## {known['step_gpu'].TITLE}" in page and "Not measured: `make bench-gpu`" in page
    assert "a &lt;b&gt;" in (tmp_path / "benchmarks.svg").read_text()
