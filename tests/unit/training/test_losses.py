from __future__ import annotations

import numpy as np
import pytest
import torch
from little import little_recipe

from fedfms.training.losses import loss_per_class, masked_sum


@pytest.fixture
def logits_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 2, 8, 8, generator=generator)
    target = (torch.rand(4, 2, 8, 8, generator=generator) > 0.7).float()
    target[0] = 0  # an empty slice
    target[1, 1] = 1  # a full one
    return logits, target


def bce(logit: np.ndarray, target: np.ndarray, weight: float) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit))
    return -(weight * target * np.log(p) + (1 - target) * np.log(1 - p)).mean()


def soft_dice(logit: np.ndarray, target: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit))
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("name", ["bce", "dice_bce"])
def test_each_value_is_the_formula_of_one_slice_and_class(logits_and_target, name, weight):
    recipe = little_recipe(loss=name, positive_weight=weight)
    got = loss_per_class(*logits_and_target, recipe)
    logits, target = (tensor.double().numpy() for tensor in logits_and_target)
    expected = np.zeros((4, 2))
    for b, k in np.ndindex(4, 2):
        expected[b, k] = bce(logits[b, k], target[b, k], weight)
        if name == "dice_bce":
            expected[b, k] += soft_dice(logits[b, k], target[b, k])
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6)


def test_bce_over_a_whole_annotated_batch_is_the_loss_of_the_paper(logits_and_target):
    logits, target = logits_and_target
    paper = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(logits, target)
    losses = loss_per_class(logits, target, little_recipe(loss="bce"))
    torch.testing.assert_close(masked_sum(losses, torch.ones(4, 2)) / 8, paper)


def test_a_class_that_nobody_drew_moves_neither_the_loss_nor_a_gradient(logits_and_target):
    logits, target = logits_and_target
    recipe = little_recipe()
    annotated = torch.tensor([[1.0, 0.0]] * 4)
    alone = loss_per_class(logits[:, :1], target[:, :1], recipe).mean()

    logits.requires_grad_()
    losses = loss_per_class(logits, 1 - target, recipe)  # the other class's target is nonsense
    losses = torch.cat([loss_per_class(logits[:, :1], target[:, :1], recipe), losses[:, 1:]], dim=1)
    loss = masked_sum(losses, annotated) / annotated.sum()
    loss.backward()

    torch.testing.assert_close(loss, alone)
    assert torch.count_nonzero(logits.grad[:, 1]) == 0
    assert torch.count_nonzero(logits.grad[:, 0]) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_counts_nothing_where_its_class_was_not_drawn(value):
    losses = torch.tensor([[0.25, value], [0.5, value]])
    annotated = torch.tensor([[1.0, 0.0]] * 2)
    assert masked_sum(losses, annotated) == 0.75


def test_an_empty_slice_still_teaches_the_dice_loss_to_predict_nothing():
    logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
    loss_per_class(logits, torch.zeros(1, 1, 16, 16), little_recipe()).sum().backward()
    assert bool((logits.grad > 0).all())


def test_the_loss_of_half_precision_logits_is_computed_in_fp32(logits_and_target):
    logits, target = logits_and_target
    got = loss_per_class(logits.bfloat16(), target, little_recipe())
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got, loss_per_class(logits.bfloat16().float(), target, little_recipe())
    )
