from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfms.models.build import SamSegmenter, build_model
from fedfms.models.upstream import MaskDecoder
from rounding import assert_as_right, in_fp64


def upstreams_masks(model: SamSegmenter, image: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's decoder with empty prompts: (1, 4, M, M) logits of SAM's masks, (1, 4) quality."""
    masks, quality = MaskDecoder.predict_masks(
        model.mask_decoder,
        image_embeddings=model.image_encoder(image[None]),
        image_pe=model.image_position,
        sparse_prompt_embeddings=image.new_zeros(1, 0, 64),
        dense_prompt_embeddings=image.new_zeros(1, 64, 16, 16),
    )
    return masks, quality


@pytest.mark.parametrize("classes", [("one",), ("one", "two", "three")])
def test_masks_equal_upstreams_decoder_with_empty_prompts(make_recipe, classes):
    """Upstream takes one image at a time; no sparse prompt, and zeros for the dense one."""
    model = build_model(make_recipe(classes=classes), None)
    images = torch.randn(3, 3, 128, 128)
    assert torch.equal(model.image_position, model.prompt_encoder.get_dense_pe())

    def by_upstream(model: SamSegmenter, image: Tensor) -> Tensor:
        masks, _ = upstreams_masks(model, image)
        return masks[0, :1] if len(classes) == 1 else model.class_head(masks)[0]

    with torch.no_grad(), in_fp64():
        doubled = copy.deepcopy(model).double()
        for image, logits in zip(images, model(images), strict=True):
            exact = by_upstream(doubled, image.double())
            assert_as_right(logits, by_upstream(model, image), exact)


def test_several_classes_are_mixtures_of_the_four_mask_tokens_alone(make_recipe):
    """The paper's seg1, by hand: logits_k = sum over the four masks of w_km mask_m, plus b_k."""
    classes = ("disc", "cup", "rim")
    model = build_model(make_recipe(classes=classes, paper_compat=True), None)
    assert [p.numel() for p in model.class_head.parameters()] == [4 * 3, 3]
    images = torch.randn(2, 3, 128, 128)
    weights = model.class_head.weight.detach().numpy()[:, :, 0, 0].astype(np.float64)
    biases = model.class_head.bias.detach().numpy().astype(np.float64)

    def by_hand(model: SamSegmenter, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
        of_one, quality = upstreams_masks(model, image)
        masks = of_one[0].numpy().astype(np.float64)
        assert quality.shape[1] == len(masks) == 4  # SAM's four, and nothing of the fifth
        mixed = [sum(weights[k, m] * masks[m] for m in range(4)) + biases[k] for k in range(3)]
        return np.stack(mixed), masks

    with torch.no_grad(), in_fp64():
        got, doubled = model(images), copy.deepcopy(model).double()
        for image, logits in zip(images, got, strict=True):
            expected, masks = by_hand(model, image)
            assert_as_right(logits, expected, by_hand(doubled, image.double())[0])
            for k in range(3):  # not simply one of the masks
                assert np.abs(logits[k].numpy() - masks[0]).max() > 1e-2


def test_a_single_class_is_the_first_mask_and_has_no_mixture(make_recipe):
    model = build_model(make_recipe(classes=("disc",), paper_compat=True), None)
    assert model.class_head is None
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = model(images)
        for token in range(1, 4):  # the other masks' own networks play no part
            for parameter in model.mask_decoder.output_hypernetworks_mlps[token].parameters():
                parameter.normal_()
        assert torch.equal(model(images), before)


def test_logits_have_one_channel_a_class_at_mask_size(make_recipe):
    recipe = make_recipe(classes=("one", "two"), image_size=64)
    logits = build_model(recipe, None)(torch.randn(5, 3, 64, 64))
    assert logits.shape == (5, 2, recipe.mask_size, recipe.mask_size)
