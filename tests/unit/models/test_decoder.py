from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfms.models.build import build_model
from fedfms.models.upstream import MaskDecoder


@pytest.mark.parametrize("classes", [("one",), ("one", "two", "three")])
def test_masks_equal_upstreams_decoder_with_empty_prompts(make_recipe, classes):
    """Upstream takes one image at a time; no sparse prompt, and zeros for the dense one."""
    model = build_model(make_recipe(classes=classes), None)
    images = torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        got = model(images)
        for image, logits in zip(images, got, strict=True):
            masks, _ = MaskDecoder.predict_masks(
                model.mask_decoder,
                image_embeddings=model.image_encoder(image[None]),
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=torch.zeros(1, 0, 64),
                dense_prompt_embeddings=torch.zeros(1, 64, 16, 16),
            )
            expected = masks[:, :1] if len(classes) == 1 else model.class_head(masks)
            assert (logits - expected[0]).abs().max() <= 1e-5


def test_several_classes_are_mixtures_of_the_four_mask_tokens_alone(make_recipe):
    """The paper's seg1, by hand: logits_k = sum over the four masks of w_km mask_m, plus b_k."""
    classes = ("disc", "cup", "rim")
    model = build_model(make_recipe(classes=classes, paper_compat=True), None)
    assert [p.numel() for p in model.class_head.parameters()] == [4 * 3, 3]
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        got = model(images).numpy()
        weights = model.class_head.weight.numpy()[:, :, 0, 0].astype(np.float64)
        biases = model.class_head.bias.numpy().astype(np.float64)
        masks = []
        for image in images:
            of_one, quality = MaskDecoder.predict_masks(
                model.mask_decoder,
                image_embeddings=model.image_encoder(image[None]),
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=torch.zeros(1, 0, 64),
                dense_prompt_embeddings=torch.zeros(1, 64, 16, 16),
            )
            masks.append(of_one[0].numpy().astype(np.float64))
            assert quality.shape[1] == len(masks[-1]) == 4  # SAM's four, and nothing of the fifth
    for b, k in np.ndindex(2, 3):
        expected = sum(weights[k, m] * masks[b][m] for m in range(4)) + biases[k]
        assert np.abs(got[b, k] - expected).max() <= 1e-5
        assert np.abs(got[b, k] - masks[b][0]).max() > 1e-2  # not simply one of the masks


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
