"""What the site's policy lets out, and everything that keeps the door closed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.errors import DoorClosed
from fedfms.exchange.bounds import read_policy
from fedfms.exchange.door import (
    check_job,
    pass_door,
    pass_pictures,
)
from fedfms.exchange.noise import random_normal
from fedfms.exchange.tensors import shapes_of, update_norm

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256="a" * 64,
    classes=("disc", "cup"),
    rounds=5,
)
SITE = SiteConfig(
    data_root=Path("/data"),
    format="nifti",
    images="images/*.nii.gz",
    labels="labels/*.nii.gz",
    classes={"disc": (1,), "cup": (2,)},
    min_cases=2,
)
POLICY = Policy(min_cases=4, min_cases_for_spread=4)


def metric(name: str = "dice", class_name: str = "disc", cases: int = 10, empty: int = 0) -> Metric:
    return Metric(class_name=class_name, metric=name, mean=0.8, std=0.1, cases=cases, empty=empty)


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
    metrics=(metric(), metric("hd95"), metric("dice_slice", cases=60)),
    loss=0.3,
    seconds={"train": 1.5},
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(40, 50, generator=generator),
        "b": torch.randn(7, generator=generator),
    }


def passes(tensors, *, policy=POLICY, site=SITE, recipe=RECIPE, report=REPORT, expected=None):
    expected = shapes_of(tensors) if expected is None else expected
    return pass_door(policy, site, recipe, expected, tensors, report)


# ------------------------------------------------------------------------------------- tensors


def test_without_clipping_the_difference_leaves_as_it_is(tensors) -> None:
    leaving, report = passes(tensors)
    assert all(torch.equal(leaving[name], tensors[name]) for name in tensors)
    assert report.update_norm == update_norm(tensors)
    assert dataclasses.replace(report, update_norm=None) == REPORT


def test_a_long_difference_is_scaled_to_the_clip_norm_and_keeps_its_direction(tensors) -> None:
    leaving, report = passes(tensors, policy=Policy(clip_norm=2.0))
    assert update_norm(leaving) == pytest.approx(2.0, rel=1e-5)
    assert report.update_norm == pytest.approx(2.0, rel=1e-5)
    scale = 2.0 / update_norm(tensors)
    for name in tensors:
        torch.testing.assert_close(leaving[name], tensors[name] * scale)


def test_a_short_difference_and_one_of_zeros_are_not_scaled(tensors) -> None:
    leaving, _ = passes(tensors, policy=Policy(clip_norm=1e6))
    assert all(torch.equal(leaving[name], tensors[name]) for name in tensors)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    leaving, report = passes(zeros, policy=Policy(clip_norm=1.0))
    assert report.update_norm == 0
    assert all(torch.equal(leaving[name], zeros[name]) for name in zeros)


def test_noise_has_the_spread_of_the_policy_and_is_new_each_time() -> None:
    zeros = {"w": torch.zeros(500, 400)}
    policy = Policy(clip_norm=2.0, noise_std=0.25)
    first, _ = passes(zeros, policy=policy)
    torch.manual_seed(0)
    second, _ = passes(zeros, policy=policy)
    torch.manual_seed(0)
    third, _ = passes(zeros, policy=policy)
    values = first["w"].double().numpy()
    error = 0.5 / math.sqrt(values.size)
    assert abs(values.mean()) < 5 * error
    assert abs(values.std() - 0.5) < 5 * error
    assert not torch.equal(second["w"], third["w"])
    assert not torch.equal(first["w"], second["w"])


def test_the_noise_is_normal() -> None:
    values = np.sort(random_normal(torch.Size([301, 667])).double().numpy().ravel())
    cumulated = 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))
    largest_gap = np.abs(cumulated - np.arange(1, values.size + 1) / values.size).max()
    assert largest_gap * math.sqrt(values.size) < 2.5  # Kolmogorov: exceeded once in 134,000 draws
    pairs = random_normal(torch.Size([100_000, 2])).numpy()
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / math.sqrt(100_000)
    assert random_normal(torch.Size([])).shape == ()
    assert random_normal(torch.Size([0, 4])).shape == (0, 4)


def test_half_precision_leaves_as_half_precision_and_its_overflow_closes_the_door(tensors) -> None:
    recipe = dataclasses.replace(RECIPE, transfer_precision="fp16")
    report = dataclasses.replace(REPORT, recipe_sha256=recipe.sha256)
    leaving, got = passes(tensors, recipe=recipe, report=report)
    for name in tensors:
        np.testing.assert_array_equal(leaving[name], tensors[name].numpy().astype(np.float16))
    assert got.update_norm == update_norm(leaving)
    with pytest.raises(DoorClosed, match="transfer_precision to fp32") as caught:
        passes({"a": torch.tensor([70000.0])}, recipe=recipe, report=report)
    assert caught.value.code == "fp16-overflow"


def test_noise_beyond_every_number_closes_the_door_where_the_difference_had_passed(
    tensors,
) -> None:
    policy = dataclasses.replace(POLICY, clip_norm=1e38, noise_std=1e6)
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, policy=policy)
    assert caught.value.code == "non-finite"


def test_an_evaluation_and_a_holdout_leave_no_tensor(tensors) -> None:
    for change in ({"kind": "evaluate", "model": "final"}, {"role": "holdout"}):
        report = dataclasses.replace(REPORT, **change, training_slices=0)
        leaving, got = passes({}, report=report, expected=shapes_of(tensors))
        assert leaving == {}
        assert got.update_norm is None
        with pytest.raises(DoorClosed) as caught:
            passes(tensors, report=report)
        assert caught.value.code == "tensors-not-asked-for"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda t: t.pop("a"), "missing-tensor"),
        (lambda t: t.update(pixels=torch.zeros(3)), "unknown-tensor"),
        (lambda t: t.update(b=torch.zeros(8)), "wrong-shape"),
        (lambda t: t.update(b=torch.zeros(7, dtype=torch.int32)), "wrong-type"),
        (lambda t: t.update(b=np.zeros(7, dtype=np.float32)), "wrong-type"),
        (lambda t: t["b"].fill_(math.nan), "non-finite"),
        (lambda t: t["b"][3:4].fill_(-math.inf), "non-finite"),
    ],
)
def test_any_other_tensor_closes_the_door(tensors, spoil, code: str) -> None:
    expected = shapes_of(tensors)
    spoil(tensors)
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, expected=expected)
    assert caught.value.code == code


# -------------------------------------------------------------------------------------- report


def test_a_metric_of_too_few_cases_loses_its_value(tensors) -> None:
    metrics = (
        metric(cases=3),
        metric("dice_slice", cases=300),  # many slices of the same three cases
        metric("iou_slice", class_name="cup", cases=300),  # no case at all is behind these
        metric("hd95", cases=4),
    )
    _, report = passes(tensors, report=dataclasses.replace(REPORT, metrics=metrics))
    assert [m.mean for m in report.metrics] == [None, None, None, 0.8]
    assert [m.std for m in report.metrics] == [None, None, None, 0.1]
    _, report = passes(
        tensors,
        policy=Policy(min_cases=4, min_cases_for_spread=5),
        report=dataclasses.replace(REPORT, metrics=metrics),
    )
    assert (report.metrics[3].mean, report.metrics[3].std) == (0.8, None)
    assert [m.cases for m in report.metrics] == [0, 300, 300, 4]


@pytest.mark.parametrize(
    ("dice", "hd95", "told"),
    [  # cases with a value, and empty ones, of ten; what is told where fewer than 4 stay untold
        ((10, 0), (10, 0), ((10, 0), (10, 0))),
        ((9, 1), (7, 1), ((10, 0), (10, 0))),  # not that one is empty, nor that three have no hd95
        ((6, 4), (5, 4), ((6, 4), (5, 4))),
        ((2, 8), (1, 8), ((0, 8), (0, 8))),
    ],
)
def test_a_count_from_which_one_of_few_cases_follows_is_coarse(tensors, dice, hd95, told) -> None:
    metrics = (metric(cases=dice[0], empty=dice[1]), metric("hd95", cases=hd95[0], empty=hd95[1]))
    _, report = passes(tensors, report=dataclasses.replace(REPORT, metrics=metrics))
    assert tuple((m.cases, m.empty) for m in report.metrics) == told


def test_numbers_of_cases_below_the_minimum_leave_as_0_and_the_averaging_weight_as_it_is(
    tensors,
) -> None:
    few = dataclasses.replace(REPORT, training_cases=3, evaluated_cases=3, training_slices=41)
    _, report = passes(tensors, report=few)
    assert (report.training_cases, report.evaluated_cases) == (0, 0)
    assert report.training_slices == 41


def test_means_leave_in_three_decimals(tensors) -> None:
    exact = dataclasses.replace(metric(), mean=0.8704530950861518, std=0.0123456)
    _, report = passes(
        tensors, report=dataclasses.replace(REPORT, metrics=(exact,), loss=0.123456789)
    )
    assert (report.metrics[0].mean, report.metrics[0].std, report.loss) == (0.87, 0.012, 0.123)


@pytest.mark.parametrize(("of_policy", "of_site"), [(11, 1), (1, 11)])
def test_the_larger_of_the_two_minimums_counts_and_few_cases_lose_their_counts_too(
    tensors, of_policy: int, of_site: int
) -> None:
    _, report = passes(
        tensors,
        policy=Policy(min_cases=of_policy),
        site=dataclasses.replace(SITE, min_cases=of_site),
    )
    assert all((m.mean, m.std, m.cases, m.empty) == (None, None, 0, 0) for m in report.metrics)


def test_the_loss_of_too_few_cases_stays(tensors) -> None:
    for cases, loss in ((3, None), (4, 0.3)):
        _, got = passes(tensors, report=dataclasses.replace(REPORT, training_cases=cases))
        assert got.loss == loss


@pytest.mark.parametrize(
    "change",
    [
        {"site": "a site with blanks"},
        {"site": "/data/images/jane_doe.nii.gz"},
        {"model": "jane-doe"},
        {"seconds": {"jane-doe": 1.0}},
        {"seconds": {"train": math.nan}},
        {"peak_memory_bytes": {"jane-doe": 1}},
        {"peak_memory_bytes": {"train": 1.5}},
        {"peak_memory_bytes": 1},
        {"loss": math.inf},
        {"loss": "jane-doe"},
        {"training_slices": True},
        {"training_slices": -1},
        {"package_version": "1.0 jane doe"},
        {"metrics": (metric(class_name="jane-doe"),)},
        {"metrics": (metric("volume"),)},
        {"metrics": (dataclasses.replace(metric(), mean=math.nan),)},
        {"metrics": (dataclasses.replace(metric(), empty="jane-doe"),)},
    ],
)
def test_a_report_with_anything_else_in_it_closes_the_door(tensors, change) -> None:
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, report=dataclasses.replace(REPORT, **change))
    assert caught.value.code == "malformed-report"
    assert "doe" not in caught.value.public


@pytest.mark.parametrize("report", [None, {}, "text"])
def test_something_that_is_no_report_closes_the_door(tensors, report) -> None:
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, report=report)
    assert caught.value.code == "malformed-report"


@pytest.mark.parametrize("key", ["recipe_sha256", "backbone_sha256"])
def test_a_report_about_another_recipe_closes_the_door(tensors, key: str) -> None:
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, report=dataclasses.replace(REPORT, **{key: "b" * 64}))
    assert caught.value.code == "other-recipe"


# -------------------------------------------------------------------------------------- policy


def test_a_policy_that_allows_the_job_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text('{"methods": ["fedmsa"], "max_rounds": 5}')
    policy = read_policy(tmp_path)
    assert policy == Policy(methods=("fedmsa",), max_rounds=5)
    check_job(policy, RECIPE)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"min_case": 3}',
        '{"min_cases": "3"}',
        '{"min_cases": 0}',
        '{"methods": []}',
        '{"methods": ["*"]}',
        '{"clip_norm": NaN}',
        '{"noise_std": 1.0}',
        '{"pictures": "no"}',
        "[" * 100_000,
    ],
)
def test_a_policy_with_a_mistake_closes_the_door(tmp_path: Path, content: str) -> None:
    (tmp_path / "privacy.json").write_text(content)
    with pytest.raises(DoorClosed, match=r"privacy\.json") as caught:
        read_policy(tmp_path)
    assert caught.value.code == "no-policy"


def test_no_policy_no_folder_and_a_file_in_its_place_close_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder" / "privacy.json").mkdir(parents=True)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "privacy.json").write_bytes(b"\xff\xfe{}")
    for folder in (
        tmp_path,
        tmp_path / "none",
        *(tmp_path / n for n in ("file", "folder", "binary")),
    ):
        with pytest.raises(DoorClosed, match="nothing leaves") as caught:
            read_policy(folder)
        assert caught.value.code == "no-policy"


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (Policy(methods=("fedsam",)), "method-not-allowed"),
        (Policy(max_rounds=4), "too-many-rounds"),
        (None, "no-policy"),
        (json.loads("{}"), "no-policy"),
    ],
)
def test_a_job_that_the_policy_does_not_allow_is_refused_before_and_at_the_door(
    tensors, policy, code: str
) -> None:
    with pytest.raises(DoorClosed) as caught:
        check_job(policy, RECIPE)
    assert caught.value.code == code
    with pytest.raises(DoorClosed) as caught:
        passes(tensors, policy=policy)
    assert caught.value.code == code


# ------------------------------------------------------------------------------------ pictures


def png(text: dict[str, str] | None = None) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (1, 2, 3)).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def test_pictures_leave_only_where_the_policy_says_so() -> None:
    assert pass_pictures(Policy(), RECIPE, [png()]) == []
    assert pass_pictures(Policy(pictures=True), RECIPE, [png(), png()]) == [png(), png()]


@pytest.mark.parametrize(
    "picture",
    [
        png({"Title": "jane_doe.nii.gz"}),
        png() + b"jane_doe",
        png()[:-1],
        b"GIF89a",
        b"",
        png() + b"\0" * (2 * 1024 * 1024),
    ],
)
def test_a_picture_with_more_than_pixels_in_it_closes_the_door(picture: bytes) -> None:
    with pytest.raises(DoorClosed) as caught:
        pass_pictures(Policy(pictures=True), RECIPE, [png(), picture])
    assert caught.value.code == "picture"


def test_too_many_pictures_close_the_door() -> None:
    with pytest.raises(DoorClosed):
        pass_pictures(Policy(pictures=True), RECIPE, [png()] * 33)
