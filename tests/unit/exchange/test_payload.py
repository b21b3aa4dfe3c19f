"""Model to tensors to file and back, and what is refused on the way."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.errors import CheckpointError, DoorClosed
from fedfms.exchange.payload import (
    difference,
    find_fault,
    load_tensors,
    read_travelling,
    save_tensors,
    shapes_of,
    update_norm,
    write_travelling,
)
from fedfms.models.build import SamSegmenter, build_model


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(
        method="fedmsa",
        backbone="vit_demo",
        backbone_sha256="0" * 64,
        classes=("blob",),
        rounds=2,
        image_size=64,
    )


@pytest.fixture
def model(recipe: Recipe) -> SamSegmenter:
    return build_model(recipe, None)


@pytest.fixture
def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(2, 5, generator=generator).T,  # not contiguous
    }


def test_what_is_written_into_a_model_is_what_is_read_and_nothing_else_changes(
    model: SamSegmenter,
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    received = {name: tensor + 1 for name, tensor in read_travelling(model).items()}
    write_travelling(model, received)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] + 1 if name in received else before[name])
    after = read_travelling(model)
    assert set(after) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert list(after) == sorted(after)


def test_reading_gives_copies(model: SamSegmenter) -> None:
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
    model: SamSegmenter, spoil, code: str
) -> None:
    before = read_travelling(model)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    spoil(tensors, list(tensors)[-1])
    with pytest.raises(CheckpointError, match="same recipe and the same version") as caught:
        write_travelling(model, tensors)
    assert caught.value.code == code
    assert all(torch.equal(t, before[name]) for name, t in read_travelling(model).items())


def test_the_difference_added_to_what_was_received_is_what_was_trained(some) -> None:
    after = {name: tensor * 1.5 for name, tensor in some.items()}
    got = difference(after, some)
    for name in some:
        np.testing.assert_array_equal(got[name].numpy(), after[name].numpy() - some[name].numpy())
    with pytest.raises(ValueError, match="same names"):
        difference({"a": some["a"]}, some)


def test_the_norm_is_over_all_values_together(some) -> None:
    flat = np.concatenate([t.numpy().ravel() for t in some.values()]).astype(np.float64)
    assert update_norm(some) == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert update_norm({}) == 0


def test_a_file_holds_the_tensors_exactly_and_in_full(tmp_path: Path, some) -> None:
    save_tensors(tmp_path / "t.safetensors", some, "fp32")
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert set(loaded) == set(some)
    assert all(torch.equal(loaded[name], some[name]) for name in some)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    # read by the library itself as well
    assert torch.equal(safetensors.torch.load_file(tmp_path / "t.safetensors")["a"], some["a"])


def test_half_precision_halves_the_values_bytes_and_rounds_to_nearest(tmp_path: Path, some) -> None:
    save_tensors(tmp_path / "t.safetensors", some, "fp16")
    loaded = load_tensors(tmp_path / "t.safetensors")
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor.numpy(), some[name].numpy().astype(np.float16))
    with (tmp_path / "t.safetensors").open("rb") as file:
        header = struct.unpack("<Q", file.read(8))[0]
    values = sum(t.numel() for t in some.values())
    assert (tmp_path / "t.safetensors").stat().st_size == 8 + header + 2 * values


def test_a_value_that_half_precision_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoorClosed, match="transfer_precision to fp32") as caught:
        save_tensors(tmp_path / "t.safetensors", {"w": torch.tensor([1.0, 65520.0])}, "fp16")
    assert caught.value.code == "fp16-overflow"
    assert not list(tmp_path.iterdir())
    save_tensors(tmp_path / "t.safetensors", {"w": torch.tensor([1.0, 65504.0])}, "fp16")


def test_a_link_in_the_shared_folder_is_neither_followed_nor_read(tmp_path: Path, some) -> None:
    private = tmp_path / "private"
    private.mkdir()
    save_tensors(private / "image", some, None)
    before = (private / "image").read_bytes()
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "t.safetensors").symlink_to(private / "image")
    with pytest.raises(CheckpointError) as caught:
        load_tensors(shared / "t.safetensors")
    assert caught.value.code == "unreadable-tensors"
    save_tensors(shared / "t.safetensors", {"a": torch.zeros(1)}, None)
    assert (private / "image").read_bytes() == before
    assert not (shared / "t.safetensors").is_symlink()


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "garbage", "pipe", "large"])
def test_a_damaged_file_is_an_error_with_a_fix_and_never_hangs(
    tmp_path: Path, some, damage: str
) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, some, "fp32")
    whole = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage != "missing":
        content = {"empty": b"", "short": whole[:-1], "garbage": b"\xff" * 64, "large": whole}
        path.write_bytes(content[damage])
    with pytest.raises(CheckpointError, match="volume is full") as caught:
        load_tensors(path, max_bytes=len(whole) - 1 if damage == "large" else None)
    assert caught.value.code == "unreadable-tensors"


def test_a_write_that_fails_leaves_no_part_behind(tmp_path: Path, some) -> None:
    (tmp_path / "t.safetensors").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        save_tensors(tmp_path / "t.safetensors", some, None)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_is_exactly_right_has_no_fault(some) -> None:
    assert find_fault(shapes_of(some), some) is None
    assert find_fault({}, {}) is None
