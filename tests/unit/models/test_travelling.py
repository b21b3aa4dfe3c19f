from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedfms.errors import CheckpointError
from fedfms.exchange.tensors import payload_bytes, to_precision, update_norm
from fedfms.models.build import build_model
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import read_travelling, travelling_names, write_travelling


def count(model) -> int:
    tensors = dict(model.named_parameters())
    return sum(tensors[name].numel() for name in travelling_names(model))


def test_fedmsa_on_vit_b_travels_as_many_values_as_we_promise(make_recipe):
    one = build_model(make_recipe("vit_b", image_size=1024), None)
    assert count(one) == 10_607_232
    two = build_model(make_recipe("vit_b", image_size=1024, classes=("disc", "cup")), None)
    assert count(two) == 11_026_666


def test_fedsam_on_vit_b_travels_sam_without_what_never_learns(make_recipe):
    model = build_model(make_recipe("vit_b", image_size=1024, method="fedsam"), None)
    assert count(model) == 93_177_216
    stays = {n for n, _ in model.named_parameters()} - set(travelling_names(model))
    unused = (
        "prompt_encoder.",
        "mask_decoder.iou_prediction_head.",
        *(f"mask_decoder.output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
    )
    assert all(name.startswith(unused) for name in stays)


# MB a round and direction; without secure sums, whose bytes are 4 or 8 a value
MOST = [
    ("fedmsa", "fp32", 42.5),
    ("fedmsa", "fp16", 21.5),
    ("fedmsa", "int8", 10.8),
    ("fedsam", "fp16", 187.0),
    ("fedsam", "int8", 95.0),
]


@pytest.mark.parametrize(("method", "precision", "most"), MOST)
def test_a_round_on_vit_b_moves_no_more_megabytes_than_we_promise(
    make_recipe, method, precision, most
):
    recipe = make_recipe("vit_b", image_size=1024, method=method)
    with torch.device("meta"):  # shapes alone
        model = build_model(recipe, None)
    zeros = {
        name: torch.zeros(()).expand(tensor.shape)  # one value in memory
        for name, tensor in model.named_parameters()
        if name in travelling_names(model)
    }
    bytes_moved = payload_bytes(to_precision(zeros, precision))
    assert 0.97 * most < bytes_moved / 1e6 <= most


@pytest.mark.parametrize("method", ["fedsam", "fedmsa", "lora"])
@pytest.mark.parametrize("classes", [("one",), ("one", "two")])
def test_requires_grad_is_exactly_on_what_travels(make_recipe, method, classes):
    model = build_model(make_recipe(method=method, classes=classes), None)
    learns = tuple(sorted(n for n, p in model.named_parameters() if p.requires_grad))
    assert learns == travelling_names(model)


@pytest.mark.parametrize("method", ["fedsam", "fedmsa", "lora"])
@pytest.mark.parametrize("classes", [("one",), ("one", "two")])
@pytest.mark.parametrize(("backbone", "image_size"), [("vit_demo", 128), ("vit_b", 64)])
def test_two_steps_move_what_travels_and_nothing_else(
    make_recipe, method, classes, backbone, image_size
):
    """Two, because identity adapters pass no gradient to their first layer in the first step."""
    recipe = make_recipe(backbone, method=method, classes=classes, image_size=image_size)
    model = build_model(recipe, None)
    images = torch.randn(2, 3, image_size, image_size)
    target = (torch.rand(2, len(classes), recipe.mask_size, recipe.mask_size) > 0.5).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), target).backward()
        optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == set(travelling_names(model))


def test_frozen_beginning_of_fedmsa_keeps_no_graph(make_recipe):
    model = build_model(make_recipe(), None)
    first = model.image_encoder.blocks[0]
    tokens = model.image_encoder.patch_embed(torch.randn(1, 3, 128, 128))
    assert not first.attention(tokens + model.image_encoder.pos_embed).requires_grad


@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_train_leaves_frozen_parts_in_evaluation_mode(make_recipe, method):
    model = build_model(make_recipe(method=method), None).train()
    assert model.training
    for name, module in model.named_modules():
        learns = any(parameter.requires_grad for parameter in module.parameters())
        assert module.training == learns, name
    assert not any(module.training for module in model.eval().modules())


def test_every_machine_draws_the_same_adapters_and_head(make_recipe):
    """Also after other random numbers, and whether or not a checkpoint filled the rest."""
    recipe = make_recipe(classes=("one", "two"), paper_compat=True, seed=3)
    first = build_model(recipe, None)
    torch.rand(17)
    state = torch.get_rng_state()
    second = build_model(recipe, None)
    assert torch.equal(torch.get_rng_state(), state), "a caller's random numbers are untouched"
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    other = build_model(make_recipe(classes=("one", "two"), seed=4), None)
    assert not torch.equal(other.class_head.weight, first.class_head.weight)


@pytest.fixture
def model(make_recipe) -> Segmenter:
    return build_model(make_recipe(image_size=64), None)


def test_what_is_written_into_a_model_is_what_is_read_and_nothing_else_changes(
    model: Segmenter,
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received = {name: tensor + 1 for name, tensor in read_travelling(model).items()}
    write_travelling(model, received)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] + 1 if name in received else before[name])
    after = read_travelling(model)
    assert set(after) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert list(after) == sorted(after)


def test_reading_gives_copies(model: Segmenter) -> None:
    tensors = read_travelling(model)
    before = update_norm(read_travelling(model))
    for tensor in tensors.values():
        tensor.zero_()
    assert update_norm(read_travelling(model)) == before


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda t, name: t.pop(name), "missing-tensor"),
        (lambda t, name: t.update(stranger=torch.zeros(1)), "unknown-tensor"),
        (lambda t, name: t.update({name: t[name][..., None]}), "wrong-shape"),
        (lambda t, name: t.update({name: t[name].double()}), "wrong-type"),
        (lambda t, name: t[name].fill_(math.nan), "non-finite"),
        (lambda t, name: t[name].view(-1)[0].fill_(math.inf), "non-finite"),
    ],
)
def test_a_received_model_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    model: Segmenter, spoil, code: str
) -> None:
    before = read_travelling(model)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    spoil(tensors, list(tensors)[-1])
    with pytest.raises(CheckpointError, match="same recipe and the same version") as caught:
        write_travelling(model, tensors)
    assert caught.value.code == code
    assert all(torch.equal(t, before[name]) for name, t in read_travelling(model).items())
