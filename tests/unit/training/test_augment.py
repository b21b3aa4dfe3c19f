"""Training slices that vary: as MONAI would, masks with pictures, the same bits everywhere."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from little import LittleNet, disc_case, disc_dataset, little_case, little_recipe, little_site
from little import values_of as values_of_model
from torch.utils.data import ConcatDataset

from fedfms.contracts.recipe import AUGMENTATIONS, Recipe
from fedfms.control import Control
from fedfms.data.slices import SliceDataset
from fedfms.geometry import mask_of_cover
from fedfms.training.augment import (
    Change,
    Tone,
    Variation,
    change_masks,
    change_picture,
    draw,
    gaussian_blur,
    level_table,
)
from fedfms.training.evaluate import evaluate
from fedfms.training.loader import Loader
from fedfms.training.loop import ShuffledBatches, train_round
from fedfms.training.private import PatientSteps

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[3]

OFF = {key: none for key, (none, _) in AUGMENTATIONS.items()}
ALL = {
    "augment": True,
    "augment_flips": "both",
    "augment_rotation": 30.0,
    "augment_scale": 1.3,
    "augment_elastic": 0.03,
    "augment_inversion": 0.5,
    "augment_gamma": 2.0,
    "augment_contrast": 0.5,
    "augment_bias": 0.3,
    "augment_blur": 0.02,
    "augment_noise": 0.1,
    "augment_probability": 0.7,
}


def ramp(rows: int = 40, columns: int = 60) -> torch.Tensor:
    """(1, h, w) uint8 with every level from 0 to 255 and smooth shapes."""
    down, right = np.mgrid[:rows, :columns]
    wave = np.sin(down / 7) * np.cos(right / 9) + 0.02 * right
    wave = (wave - wave.min()) / np.ptp(wave)
    return torch.from_numpy(np.rint(255 * wave).astype(np.uint8))[None]


# ------------------------------------------------------------------------- against MONAI's numbers


@pytest.mark.parametrize("gamma", [0.5, 1.7, 4.0])
def test_gamma_is_monais(gamma):
    from monai.transforms import AdjustContrast

    picture = ramp()
    got, inside = change_picture(picture, Change(tones=(Tone(gamma=gamma),)))
    expected = AdjustContrast(gamma)(picture.float())
    assert inside is None and (got - expected).abs().max() <= 0.501


@pytest.mark.parametrize(("degrees", "scale"), [(25.0, 1.0), (-70.0, 1.4), (0.0, 0.7)])
def test_rotation_and_scale_are_monais(degrees, scale):
    from monai.transforms import Affine

    picture = ramp()
    got, inside = change_picture(picture, Change(degrees=degrees, scale=scale))
    turn = Affine(
        rotate_params=(-math.radians(degrees),),  # MONAI counts from rows to columns
        scale_params=(1 / scale, 1 / scale),
        padding_mode="border",
        image_only=True,
    )
    expected = torch.as_tensor(turn(picture.float()))
    assert (got - expected).abs().max() <= 0.51
    assert inside is not None and 0.3 < inside.float().mean() <= 1.0


def test_a_quarter_turn_is_counter_clockwise():
    picture = torch.zeros(1, 9, 9, dtype=torch.uint8)
    picture[0, 7, 4] = 200  # below the centre
    turned, _ = change_picture(picture, Change(degrees=90.0))
    assert torch.equal(turned[0], torch.rot90(picture[0]))
    assert turned[0, 4, 7] == 200


@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_blur_is_monais_but_for_the_edge(sigma):
    from monai.networks.layers import GaussianFilter

    values = ramp(50, 70).float()
    got = gaussian_blur(values, sigma)
    expected = GaussianFilter(2, sigma, truncated=4.0, approx="sampled")(values[None])[0]
    edge = math.ceil(4 * sigma) + 1
    inner = (slice(None), slice(edge, -edge), slice(edge, -edge))
    assert torch.allclose(got[inner], expected[inner] / expected[inner].mean() * got[inner].mean())
    assert torch.allclose(gaussian_blur(torch.full((1, 9, 9), 80.0), sigma), torch.tensor(80.0))


def test_a_bias_field_is_the_polynomial_of_its_coefficients():
    """As in MONAI's RandBiasField, whose own in two dimensions leaves out powers of columns."""
    coefficients = np.random.default_rng(4).uniform(-0.3, 0.3, 10).astype(np.float32)
    coefficients[0] = 0.0
    flat = torch.full((1, 96, 128), 100, dtype=torch.uint8)
    got, _ = change_picture(flat, Change(bias=coefficients))
    matrix = np.zeros((4, 4))
    matrix[[0, 0, 0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]] = coefficients
    down, right = (np.linspace(-1, 1, side) for side in (96, 128))
    field = np.exp(np.polynomial.legendre.leggrid2d(down, right, matrix))
    assert np.abs(got[0].numpy() - np.clip(100 * field, 0, 255)).max() <= 1.0
    assert np.ptp(field) > 0.2


def test_a_mapping_of_levels_is_a_broken_line_of_which_a_share_is_taken():
    knots = np.array([[0.9, 0.1, 0.4, 0.4, 1.0, 0.0]])
    table = level_table(Change(tones=(Tone(mapping=(0.25, knots)),)))[0]
    level = np.arange(256) / 255
    line = np.interp(level, [0, 0.2, 0.4, 0.6, 0.8, 1], knots[0])
    np.testing.assert_allclose(table, 255 * (0.75 * level + 0.25 * line), rtol=1e-6)
    inverted, _ = change_picture(ramp(), Change(tones=(Tone(inverted=True),)))
    assert torch.equal(inverted, 255 - ramp())


def test_noise_has_the_deviation_that_is_asked_for():
    flat = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    got, _ = change_picture(flat, Change(noise=0.05, seed=7))
    assert got.float().std().item() == pytest.approx(255 * 0.05, rel=0.02)
    assert not torch.equal(got[0], got[1])
    assert torch.equal(change_picture(flat, Change(noise=0.05, seed=7))[0], got)


def test_no_change_is_none():
    picture, target = ramp(), torch.rand(2, 16, 16) > 0.5
    got, inside = change_picture(picture, Change())
    assert torch.equal(got, picture) and inside is None
    assert change_masks(target, 11, 16, Change()) is target


# ------------------------------------------------------------------------------------------- masks


def disc(rows: int, columns: int, radius: float = 0.22) -> np.ndarray:
    down, right = np.mgrid[:rows, :columns]
    away = np.hypot(down + 0.5 - 0.4 * rows, right + 0.5 - 0.55 * columns)
    return (away < radius * max(rows, columns)) & (right < 0.6 * columns)  # no symmetry


@pytest.mark.parametrize("seed", range(12))
def test_masks_go_where_their_object_goes(seed):
    """Of a picture that is the mask: what is bright after a change is the mask after it."""
    moving = {
        key: ALL[key] for key in ALL if key.endswith(("flips", "rotation", "scale", "elastic"))
    }
    recipe = little_recipe(image_size=128, **{**OFF, **moving}, augment_probability=1.0)
    change = draw(recipe, np.random.default_rng(seed))
    assert change.moves
    rows, columns = 96, 128
    shape = disc(rows, columns)
    picture = torch.from_numpy(255 * shape[None].astype(np.uint8))
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(shape)[None, None].float(), size=(48, 64), mode="bilinear", antialias=True
    )
    masks[:, :48] = small[0] >= 0.5
    moved, inside = change_picture(picture, change)
    bright = moved.float() if inside is None else moved * inside
    seen = (
        torch.nn.functional.interpolate(
            bright[None], size=(48, 64), mode="bilinear", antialias=True
        )[0]
        >= 127.5
    )
    got = change_masks(masks, 48, 64, change)
    assert not got[:, 48:].any()
    overlap = (got[:, :48] & seen).sum() * 2 / (got.sum() + seen.sum())
    assert overlap > 0.94
    assert not torch.equal(got, masks)


def test_mirrored_pictures_and_masks_are_exactly_so():
    picture, masks = ramp(40, 64), torch.rand(2, 16, 16) > 0.5
    for flips, axes in (((True, False), (1,)), ((False, True), (2,)), ((True, True), (1, 2))):
        change = Change(flips=flips)
        assert torch.equal(change_picture(picture, change)[0], torch.flip(picture, axes))
        got = change_masks(masks, 10, 16, change)
        assert torch.equal(got[:, :10], torch.flip(masks[:, :10], axes))
        assert not got[:, 10:].any()


def test_a_thin_vessel_stays_where_it_is_turned():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 5:60, 30] = True
    got = change_masks(masks, 64, 64, Change(degrees=31.0))
    assert got.sum() >= 0.5 * masks.sum()


def test_the_rule_of_thin_objects_is_each_classes_own():
    """As geometry.mask_target says it, in words of one class."""
    random = torch.Generator().manual_seed(5)
    blocks = torch.rand(24, 9, 11, generator=random)
    blocks[6:12] *= 0.3  # half of which is nowhere
    blocks[12:18] *= (torch.rand(6, 9, 11, generator=random) > 0.9) * 0.45
    blocks[18:20] = 0.0
    blocks[20:] = (blocks[20:] > 0.5).float()
    thin = 0
    for plane, got in zip(blocks, mask_of_cover(blocks), strict=True):
        expected = plane >= 0.5
        if expected.sum() < 0.5 * plane.sum():
            expected |= plane >= 0.5 * plane.max()
            thin += 1
        assert torch.equal(got, expected)
    assert 6 <= thin <= 18
    assert mask_of_cover(torch.zeros(2, 0, 5)).shape == (2, 0, 5)


@pytest.mark.parametrize("seed", range(8))
def test_a_change_asks_its_device_for_no_value(seed):
    """A host that did would wait for the GPU. Tensors of the meta device have none to give."""
    strengths = {**ALL, "augment_probability": 1.0, "augment_noise": 0.0}  # a GPU's own generator
    change = draw(little_recipe(image_size=64, **strengths), np.random.default_rng(seed))
    assert change.bent
    picture = torch.empty(1, 48, 64, dtype=torch.uint8, device="meta")
    changed, inside = change_picture(picture, change)
    assert (changed.shape, changed.dtype) == (picture.shape, torch.uint8)
    assert inside is not None and inside.device.type == "meta"
    target = torch.empty(3, 32, 32, dtype=torch.bool, device="meta")
    assert change_masks(target, 24, 32, change).shape == (3, 32, 32)


def test_what_was_in_no_slice_is_padding_and_no_foreground():
    turning = {"augment_rotation": 180.0, "augment_scale": 2.0, "augment_probability": 1.0}
    recipe = little_recipe(augment=True, **{**OFF, **turning})
    site = little_site()
    white = np.full((1, 24, 24), 255)
    dataset = SliceDataset([little_case(white, np.ones((1, 24, 24)))], site, recipe)
    loader, order = Loader(dataset, recipe, site, CPU), [[0]]
    some_outside = 0
    for number in range(8):
        variation = Variation(dataset, recipe, number)
        (batch,) = loader.batches(order, variation)
        image, target = batch["image"][0], batch["target"][0]
        outside = image[0] == 0  # padding is 0 after normalisation, white is not
        some_outside += bool(outside.any())
        assert (image[:, outside] == 0).all() and (image[:, ~outside] > 2).all()
        # a mask pixel is 2 x 2 pixels of the input
        all_outside = outside.reshape(16, 2, 16, 2).all(dim=3).all(dim=1)
        assert not target[0][all_outside].any()
        assert target[0][~outside.reshape(16, 2, 16, 2).any(dim=3).any(dim=1)].all()
        assert not target[1].any() and torch.equal(batch["annotated"], torch.ones(1, 2))
    assert some_outside


# ------------------------------------------------------------------------ the same bits everywhere


def changed_batches(recipe, site, dataset, number, secret=b"s" * 32, loader=None):
    variation = Variation.of(dataset, recipe, number, secret)
    loader = loader or Loader(dataset, recipe, site, CPU)
    order = ShuffledBatches(len(dataset), recipe, number, secret)
    return [
        {key: value.clone() for key, value in batch.items()}
        for batch in loader.batches(order, variation)
    ]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]), key


def test_a_round_trained_with_and_without_workers_is_the_same_bytes():
    """And on more threads, and after others: a loader that has worked before."""
    recipe = little_recipe(local_epochs=2, clip_grad_norm=1.0, **ALL)
    trained = []
    for workers in (0, 2):
        site = little_site(workers=workers)
        model, dataset = LittleNet(), disc_dataset(recipe, site)
        loader = Loader(dataset, recipe, site, CPU)
        for number in range(2):
            train_round(
                model,
                dataset,
                recipe,
                site,
                round_number=number,
                optimizer=None,
                control=Control(),
                secret=b"s" * 32,
                loader=loader,
            )
        trained.append(values_of_model(model))
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
    site = little_site(workers=0)
    dataset = disc_dataset(recipe, site)
    first = changed_batches(recipe, site, dataset, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_equal(changed_batches(recipe, site, dataset, 1), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("channels", ["gray", "rgb", "neighbours"])
def test_every_turn_of_every_slice_is_another_and_follows_from_secret_and_seed(channels):
    recipe = little_recipe(local_epochs=2, batch_size=3, **ALL)
    site = little_site(workers=0, channels=channels)
    rng = np.random.default_rng(3)
    shape = (4, 24, 24, 3) if channels == "rgb" else (4, 24, 24)
    case = little_case(rng.integers(0, 256, shape), np.ones((4, 24, 24)))
    dataset = SliceDataset([case], site, recipe)
    rounds = [changed_batches(recipe, site, dataset, number) for number in range(2)]
    images = torch.cat([batch["image"] for batches in rounds for batch in batches])
    assert len(images) == 16
    assert len({image.numpy().tobytes() for image in images}) == 16
    assert_equal(changed_batches(recipe, site, dataset, 1), rounds[1])  # alone, as after a restart
    for other in (
        changed_batches(recipe, site, dataset, 1, b"t" * 32),
        changed_batches(recipe, site, dataset, 1, None),
        changed_batches(dataclasses.replace(recipe, seed=6), site, dataset, 1),
    ):
        seen = {image.numpy().tobytes() for batch in other for image in batch["image"]}
        assert not seen & {image.numpy().tobytes() for image in images}


def test_what_a_slice_becomes_does_not_depend_on_who_else_is_there():
    recipe, site = little_recipe(**ALL), little_site()
    cases = [disc_case(seed, 2, key=f"p{seed}") for seed in range(3)]
    all_three = SliceDataset(cases, site, recipe)
    without_first = SliceDataset(cases[1:], site, recipe)
    one, other = Variation(all_three, recipe, 0, b"s"), Variation(without_first, recipe, 0, b"s")
    for item in range(4):
        got, expected = other.change(item, 3), one.change(item + 2, 3)
        assert dataclasses.asdict(got).keys() == dataclasses.asdict(expected).keys()
        assert got.seed == expected.seed and got.degrees == expected.degrees
        assert other.name(item, 3) == one.name(item + 2, 3)
    pooled = ConcatDataset([all_three, without_first])
    assert Variation(pooled, recipe, 0, b"s").change(6, 3).seed == one.change(2, 3).seed


def test_with_variants_a_slice_comes_in_so_many_forms_in_turn():
    recipe, site = little_recipe(augment_variants=3, rounds=9, **ALL), little_site()
    dataset = disc_dataset(recipe, site)
    seeds = [Variation.of(dataset, recipe, number, b"s", keeps=True) for number in range(6)]
    found = [one.change(0, one.turn(0)).seed for one in seeds]
    assert found[:3] == found[3:] and len(set(found)) == 3
    names = [one.name(0, one.turn(0)) for one in seeds]
    assert names[:3] == names[3:] and len(set(names)) == 3
    stronger = Variation(dataset, dataclasses.replace(recipe, augment_gamma=3.0), 0, b"s", 3)
    assert stronger.name(0, 0) != names[0] and stronger.change(0, 0).seed == found[0]


def test_steps_of_patients_train_on_changed_slices_each_step_anew():
    """And a patient's own are the same whoever else is there: what bounds its part holds."""
    recipe = little_recipe(patient_rate=1.0, patient_clip_norm=0.5, local_epochs=2, **ALL)
    site = little_site()
    cases = [disc_case(seed, 2, key=f"p{seed}") for seed in range(3)]

    def gradients(cases, steps, recipe=recipe):
        model, dataset = LittleNet(), SliceDataset(cases, site, recipe)
        variation = Variation.of(dataset, recipe, 0, b"s" * 32)
        steps_of_round = PatientSteps(model, dataset, recipe, Control(), 9, variation=variation)
        found = []
        for _ in range(steps):
            steps_of_round.gradients()
            found.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()]))
        return found

    first, second = gradients(cases, 2)
    assert not torch.equal(first, second)
    again, _ = gradients(cases, 2)
    assert torch.equal(first, again)
    still = dataclasses.replace(recipe, augment=False)
    one, other = gradients(cases, 2, still)
    assert torch.equal(one, other) and not torch.equal(one, first)
    for gone in range(3):  # the sums differ by the part of who is gone, no more than the norm
        without = gradients([case for number, case in enumerate(cases) if number != gone], 1)[0]
        apart = torch.linalg.norm(3 * first - 2 * without)
        assert 0 < apart <= 0.5 + 1e-5


def test_what_is_scored_is_never_changed():
    recipe, site = little_recipe(**ALL), little_site()
    plain = little_recipe()
    cases = [disc_case(9, 3)]
    one, other = (evaluate(LittleNet(), cases, r, site, Control()) for r in (recipe, plain))
    assert one == other and one
    dataset = SliceDataset(cases, site, recipe)
    target = dataset.levels(0)[2]
    assert torch.equal(dataset[0]["target"], target.float())
    assert torch.equal(dataset[0]["image"], SliceDataset(cases, site, plain)[0]["image"])


# ------------------------------------------------------------------------------------- the recipes


def test_it_is_off_in_the_papers_recipes_and_on_in_ours():
    assert not little_recipe().augment
    for path in REPOSITORY.glob("jobs/recipes/*-paper.json"):
        assert not Recipe.from_json(path).augment, path
    for name in ("fedmsa", "fedsam", "lora"):
        assert Recipe.from_json(REPOSITORY / f"jobs/{name}/app/config/recipe.json").augment, name


@pytest.mark.parametrize("key", ["augment_flips", *OFF])
def test_each_strength_does_something_and_moves_no_other_draw(key):
    certain = {"augment_probability": 1.0}
    nothing = draw(little_recipe(**OFF, **certain), np.random.default_rng(0))
    assert not nothing.words() and not nothing.moves
    recipe = little_recipe(**{**OFF, key: ALL[key]}, **certain)
    everything = little_recipe(**{**ALL, **certain})
    alone = [draw(recipe, np.random.default_rng(seed)) for seed in range(8)]
    with_all = [draw(everything, np.random.default_rng(seed)) for seed in range(8)]
    assert sum(len(change.words()) for change in alone) >= 1
    for one, other in zip(alone, with_all, strict=True):
        assert set(one.words()) <= set(other.words()) and one.seed == other.seed
