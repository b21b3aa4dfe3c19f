"""Augmentation with void pixels and several contrasts: masks and channels stay together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from little import LittleNet, little_case, little_recipe, little_site
from little import values_of as values_of_model
from torch import Tensor

from fedfms.contracts.recipe import AUGMENTATIONS, Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import Shelves
from fedfms.data.features import FeatureFolder
from fedfms.data.slices import SliceDataset
from fedfms.geometry import pixel_statistics
from fedfms.training.augment import (
    Change,
    Tone,
    Variation,
    bytes_of_change,
    change_picture,
    changed_item,
    changed_pictures,
    draw,
    level_table,
)
from fedfms.training.frozen import FrozenSlices
from fedfms.training.gradients import accumulate_gradients
from fedfms.training.loader import Loader
from fedfms.training.loop import adam, train_round
from fedfms.training.losses import loss_per_class
from fedfms.training.private import PatientSteps
from fedfms.training.step_memory import _Count, count_step

CPU = torch.device("cpu")
VOID = 9
SECRET = b"s" * 32

OFF = {key: none for key, (none, _) in AUGMENTATIONS.items()}
MOVING = {
    "flips": {"augment_flips": "both"},
    "rotation": {"augment_rotation": 60.0},
    "scale": {"augment_scale": 1.5},
    "elastic": {"augment_elastic": 0.05},
}
MOVING["all"] = {key: value for one in MOVING.values() for key, value in one.items()}
TONES = {"augment_inversion": 0.5, "augment_gamma": 2.0, "augment_contrast": 0.5}
ALL = {**MOVING["all"], **TONES, "augment_bias": 0.3, "augment_blur": 0.02, "augment_noise": 0.1}

CONTRASTS = ("t1", "t2", "flair")


def augmented(**changes) -> Recipe:
    values = {"augment": True, "augment_probability": 1.0, **OFF, "classes": ("disc",), **changes}
    return little_recipe(**values)


def site_of(**changes) -> SiteConfig:
    return little_site(**{"classes": {"disc": (1,)}, "void": (VOID,), "workers": 0, **changes})


def contrasts_site(missing: str = "black", **changes) -> SiteConfig:
    globs = {name: f"{name}/*.nii.gz" for name in CONTRASTS}
    return site_of(contrasts=globs, images=globs["t1"], missing_contrast=missing, **changes)


def labelled(seed: int = 0, rows: int = 20, columns: int = 28, channels: int = 0, key: str = "a"):
    """A class, and beside it and at an edge what is void; the picture says where each is."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((3, rows, columns), int)
    labels[:, 4:12, 6:15] = 1
    labels[:, 9:16, 13:24] = VOID
    labels[:, :, :2] = VOID
    labels[0, 17:19, 20:28] = 1
    images = 30 + 100 * (labels == 1) + rng.integers(0, 60, labels.shape)
    if channels:
        own = rng.integers(1, 60, (*labels.shape, channels))
        images = images[..., None] + own
    return little_case(np.clip(images, 0, 255), labels, key=key)


def batches_of(dataset, recipe, variation, order) -> list[dict[str, Tensor]]:
    loader = Loader(dataset, recipe, dataset.site, CPU)
    return [
        {key: value.clone() for key, value in batch.items()}
        for batch in loader.batches(order, variation)
    ]


def levels_of(image: Tensor, recipe: Recipe) -> Tensor:
    """(C, S, S) of an input as grey levels."""
    mean, std = (torch.tensor(one)[:, None, None] for one in pixel_statistics(recipe))
    return image * std + mean


# ------------------------------------------------------------------------------------------- void


@pytest.mark.parametrize("kind", MOVING)
def test_void_pixels_go_where_a_class_in_their_place_would_go(kind: str) -> None:
    """Label 9 once void and once a class: the same plane, of batches and of single items."""
    recipe = augmented(**MOVING[kind])
    as_class = dataclasses.replace(recipe, classes=("disc", "cup"))
    case = labelled()
    void = SliceDataset([case], site_of(), recipe)
    drawn = SliceDataset([case], little_site(classes={"disc": (1,), "cup": (VOID,)}), as_class)
    order, moved = [[0, 1, 2]], 0
    for number in range(4):
        (got,) = batches_of(void, recipe, Variation(void, recipe, number, SECRET), order)
        variation = Variation(drawn, as_class, number, SECRET)
        (expected,) = batches_of(drawn, as_class, variation, order)
        assert got["target"].shape == (3, 2, 16, 16) and got["annotated"].shape == (3, 1)
        assert torch.equal(got["image"], expected["image"])
        assert torch.equal(got["target"], expected["target"])
        assert got["target"][:, 1].any()
        plain = torch.stack([void[item]["target"] for item in range(3)])
        moved += not torch.equal(got["target"][:, 1], plain[:, 1])
        turn = variation.turn(0)
        for item in range(3):
            change = Variation(void, recipe, number, SECRET).change(item, turn)
            alone = changed_item(void.levels(item), change, recipe)
            assert torch.equal(alone["target"], got["target"][item])
            assert torch.equal(alone["image"], got["image"][item])
    assert moved >= 2


def test_what_comes_in_from_beyond_the_edge_is_padding_and_taught_as_such() -> None:
    """Of a white slice that is void throughout: outside is no void, so that it counts as padding.

    And as padding does in a slice that is not square: it is background of every class.
    """
    recipe = augmented(augment_rotation=180.0, augment_scale=2.0)
    case = little_case(np.full((1, 20, 28), 255), np.full((1, 20, 28), VOID))
    case.labels[0, 8:12, 10:16] = 1
    dataset = SliceDataset([case], site_of(), recipe)
    plain = dataset[0]
    assert (plain["image"][:, 24:] == 0).all() and not plain["target"][:, 12:].any()
    some_outside = 0
    for number in range(8):
        variation = Variation(dataset, recipe, number)
        (batch,) = batches_of(dataset, recipe, variation, [[0]])
        image, (disc, void) = batch["image"][0], batch["target"][0]
        outside = image[0] == 0  # padding is 0 after normalisation, white is not
        blocks = outside.reshape(16, 2, 16, 2)  # a mask pixel is 2 x 2 pixels of the input
        all_outside = blocks.all(dim=3).all(dim=1)
        all_inside = ~blocks.any(dim=3).any(dim=1)
        assert not void[all_outside].any() and not disc[all_outside].any()
        assert (void + disc)[all_inside].bool().all()
        some_outside += bool(all_outside[:12].any())
        logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
        loss_per_class(logits, batch["target"], recipe).sum().backward()
        gradient = logits.grad[0, 0]
        assert (gradient[all_outside] > 0).all(), "towards background"
        assert not gradient[void.bool()].any()
    assert some_outside >= 4


def test_training_sees_nothing_of_void_pixels_wherever_they_go() -> None:
    """The gradient of what a network says there is nought, in each augmented batch of a round."""
    recipe = augmented(**ALL, loss="bce")
    dataset = SliceDataset([labelled(seed) for seed in range(2)], site_of(), recipe)
    for number in range(3):
        variation = Variation.of(dataset, recipe, number, SECRET)
        for batch in batches_of(dataset, recipe, variation, [[0, 4], [3, 1]]):
            said: list[Tensor] = []

            class Keeps(LittleNet):
                def forward(self, images: Tensor, said: list[Tensor] = said) -> Tensor:
                    logits = super().forward(images)
                    logits.retain_grad()
                    said.append(logits)
                    return logits

            accumulate_gradients(Keeps(1), batch, recipe, 2, Control())
            (logits,) = said
            void = batch["target"][:, 1:].bool()
            assert void.any() and logits.grad is not None
            assert not logits.grad[void].any() and (logits.grad[~void] != 0).all()


# -------------------------------------------------------------------------------------- contrasts


@pytest.mark.parametrize("kind", MOVING)
def test_every_contrast_takes_the_same_place(kind: str) -> None:
    """Of channels that are one picture, and of one that is alone: the same pixels come out."""
    recipe = augmented(**MOVING[kind], contrasts=CONTRASTS)
    case = labelled()
    several = dataclasses.replace(case, images=np.repeat(case.images[..., None], 3, axis=3))
    dataset = SliceDataset([several], contrasts_site(), recipe)
    for number in range(4):
        variation = Variation(dataset, recipe, number, SECRET)
        (batch,) = batches_of(dataset, recipe, variation, [[0, 1, 2]])
        levels = torch.stack([levels_of(image, recipe) for image in batch["image"]])
        assert torch.equal(levels[:, 0], levels[:, 1]) and torch.equal(levels[:, 0], levels[:, 2])
        for item in range(3):
            change = variation.change(item, variation.turn(0))
            picture, covered = dataset.levels(item)[:2]
            native = dataset.levels(item, native=True)[0]
            alone = dataclasses.replace(change, tones=change.tones[:1])
            expected, inside = change_picture(picture[:1], alone)
            there = torch.ones(expected.shape[1:], dtype=torch.bool) if inside is None else inside
            rows, columns = covered
            got = levels[item, :, :rows, :columns].round().to(torch.uint8)
            assert torch.equal(got[0][there], expected[0][there])
            # as a GPU does it: from the native size
            ((from_native,), _) = changed_pictures([native], [covered], [change], recipe)
            assert (from_native[1].int() - expected[0].int()).abs().max() <= 1


def test_each_contrast_has_a_tone_of_its_own_and_all_have_one_place_and_field() -> None:
    recipe = augmented(**ALL, contrasts=CONTRASTS)
    changes = [draw(recipe, np.random.default_rng(seed)) for seed in range(12)]
    assert {len(change.tones) for change in changes} == {3}
    inverted = [tuple(tone.inverted for tone in change.tones) for change in changes]
    assert any(len(set(one)) == 2 for one in inverted)
    assert all(len({tone.gamma for tone in change.tones}) == 3 for change in changes)
    one = draw(dataclasses.replace(recipe, contrasts=("t1",)), np.random.default_rng(0))
    plain = draw(dataclasses.replace(recipe, contrasts=()), np.random.default_rng(0))
    assert len(one.tones) == 1 and one.words() == plain.words() and one.seed == plain.seed


def test_each_contrast_becomes_what_its_tone_says() -> None:
    recipe = augmented(**TONES, contrasts=CONTRASTS)
    dataset = SliceDataset([labelled(channels=3)], contrasts_site(), recipe)
    variation = Variation(dataset, recipe, 0, SECRET)
    for item in range(3):
        change = variation.change(item, 0)
        picture = dataset.levels(item)[0]
        seen = levels_of(changed_item(dataset.levels(item), change, recipe)["image"], recipe)
        rows, columns = picture.shape[1:]
        for number, tone in enumerate(change.tones):
            table = torch.from_numpy(level_table(Change(tones=(tone,)))[0])
            expected = table[picture[number].long()].round()
            assert (seen[number, :rows, :columns] - expected).abs().max() < 1e-3
    sure = dataclasses.replace(recipe, augment_inversion=1.0, augment_gamma=1.0, augment_contrast=0)
    change = Variation(dataset, sure, 0, SECRET).change(0, 0)
    picture = dataset.levels(0)[0]
    assert torch.equal(change_picture(picture, change)[0], 255 - picture)


def test_levels_are_of_the_whole_range_whatever_a_slice_shows() -> None:
    """A CT window's or a photograph's levels mean the same everywhere, and still do afterwards."""
    tone = Tone(gamma=1.7, inverted=True)
    narrow = torch.arange(80, 121, dtype=torch.uint8).repeat(3, 1)[None]
    wide = torch.arange(256).to(torch.uint8).repeat(3, 1)[None]
    of_narrow, _ = change_picture(narrow, Change(tones=(tone,)))
    of_wide, _ = change_picture(wide, Change(tones=(tone,)))
    assert torch.equal(of_narrow, of_wide[..., 80:121])
    level = np.arange(256) / 255
    np.testing.assert_array_equal(of_wide[0, 0].numpy(), np.rint(255 * (1 - level**1.7)))


@pytest.mark.parametrize("missing", ["black", "mean"])
def test_a_contrast_that_a_case_lacks_stays_black(missing: str) -> None:
    """As predict shows it to the network; the mean of the others is a picture as they are."""
    recipe = augmented(**ALL, contrasts=(*CONTRASTS, "t1ce"))
    case = labelled(channels=3)
    dataset = SliceDataset([case], contrasts_site(missing), recipe)
    for turn in range(6):
        change = Variation(dataset, recipe, 0, SECRET).change(0, turn)
        picture = dataset.levels(0)[0]
        changed, _ = change_picture(picture, change)
        assert bool((picture[3] == 0).all()) == (missing == "black")
        assert bool((changed[3] == 0).all()) == (missing == "black")
        assert all(not torch.equal(changed[number], picture[number]) for number in range(3))
    gray = torch.zeros(1, 8, 8, dtype=torch.uint8)  # of an image without contrasts none is lacking
    assert (change_picture(gray, Change(tones=(Tone(inverted=True),)))[0] == 255).all()


# ----------------------------------------------------------------------- the same bytes everywhere


def test_with_void_and_contrasts_rounds_are_the_same_bytes_with_workers_and_after_a_restart() -> (
    None
):
    recipe = augmented(**ALL, contrasts=CONTRASTS, local_epochs=2, batch_size=4)
    cases = [labelled(seed, channels=3, key=f"p{seed}") for seed in range(3)]

    def made(workers: int):
        site = contrasts_site(workers=workers)
        return SliceDataset(cases, site, recipe), site

    def round_of(number, model, optimizer, dataset, site, loader=None):
        return train_round(
            *(model, dataset, recipe, site),
            round_number=number,
            optimizer=optimizer,
            control=Control(),
            secret=SECRET,
            loader=loader,
        ).optimizer

    ends = []
    for workers in (0, 2):
        dataset, site = made(workers)
        model, optimizer = LittleNet(1), None
        loader = Loader(dataset, recipe, site, CPU)
        for number in range(2):
            optimizer = round_of(number, model, optimizer, dataset, site, loader)
        ends.append(values_of_model(model))
    dataset, site = made(0)
    model = LittleNet(1)
    moments = round_of(0, model, None, dataset, site).state_dict()
    again = LittleNet(1)  # another process: nothing but what was written is there
    again.load_state_dict(model.state_dict())
    dataset, site = made(0)
    optimizer = adam(again, recipe)
    optimizer.load_state_dict(moments)
    round_of(1, again, optimizer, dataset, site)
    ends.append(values_of_model(again))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        assert torch.equal(value, ends[2][name]), name


def test_steps_of_patients_train_on_the_same_slices_and_pass_void_pixels_over() -> None:
    recipe = augmented(
        **ALL, contrasts=CONTRASTS, patient_rate=1.0, patient_clip_norm=1e6, loss="bce"
    )
    site = contrasts_site()
    dataset = SliceDataset([labelled(channels=3)], site, recipe)
    model = LittleNet(1)
    variation = Variation.of(dataset, recipe, 1, SECRET)
    assert variation is not None
    steps = PatientSteps(model, dataset, recipe, Control(), 9, variation=variation)
    steps.gradients()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    (batch,) = batches_of(dataset, recipe, variation, [[0, 1, 2]])
    assert batch["target"][:, 1].any()
    accumulate_gradients(model, batch, recipe, 9, Control(), over=1.0)
    for one, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)
    without = {**batch, "target": batch["target"][:, :1]}
    model.zero_grad(set_to_none=True)
    accumulate_gradients(model, without, recipe, 9, Control(), over=1.0)
    assert not torch.allclose(got[0], next(model.parameters()).grad)


def test_features_that_are_kept_come_with_the_masks_of_their_variant(tmp_path: Path) -> None:
    """What is read from the disk has the target that the picture had when it was computed."""
    recipe = augmented(**ALL, augment_variants=2)
    shelves = Shelves(tmp_path / "cache")
    stored = shelves.put(labelled(), "0" * 64)
    dataset = SliceDataset([stored], site_of(), recipe)
    kept = FeatureFolder(tmp_path / "features", "1" * 64, "job", 2**30)
    targets = []
    for turn in range(2):
        variation = Variation(dataset, recipe, 0, SECRET, variants=2)
        slices = FrozenSlices(dataset, kept, variation)
        for item in range(3):
            first = slices[item, turn]
            one = first["slice"]
            assert one.features is None and one.name is not None
            change = variation.change(item, turn)
            expected = changed_item(dataset.levels(item), change, recipe)
            assert torch.equal(one.image, expected["image"])
            features = one.image.mean(dim=0)[:4, :4].clone()
            kept.put(one.name, features)
            second = slices[item, turn]
            assert second["slice"].image is None
            assert torch.equal(second["slice"].features, features)
            assert torch.equal(second["target"], expected["target"])
            assert torch.equal(first["target"], expected["target"])
            assert second["target"][1].any()
            targets.append(second["target"])
    assert len({target.numpy().tobytes() for target in targets}) == 6


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("contrasts", [(), ("t1", "t2", "flair", "t1ce", "dwi")])
def test_the_memory_plan_counts_what_a_change_takes(contrasts) -> None:
    """Checked with real numbers: all storages that torch makes while a batch is changed."""
    recipe = augmented(**ALL, contrasts=contrasts, image_size=256, batch_size=3)
    channels = len(contrasts) or 3
    rng = np.random.default_rng(0)
    pictures = [
        torch.from_numpy(rng.integers(1, 256, (channels, 256, 256)).astype(np.uint8))
        for _ in range(3)
    ]
    changes = [
        draw(recipe, np.random.default_rng(seed), 3 if not contrasts else 1) for seed in range(3)
    ]
    assert all(change.bends is not None and change.blur for change in changes)
    with _Count(Control()) as count:
        count.begin()
        changed = changed_pictures(pictures, [(256, 256)] * 3, changes, recipe)
        took = count.most[0] + 4 * channels * 256**2  # and the noise, which numpy makes
    assert len(changed[0]) == 3
    assert took <= bytes_of_change(recipe) <= 1.6 * took
    assert bytes_of_change(dataclasses.replace(recipe, augment=False)) == 0


def test_a_step_that_is_smaller_than_its_batchs_changes_is_planned_by_these() -> None:
    recipe = augmented(method="fedmsa", image_size=256, batch_size=1)
    still = dataclasses.replace(recipe, augment=False)
    many = dataclasses.replace(recipe, contrasts=tuple(f"c{number}" for number in range(16)))
    one, other = (count_step(r, 1, False, CPU) for r in (recipe, still))
    assert one.work >= other.work >= bytes_of_change(recipe)
    assert one == other, "activations are far more, and gone when slices are changed"
    least = bytes_of_change(many)
    assert count_step(many, 1, True, CPU).work >= least
