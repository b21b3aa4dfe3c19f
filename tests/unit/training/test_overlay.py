from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from little import disc_case, little_case, little_recipe, little_site
from PIL import Image
from scipy import ndimage
from scipy.ndimage import binary_dilation, binary_erosion

from fedfms.control import Control
from fedfms.models.build import build_model
from fedfms.training.evaluate import CaseScore, evaluate
from fedfms.training.overlay import (
    CLASS_COLOURS,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    choose_cases,
    draw_overlay,
    fullest_slice,
    site_pictures,
)


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def in_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The picture without its caption, which uses the same colours."""
    return (pixels[:-44] == colour).all(axis=-1)


def score(key: str, dice: float, class_name: str = "disc") -> CaseScore:
    return CaseScore(key, class_name, dice, dice, 0.0, math.isnan(dice), (), True, dice > 0)


def test_contours_lie_where_the_masks_end():
    truth, predicted = np.zeros((1, 64, 64), bool), np.zeros((1, 64, 64), bool)
    truth[0, 10:30, 10:30] = True
    predicted[0, 36:56, 36:56] = True
    case = little_case(np.full((1, 64, 64), 90), np.zeros((1, 64, 64)))
    png = draw_overlay(case, 0, predicted, truth, "case 1 of 1")
    pixels = pixels_of(png)
    assert pixels.shape == (512 + 44, 512, 3)

    zoom = np.ones((8, 8), bool)
    large_truth, large_predicted = np.kron(truth[0], zoom), np.kron(predicted[0], zoom)
    blue, orange = in_colour(pixels, TRUTH_COLOUR), in_colour(pixels, PREDICTION_COLOUR)
    assert blue.any() and not (blue & large_truth).any()  # just outside
    assert (blue & ~binary_dilation(large_truth, iterations=2)).sum() == 0
    assert orange.any() and not (orange & ~large_predicted).any()  # just inside
    corner = large_predicted & ~np.roll(large_predicted, (1, 1), axis=(0, 1))
    assert orange[corner].all()
    grey = pixels[:512][~blue & ~orange]
    assert (grey == 90).all()


def test_classes_are_told_apart_by_colour_and_truth_from_prediction_by_dashes():
    truth, predicted = np.zeros((2, 64, 64), bool), np.zeros((2, 64, 64), bool)
    truth[0, 6:30, 6:30], predicted[0, 8:28, 8:28] = True, True
    truth[1, 36:60, 30:60], predicted[1, 38:58, 36:60] = True, True
    case = little_case(np.full((1, 64, 64), 90), np.zeros((1, 64, 64)))
    colours = dict(zip(("disc", "the_cup"), CLASS_COLOURS, strict=False))
    pixels = pixels_of(draw_overlay(case, 0, predicted, truth, "case 1 of 1", colours))[:512]
    zoom = np.ones((8, 8), bool)
    for number, colour in enumerate(colours.values()):
        mine = (pixels == colour).all(axis=-1)
        large, found = np.kron(truth[number], zoom), np.kron(predicted[number], zoom)
        outside = binary_dilation(large, iterations=2) & ~large
        inside = found & ~binary_erosion(found, iterations=2)
        assert mine[inside].all()  # solid
        assert 0.3 < mine[outside].mean() < 0.7  # dashed
        assert not (mine & ~inside & ~outside).any()  # and no other class in this colour
        _, dashes = ndimage.label(mine & outside)
        assert dashes > 10


def test_the_legend_names_the_classes_and_wraps():
    mask = np.zeros((9, 16, 16), bool)
    names = [f"a_class_of_a_long_name_{number}" for number in range(9)]
    colours = {name: CLASS_COLOURS[n % len(CLASS_COLOURS)] for n, name in enumerate(names)}
    case = little_case(np.full((1, 16, 16), 90), np.zeros((1, 16, 16)))
    pixels = pixels_of(draw_overlay(case, 0, mask, mask, "", colours))
    assert pixels.shape[0] > 512 + 44 + 2 * 19  # three lines of names or more
    for colour in CLASS_COLOURS:
        assert (pixels[512:] == colour).all(axis=-1).any()


def test_agreement_shows_both_contours():
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 10:30, 12:28] = True
    pixels = pixels_of(draw_overlay(disc_case(0, 1, 40), 0, mask, mask, ""))
    assert in_colour(pixels, TRUTH_COLOUR).sum() > 500
    assert in_colour(pixels, PREDICTION_COLOUR).sum() > 500


def test_slices_are_drawn_as_high_and_wide_as_they_are():
    case = little_case(np.full((2, 20, 20), 50), np.zeros((2, 20, 20)), (1.0, 3.0, 1.0))
    mask = np.zeros((1, 20, 20), bool)
    pixels = pixels_of(draw_overlay(case, 0, mask, mask, ""))
    grey = (pixels[:512] == 50).all(axis=-1)
    assert grey.any(axis=1).sum() == 512  # 60 mm of rows
    assert 168 <= grey.any(axis=0).sum() <= 173  # 20 mm of columns


def test_colour_pictures_become_grey():
    images = np.zeros((1, 16, 16, 3))
    images[..., 0] = 200
    mask = np.zeros((1, 16, 16), bool)
    pixels = pixels_of(draw_overlay(little_case(images, np.zeros((1, 16, 16))), 0, mask, mask, ""))
    assert (pixels[:512] == pixels[:512, :, :1]).all()


def test_best_median_and_worst_by_the_mean_over_classes():
    scores = [score("a", 0.9), score("b", 0.2), score("c", 0.6), score("d", math.nan)]
    scores += [score("a", 0.1, "cup"), score("b", 0.8, "cup"), score("e", 0.95)]
    chosen = choose_cases(scores)  # e 0.95, c 0.6, a 0.5, b 0.5
    assert [(c.key, c.rank, c.word) for c in chosen] == [
        *(("e", 1, "best"), ("a", 3, "median"), ("b", 4, "worst"))
    ]
    assert chosen[1].dice == pytest.approx(0.5)


def test_few_cases_give_few_pictures():
    assert choose_cases([score("d", math.nan)]) == []
    assert [c.word for c in choose_cases([score("a", 0.3)])] == ["best"]
    assert [c.word for c in choose_cases([score("a", 0.3), score("b", 0.5)])] == ["best", "worst"]


def test_the_fullest_slice_is_shown():
    truth = np.zeros((2, 5, 4, 4), bool)
    assert fullest_slice(truth) == 2
    truth[0, 1, :2], truth[1, 3] = True, True
    assert fullest_slice(truth) == 3


@pytest.mark.parametrize("classes", [("disc",), ("disc", "cup")])
def test_a_sites_pictures_name_nobody(classes):
    recipe = little_recipe(image_size=64, classes=classes)
    site = little_site()
    model = build_model(recipe, None)
    cases = [disc_case(seed, 3, key=f"SMITH_{seed}") for seed in range(4)]
    scores = evaluate(model, cases, recipe, site, Control())
    with torch.no_grad():
        pictures = site_pictures(model, cases, scores, recipe, site, Control())
    assert len(pictures) == len(choose_cases(scores)) > 0
    for png in pictures:
        assert b"SMITH" not in png
        assert Image.open(io.BytesIO(png)).info == {}
        assert in_colour(pixels_of(png), TRUTH_COLOUR).any()
    again = site_pictures(model, cases, scores, recipe, site, Control())
    assert pictures == again
