"""Low-rank updates: what they are, what of them travels, and what an export makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedfms.errors import ConfigError
from fedfms.exchange.tensors import payload_bytes, to_precision
from fedfms.models.build import build_model
from fedfms.models.lora import LowRankQkv
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling, travelling_names
from rounding import assert_as_right, exactly


def moved(model, scale: float = 0.05):
    """The model after something was learnt."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def test_what_travels_is_the_updates_and_the_decoder_parts_that_learn(make_recipe):
    model = build_model(make_recipe(method="lora", lora_rank=4), None)
    decoder = travelling_names(build_model(make_recipe(method="fedmsa"), None))
    expected = {name for name in decoder if name.startswith("mask_decoder.")}
    for block in range(len(model.image_encoder.blocks)):
        place = f"image_encoder.blocks.{block}.attn.qkv."
        expected |= {place + one for one in ("q_down.weight", "q_up", "v_down.weight", "v_up")}
    assert set(travelling_names(model)) == expected
    width = model.image_encoder.blocks[0].attn.qkv.in_features
    shapes = {tuple(t.shape) for n, t in read_travelling(model).items() if ".qkv." in n}
    assert shapes == {(4, width)}


def test_it_starts_as_sam_and_every_machine_draws_the_same(make_recipe):
    recipe = make_recipe(method="lora", seed=5)
    checkpoint = find_checkpoint(recipe, None)
    model = build_model(recipe, checkpoint)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(
            model(images), build_model(make_recipe(method="fedsam"), checkpoint)(images)
        )
    torch.manual_seed(99)
    again = read_travelling(build_model(recipe, checkpoint))
    for name, tensor in read_travelling(model).items():
        assert torch.equal(again[name], tensor)
        assert bool(tensor.any()) != name.endswith("_up") or "qkv" not in name
    other = read_travelling(build_model(make_recipe(method="lora", seed=6), checkpoint))
    downs = [name for name in again if name.endswith("q_down.weight")]
    assert downs and not any(torch.equal(other[name], again[name]) for name in downs)


def test_an_update_is_added_to_q_and_v_and_k_stays():
    frozen = torch.nn.Linear(12, 36)
    layer = LowRankQkv(frozen, 2)
    torch.nn.init.normal_(layer.q_up)
    torch.nn.init.normal_(layer.v_up)
    tokens = torch.randn(5, 7, 12)
    q, k, v = layer(tokens).chunk(3, dim=-1)
    expected = F.linear(tokens, frozen.weight, frozen.bias).chunk(3, dim=-1)
    assert torch.equal(k, expected[1])
    to_q = torch.einsum("btc,rc,rd->btd", tokens, layer.q_down.weight, layer.q_up)
    to_v = torch.einsum("btc,rc,rd->btd", tokens, layer.v_down.weight, layer.v_up)
    torch.testing.assert_close(q, expected[0] + to_q)
    torch.testing.assert_close(v, expected[2] + to_v)


@pytest.mark.parametrize("image_size", [128, 80])  # border windows of 80 are padded
def test_the_merged_network_is_plain_sam_and_computes_the_same(make_recipe, image_size):
    recipe = make_recipe(method="lora", image_size=image_size)
    model = moved(build_model(recipe, find_checkpoint(recipe, None)))
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        before, exact = model(images), exactly(model, images)
        model.method.merge(model)
        assert_as_right(model(images), before, exact)
    plain = build_model(make_recipe(method="fedsam", image_size=image_size), None)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_updates_learn_in_bf16_and_their_gradient_is_fp32(make_recipe):
    model = moved(build_model(make_recipe(method="lora", precision="bf16"), None))
    model(torch.randn(1, 3, 128, 128)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in travelling_names(model):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.any()) or "k_proj.bias" in name, name
        else:
            assert parameter.grad is None


def test_a_rank_is_from_1_to_64_and_old_recipes_keep_their_hash(make_recipe):
    for rank in (0, 65):
        with pytest.raises(ConfigError, match="lora_rank"):
            make_recipe(method="lora", lora_rank=rank)
    assert make_recipe(lora_rank=8).sha256 == make_recipe().sha256
    assert make_recipe(lora_rank=4).sha256 != make_recipe().sha256


def test_a_round_on_vit_b_moves_no_more_than_we_promise(make_recipe):
    recipe = make_recipe("vit_b", image_size=1024, method="lora")
    with torch.device("meta"):  # shapes alone
        model = build_model(recipe, None)
    names = set(travelling_names(model))
    zeros = {
        name: torch.zeros(()).expand(tensor.shape)
        for name, tensor in model.named_parameters()
        if name in names
    }
    assert sum(one.numel() for one in zeros.values()) == 3_801_216
    assert payload_bytes(to_precision(zeros, "int8")) <= 4.1e6
