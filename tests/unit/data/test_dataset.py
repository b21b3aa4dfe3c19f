import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from site_files import disk, picture, recipe, site_config, write_case, write_site, write_volume

from fedfms.contracts.site import Intensity
from fedfms.control import Control
from fedfms.data.classes import annotated, class_masks
from fedfms.data.manifest import Case, find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import PreparedCase, to_grey_levels
from fedfms.data.slices import SliceDataset
from fedfms.errors import SiteDataError, TaskAborted
from fedfms.geometry import PIXEL_MEAN, PIXEL_STD, Frame, network_input, to_native


def prepared(images, labels=None, **changes) -> PreparedCase:
    """A case in memory; images (D, H, W) or (D, H, W, 3) uint8."""
    if labels is None:
        labels = np.zeros(images.shape[:3], np.int16)
    case = Case("c", "c", "c.png", "c.png", "train")
    values = (case, images, labels.astype(np.int16), (1.0, 1.0, 1.0), len(images) > 1)
    return dataclasses.replace(PreparedCase(*values), **changes)


# ------------------------------------------------------------------------------------- grey levels


def grey(values, **intensity):
    site = site_config(".", intensity=Intensity(**intensity))
    return to_grey_levels(np.asarray(values, np.float32), site)


def test_percentiles_of_the_case_become_black_and_white():
    values = np.random.default_rng(0).normal(500, 100, (4, 20, 20))
    low, high = np.percentile(values.astype(np.float32), (2, 90))
    wanted = np.clip((values - low) / (high - low), 0, 1) * 255
    got = grey(values, low=2.0, high=90.0)
    assert got.dtype == np.uint8
    assert np.abs(got - wanted).max() <= 0.51


def test_the_papers_grey_levels_are_cut_at_the_99th_percentile_from_the_minimum_on():
    values = np.random.default_rng(1).gamma(2.0, 300.0, (5, 24, 24)).astype(np.float32)
    cut = np.minimum(values, np.percentile(values, 99))
    wanted = (cut - cut.min()) / (cut.max() - cut.min()) * 255
    assert np.abs(grey(values, low=0.0, high=99.0) - wanted).max() <= 0.51


def test_the_papers_grey_levels_are_the_level_below():
    values = np.random.default_rng(2).gamma(2.0, 300.0, (5, 24, 24))
    values[0, :2] = np.linspace(0, 255, 48).reshape(2, 24)
    stored = values.astype(np.float32)
    cut = np.clip(stored.astype(np.float64), None, np.percentile(stored, 99))
    wanted = ((cut - cut.min()) / (cut.max() - cut.min()) * 255).astype(np.uint8)
    got = grey(stored, low=0.0, high=99.0, rounding="truncate")
    np.testing.assert_array_equal(got, wanted)
    higher = grey(stored, low=0.0, high=99.0).astype(int) - got
    assert set(np.unique(higher)) == {0, 1} and 0.4 < higher.mean() < 0.6
    every = np.arange(256).reshape(1, 16, 16)  # whole levels stay what they are
    np.testing.assert_array_equal(grey(every, rule="range", rounding="truncate"), every)


def test_a_window_in_hounsfield_units():
    got = grey([[[-1000, -160, 40, 240, 3000]]], rule="window", center=40.0, width=400.0)
    np.testing.assert_array_equal(got, [[[0, 0, 128, 255, 255]]])


def test_eight_bit_pictures_stay_what_they_are_and_sixteen_bit_ones_are_scaled():
    every = np.arange(256).reshape(1, 16, 16)
    np.testing.assert_array_equal(grey(every, rule="range"), every)
    got = grey(every * 257, rule="range", low=0.0, high=65535.0)
    np.testing.assert_array_equal(got, every)


def test_a_nearly_constant_image_keeps_its_spots_and_a_constant_one_is_black():
    spots = np.full((1, 50, 50), 7.0)
    spots[0, 3, 3] = 9.0  # beyond every percentile
    got = grey(spots)
    assert got[0, 3, 3] == 255
    assert got.sum() == 255
    assert grey(np.full((1, 5, 5), 7.0)).max() == 0


def test_four_orders_of_magnitude_between_scanners_do_not_matter():
    values = np.random.default_rng(1).gamma(3, 40, (3, 20, 20))
    np.testing.assert_allclose(grey(values).astype(int), grey(values * 1e4), atol=1)


# ----------------------------------------------------------------------------------------- geometry

SIZES = [(35, 51), (51, 35), (512, 512), (520, 696), (64, 64), (100, 37), (256, 320), (200, 24)]
RECIPES = {
    "128 pad": recipe(),
    "128 stretch": recipe(resize="stretch"),
    "256 pad": recipe(backbone="vit_b", image_size=256),
    "1024 pad": recipe(backbone="vit_b", image_size=1024),
}


def logits_of(target: torch.Tensor) -> torch.Tensor:
    return target * 10 - 5


def ball(spacing, size_mm=(36.0, 50.0), radius=14.0):
    """(1, H, W) bool: a disc in a slice of this size whose pixels are so high and wide (mm)."""
    rows, columns = (
        (np.arange(round(side / step)) + 0.5) * step
        for side, step in zip(size_mm, spacing, strict=True)
    )
    distance = np.hypot(rows[:, None] - size_mm[0] / 2, columns[None] - size_mm[1] / 2)
    return (distance < radius)[None]


@pytest.mark.parametrize(
    ("height", "width", "spacing", "covered"),
    [
        (36, 50, (1.0, 1.0, 1.0), (46, 64)),  # 36 / 50 x 64 = 46.08
        (12, 50, (1.0, 3.0, 1.0), (46, 64)),  # the same slice, thick
        (36, 17, (1.0, 1.0, 2.941), (46, 64)),
        (50, 12, (1.0, 0.7, 2.1), (64, 46)),  # 25.2 of 35 mm
        (10, 10, (2.0, 5.0, 1.0), (64, 13)),
        (36, 50, (9.0, 0.7, 0.7), (46, 64)),  # between slices it does not matter
        (36, 50, (1.0, 0.7000001, 0.6999999), (46, 64)),  # an affine's rounding
        (1, 128, (1.0, 1.0, 1.0), (2, 64)),
    ],
)
def test_a_slice_keeps_the_shape_that_it_has_in_millimetres(height, width, spacing, covered):
    images = np.full((1, height, width), 200, np.uint8)
    case = prepared(images, spacing=spacing)
    assert Frame.of(case).covered(recipe()) == covered
    shown = network_input(case, 0, site_config("."), recipe(normalize=False))[0] > 0
    assert (int(shown.any(dim=1).sum()), int(shown.any(dim=0).sum())) == (
        2 * covered[0], 2 * covered[1],
    )  # fmt: skip
    assert Frame.of(case).covered(recipe(resize="stretch")) == (64, 64)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.5), (0.5, 2.0), (4.0, 0.8)])
def test_what_is_round_in_the_body_is_round_for_the_network_and_comes_back(spacing):
    truth = ball(spacing)
    case = prepared(truth.astype(np.uint8) * 255, truth, spacing=(1.0, *spacing))
    site = site_config(".", classes={"disc": (1,)})
    job = recipe(classes=("disc",))
    target = SliceDataset([case], site, job)[0]["target"]
    rows, columns = target[0].any(dim=1).sum(), target[0].any(dim=0).sum()
    wanted = 28 / 50 * 64  # mask pixels
    coarse = max(spacing) / 50 * 64  # one pixel of the slice
    assert abs(rows - wanted) <= 1 + coarse and abs(columns - wanted) <= 1 + coarse
    picture = network_input(case, 0, site, recipe(normalize=False))[0] > 0.5
    assert abs(picture.any(dim=1).sum() - 2 * wanted) <= 2 + 2 * coarse
    assert abs(picture.any(dim=0).sum() - 2 * wanted) <= 2 + 2 * coarse
    back = to_native(logits_of(target[None]), Frame.of(case), job)[0, 0] >= 0
    overlap = 2 * (back.numpy() & truth[0]).sum() / (back.sum() + truth.sum())
    assert overlap > 0.96


def test_a_thick_slice_looks_like_the_thin_one_that_it_was_made_of():
    rng = np.random.default_rng(5)
    thin = gaussian_filter(rng.normal(size=(36, 48)), 3)
    thin = np.interp(thin, (thin.min(), thin.max()), (0, 255))
    thick = thin.reshape(12, 3, 48).mean(axis=1)
    plain = recipe(normalize=False)
    pictures = [
        network_input(
            prepared(np.rint(values)[None].astype(np.uint8), spacing=(1.0, height, 1.0)),
            0, site_config("."), plain,
        )
        for values, height in ((thin, 1.0), (thick, 3.0))
    ]  # fmt: skip
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02
    assert (pictures[0] - pictures[1]).abs().max() < 0.2


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_survives_the_way_to_the_network_and_back(size, name):
    job = RECIPES[name]
    radius = 0.4 * min(size)
    mask = disk(size, radius)
    case = prepared(picture(0, (1, *size)), mask[None])
    target = SliceDataset([case], site_config("."), job)[0]["target"]
    back = to_native(logits_of(target[None]), Frame(*size), job)[0, 0] >= 0
    overlap = 2 * (back.numpy() & (mask > 0)).sum() / (back.sum().item() + mask.sum())
    # the mask of a vit_demo recipe has 64 pixels a side: 696 pixels become 64
    assert overlap > 0.95


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(35, 51), (51, 35), (128, 96), (520, 696), (61, 61)])
def test_image_target_and_prediction_lie_in_one_place(size, name):
    """The centre of a blob is where it was, to a small part of a pixel, in all three grids."""
    job = RECIPES[name]
    y, x = np.mgrid[: size[0], : size[1]]
    centre = np.array([0.41 * size[0], 0.37 * size[1]])
    width = 0.09 * min(size)
    blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
    mask = blob > 0.5
    case = prepared((blob * 255).round().astype(np.uint8)[None], mask[None])

    def middle(weights, grid):  # in shares of the picture; pixel centres are at half-integers
        weights = np.asarray(weights, float)
        rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
        at = [(weights * rows).sum(), (weights * columns).sum()] / weights.sum()
        return at / grid

    longest = max(size)
    covered = np.array(size) / longest if job.resize == "pad" else np.ones(2)
    plain = dataclasses.replace(job, normalize=False)
    item = SliceDataset([case], site_config("."), plain)[0]
    in_image = middle(item["image"][0], covered * job.image_size)
    in_target = middle(item["target"][0], covered * job.mask_size)
    back = to_native(logits_of(item["target"][None]), Frame(*size), job)[0, 0] >= 0
    in_native, wanted = middle(back, size), middle(mask, size)
    exact = middle(blob, size)
    # pad rounds the shorter side to whole mask pixels: at most half a mask pixel over its length
    rounding = 0.5 / (covered.min() * job.mask_size) if job.resize == "pad" else 0.0
    assert np.abs(in_image - exact).max() < 0.1 / job.mask_size + rounding * exact.max()
    assert np.abs(in_target - wanted).max() < 0.3 / job.mask_size + rounding * exact.max()
    assert np.abs(in_native - wanted).max() < 0.15 / job.mask_size + 0.05 / min(size)


def test_shrinking_by_two_has_no_half_pixel_shift():
    # nearest neighbour would take pixel 0 of each pair; the exact answer takes both equally
    mask = np.zeros((1, 128, 128), bool)
    mask[0, 32:64, 48:96] = True
    job = recipe()
    target = SliceDataset([prepared(picture(0, (1, 128, 128)), mask)], site_config("."), job)[0]
    wanted = np.zeros((64, 64))
    wanted[16:32, 24:48] = 1
    np.testing.assert_array_equal(target["target"][0], wanted)
    back = to_native(logits_of(target["target"][None]), Frame(128, 128), job)[0, 0] >= 0
    np.testing.assert_array_equal(back, mask[0])


def test_thin_and_small_structures_are_not_lost():
    mask = np.zeros((1, 512, 512), bool)
    mask[0, 100, 50:450] = True  # one pixel wide: half a mask pixel of eight covers it by 1/8
    mask[0, 300:302, 300:302] = True
    target = SliceDataset([prepared(picture(0, (1, 512, 512)), mask)], site_config("."), recipe())
    kept = target[0]["target"][0]
    line = kept[10:15].any(dim=0)
    assert line[7:56].all()  # without a gap


def test_padding_is_right_and_below_and_zero_after_normalisation():
    case = prepared(np.full((1, 64, 96), 200, np.uint8))
    got = network_input(case, 0, site_config("."), recipe())
    rows = 86  # 64 / 96 of 128 is 85.3, rounded to mask pixels of 2
    for channel, (mean, std) in enumerate(zip(PIXEL_MEAN, PIXEL_STD, strict=True)):
        torch.testing.assert_close(got[channel, :rows], torch.full((rows, 128), (200 - mean) / std))
    assert (got[:, rows:] == 0).all()
    plain = network_input(case, 0, site_config("."), recipe(normalize=False))
    torch.testing.assert_close(plain[:, :rows], torch.full((3, rows, 128), 200 / 255))


def test_resizing_a_picture_is_what_pillow_does_for_sam():
    # SAM resizes with Pillow, bilinear: antialiased when it shrinks
    for size in ((300, 300), (60, 60)):
        values = picture(3, (*size, 3))
        wanted = np.asarray(Image.fromarray(values).resize((128, 128), Image.Resampling.BILINEAR))
        site = site_config(".", "image", channels="rgb")
        got = network_input(prepared(values[None]), 0, site, recipe(normalize=False)) * 255
        assert np.abs(got.numpy().transpose(1, 2, 0) - wanted).max() <= 1.01


def test_to_native_is_bilinear():
    logits = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    got = to_native(logits, Frame(192, 192), recipe())[0, 0].numpy()
    wanted = zoom(logits[0, 0].numpy(), 3, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_half_precision_logits_come_back_as_float32():
    assert to_native(
        torch.zeros(2, 1, 64, 64, dtype=torch.bfloat16), Frame(9, 9), recipe()
    ).dtype == (torch.float32)


# ------------------------------------------------------------------------------- channels, classes


def test_neighbours_are_the_slices_before_and_after_and_repeat_at_the_ends():
    images = np.stack([np.full((32, 32), grey, np.uint8) for grey in (10, 20, 30)])
    site = site_config(".", channels="neighbours")
    job = recipe(normalize=False)
    seen = [
        (network_input(prepared(images), index, site, job)[:, 5, 5] * 255).round().int().tolist()
        for index in range(3)
    ]
    assert seen == [[10, 10, 20], [10, 20, 30], [20, 30, 30]]


def test_classes_that_exclude_each_other_share_no_label_value():
    site = site_config(".", classes={"disc": (1, 2), "cup": (2,)})
    job = recipe(classes=("disc", "cup"))
    assert annotated(site, job).tolist() == [True, True]  # they may overlap
    with pytest.raises(SiteDataError, match="value 2 means disc and cup") as error:
        annotated(site, dataclasses.replace(job, exclusive_classes=True))
    assert error.value.code == "classes-share-values"
    assert "exclusive_classes: false" in error.value.fix
    apart = dataclasses.replace(site, classes={"disc": (1,), "cup": (2,)})
    assert annotated(apart, dataclasses.replace(job, exclusive_classes=True)).all()


def test_classes_may_overlap_and_a_class_nobody_drew_is_masked():
    labels = np.array([[[0, 1, 2, 7]]])
    classes = {"whole": (1, 2), "front": (1,)}
    site = site_config(".", classes=classes, not_annotated=("tumour",), background=(0, 7))
    job = recipe(classes=("front", "tumour", "whole"))
    masks = class_masks(prepared(np.zeros((1, 1, 4), np.uint8), labels), site, job)
    assert masks.int().tolist() == [[[[0, 1, 0, 0]]], [[[0, 0, 0, 0]]], [[[0, 1, 1, 0]]]]
    assert annotated(site, job).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("mapping", "share"), [((1,), 1 - 20**2 / 44**2), ((1, 2), 1.0)], ids=["ring", "full"]
)
def test_the_optic_disc_is_the_papers_ring_or_the_whole_disc_by_its_values(mapping, share):
    """Labels as REFUGE's: 1 the disc around the cup, 2 the cup; the cup lies inside the disc."""
    labels = np.zeros((1, 64, 64))
    labels[0, 10:54, 10:54] = 1
    labels[0, 22:42, 22:42] = 2
    site = site_config(".", classes={"optic_disc": mapping, "optic_cup": (2,)})
    job = recipe(classes=("optic_disc", "optic_cup"), resize="stretch", paper_compat=True)
    case = prepared(picture(9, (1, 64, 64)), labels)
    disc, cup = SliceDataset([case], site, job)[0]["target"].bool().numpy()
    assert disc.sum() == share * 44**2 and cup.sum() == 20**2
    assert (disc & cup).sum() == (20**2 if 2 in mapping else 0)
    np.testing.assert_array_equal(disc | cup, labels[0] > 0)
    np.testing.assert_array_equal(class_masks(case, site, job)[0, 0].numpy(), disc)


def test_a_class_that_site_yml_does_not_know_is_refused_with_the_nearest_name():
    site = site_config(".", classes={"nucleus": (255,)})
    with pytest.raises(SiteDataError, match="did you mean nucleus") as caught:
        annotated(site, recipe(classes=("nuclei",)))
    assert caught.value.code == "unknown-class"


@pytest.mark.parametrize(("every", "kept"), [(1, 10), (3, 2 + 3), (0, 2), (100, 2 + 1)])
def test_every_nth_slice_without_foreground_trains(every, kept):
    labels = np.zeros((5, 8, 8))
    labels[2, 1:4, 1:4] = 1
    cases = [prepared(picture(seed, (5, 8, 8)), labels) for seed in (0, 1)]
    assert len(SliceDataset(cases, site_config(".", keep_empty_every=every), recipe())) == kept


def test_no_slice_to_train_on_is_an_error():
    with pytest.raises(SiteDataError) as caught:
        SliceDataset(
            [prepared(picture(0, (2, 8, 8)))], site_config(".", keep_empty_every=0), recipe()
        )
    assert caught.value.code == "no-training-slices"


def test_a_slice_is_resized_once_and_again_only_where_it_could_not_be_kept_whole(monkeypatch):
    case = prepared(picture(5, (2, 40, 48)), np.stack([disk((40, 48), 9)] * 2))
    data = SliceDataset([case], site_config(".", channels="neighbours"), recipe())
    write = os.pwrite
    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "pwrite", lambda file, all_, at: write(file, all_[:100], at))
        first = data[0]
    again = data[0]
    case.images[:] = 0  # from now on only what was kept can be right
    kept = data[0]
    for name in ("image", "target", "annotated"):
        torch.testing.assert_close(again[name], first[name], rtol=0, atol=0)
        torch.testing.assert_close(kept[name], first[name], rtol=0, atol=0)
    assert first["image"].any() and first["target"].any()
    assert data[1]["image"].unique().numel() < 9  # of black slices alone: it was not kept before


def test_items_are_the_same_from_memory_and_in_worker_processes():
    labels = np.stack([disk((40, 48), 9)] * 4)
    case = prepared(picture(5, (4, 40, 48)), labels)
    data = SliceDataset([case], site_config(".", channels="neighbours"), recipe())
    first = [data[i] for i in range(4)]
    again = [data[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        SliceDataset([case], site_config(".", channels="neighbours"), recipe()),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for one, two, three in zip(first, again, loader, strict=True):
        for name in ("image", "target", "annotated"):
            assert one[name].dtype == torch.float32
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
            torch.testing.assert_close(one[name], three[name], rtol=0, atol=0)
    first[0]["image"].zero_()  # a caller's change does not reach the next item
    first[0]["annotated"].zero_()
    torch.testing.assert_close(data[0]["image"], again[0]["image"], rtol=0, atol=0)
    assert data[0]["annotated"].item() == 1


def test_the_papers_resizing_is_nearest_and_without_antialiasing():
    mask = np.random.default_rng(6).integers(0, 2, (1, 200, 150))
    image = picture(7, (1, 200, 150))
    job = recipe(resize="stretch", normalize=False, paper_compat=True)
    item = SliceDataset([prepared(image, mask)], site_config("."), job)[0]
    rows, columns = (np.arange(64) * size // 64 for size in (200, 150))
    np.testing.assert_array_equal(item["target"][0], mask[0][np.ix_(rows, columns)])
    at = (np.arange(128) + 0.5) * 200 / 128 - 0.5  # plain bilinear along the rows of one column
    low = np.clip(np.floor(at).astype(int), 0, 198)
    square = picture(8, (1, 200, 200))
    got = network_input(prepared(square), 0, site_config("."), job)[0].numpy() * 255
    rows_in = square[0][low] + (at - low)[:, None] * (square[0][low + 1] * 1.0 - square[0][low])
    wanted = rows_in[:, low] + (at - low) * (rows_in[:, low + 1] - rows_in[:, low])
    assert np.abs(got - wanted).max() < 1.5


def test_the_papers_input_is_the_grey_value_over_255_and_nothing_else():
    job = recipe(resize="stretch", normalize=False, paper_compat=True)
    whole = picture(10, (1, 128, 128))  # as large as the input: nothing is resized
    got = network_input(prepared(whole), 0, site_config("."), job).numpy()
    assert got.shape == (3, 128, 128)
    for channel in got:
        np.testing.assert_array_equal(channel, whole[0].astype(np.float32) / np.float32(255))
    colours = picture(11, (1, 128, 128, 3))
    site = site_config(".", "image", channels="rgb")
    got = network_input(prepared(colours), 0, site, job).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(got, colours[0].astype(np.float32) / np.float32(255))
    # both sides are stretched: no padding, and every corner of the picture is in its corner
    corners = np.zeros((1, 40, 100), np.uint8)
    for number, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)], start=1):
        corners[0, row, column] = 60 * number
    wide = network_input(prepared(corners), 0, site_config("."), job)[0].numpy() * 255
    np.testing.assert_allclose(wide[[0, 0, -1, -1], [0, -1, 0, -1]], [60, 120, 180, 240], atol=1e-3)


# ------------------------------------------------------------------------------ preparing and cache


def test_cases_are_prepared_with_progress_and_can_be_stopped(tmp_path):
    write_site(tmp_path)
    site = site_config(tmp_path)
    seen = []
    cases = prepare_cases(find_cases(site), site, Control(lambda *step: seen.append(step)))
    assert seen == [("prepare", n, 5) for n in range(6)]
    assert cases[0].images.shape == cases[0].labels.shape == (3, 8, 6)
    assert (cases[0].images.dtype, cases[0].labels.dtype) == (np.uint8, np.uint8)
    stopped = Control(lambda phase, done, total: stopped.abort())
    with pytest.raises(TaskAborted):
        prepare_cases(find_cases(site), site, stopped)


def same(one: list[PreparedCase], other: list[PreparedCase]) -> bool:
    return all(
        np.array_equal(a.images, b.images)
        and np.array_equal(a.labels, b.labels)
        and (a.spacing, a.is_volume, a.case) == (b.spacing, b.is_volume, b.case)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("format", ["nifti", "image", "npy"])
def test_the_cache_gives_what_the_files_give(tmp_path, format):
    write_site(tmp_path / "site", format)
    plain = site_config(tmp_path / "site", format)
    cached = dataclasses.replace(plain, cache=tmp_path / "cache")
    fresh = prepare_cases(find_cases(plain), plain)
    assert same(prepare_cases(find_cases(cached), cached), fresh)
    stamps = {path: path.stat().st_mtime_ns for path in cached.cache.iterdir()}
    assert len(stamps) == 5
    assert same(prepare_cases(find_cases(cached), cached), fresh)
    assert {path: path.stat().st_mtime_ns for path in cached.cache.iterdir()} == stamps


def test_names_in_the_cache_tell_nothing(tmp_path):
    write_site(tmp_path)
    site = site_config(tmp_path, cache=tmp_path / "cache")
    prepare_cases(find_cases(site), site)
    for path in site.cache.iterdir():
        assert len(path.stem) == 64
        assert set(path.stem) <= set("0123456789abcdef")
        assert path.stat().st_mode & 0o077 == 0  # for this user only
        assert b"c01" not in path.read_bytes()


def test_changed_files_and_changed_settings_are_prepared_anew(tmp_path):
    write_site(tmp_path)
    site = site_config(tmp_path, cache=tmp_path / "cache")
    before = prepare_cases(find_cases(site), site)
    write_case(tmp_path, "nifti", "c01", seed=99)
    after = prepare_cases(find_cases(site), site)
    assert not np.array_equal(after[0].images, before[0].images)
    assert same(after[1:], before[1:])
    for changes in (
        {"plane": "coronal"},
        {"intensity": Intensity(rule="range", high=100.0)},
    ):
        other = dataclasses.replace(site, **changes)
        fresh = dataclasses.replace(other, cache=None)
        assert same(
            prepare_cases(find_cases(other), other), prepare_cases(find_cases(fresh), fresh)
        )


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text", "other arrays"])
def test_a_damaged_cache_is_remade(tmp_path, damage):
    write_site(tmp_path)
    site = site_config(tmp_path, cache=tmp_path / "cache")
    fresh = prepare_cases(find_cases(site), site)
    for path in site.cache.iterdir():
        data = bytearray(path.read_bytes())
        if damage == "other arrays":
            with path.open("wb") as file:
                np.savez(file, images=np.zeros(3), labels=np.zeros(3), spacing=1, is_volume=1)
            continue
        if damage == "flipped":
            data[200] ^= 0xFF  # inside the first array: the checksum tells
        path.write_bytes(
            {"empty": b"", "half": data[: len(data) // 2], "flipped": data, "text": b"x"}[damage]
        )
    damaged = {path: path.read_bytes() for path in site.cache.iterdir()}
    assert same(prepare_cases(find_cases(site), site), fresh)
    assert all(path.read_bytes() != data for path, data in damaged.items())


def test_a_process_killed_while_it_writes_leaves_a_usable_cache(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 3000, (160, 160, 60)).astype(np.int16)
        write_volume(tmp_path / "images" / f"c{number}.nii", values)
        write_volume(tmp_path / "labels" / f"c{number}.nii", (values > 2900).astype(np.uint8))
    site = site_config(
        tmp_path, images="images/*.nii", labels="labels/*.nii", cache=tmp_path / "cache"
    )
    program = (
        "from pathlib import Path; import sys; sys.path.insert(0, sys.argv[2])\n"
        "from site_files import site_config\n"
        "from fedfms.data.manifest import find_cases\n"
        "from fedfms.data.prepare import prepare_cases\n"
        "root = Path(sys.argv[1])\n"
        "site = site_config(root, images='images/*.nii', labels='labels/*.nii',"
        " cache=root / 'cache')\n"
        "print('ready', flush=True)\n"
        "prepare_cases(find_cases(site), site)\n"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), here], stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if site.cache.is_dir() and any(site.cache.iterdir()):
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    process.stdout.close()
    plain = dataclasses.replace(site, cache=None)
    assert same(prepare_cases(find_cases(site), site), prepare_cases(find_cases(plain), plain))


def test_a_cache_that_cannot_be_written_does_not_stop_the_work(tmp_path, caplog):
    write_site(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    site = site_config(tmp_path, cache=tmp_path / "cache")
    assert len(prepare_cases(find_cases(site), site)) == 5
    assert "cache cannot be written" in caplog.text
    assert "c01" not in caplog.text


def test_an_error_while_preparing_keeps_names_out_of_its_public_text(tmp_path):
    write_site(tmp_path)
    (tmp_path / "images" / "c03.nii.gz").write_bytes(b"")
    site = site_config(tmp_path)
    with pytest.raises(SiteDataError) as caught:
        prepare_cases(find_cases(site), site)
    assert "c03.nii.gz" in str(caught.value)
    assert "c03" not in caught.value.public
    assert "empty-file" in caught.value.public
    assert caught.value.__cause__ is None


def test_a_picture_of_another_size_is_scored_at_its_own(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number, size in enumerate([(20, 30), (44, 12), (64, 64)]):
        Image.fromarray(picture(number, size)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(disk(size, 5)).save(tmp_path / "labels" / f"{number}.png")
    site = site_config(tmp_path, "image")
    shapes = [case.images.shape for case in prepare_cases(find_cases(site), site)]
    assert shapes == [(1, 20, 30), (1, 44, 12), (1, 64, 64)]


@pytest.mark.parametrize(
    "values",
    [
        (1,),
        (5, 2, 2, 9),
        tuple(range(1, 168)),
        (*range(-32768, 0), *range(1, 32768)),
        tuple(range(-32768, 32768, 3)),
        (-32768, 32767),
    ],
)
def test_masks_hold_the_values_of_a_class_however_many_they_are(values):
    labels = np.random.default_rng(0).integers(-32768, 32768, (3, 40, 50)).astype(np.int16)
    labels[0] %= 200
    labels[1, 0, :2] = -32768, 32767
    site, job = site_config(".", classes={"lesion": values}, background=()), recipe()
    masks = class_masks(prepared(np.zeros(labels.shape, np.uint8), labels), site, job)
    np.testing.assert_array_equal(masks[0].numpy(), np.isin(labels, values))
