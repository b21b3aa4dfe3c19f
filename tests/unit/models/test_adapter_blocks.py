"""Adapters in the last blocks alone: what is there, what learns, and what the frozen part gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError, ConfigError
from fedfms.models.build import build_model
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import read_travelling, travelling_names, write_travelling
from fedfms.report.words import method as words_of

Make = Callable[..., Recipe]


def adapted_blocks(model: Segmenter) -> set[int]:
    """Numbers of the blocks of which a tensor of an adapter travels."""
    return {int(n.split(".")[2]) for n in travelling_names(model) if "_adapter." in n}


def stirred(model: Segmenter) -> Segmenter:
    """With adapters that do something, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "_adapter." in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("last", [0, 1, 2, 3, 4])
def test_the_last_blocks_have_adapters_and_no_others_do(make_recipe: Make, last: int):
    model = build_model(make_recipe(adapter_blocks=f"last:{last}"), None)
    assert adapted_blocks(model) == set(range(4 - last, 4))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        travelling_names(model)
    )
    whole = build_model(make_recipe(), None)
    decoder = {name for name in travelling_names(whole) if "_adapter." not in name}
    assert {name for name in travelling_names(model) if "_adapter." not in name} == decoder


def test_what_vit_b_sends_with_few_adapters(make_recipe: Make):
    """Two adapters of each adapted block, 768 to 192 to 768; 14.0 to 23.5 MB in fp32."""
    an_adapter = 2 * 768 * 192 + 192 + 768
    whole = 10_607_232
    for last, megabytes in ((0, 14.0), (2, 18.8), (4, 23.5)):
        recipe = make_recipe("vit_b", image_size=64, adapter_blocks=f"last:{last}")
        tensors = read_travelling(build_model(recipe, None))
        at_64 = sum(t.numel() for t in tensors.values())
        assert at_64 == whole - (12 - last) * 2 * an_adapter
        assert round(4 * at_64 / 1e6, 1) == megabytes  # as docs/coordinator.md says


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("last", [0, 2, 3])
def test_the_network_and_what_follows_its_frozen_part_agree_to_the_bit(
    make_recipe: Make, last: int, precision: str
):
    recipe = make_recipe(adapter_blocks=f"last:{last}", precision=precision)
    model = stirred(build_model(recipe, None))
    images = torch.randn(2, 3, 128, 128)
    kept = model.prefix(images)
    assert kept.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert not kept.requires_grad, "nothing in it learns"
    whole = gradients(model, lambda: model(images))
    rest = gradients(model, lambda: model(kept, from_prefix=True))
    assert whole.keys() == rest.keys() == set(travelling_names(model))
    for name, gradient in whole.items():
        assert torch.equal(gradient, rest[name]), name


def gradients(model: Segmenter, logits: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    found = logits()
    F.binary_cross_entropy_with_logits(found, torch.ones_like(found)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_few_adapters_are_all_adapters_of_which_the_first_do_nothing(make_recipe: Make):
    """The same network but for what is left out, since an adapter starts as nothing."""
    few = stirred(build_model(make_recipe(adapter_blocks="last:2"), None))
    whole = build_model(make_recipe(), None)
    whole.load_state_dict(few.state_dict(), strict=False)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(few(images), whole(images))


def test_only_what_is_worth_keeping_is_split_off(make_recipe: Make):
    assert build_model(make_recipe(), None).frozen_blocks is None
    assert build_model(make_recipe(method="fedsam"), None).frozen_blocks is None
    assert build_model(make_recipe(adapter_blocks="last:4"), None).frozen_blocks is None
    assert build_model(make_recipe(adapter_blocks="last:1"), None).frozen_blocks == 3
    assert build_model(make_recipe(adapter_blocks="last:0"), None).frozen_blocks == 4


def test_a_method_without_adapters_refuses_blocks_for_them(make_recipe: Make):
    with pytest.raises(ConfigError, match="fedsam has no adapters") as e:
        build_model(make_recipe(method="fedsam", adapter_blocks="last:2"), None)
    assert e.value.code == "method-and-adapters"


def test_a_model_with_other_adapters_is_refused(make_recipe: Make):
    two = read_travelling(build_model(make_recipe(adapter_blocks="last:2"), None))
    with pytest.raises(CheckpointError) as e:
        write_travelling(build_model(make_recipe(adapter_blocks="last:1"), None), two)
    assert e.value.code == "unknown-tensor"
    with pytest.raises(CheckpointError) as e:
        write_travelling(build_model(make_recipe(), None), two)
    assert e.value.code == "missing-tensor"


def test_reports_say_where_the_adapters_are():
    assert words_of("fedmsa") == words_of("fedmsa", "all") == words_of("fedmsa", None)
    ends = {
        "last:0": "; here without adapters: the mask decoder alone",
        "last:1": "; here with adapters in the last block alone",
        "last:3": "; here with adapters in the last 3 blocks alone",
    }
    for blocks, end in ends.items():
        assert words_of("fedmsa", blocks)[1] == words_of("fedmsa")[1] + end
