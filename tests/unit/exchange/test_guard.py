"""What the server takes from a site, and why it refuses the rest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ContributionRefused
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.tensors import from_wire, shapes_of, to_precision

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256="a" * 64,
    classes=("disc",),
    rounds=5,
    holdout=("site-9",),
)
REPORT = Contribution(
    site="site-1",
    kind="train",
    role="train",
    round=0,
    model="round",
    recipe_sha256=RECIPE.sha256,
    backbone_sha256=RECIPE.backbone_sha256,
    package_version="0.1.0",
    training_slices=40,
    training_cases=12,
    evaluated_cases=10,
    metrics=(Metric(class_name="disc", metric="dice", mean=0.5, std=0.1, cases=9, empty=1),),
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 4), 0.5), "b": torch.zeros(2)}  # L2 norm sqrt(3)


def check(tensors, *, report=REPORT, recipe=RECIPE, expected=None):
    expected = shapes_of(tensors) if expected is None else expected
    return check_contribution(expected, recipe, "0.1.0", tensors, report)


def test_what_is_right_comes_back_as_fp32_with_its_values(tensors) -> None:
    for dtype in (torch.float32, torch.float16):
        got = check({name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert set(got) == set(tensors)
        assert all(t.dtype == torch.float32 and torch.equal(t, tensors[n]) for n, t in got.items())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"package_version": "0.0.9"}, "other-version"),
        ({"recipe_sha256": "b" * 64}, "other-recipe"),
        ({"backbone_sha256": "b" * 64}, "other-backbone"),
        ({"role": "holdout"}, "wrong-role"),
        ({"kind": "evaluate"}, "wrong-role"),
        ({"site": "site-9"}, "wrong-role"),
        ({"training_slices": 0}, "no-training-slices"),
    ],
)
def test_another_report_is_refused_with_the_sites_name(tensors, change, code: str) -> None:
    report = dataclasses.replace(REPORT, **change)
    with pytest.raises(ContributionRefused, match=report.site) as caught:
        check(tensors, report=report)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda t: t["b"].fill_(math.nan), "non-finite"),
        (lambda t: t.pop("a"), "missing-tensor"),
        (lambda t: t.update(c=torch.zeros(1)), "unknown-tensor"),
        (lambda t: t.update(b=torch.zeros(3)), "wrong-shape"),
        (lambda t: t.update(b=torch.zeros(2, dtype=torch.int64)), "wrong-type"),
    ],
)
def test_another_tensor_is_refused_with_the_sites_name(tensors, spoil, code: str) -> None:
    expected = shapes_of(tensors)
    spoil(tensors)
    with pytest.raises(ContributionRefused, match="site-1") as caught:
        check(tensors, expected=expected)
    assert caught.value.code == code


def test_a_difference_beyond_the_recipes_norm_is_refused_and_one_at_it_is_not(tensors) -> None:
    norm = math.sqrt(3)
    for bound, fits in ((norm, True), (norm * 0.9995, True), (norm * 0.998, False)):
        recipe = dataclasses.replace(RECIPE, max_update_norm=bound)
        report = dataclasses.replace(REPORT, recipe_sha256=recipe.sha256)
        if fits:
            check(tensors, recipe=recipe, report=report)
            continue
        with pytest.raises(ContributionRefused, match=r"L2 norm 1\.732") as caught:
            check(tensors, recipe=recipe, report=report)
        assert caught.value.code == "too-large"


def test_a_holdout_site_is_taken_without_tensors_and_refused_with_some(tensors) -> None:
    report = dataclasses.replace(REPORT, site="site-9", role="holdout", training_slices=0)
    assert check({}, report=report, expected=shapes_of(tensors)) == {}
    with pytest.raises(ContributionRefused) as caught:
        check(tensors, report=report)
    assert caught.value.code == "unknown-tensor"


def test_a_report_survives_the_wire_and_nothing_unknown_does() -> None:
    assert Contribution.from_dict(REPORT.to_dict()) == REPORT
    for change in ({"patient": "x"}, {"metrics": [{"dice": 1}]}, {"metrics": 3}, {"round": 1.5}):
        with pytest.raises(ContributionRefused, match="same version") as caught:
            Contribution.from_dict({**REPORT.to_dict(), **change})
        assert caught.value.code == "malformed-report"
    without = {k: v for k, v in REPORT.to_dict().items() if k != "training_slices"}
    with pytest.raises(ContributionRefused, match="training_slices"):
        Contribution.from_dict(without)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({"metric": "dice", "mean": 1.0, "std": 0.5}, True),
        ({"metric": "dice", "mean": 0.0, "std": 0.0}, True),
        ({"metric": "dice", "mean": 1.001}, False),
        ({"metric": "iou", "mean": -0.01}, False),
        ({"metric": "iou_slice", "mean": 1e6}, False),
        ({"metric": "dice_slice", "std": 0.6}, False),
        ({"metric": "hd95", "mean": 250.0, "std": 90.0}, True),
        ({"metric": "hd95", "mean": -1.0}, False),
        ({"metric": "hd95", "std": -1.0}, False),
        ({"metric": "dice", "mean": None, "std": None}, True),
    ],
)
def test_a_score_that_no_prediction_can_have_is_refused(tensors, change, fits: bool) -> None:
    metric = dataclasses.replace(REPORT.metrics[0], **change)
    report = dataclasses.replace(REPORT, metrics=(metric,))
    if fits:
        check(tensors, report=report)
        return
    with pytest.raises(ContributionRefused, match=r"reports a \w+ of disc outside") as caught:
        check(tensors, report=report)
    assert caught.value.code == "metric-range"


@pytest.mark.parametrize("value", [64.5, -65.0, 3e38])
def test_a_value_that_no_sum_can_hold_is_refused(tensors, value: float) -> None:
    check(tensors | {"b": torch.tensor([64.0, -64.0])})
    with pytest.raises(ContributionRefused, match="a value beyond 64 in b") as caught:
        check(tensors | {"b": torch.tensor([0.0, value])})
    assert caught.value.code == "value-too-large"


@pytest.fixture
def eight() -> tuple[Recipe, Contribution]:
    recipe = dataclasses.replace(RECIPE, transfer_precision="int8", max_update_norm=1.0)
    return recipe, dataclasses.replace(REPORT, recipe_sha256=recipe.sha256)


def test_eight_bits_come_back_decoded_and_are_bounded_as_what_they_mean(eight) -> None:
    recipe, report = eight
    whole = {"w": torch.randn(3, 64) / 20, "b": torch.zeros(2)}
    coded = to_precision(whole, "int8")
    got = check(coded, report=report, recipe=recipe, expected=shapes_of(whole))
    assert set(got) == set(whole)
    assert all(torch.equal(got[name], one) for name, one in from_wire(coded).items())
    for factor, code in ((100.0, "too-large"), (1e6, "value-too-large")):
        long = to_precision({name: factor * one for name, one in whole.items()}, "int8")
        with pytest.raises(ContributionRefused) as caught:
            check(long, report=report, recipe=recipe, expected=shapes_of(whole))
        assert caught.value.code == code


def test_eight_bits_are_taken_where_the_recipe_says_so_and_nothing_else_there(eight) -> None:
    recipe, report = eight
    whole = {"w": torch.randn(3, 64) / 20, "b": torch.zeros(2)}
    for tensors, of, said in (
        (whole, recipe, report),
        (to_precision(whole, "fp16"), recipe, report),
        (to_precision(whole, "int8"), RECIPE, REPORT),
    ):
        with pytest.raises(ContributionRefused, match="site-1"):
            check(tensors, report=said, recipe=of, expected=shapes_of(whole))


def test_a_holdout_sends_nothing_in_eight_bits_either(eight) -> None:
    recipe, report = eight
    holdout = dataclasses.replace(report, site="site-9", role="holdout", training_slices=0)
    assert check({}, report=holdout, recipe=recipe, expected={"w": torch.Size([2, 64])}) == {}
    with pytest.raises(ContributionRefused) as caught:
        coded = to_precision({"w": torch.zeros(2, 64)}, "int8")
        check(coded, report=holdout, recipe=recipe, expected={"w": torch.Size([2, 64])})
    assert caught.value.code == "unknown-tensor"
