from __future__ import annotations

import copy
import dataclasses

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


def standard_deviations(model):
    """Of the adapters' weights, first and second layers."""
    return [
        float(
            torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith(end)]).std()
        )
        for end in ("_adapter.down.weight", "_adapter.up.weight")
    ]


def test_the_papers_start_is_the_weighted_mean_of_a_draw_for_each_site(make_recipe):
    """FedFMS on ViT-B averages three sites of 0.44, 0.24 and 0.32 once: 0.0124 and 0.0248."""
    weights = (0.44, 0.24, 0.32)
    sizes = {"down": 768, "up": 192}  # inputs of a layer; PyTorch draws within 1 / sqrt(inputs)
    recipe = make_recipe(method="fedmsa", paper_compat=True, classes=("disc", "cup"))
    single, mean = (
        build_model(dataclasses.replace(recipe, start_draws=draws), None) for draws in ((), weights)
    )
    narrower = sum(weight**2 for weight in weights) ** 0.5
    for one, averaged in zip(standard_deviations(single), standard_deviations(mean), strict=True):
        assert averaged == pytest.approx(one * narrower, rel=0.03)
    for inputs, measured in zip(sizes.values(), (0.0124, 0.0248), strict=True):
        assert narrower / (3 * inputs) ** 0.5 == pytest.approx(measured, abs=5e-5)
    assert not torch.equal(single.class_head.weight, mean.class_head.weight)


def test_draws_are_averaged_with_their_weights(make_recipe):
    """A weight of nearly all is that draw; equal draws do not depend on the weights' scale."""
    recipe = make_recipe(method="fedmsa", paper_compat=True)

    def adapters(*draws):
        model = build_model(dataclasses.replace(recipe, start_draws=draws), None)
        return {n: p.detach() for n, p in model.named_parameters() if "_adapter." in n}

    first, second, both = adapters(), adapters(1e-12, 1.0), adapters(3.0, 1.0)
    assert all(torch.equal(adapters(5.0)[name], tensor) for name, tensor in first.items())
    for name, tensor in both.items():
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
    again = adapters(3.0, 1.0)
    assert all(torch.equal(tensor, again[name]) for name, tensor in both.items())


def test_a_start_of_several_draws_still_is_the_identity(make_recipe):
    images = torch.randn(1, 3, 128, 128)
    fedsam = build_model(make_recipe(method="fedsam"), None)
    recipe = dataclasses.replace(make_recipe(method="fedmsa"), start_draws=(1.0, 1.0))
    assert torch.equal(build_model(recipe, None)(images), fedsam(images))


@pytest.mark.parametrize("norm_padding", [False, True])
def test_an_adapted_block_equals_the_paper_step_by_step(
    upstream_encoder, fill_positions, norm_padding
):
    """Written out in Medical-SAM-Adapter's order, with the adapter inside the windows."""
    upstream = upstream_encoder(256, depth=1, global_blocks=()).blocks[0]
    block = AdaptedBlock(EncoderBlock(upstream), starts_as_zero=False, norm_padding=norm_padding)
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
