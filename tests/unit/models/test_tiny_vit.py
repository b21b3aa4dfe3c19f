"""vit_t: MobileSAM's names, what its parts compute, what learns and travels; mask_token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import ConfigError
from fedfms.models.build import build_model
from fedfms.models.encoder import checkpoint_blocks
from fedfms.models.methods import find_method
from fedfms.models.sam import load_backbone
from fedfms.models.tiny_vit import NormedConv, TinyViT, WindowAttention
from fedfms.models.travelling import read_travelling, travelling_names
from fedfms.training.loop import adam, train_step
from rounding import assert_as_right, exactly

ADAPTERS = ("space_adapter", "mlp_adapter")
ALONE = {"adapter_blocks": "last:0"}


@pytest.fixture
def make(make_recipe):
    def of(**values) -> Recipe:
        return make_recipe("vit_t", **{"image_size": 64, **values})

    return of


def stirred(model: nn.Module) -> nn.Module:
    """With statistics, biases and added parts that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith(("running_mean", "bias", "attention_biases", "_up")):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif ".up.weight" in name:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model


def official_names() -> set[str]:
    """Those of the image encoder in weights/mobile_sam.pt."""
    convolutions = ["patch_embed.seq.0", "patch_embed.seq.2"]
    convolutions += [f"layers.0.blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2, 3)]
    convolutions += [f"layers.{s}.downsample.conv{c}" for s in (0, 1, 2) for c in (1, 2, 3)]
    blocks = [
        f"layers.{s}.blocks.{b}" for s, depth in ((1, 2), (2, 6), (3, 2)) for b in range(depth)
    ]
    convolutions += [f"{block}.local_conv" for block in blocks]
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{one}.c.weight" for one in convolutions}
    names |= {f"{one}.bn.{part}" for one in convolutions for part in of_norm}
    of_block = ("attn.norm", "attn.qkv", "attn.proj", "mlp.norm", "mlp.fc1", "mlp.fc2")
    pairs = [f"{block}.{part}" for block in blocks for part in of_block]
    pairs += ["norm_head", "head", "neck.1", "neck.3"]
    names |= {f"{one}.{part}" for one in pairs for part in ("weight", "bias")}
    names |= {f"{block}.attn.attention_biases" for block in blocks}
    return names | {"neck.0.weight", "neck.2.weight"}


def test_its_tensors_are_those_of_the_official_file(make):
    model = build_model(make(), None)
    plain = build_model(make(method="fedsam"), None)
    own = {n.removeprefix("image_encoder.") for n in plain.state_dict() if "image_encoder" in n}
    assert own == official_names()
    assert plain.state_dict()["image_encoder.head.weight"].shape == (1000, 320)
    # what torch.save makes of as many values: weights/mobile_sam.pt has 40 728 226 bytes
    assert sum(one.nbytes for one in plain.state_dict().values()) == 40_561_032
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added and all(any(part in name for part in ADAPTERS) for name in added)


def test_a_convolution_is_torchs_with_the_statistics_that_it_has(make):
    conv = stirred(NormedConv(6, 8, 3, stride=2, groups=2)).train()
    grid = torch.randn(2, 6, 9, 10)
    expected = conv.bn.eval()(conv.c(grid))
    conv.train()
    before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    torch.testing.assert_close(conv(grid), expected)
    assert all(torch.equal(before[name], one) for name, one in conv.state_dict().items())


@pytest.mark.parametrize("side", [7, 10])  # one window; border windows that are filled up
def test_attention_is_that_of_tinyvit_written_out(side):
    attention = stirred(WindowAttention(16, 4, 7)).eval()
    tokens = torch.randn(2, side, side, 16)
    full = -(-side // 7) * 7
    padded = F.pad(tokens, (0, 0, 0, full - side, 0, full - side))
    expected = torch.empty_like(padded)
    for top in range(0, full, 7):
        for left in range(0, full, 7):
            window = padded[:, top : top + 7, left : left + 7].reshape(2, 49, 16)
            qkv = attention.qkv(attention.norm(window)).view(2, 49, 4, 12)
            query, key, value = (part.transpose(1, 2) for part in qkv.split(4, dim=-1))
            logits = query @ key.transpose(-2, -1) / 2.0
            for one in range(49):
                for other in range(49):
                    apart = abs(one // 7 - other // 7) * 7 + abs(one % 7 - other % 7)
                    logits[:, :, one, other] += attention.attention_biases[:, apart]
            mixed = (logits.softmax(-1) @ value).transpose(1, 2).reshape(2, 49, 16)
            expected[:, top : top + 7, left : left + 7] = attention.proj(mixed).view(2, 7, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(attention(tokens), expected[:, :side, :side])


@pytest.mark.parametrize("size", [64, 112])
def test_embeddings_are_a_sixteenth_of_any_multiple_of_sixteen(make, size):
    model = build_model(make(image_size=size), None)
    with torch.no_grad():
        grid = model.image_encoder(torch.randn(1, 3, size, size))
        assert grid.shape == (1, 256, size // 16, size // 16)
        assert model(torch.randn(1, 3, size, size)).shape == (1, 1, size // 4, size // 4)
    with pytest.raises(ConfigError, match="image_size is 72"):
        make(image_size=72)


# one class at any size: values that travel, of which of the encoder
TRAVELS = [
    ({"method": "fedsam"}, 9_250_196, lambda name: "head" not in name),
    ({}, 3_902_112, lambda name: any(part in name for part in ADAPTERS)),
    ({"method": "lora"}, 3_565_696, lambda name: name.endswith(("_down.weight", "_up"))),
    (ALONE, 3_506_304, lambda name: False),
    (
        {"adapter_blocks": "last:2"},
        3_712_704,
        lambda name: ".layers.3." in name and any(part in name for part in ADAPTERS),
    ),
]


@pytest.mark.parametrize(("values", "count", "of_encoder"), TRAVELS)
def test_what_travels_is_exactly_what_gets_a_gradient(make, values, count, of_encoder):
    model = stirred(build_model(make(**values), None)).train()
    names = set(travelling_names(model))
    encoder = {n for n, _ in model.named_parameters() if n.startswith("image_encoder.")}
    assert names & encoder == {name for name in encoder if of_encoder(name)}
    assert sum(tensor.numel() for tensor in read_travelling(model).values()) == count
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved <= names and {n for n in names - moved if "k_proj.bias" not in n} == set()


@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_a_step_moves_what_travels_and_no_statistic(make, method):
    recipe = make(method=method)
    model = stirred(build_model(recipe, None)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {
        "image": torch.randn(2, 3, 64, 64),
        "target": torch.ones(2, 1, 16, 16),
        "annotated": torch.ones(2, 1),
    }
    step = find_method(method).start_round(model, recipe)
    train_step(model, adam(model, recipe), batch, recipe, 2, Control(), step)
    after = model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(
        travelling_names(model)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("last", [0, 2, 4])
def test_what_follows_the_frozen_part_gives_the_same_bits(make, last, precision):
    model = stirred(build_model(make(adapter_blocks=f"last:{last}", precision=precision), None))
    images = torch.randn(2, 3, 64, 64)
    kept = model.prefix(images)
    assert kept.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert model.frozen_blocks == 10 - last
    assert torch.equal(model(images), model(kept, from_prefix=True))


def test_checkpointed_blocks_give_the_same_gradient(make):
    model = stirred(build_model(make(), None)).train()
    images = torch.randn(1, 3, 64, 64)

    def gradients():
        model.zero_grad()
        model(images).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert checkpoint_blocks(model, True) == 10
    assert all(torch.equal(one, plain[name]) for name, one in gradients().items())


def test_merged_updates_compute_the_same_in_plain_tinyvit(make):
    model = stirred(build_model(make(method="lora"), None))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, exact = model(images), exactly(model, images)
        model.method.merge(model)
        assert_as_right(model(images), before, exact)
    load_backbone(build_model(make(method="fedsam"), None), model.state_dict())


def test_adapters_start_as_nothing(make):
    fedsam = build_model(make(method="fedsam"), None)
    fedmsa = build_model(make(), None)
    fedmsa.load_state_dict(fedsam.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fedsam(images), fedmsa(images))


def test_its_encoder_holds_no_table_of_the_image_size():
    small, large = TinyViT(256).state_dict(), TinyViT(256).state_dict()
    assert {n: t.shape for n, t in small.items()} == {n: t.shape for n, t in large.items()}


# ------------------------------------------------------------------------------------- mask_token


@pytest.mark.parametrize("backbone", ["vit_demo", "vit_t"])
@pytest.mark.parametrize("token", [1, 3])
def test_a_single_class_starts_from_the_mask_that_the_recipe_names(make_recipe, backbone, token):
    values = {"method": "fedsam", "image_size": 64}
    first = build_model(make_recipe(backbone, **values), None)
    model = build_model(make_recipe(backbone, **values, mask_token=token), None)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        masks = first.mask_decoder(first._embeddings(images, False), first.image_position, 4)
        torch.testing.assert_close(model(images)[:, 0], masks[:, token])
    assert travelling_names(model) == travelling_names(first)
    assert model.state_dict().keys() == first.state_dict().keys()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mask_token": 4}, "mask_token is 4"),
        ({"mask_token": -1}, "mask_token is -1"),
        ({"mask_token": 1, "classes": ("a", "b")}, "2 classes"),
        ({"mask_token": 1, "paper_compat": True}, "paper_compat"),
    ],
)
def test_a_mask_token_that_cannot_be_is_refused(make_recipe, values, said):
    with pytest.raises(ConfigError, match=said):
        make_recipe(**values)
