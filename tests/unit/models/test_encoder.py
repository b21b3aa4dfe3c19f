from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedfms.models.adapters import AdaptedBlock
from fedfms.models.build import build_model
from fedfms.models.encoder import EncoderBlock
from fedfms.models.upstream import window_partition, window_unpartition
from rounding import assert_as_right, assert_gradients_as_right, exactly, in_fp64


def with_our_blocks(upstream: nn.Module) -> nn.Module:
    """The same weights, the same names, our computation."""
    ours = copy.deepcopy(upstream)
    ours.blocks = nn.ModuleList(EncoderBlock(block) for block in ours.blocks)
    assert ours.state_dict().keys() == upstream.state_dict().keys()
    return ours


def test_the_encoder_and_its_gradients_equal_upstream_at_256_pixels(upstream_encoder):
    upstream = upstream_encoder(256)
    ours = with_our_blocks(upstream)
    images, weights = torch.randn(1, 3, 256, 256), torch.randn(1, 256, 16, 16)
    exact = copy.deepcopy(upstream).double()
    expected, got, truth = upstream(images), ours(images), exact(images.double())
    assert_as_right(got, expected, truth)
    for embeddings in (expected, got, truth):
        (embeddings * weights).sum().backward()
    assert_gradients_as_right(ours, upstream, exact)


@pytest.mark.slow
def test_the_encoder_equals_upstream_at_1024_pixels(upstream_encoder):
    upstream = upstream_encoder(1024)
    ours = with_our_blocks(upstream)
    images = torch.randn(1, 3, 1024, 1024)
    torch.set_num_threads(2)
    with torch.inference_mode():
        assert_as_right(ours(images), upstream(images), exactly(upstream, images))


@pytest.mark.slow
def test_gradients_equal_upstream_at_1024_pixels(upstream_encoder):
    """One global block, whose grid grows with the picture; windows are as large at 256 pixels."""
    upstream = upstream_encoder(1024, depth=1, global_blocks=(0,))
    ours = with_our_blocks(upstream)
    images, weights = torch.randn(1, 3, 1024, 1024), torch.randn(1, 256, 64, 64)
    torch.set_num_threads(2)
    exact = copy.deepcopy(upstream).double()
    for encoder in (upstream, ours, exact):
        (encoder(images.to(encoder.pos_embed.dtype)) * weights).sum().backward()
    assert_gradients_as_right(ours, upstream, exact)


@pytest.mark.parametrize("classes", [("one",), ("one", "two")])
def test_fedmsa_starts_as_fedsam(make_recipe, classes):
    """Identity adapters, and the same head where there are several classes."""
    images = torch.randn(2, 3, 128, 128)
    fedsam = build_model(make_recipe(method="fedsam", classes=classes), None)
    fedmsa = build_model(make_recipe(method="fedmsa", classes=classes), None)
    assert torch.equal(fedmsa(images), fedsam(images))


def test_papers_adapters_do_not_start_as_identity(make_recipe):
    images = torch.randn(2, 3, 128, 128)
    fedsam = build_model(make_recipe(method="fedsam"), None)
    paper = build_model(make_recipe(method="fedmsa", paper_compat=True), None)
    assert (paper(images) - fedsam(images)).abs().max() > 1e-3


@pytest.mark.parametrize("norm_padding", [False, True])
def test_an_adapted_block_equals_the_paper_step_by_step(
    upstream_encoder, fill_positions, norm_padding
):
    """Written out in Medical-SAM-Adapter's order, with the adapter inside the windows."""
    upstream = upstream_encoder(256, depth=1, global_blocks=()).blocks[0]
    block = AdaptedBlock(EncoderBlock(upstream, norm_padding=norm_padding), starts_as_zero=False)
    fill_positions(block)
    tokens = torch.randn(2, 16, 16, 768)  # windows of 14: border windows are padded

    def step_by_step(upstream: nn.Module, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if norm_padding:
            windows, padded = window_partition(tokens, 14)
            windows = upstream.norm1(windows)
        else:
            windows, padded = window_partition(upstream.norm1(tokens), 14)
        windows = upstream.attn(windows)
        windows = windows + block.space_adapter(windows)
        expected = tokens + window_unpartition(windows, 14, padded, (16, 16))
        normed = upstream.norm2(expected)
        return expected + upstream.mlp(normed) + 0.5 * block.mlp_adapter(normed)

    with torch.no_grad(), in_fp64():
        expected = step_by_step(upstream, block, tokens)
        doubled = (copy.deepcopy(module).double() for module in (upstream, block))
        assert_as_right(block(tokens), expected, step_by_step(*doubled, tokens.double()))


def test_padding_order_matters_only_in_the_papers_mode(make_recipe):
    model = build_model(make_recipe("vit_b", image_size=256, paper_compat=True), None)
    assert all(block.norm_padding for block in model.image_encoder.blocks)
    model = build_model(make_recipe(image_size=128, paper_compat=True, method="fedsam"), None)
    assert not any(block.norm_padding for block in model.image_encoder.blocks)


def test_bf16_stays_close_and_hands_fp32_to_decoder_and_gradients(make_recipe):
    images = torch.randn(2, 3, 128, 128)
    exact = build_model(make_recipe(), None)
    rounded = build_model(make_recipe(precision="bf16"), None)
    expected, got = exact(images), rounded(images)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() <= 0.1 * expected.std()
    got.sum().backward()
    assert {p.grad.dtype for p in rounded.parameters() if p.requires_grad} == {torch.float32}
