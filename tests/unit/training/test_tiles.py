"""Pictures in parts: what is trained on, and how masks are put together, against MONAI's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from little import little_case, little_recipe, little_site
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from fedfms.control import Control
from fedfms.data.cache import CacheFolder
from fedfms.data.features import slice_name
from fedfms.data.prepared import PreparedCase
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError
from fedfms.export.run import _check_method
from fedfms.geometry import Frame, Part, Tile, native_logits, pieces, tiles, to_native
from fedfms.models.methods import find_method
from fedfms.training.augment import Variation
from fedfms.training.evaluate import evaluate, foreground, predict

RECIPE = little_recipe(normalize=False, tile=32, classes=("disc",))
SITE = little_site(classes={"disc": (1,)})


class Bright(nn.Module):
    """Finds what is white in a part of 32 pixels, which it sees as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return self.scale * (nn.functional.avg_pool2d(images[:, :1], 2) - 0.5)


def spots(height: int, width: int, at: list[tuple[int, int]]) -> PreparedCase:
    """A picture with white squares of 4 pixels, which are the disc."""
    labels = np.zeros((1, height, width), int)
    for row, column in at:
        labels[0, row : row + 4, column : column + 4] = 1
    return little_case(255 * labels, labels)


def test_parts_cover_a_slice_and_are_alike():
    for height, width, side, overlap in ((100, 71, 32, 0.25), (33, 32, 32, 0.0), (20, 90, 32, 0.5)):
        found = tiles(height, width, side, overlap)
        seen = np.zeros((height, width), int)
        for one in found:
            seen[one.rows, one.columns] += 1
        assert seen.min() == 1 and len(set(found)) == len(found)
        assert {(one.height, one.width) for one in found} == {(min(side, height), min(side, width))}
    assert tiles(64, 64, 32) == [
        Tile(top, left, 32, 32) for top in (0, 32) for left in (0, 32)
    ]  # none twice


@pytest.mark.parametrize("size", [(101, 70), (40, 33), (96, 96)])
def test_masks_are_put_together_as_by_monais_sliding_windows(size):
    height, width = size
    generator = torch.Generator().manual_seed(1)
    image = little_case(np.zeros((2, *size)), np.zeros((2, *size)))
    picture = torch.randn(2, 1, *size, generator=generator)
    frame = Frame(min(32, height), min(32, width))

    def network(part: Tensor) -> Tensor:  # two classes, at half the size
        found = nn.functional.avg_pool2d(part, 2)
        return torch.cat([found, found**2 - 1], dim=1)

    def native(part: Tensor) -> Tensor:
        return to_native(network(part), frame, RECIPE)

    wanted = sliding_window_inference(picture, (32, 32), 4, native, overlap=0.25, mode="gaussian")
    stream = (
        network(picture[index : index + 1, :, part.tile.rows, part.tile.columns])[0]
        for part, index in pieces(image, RECIPE)
        if isinstance(part, Part)
    )
    got = torch.full_like(wanted, float("nan"))
    for where, found in native_logits(stream, image, RECIPE, 2):
        assert got[where.slices, :, where.rows].isnan().all()  # each pixel once
        got[where.slices, :, where.rows] = found
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_small_is_found_in_parts_and_not_in_the_whole():
    case = spots(200, 300, [(10, 20), (97, 150), (180, 290)])
    for recipe, expected in ((RECIPE, 1.0), (little_recipe(normalize=False, classes=("disc",)), 0)):
        network = Bright()
        (score,) = evaluate(network, [case], recipe, SITE, Control())
        assert score.dice == pytest.approx(expected, abs=0.2)
        assert {shape[1:] for shape in network.seen} == {(3, 32, 32)}  # whatever the picture's size


def test_a_mask_that_is_written_is_the_one_that_is_scored():
    case, network = spots(70, 90, [(30, 30)]), Bright()
    parts = pieces(case, RECIPE)
    together = list(predict(network, parts, RECIPE, SITE, Control()))
    alone = [next(predict(network, [one], RECIPE, SITE, Control())) for one in parts]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    masks = foreground(together, case, RECIPE)
    assert masks.shape == (1, 1, 70, 90) and masks[0, 0, 30:34, 30:34].all()


def test_training_sees_parts_with_foreground_and_some_without():
    case = spots(96, 64, [(40, 40)])
    case.labels[0, 0, 0] = 7  # void
    site = little_site(classes={"disc": (1,)}, void=(7,), keep_empty_every=5)
    dataset = SliceDataset([case], site, RECIPE)
    every = tiles(96, 64, 32)
    assert len(every) == 6
    shown = [dataset.picture(item)[0] for item in range(len(dataset))]
    # of 5 parts without foreground every fifth, from the first on
    assert [one.tile for one in shown] == [every[0], every[3]]
    for item, part in enumerate(shown):
        levels, covered, target, annotated = dataset.levels(item, native=True)
        np.testing.assert_array_equal(levels[0], case.images[0, part.tile.rows, part.tile.columns])
        assert covered == (32, 32) and annotated.tolist() == [1.0]
        assert target[0].any() == (item == 1) and target[1].any() == (item == 0)
        image = dataset[item]["image"]
        torch.testing.assert_close(image[0], levels[0] / 255)
    names = {Variation(dataset, RECIPE, 0, None).name(item, 0) for item in range(len(dataset))}
    assert len(names) == len(dataset)


def test_a_part_at_an_edge_is_seen_as_large_as_others():
    assert Frame(32, 32).input_size(RECIPE) == (32, 32)
    assert Frame(32, 20).input_size(RECIPE) == (32, 20)
    assert Frame(16, 8).input_size(RECIPE) == (16, 8)  # a small picture is not made larger
    assert Frame(32, 32, aspect=2.0).input_size(RECIPE) == (32, 16)
    assert Frame(32, 32, aspect=0.5).input_size(RECIPE) == (16, 32)
    assert Frame(16, 16, aspect=2.0).input_size(RECIPE) == (16, 8)
    assert Frame(16, 16, aspect=0.5).input_size(RECIPE) == (8, 16)


def test_features_are_kept_for_each_part(stored_case):
    parts = {slice_name(part, index, SITE) for part, index in pieces(stored_case, RECIPE)}
    assert len(parts) == len(pieces(stored_case, RECIPE)) > 1
    assert slice_name(stored_case, 0, SITE) not in parts


@pytest.fixture
def stored_case(tmp_path: Path):
    return CacheFolder(tmp_path / "cache").put(spots(70, 90, [(1, 1)]), "0" * 64)


def test_what_knows_no_parts_refuses_them():
    for format in ("onnx", "bundle"):
        with pytest.raises(ConfigError, match="--as fedfms"):
            _check_method(find_method("fedsam"), RECIPE, format)
