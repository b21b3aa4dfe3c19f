from __future__ import annotations

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


def test_logits_have_one_channel_a_class_at_mask_size(make_recipe):
    recipe = make_recipe(classes=("one", "two"), image_size=64)
    logits = build_model(recipe, None)(torch.randn(5, 3, 64, 64))
    assert logits.shape == (5, 2, recipe.mask_size, recipe.mask_size)
