from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedfms.control import Control
from fedfms.models import attention
from fedfms.models.attention import attend, choose
from fedfms.models.build import build_model, hold_frozen
from fedfms.models.upstream import ImageEncoderViT
from fedfms.training.gradients import accumulate_gradients
from rounding import assert_as_right


def upstream_attention(height, width, heads=2, head_dim=8):
    """segment_anything's own, with tables of positions that matter; no projection around it."""
    encoder = ImageEncoderViT(
        depth=1, embed_dim=heads * head_dim, num_heads=heads, img_size=16, use_rel_pos=True
    )
    theirs = encoder.blocks[0].attn
    theirs.qkv, theirs.proj = torch.nn.Identity(), torch.nn.Identity()
    for name, size in (("rel_pos_h", height), ("rel_pos_w", width)):
        table = torch.randn(2 * size - 1, head_dim)
        setattr(theirs, name, torch.nn.Parameter(table))
    return theirs


def with_gradients(function, qkv, theirs, weights):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv)
    wanted = (qkv, theirs.rel_pos_h, theirs.rel_pos_w)
    return out, *torch.autograd.grad((out * weights).sum(), wanted)


# one tile for all heads; some heads a tile, and some left over; a few queries of one head a tile
@pytest.mark.parametrize("tile", [2**20, 2 * 48**2, 48 * 10])
def test_tiled_attention_and_its_gradients_equal_upstream(monkeypatch, tile):
    monkeypatch.setattr(attention, "_TILE", {"cpu": tile})
    theirs = upstream_attention(6, 8)
    qkv, weights = torch.randn(3, 6, 8, 48), torch.randn(3, 6, 8, 16)
    assert choose("cpu", torch.float32, 8, 6, 8, recorded=False).way == "tiled"
    ours = with_gradients(lambda x: attend(x, theirs), qkv, theirs, weights)
    upstream = with_gradients(theirs, qkv, theirs, weights)
    exact = copy.deepcopy(theirs).double()
    truth = with_gradients(exact, qkv.double(), exact, weights.double())
    for what, *values in zip(("out", "qkv", "rows", "columns"), ours, upstream, truth, strict=True):
        assert_as_right(*values, what)


def test_only_what_is_asked_for_gets_a_gradient():
    theirs = upstream_attention(4, 4)
    for table in (theirs.rel_pos_h, theirs.rel_pos_w):
        table.requires_grad_(False)
    qkv = torch.randn(1, 4, 4, 48, requires_grad=True)
    attend(qkv, theirs).sum().backward()
    assert qkv.grad is not None and theirs.rel_pos_h.grad is None
    assert not attend(qkv.detach(), theirs).requires_grad


def test_second_derivatives_are_there_where_only_the_math_kernel_is():
    """As an attack by matching gradients needs them (fedfms_lab/attacks/matching.py)."""
    theirs = upstream_attention(4, 4).double()
    qkv = torch.randn(1, 4, 4, 48, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: attend(x, theirs), (qkv,))


def test_positions_first_used_in_inference_can_be_trained_with():
    theirs = upstream_attention(3, 7)
    attention._distances.cache_clear()
    qkv = torch.randn(1, 3, 7, 48)
    with torch.inference_mode():
        scored = attend(qkv, theirs)
    trained = attend(qkv.requires_grad_(), theirs)
    trained.sum().backward()
    assert torch.equal(scored, trained) and theirs.rel_pos_h.grad is not None


@pytest.mark.parametrize(
    ("facts", "way", "why"),
    [
        (("cuda", torch.float32, 64, 64, 64), "tiled", "slow at width 192"),
        (("cuda", torch.float32, 64, 14, 14), "folded", "fastest"),
        (("cuda", torch.bfloat16, 64, 64, 64), "folded", "fastest"),
        (("cpu", torch.float32, 64, 64, 64), "tiled", "no fused kernel"),
    ],
)
def test_the_choice_says_why(facts, way, why):
    choice = choose(*facts, recorded=False)
    assert choice.way == way and why in choice.why
    assert choose(*facts, recorded=True).way == "folded"


def test_which_attention_runs_is_in_the_log_once(caplog):
    attention._say.cache_clear()
    with caplog.at_level(logging.DEBUG, "fedfms.models.attention"):
        for _ in range(2):
            attend(torch.randn(1, 5, 5, 48), upstream_attention(5, 5))
    (line,) = caplog.messages
    assert line.startswith("attention of 5 x 5 tokens, heads of 8, float32 on cpu: tiled, since ")


def gradients_and_logits(recipe, state):
    model = build_model(recipe, None)
    model.load_state_dict(state)
    model.train()
    hold_frozen(model)
    numbers = torch.Generator().manual_seed(3)
    batch = {
        "image": torch.randn(2, 3, 128, 128, generator=numbers),
        "target": (torch.rand(2, 1, 64, 64, generator=numbers) < 0.2).float(),
        "annotated": torch.ones(2, 1),
    }
    accumulate_gradients(model, batch, recipe, 2, Control())
    found = {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}
    return model, found, model(batch["image"]).detach()


@pytest.mark.parametrize("method", ["fedmsa", "fedsam"])
def test_bf16_gradients_are_within_a_hundredth(make_recipe, fill_positions, method):
    """Frozen weights and the stream of tokens are bf16; what learns and its gradient fp32."""
    recipe = make_recipe(method=method, paper_compat=True)
    start = build_model(recipe, None)
    fill_positions(start)
    state = start.state_dict()
    _, exact, logits = gradients_and_logits(recipe, state)
    model, rounded, close = gradients_and_logits(
        make_recipe(method=method, paper_compat=True, precision="bf16"), state
    )
    assert exact.keys() == rounded.keys()
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    one, other = torch.cat(list(rounded.values())), torch.cat(list(exact.values()))
    assert (one - other).norm() <= 1e-2 * other.norm()
    assert 0 < (close - logits).norm() <= 1e-2 * logits.norm()
    frozen = {
        p.dtype
        for n, p in model.image_encoder.named_parameters()
        if not p.requires_grad and not n.startswith("neck.")
    }
    assert frozen == ({torch.bfloat16} if method == "fedmsa" else set())


def test_a_network_in_fp32_is_held_as_it_is(make_recipe):
    model = build_model(make_recipe(), None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hold_frozen(model)
    hold_frozen(SimpleNamespace())  # of a network that is not SAM nothing is held
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
