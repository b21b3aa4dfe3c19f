from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from scipy.ndimage import distance_transform_edt, gaussian_filter, generate_binary_structure

from fedfms.training.metrics import count, diagonal, dice, hd95, iou, paper_scores

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.5, 2.0, 1.25)]


def blob(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    noise = gaussian_filter(rng.normal(size=shape), (0.0 if shape[0] == 1 else 1.0, 1.5, 1.5))
    return noise > np.quantile(noise, 1 - share)


def mask_pairs() -> list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    """200 pairs, 2-D and 3-D; 42 of them edge cases, each in isotropic and anisotropic spacing."""
    rng = np.random.default_rng(7)
    pairs = []
    for number in range(158):
        shape = (1, 23, 17) if number % 2 else (6, 14, 19)
        one, other = (blob(rng, shape, rng.uniform(0.02, 0.6)) for _ in range(2))
        pairs.append((one, other, SPACINGS[number % 3]))
    for shape in ((1, 23, 17), (6, 14, 19)):
        for spacing in SPACINGS:
            pixel, corner, full, empty = (np.zeros(shape, bool) for _ in range(4))
            pixel[shape[0] // 2, 4, 5] = True
            corner[-1, -1, -1] = True
            full[:] = True
            border = blob(rng, shape, 0.3)
            border[:, 0, :] = True  # touches the image's border on one side
            pairs += [
                (pixel, corner, spacing),
                (pixel, pixel, spacing),
                (full, border, spacing),
                (border, np.roll(border, 3, axis=1), spacing),
                (pixel, empty, spacing),
                (empty, border, spacing),
                (empty, empty, spacing),
            ]
    return pairs


ALL_PAIRS = mask_pairs()
PAIRS = [(one, other, spacing) for one, other, spacing in ALL_PAIRS if one.any() and other.any()]


def hd95_by_distance_maps(one: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Border pixels by counting neighbours, distances by distance maps of the whole image."""
    if len(one) == 1:
        one, other, spacing = one[0], other[0], spacing[1:]

    def border(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1).astype(int)
        cross = generate_binary_structure(mask.ndim, 1)
        inside = sum(
            np.roll(padded, [c - 1 for c in corner], axis=range(mask.ndim))
            for corner in np.argwhere(cross)
        )
        middle = tuple(slice(1, -1) for _ in range(mask.ndim))
        return mask & (inside[middle] < cross.sum())

    edge, other_edge = border(one), border(other)
    there = distance_transform_edt(~other_edge, sampling=spacing)[edge]
    back = distance_transform_edt(~edge, sampling=spacing)[other_edge]
    return max(np.percentile(there, 95), np.percentile(back, 95))


def tensors(*masks: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(mask)[None, None].float() for mask in masks]


def test_there_are_enough_pairs():
    assert len(ALL_PAIRS) == 200
    sizes = [(int(one.sum()), int(other.sum())) for one, other, _ in ALL_PAIRS]
    assert sizes.count((0, 0)) == 6  # both empty
    assert sum((a == 0) != (b == 0) for a, b in sizes) == 12  # one empty
    assert sum(1 in pair for pair in sizes) >= 12  # one pixel
    touching = [one for one, _, _ in ALL_PAIRS if one[:, 0].any() or one[:, :, -1].any()]
    assert len(touching) > 100
    assert sum(len(set(spacing)) > 1 for _, _, spacing in ALL_PAIRS) > 100  # anisotropic


def test_empty_masks_have_the_values_that_are_promised_and_monai_agrees_where_it_has_any():
    for one, other, spacing in ALL_PAIRS:
        if one.any() and other.any():
            continue
        whole = count(one, other).whole()
        got = dice(whole)[0], iou(whole)[0], hd95(one, other, spacing)
        if not one.any() and not other.any():
            assert np.isnan(got).all()
            assert np.isnan(compute_dice(*tensors(one, other), ignore_empty=True).item())
            continue
        extent = [(size - 1) * step for size, step in zip(one.shape, spacing, strict=True)]
        assert got == (0.0, 0.0, pytest.approx(math.hypot(*extent), abs=1e-6))
        assert compute_dice(*tensors(one, other), ignore_empty=False).item() == 0.0
        assert compute_iou(*tensors(one, other), ignore_empty=False).item() == 0.0


def test_dice_and_iou_equal_sets_of_pixels_and_monai():
    for one, other, _ in PAIRS:
        a, b = ({tuple(i) for i in np.argwhere(mask)} for mask in (one, other))
        whole = count(one, other).whole()
        assert dice(whole)[0] == pytest.approx(2 * len(a & b) / (len(a) + len(b)), abs=1e-12)
        assert iou(whole)[0] == pytest.approx(len(a & b) / len(a | b), abs=1e-12)
        assert dice(whole)[0] == pytest.approx(compute_dice(*tensors(one, other)).item(), abs=1e-6)
        assert iou(whole)[0] == pytest.approx(compute_iou(*tensors(one, other)).item(), abs=1e-6)


def test_scores_per_slice_are_those_of_each_slice_alone():
    for one, other, _ in PAIRS:
        together = dice(count(one, other)), iou(count(one, other))
        for index in range(len(one)):
            alone = count(one[index : index + 1], other[index : index + 1])
            np.testing.assert_array_equal(dice(alone)[0], together[0][index])
            np.testing.assert_array_equal(iou(alone)[0], together[1][index])


def test_hd95_equals_distance_maps_and_monai_in_both_directions():
    for one, other, spacing in PAIRS:
        got = hd95(one, other, spacing)
        assert got == pytest.approx(hd95_by_distance_maps(one, other, spacing), rel=1e-6)
        assert got == hd95(other, one, spacing)
        flat = len(one) == 1
        monai = compute_hausdorff_distance(
            *tensors(*((one[0], other[0]) if flat else (one, other))),
            include_background=True,
            percentile=95,
            spacing=list(spacing[1:] if flat else spacing),
        )
        assert got == pytest.approx(monai.item(), rel=1e-5)  # it measures in fp32


def test_hd95_of_masks_whose_distance_is_known():
    truth, shifted = np.zeros((1, 30, 30), bool), np.zeros((1, 30, 30), bool)
    truth[0, 5:15, 5:15] = True
    shifted[0, 5:15, 9:19] = True  # four columns to the right
    assert hd95(shifted, truth, (1.0, 1.0, 0.5)) == pytest.approx(2.0)
    assert hd95(truth, truth, (1.0, 1.0, 0.5)) == 0.0
    slices, other = np.zeros((9, 8, 8), bool), np.zeros((9, 8, 8), bool)
    slices[1, 4, 4], other[5, 4, 4] = True, True
    assert hd95(slices, other, (2.5, 1.0, 1.0)) == pytest.approx(10.0)


def test_both_empty_has_no_score():
    empty = np.zeros((3, 5, 5), bool)
    counts = count(empty, empty)
    assert np.isnan(dice(counts)).all()
    assert np.isnan(iou(counts)).all()
    assert counts.empty.all()
    assert math.isnan(hd95(empty, empty, (1, 1, 1)))


def test_one_empty_is_worth_nothing_and_as_far_off_as_the_image_is_large():
    rng = np.random.default_rng(0)
    some, empty = blob(rng, (4, 10, 12), 0.2), np.zeros((4, 10, 12), bool)
    for one, other in ((some, empty), (empty, some)):
        counts = count(one, other).whole()
        assert dice(counts)[0] == iou(counts)[0] == 0.0
        assert not counts.empty[0]
        assert hd95(one, other, (3.0, 1.0, 0.5)) == pytest.approx(
            math.sqrt(9.0**2 + 9.0**2 + 5.5**2)
        )


def test_no_wrong_place_is_farther_off_than_not_found():
    for one, other, spacing in PAIRS:
        assert hd95(one, other, spacing) <= diagonal(one.shape, spacing) + 1e-6


# --------------------------------------------------------------------------- the paper's own scores


def paper_by_hand(logit: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """One slice of one class, as the paper's evaluation goes through its thresholds."""
    dices, ious = 0.0, 0.0
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        predicted = logit > threshold  # no sigmoid
        overlap = float(np.logical_and(predicted, truth).sum())
        dices += (2 * overlap + 1e-4) / (float(predicted.sum()) + float(truth.sum()) + 1e-4)
        ious += (overlap + 1e-6) / (float(np.logical_or(predicted, truth).sum()) + 1e-6)
    return dices / 5, ious / 5


def test_paper_scores_equal_a_straight_walk_through_the_thresholds():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(0, 1, (60, 2, 12, 12)), dtype=torch.float32)
    target = torch.tensor(rng.random((60, 2, 12, 12)) > 0.6).float()
    target[:5] = 0  # empty truth, wrong pixels
    logits[5:10, :, :6] = -4.0
    logits[10:13], target[10:13] = -4.0, 0.0  # empty and empty
    logits[13:15] = 4.0
    steps = np.array([0.1, 0.3, 0.5, 0.7, 0.9], np.float32)  # exactly at a threshold: not found
    logits[15:20] = torch.from_numpy(rng.choice(steps, (5, 2, 12, 12)))
    dices, ious = paper_scores(logits, target)
    for b, k in np.ndindex(60, 2):  # to the last bit
        expected = paper_by_hand(logits[b, k].numpy(), target[b, k].numpy() > 0)
        assert (dices[b, k].item(), ious[b, k].item()) == expected
    assert dices[10:13].min() == ious[10:13].min() == 1.0
    assert dices[0].max() < 1e-4


def test_paper_thresholds_are_on_logits():
    logits = torch.full((1, 1, 4, 4), 0.4)  # probability 0.6
    dices, _ = paper_scores(logits, torch.ones(1, 1, 4, 4))
    assert dices.item() == pytest.approx(0.4, abs=1e-4)  # found at 0.1 and 0.3 only
