"""Dice, IoU and HD95 of one mask, what an empty mask is worth, and the scores as FedFMS has them.

Empty masks. Where truth and prediction are both empty there is nothing to overlap or to measure:
every score is NaN, which `training.evaluate` counts as "empty" and leaves out of means. Where
exactly one of the two is empty, Dice and IoU are 0, and HD95, which has no value then, is the
diagonal of the image: the largest distance two of its pixels can have, so that a structure that was
missed altogether is never better than one that was found in the wrong place.

`paper_scores` alone follows another rule, the paper's: empty and empty is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree
from torch import Tensor

Mask = NDArray[np.bool_]

# FedFMS compares these with raw logits, not with probabilities: they act as probabilities 0.52,
# 0.57, 0.62, 0.67 and 0.71. Reproduced for comparison only.
PAPER_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_PAPER_IOU_SMOOTH = 1e-6
_PAPER_DICE_EPSILON = 1e-4


class Counts(NamedTuple):
    """Foreground pixels of each slice of one class, (D,) int64 each."""

    both: NDArray[np.int64]  # of prediction and truth at once
    predicted: NDArray[np.int64]
    true: NDArray[np.int64]

    @property
    def empty(self) -> Mask:
        """(D,): neither prediction nor truth has a pixel."""
        empty: Mask = (self.predicted + self.true) == 0
        return empty

    def whole(self) -> Counts:
        """The counts of all slices as one, (1,) each."""
        return Counts(*(values.sum(keepdims=True) for values in self))


def count(predicted: Mask, truth: Mask) -> Counts:
    """Count the pixels of two masks, (D, H, W) each, slice by slice.

    Whole numbers: sums in fp32, as MONAI's Dice has them, are no longer exact above 2**24 voxels.
    """
    return Counts(
        *(mask.sum(axis=(1, 2), dtype=np.int64) for mask in (predicted & truth, predicted, truth))
    )


def dice(counts: Counts) -> NDArray[np.float64]:
    """(D,) in [0, 1], twice the overlap over the sum of sizes; NaN where both are empty."""
    return _share(2 * counts.both, counts.predicted + counts.true)


def iou(counts: Counts) -> NDArray[np.float64]:
    """(D,) in [0, 1], intersection over union; NaN where both are empty."""
    return _share(counts.both, counts.predicted + counts.true - counts.both)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = np.full(len(whole), np.nan)
    np.divide(part, whole, out=share, where=whole > 0)
    return share


def hd95(predicted: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """Symmetric 95th-percentile Hausdorff distance between the masks' borders.

    The larger of the two directed 95th percentiles over border pixels; a border pixel is one that
    has a neighbour (4 in 2-D, 6 in 3-D) outside the mask or outside the image. A single slice is
    measured in 2-D: in 3-D all of its pixels would be border. Equal to MONAI's
    `compute_hausdorff_distance`, which stops at 16 million border voxels; this does not.

    Args:
        predicted, truth: (D, H, W).
        spacing: between slices, rows and columns.

    Returns:
        a distance in the unit of `spacing`; NaN where both are empty, `diagonal` where one is.
    """
    found = bool(predicted.any()), bool(truth.any())
    if not any(found):
        return float("nan")
    if not all(found):
        return diagonal(truth.shape, spacing)
    if len(truth) == 1:
        predicted, truth, spacing = predicted[0], truth[0], spacing[1:]
    box = _box(predicted | truth)
    borders = [_border(mask[box], spacing) for mask in (predicted, truth)]
    return max(
        float(np.percentile(KDTree(other).query(one)[0], 95))
        for one, other in (borders, borders[::-1])
    )


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Distance between the centres of the two pixels of an image that lie farthest apart."""
    return float(np.linalg.norm((np.array(shape) - 1) * np.array(spacing)))


def _border(mask: Mask, spacing: Sequence[float]) -> NDArray[np.float64]:
    """(N, 2) or (N, 3) places of the border pixels, in the unit of the spacing."""
    places: NDArray[np.float64] = np.argwhere(mask & ~binary_erosion(mask)).astype(np.float64)
    places *= np.asarray(spacing)
    return places


def _box(mask: Mask) -> tuple[slice, ...]:
    """The foreground's bounding box and one pixel around it, where the image has one.

    Borders and distances are the same inside it, since all of both masks and all their neighbours
    are in it; on a large volume it is several times faster.
    """
    (sides,) = find_objects(mask.view(np.uint8))
    return tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in sides)


def paper_scores(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU of each slice and class exactly as FedFMS reports them.

    Five thresholds on raw logits, `(2 overlap + 1e-4) / (sizes + 1e-4)` and
    `(intersection + 1e-6) / (union + 1e-6)` at each, averaged over the thresholds; so empty and
    empty is 1, and any pixel in an empty slice makes it about 0. Average over slices for the
    paper's numbers (arXiv 2403.05408).

    Args:
        logits: (B, K, M, M), before the sigmoid.
        target: (B, K, M, M), 0 or 1.

    Returns:
        Dice and IoU, (B, K) fp64 each.
    """
    truth = target > 0.5
    true = truth.sum(dim=(-2, -1)).double()
    dices, ious = torch.zeros_like(true), torch.zeros_like(true)
    for threshold in PAPER_THRESHOLDS:
        predicted = logits > threshold
        size = predicted.sum(dim=(-2, -1)).double() + true
        both = (predicted & truth).sum(dim=(-2, -1)).double()
        dices += (2 * both + _PAPER_DICE_EPSILON) / (size + _PAPER_DICE_EPSILON)
        ious += (both + _PAPER_IOU_SMOOTH) / (size - both + _PAPER_IOU_SMOOTH)
    return dices / len(PAPER_THRESHOLDS), ious / len(PAPER_THRESHOLDS)
