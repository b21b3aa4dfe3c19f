from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from little import disc_case, little_case, little_recipe, little_site
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from torch import Tensor, nn

from fedfms.control import Control
from fedfms.data.classes import class_masks
from fedfms.data.prepared import PreparedCase
from fedfms.errors import TaskAborted, TrainingError
from fedfms.geometry import Frame, network_input, to_native
from fedfms.models.build import build_model
from fedfms.training.evaluate import CaseScore, SliceScore, evaluate, predict, summarize
from fedfms.training.interrupt import in_turn


class Reader(nn.Module):
    """Finds exactly what is painted in the picture: disc in the red channel, cup in the green.

    A pixel of 16 x 16 becomes 2 x 2 by the dataset's bilinear resize; their mean is at least 0.56
    of full scale where the pixel is painted and at most 0.44 where it is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return self.scale * (nn.functional.avg_pool2d(images[:, :2], 2) - 0.5)


RECIPE = little_recipe(normalize=False)
SITE = little_site(channels="rgb", classes={"disc": (1, 2), "cup": (2,)})


def painted(
    predicted_disc: np.ndarray,
    predicted_cup: np.ndarray,
    labels: np.ndarray,
    spacing: tuple[float, float, float],
    key: str,
) -> PreparedCase:
    images = np.zeros((*labels.shape, 3))
    images[..., 0], images[..., 1] = 255 * predicted_disc, 255 * predicted_cup
    return little_case(images, labels, spacing, key)


@pytest.fixture
def three_cases() -> list[PreparedCase]:
    def square(depth: int, rows: slice, columns: slice, slices: slice = slice(None)) -> np.ndarray:
        mask = np.zeros((depth, 16, 16), bool)
        mask[slices, rows, columns] = True
        return mask

    nothing = np.zeros((3, 16, 16), bool)
    # a: two of three slices; the disc is found one row too low, the cup in one slice of two
    disc = square(3, slice(2, 12), slice(2, 12), slice(0, 2))
    cup = square(3, slice(4, 8), slice(4, 8), slice(0, 2))
    a = painted(
        square(3, slice(3, 13), slice(2, 12), slice(0, 2)),
        square(3, slice(4, 8), slice(4, 8), slice(0, 1)),
        disc.astype(int) + cup,
        (4.0, 1.0, 0.5),
        "a",
    )
    # b: all found, and there is no cup
    b = painted(disc, nothing, disc.astype(int), (1.0, 1.0, 1.0), "b")
    # c: one picture; the disc is missed, a cup is found where none is
    c = painted(
        nothing[:1],
        square(1, slice(0, 2), slice(0, 2)),
        square(1, slice(5, 9), slice(5, 9)).astype(int),
        (1.0, 1.0, 1.0),
        "c",
    )
    return [a, b, c]


def test_three_cases_worked_out_by_hand(three_cases):
    scores = evaluate(Reader(), three_cases, RECIPE, SITE, Control())
    got = {(score.key, score.class_name): score for score in scores}
    assert [(score.key, score.class_name) for score in scores] == [
        *(("a", "disc"), ("a", "cup"), ("b", "disc"), ("b", "cup"), ("c", "disc"), ("c", "cup"))
    ]
    # 10 x 10 against 10 x 10 one row lower: 90 pixels of a slice in common
    assert got["a", "disc"].dice == pytest.approx(0.9)
    assert got["a", "disc"].iou == pytest.approx(90 / 110)
    assert got["a", "disc"].hd95 == pytest.approx(1.0)
    assert got["a", "disc"].slices[0] == SliceScore(0.9, pytest.approx(90 / 110), False, True)
    assert got["a", "disc"].slices[2].empty
    assert math.isnan(got["a", "disc"].slices[2].dice)
    # the cup is found in the first of two slices, which lie 4 mm apart
    assert got["a", "cup"].dice == pytest.approx(2 / 3)
    assert got["a", "cup"].iou == pytest.approx(1 / 2)
    assert got["a", "cup"].hd95 == pytest.approx(4.0)
    assert [part.dice for part in got["a", "cup"].slices[:2]] == [1.0, 0.0]

    assert (got["b", "disc"].dice, got["b", "disc"].iou, got["b", "disc"].hd95) == (1.0, 1.0, 0.0)
    assert got["b", "cup"].empty
    assert all(math.isnan(getattr(got["b", "cup"], name)) for name in ("dice", "iou", "hd95"))

    diagonal = math.hypot(15, 15)
    for name in ("disc", "cup"):
        assert (got["c", name].dice, got["c", name].iou, got["c", name].empty) == (0.0, 0.0, False)
        assert got["c", name].hd95 == pytest.approx(diagonal)

    metrics = {(m.class_name, m.metric): m for m in summarize(scores, 1)}
    disc = metrics["disc", "dice"]
    assert disc.mean == pytest.approx((0.9 + 1 + 0) / 3)
    assert disc.std == pytest.approx(np.std([0.9, 1, 0]))
    assert (disc.cases, disc.empty) == (3, 0)
    assert metrics["disc", "hd95"].mean == pytest.approx((1 + 0 + diagonal) / 3)
    assert (metrics["cup", "dice"].mean, metrics["cup", "dice"].cases) == (pytest.approx(1 / 3), 2)
    assert metrics["cup", "dice"].empty == 1
    by_slice = metrics["disc", "dice_slice"]  # 0.9 0.9 - | 1 1 - | 0
    assert by_slice.mean == pytest.approx(3.8 / 5)
    assert (by_slice.cases, by_slice.empty) == (5, 2)


@pytest.mark.parametrize("paper_compat", [False, True])
def test_scores_beside_the_next_forward_pass_are_the_same(three_cases, monkeypatch, paper_compat):
    recipe = little_recipe(normalize=False, paper_compat=paper_compat)
    expected = evaluate(Reader(), three_cases, recipe, SITE, Control())
    monkeypatch.setattr(
        "fedfms.training.evaluate.in_turn",
        lambda work, control, beside: in_turn(work, control, beside=True),  # as with a GPU
    )
    assert repr(evaluate(Reader(), three_cases, recipe, SITE, Control())) == repr(expected)


def test_too_few_cases_stay_at_the_site_however_many_slices_they_have(three_cases):
    scores = evaluate(Reader(), three_cases, RECIPE, SITE, Control())
    metrics = {(m.class_name, m.metric): m for m in summarize(scores, 3)}
    for name in ("dice", "iou", "hd95", "dice_slice", "iou_slice"):
        assert metrics["disc", name].mean is not None
        # the cup has a value in two cases only, though in three slices
        assert metrics["cup", name].mean is None
        assert metrics["cup", name].std is None
    assert metrics["cup", "dice_slice"].cases == 3


def test_a_class_without_any_value_has_no_mean():
    score = CaseScore("a", "disc", math.nan, math.nan, math.nan, True, (), False, False)
    assert all(metric.mean is None for metric in summarize([score], 1))
    assert summarize([], 1) == ()


def test_a_class_that_the_site_never_drew_is_not_scored(three_cases):
    site = little_site(channels="rgb", classes={"disc": (1, 2)}, not_annotated=("cup",))
    scores = evaluate(Reader(), three_cases, RECIPE, site, Control())
    assert {score.class_name for score in scores} == {"disc"}
    assert len(scores) == 3


def test_a_batch_holds_slices_of_one_case_and_progress_is_told(three_cases):
    told, model = [], Reader()
    control = Control(lambda *step: told.append(step))
    evaluate(model, three_cases, RECIPE, SITE, control)
    assert model.batches == [3, 3, 1]
    assert told == [("evaluate", 0, 7), ("evaluate", 3, 7), ("evaluate", 6, 7), ("evaluate", 7, 7)]


def test_a_case_is_the_same_alone_as_among_others(three_cases):
    class Rounding(Reader):
        """As sums of a real network: the last digits depend on all that is in the batch."""

        def forward(self, images: Tensor) -> Tensor:
            places = torch.arange(len(images)).view(-1, 1, 1, 1)
            return super().forward(images) + 1e-6 * (len(images) + places)

    def logits(*cases: PreparedCase) -> list[Tensor]:
        slices = [(case, index) for case in cases for index in range(len(case.images))]
        return list(predict(Rounding(), slices, recipe, SITE, Control()))

    recipe = little_recipe(normalize=False, batch_size=2)
    alone = [one for case in three_cases for one in logits(case)]
    for one, among in zip(alone, logits(*three_cases), strict=True):
        assert torch.equal(one, among)


def test_sam_scores_equal_slice_by_slice_prediction_and_monai():
    recipe = little_recipe(image_size=64, batch_size=4)
    site = little_site()
    model = build_model(recipe, None)
    cases = [
        disc_case(seed, depth, 20 + 9 * seed, str(seed)) for seed, depth in enumerate((3, 1, 5))
    ]
    with torch.no_grad():  # random weights: make half of the pixels of a slice foreground
        logits = model(network_input(cases[0], 0, site, recipe)[None])
        model.class_head.bias -= logits.flatten(2).median(dim=-1).values[0]
    scores = evaluate(model, cases, recipe, site, Control())

    rows = iter(scores)
    for case in cases:
        masks = []
        for index in range(len(case.images)):
            with torch.no_grad():
                logits = model(network_input(case, index, site, recipe)[None])
            masks.append(1 / (1 + (-to_native(logits, Frame.of(case), recipe)).exp()) >= 0.5)
        predicted = torch.cat(masks).transpose(0, 1)[None].float()  # (1, K, D, H, W)
        truth = class_masks(case, site, recipe)[None].float()
        if len(case.images) == 1:  # a picture is measured in 2-D
            predicted, truth = predicted[:, :, 0], truth[:, :, 0]
        expected = [
            compute_dice(predicted, truth, ignore_empty=False),
            compute_iou(predicted, truth, ignore_empty=False),
            compute_hausdorff_distance(
                predicted,
                truth,
                include_background=True,
                percentile=95,
                spacing=list(case.spacing[-(predicted.ndim - 2) :]),
            ),
        ]
        for index in range(2):
            row = next(rows)
            got = (row.dice, row.iou, row.hd95)
            assert 0 < row.dice < 1
            assert got == pytest.approx([float(e[0, index]) for e in expected], abs=1e-4)


def test_paper_compat_scores_slices_as_the_paper_and_cases_as_ever(three_cases):
    compat = little_recipe(normalize=False, resize="stretch", paper_compat=True)
    site = little_site(channels="rgb", keep_empty_every=0)
    scores = evaluate(Reader(), three_cases, compat, site, Control())
    got = {(score.key, score.class_name): score for score in scores}
    ordinary = evaluate(Reader(), three_cases, RECIPE, SITE, Control())
    assert [s.dice for s in scores] == pytest.approx([s.dice for s in ordinary], nan_ok=True)
    assert [s.hd95 for s in scores] == pytest.approx([s.hd95 for s in ordinary], nan_ok=True)

    # the third slices of a and b have no foreground, and the site keeps no empty slice
    assert [len(got[key, "disc"].slices) for key in "abc"] == [2, 2, 1]
    for case in three_cases:
        for index in range(len(got[case.case.key, "disc"].slices)):
            logits = Reader()(network_input(case, index, site, compat)[None]).detach().numpy()[0]
            for number, name in enumerate(("disc", "cup")):
                truth = case.labels[index] >= number + 1
                dices, ious = [], []
                for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
                    mask = logits[number] > threshold
                    both, sizes = (mask & truth).sum(), mask.sum() + truth.sum()
                    dices.append((2 * both + 1e-4) / (sizes + 1e-4))
                    ious.append((both + 1e-6) / (sizes - both + 1e-6))
                row = got[case.case.key, name].slices[index]
                assert row.dice == pytest.approx(np.mean(dices), abs=1e-9)
                assert row.iou == pytest.approx(np.mean(ious), abs=1e-9)
    # empty and empty counts as 1 here, and is counted with the others
    assert got["b", "cup"].slices[0] == SliceScore(1.0, 1.0, True, False)
    metrics = {(m.class_name, m.metric): m for m in summarize(scores, 1)}
    assert metrics["cup", "dice_slice"].cases == 5


def test_running_out_of_memory_halves_the_slices_at_once(three_cases):
    class Hungry(Reader):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(images)

        fits = 1

    hungry = Hungry()
    scores = evaluate(hungry, three_cases, RECIPE, SITE, Control())
    assert hungry.batches == [1] * 7
    assert [s.dice for s in scores] == pytest.approx(
        [s.dice for s in evaluate(Reader(), three_cases, RECIPE, SITE, Control())], nan_ok=True
    )
    hungry.fits = 0
    with pytest.raises(TrainingError, match="smaller image_size") as caught:
        evaluate(hungry, three_cases, RECIPE, SITE, Control())
    assert caught.value.code == "out-of-memory"


def test_a_model_that_answers_nonsense_is_not_scored(three_cases):
    model = Reader()
    model.scale.data.fill_(math.nan)
    with pytest.raises(TrainingError) as caught:
        evaluate(model, three_cases, RECIPE, SITE, Control())
    assert caught.value.code == "non-finite-logits"


def test_an_abort_ends_the_evaluation(three_cases):
    control = Control()
    control.abort()
    with pytest.raises(TaskAborted):
        evaluate(Reader(), three_cases, RECIPE, SITE, control)
