"""Pixels that teach nothing, and classes that nobody drew in single cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from little import LittleNet, disc_case, little_case, little_recipe, little_site, values_of

from fedfms.control import Control
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError
from fedfms.training.evaluate import evaluate
from fedfms.training.loop import train_round
from fedfms.training.losses import loss_per_class

VOID = 9


def spoiled(seed: int, key: str = "a"):
    """A case with a void stripe, under which the label is anything."""
    case = disc_case(seed, 3, key=key)
    labels = case.labels.copy()
    labels[:, :, :6] = VOID
    return little_case(case.images, labels, case.spacing, key)


@pytest.mark.parametrize("loss", ["bce", "dice_bce"])
def test_a_void_pixel_has_no_gradient_and_the_others_that_of_the_part(loss: str) -> None:
    recipe = little_recipe(loss=loss)
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 8, 8, generator=random, requires_grad=True)
    target = torch.randint(0, 2, (2, 2, 8, 8), generator=random).float()
    void = torch.zeros(2, 1, 8, 8)
    void[..., :3] = 1
    losses = loss_per_class(logits, torch.cat([target, void], 1), recipe)
    losses.sum().backward()
    assert not logits.grad[..., :3].any() and logits.grad[..., 3:].all()
    part = loss_per_class(logits[..., 3:].detach(), target[..., 3:], recipe)
    torch.testing.assert_close(losses.detach(), part)


def test_without_void_pixels_the_loss_is_what_it_was_and_all_void_is_none() -> None:
    recipe = little_recipe(loss="bce")
    logits, target = torch.randn(2, 2, 8, 8), torch.ones(2, 2, 8, 8)
    plain = loss_per_class(logits, target, recipe)
    torch.testing.assert_close(
        loss_per_class(logits, torch.cat([target, torch.zeros(2, 1, 8, 8)], 1), recipe), plain
    )
    nothing = loss_per_class(logits, torch.cat([target, torch.ones(2, 1, 8, 8)], 1), recipe)
    assert nothing.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_training_does_not_see_what_is_under_void_pixels(tmp_path) -> None:
    site, recipe = little_site(void=(VOID,)), little_recipe()
    ends = []
    for background in (0, 255):  # grey levels are seen, labels are not: those are alike
        case = spoiled(0)
        if background:  # what was drawn under the stripe before
            assert (disc_case(0, 3).labels[:, :, :6] > 0).any()
        dataset = SliceDataset([case], site, recipe)
        assert dataset[0]["target"].shape == (3, 16, 16) and dataset[0]["target"][2, :, :4].all()
        model = LittleNet()
        train_round(model, dataset, recipe, site, round_number=0, optimizer=None, control=Control())
        ends.append(values_of(model))
    plain = LittleNet()
    unspoiled = SliceDataset([disc_case(0, 3)], little_site(), recipe)
    train_round(
        plain, unspoiled, recipe, little_site(), round_number=0, optimizer=None, control=Control()
    )
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(values_of(plain)[name], ends[0][name]) for name in ends[0])


def test_void_pixels_are_kept_with_the_slices_and_are_alike_at_native_size() -> None:
    dataset = SliceDataset([spoiled(0)], little_site(void=(VOID,)), little_recipe())
    first, again = dataset.levels(1)[2], dataset.levels(1)[2]
    assert torch.equal(first, again) and torch.equal(first, dataset.levels(1, native=True)[2])
    assert torch.equal(dataset.drawn(1)["target"], first.float())


def test_a_mistake_under_void_pixels_costs_no_score() -> None:
    recipe = little_recipe(classes=("disc",))

    class Everything(LittleNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * 0 + 9.0

    labels = np.full((2, 24, 24), VOID, np.int16)
    labels[:, 4:12, 4:12] = 1
    case = little_case(np.full((2, 24, 24), 7), labels)
    (score,) = evaluate(Everything(1), [case], recipe, little_site(void=(VOID,)), Control())
    assert score.dice == 1.0
    (other,) = evaluate(Everything(1), [case], recipe, little_site(background=(0, VOID)), Control())
    assert other.dice < 0.3


def test_a_class_that_a_case_lacks_is_neither_taught_nor_scored_there() -> None:
    site = little_site(not_annotated_in={"cup": ("b*",)})
    recipe = little_recipe()
    cases = [disc_case(0, 2, key="a1"), disc_case(1, 2, key="b1")]
    dataset = SliceDataset(cases, site, recipe)
    drawn = [item["annotated"].tolist() for item in (dataset[0], dataset[2])]
    assert drawn == [[1.0, 1.0], [1.0, 0.0]]
    assert dataset.drawn(3)["annotated"].tolist() == [1.0, 0.0]
    scores = evaluate(LittleNet(), cases, recipe, site, Control())
    assert [(one.key, one.class_name) for one in scores] == [
        ("a1", "disc"),
        ("a1", "cup"),
        ("b1", "disc"),
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"void": (1,)}, "label value 1 is void, and class or background"),
        ({"not_annotated_in": {"lens": ("a*",)}}, "not_annotated_in names lens"),
        ({"not_annotated_in": {"cup": ()}}, "not_annotated_in names no case for cup"),
        ({"leave_out": 0.6}, "leave_out is 0.6"),
    ],
)
def test_a_site_that_cannot_be_meant_is_refused(settings, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        little_site(**settings)
