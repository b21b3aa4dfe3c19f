"""Tensors to a file and back, and what is refused on the way."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fedfms.errors import CheckpointError, ConfigError
from fedfms.exchange.tensors import (
    difference,
    find_fault,
    fingerprint,
    load_tensors,
    save_tensors,
    shapes_of,
    update_norm,
)


@pytest.fixture
def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(2, 5, generator=generator).T,  # not contiguous
    }


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
    with pytest.raises(ConfigError, match="transfer_precision to fp32") as caught:
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
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        load_tensors(path, max_bytes=len(whole) - 1 if damage == "large" else None)
    assert caught.value.code == "unreadable-tensors"


def test_one_damaged_byte_anywhere_in_a_file_of_ours_is_an_error(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    tensors = {"b": torch.arange(6.0), "a": torch.ones(2, dtype=torch.float16)}
    save_tensors(whole, tensors, None)
    data = whole.read_bytes()
    codes = []
    for place in range(len(data)):
        for flip in (0x01, 0x20, 0x80):
            damaged.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(CheckpointError, match="again") as caught:
                load_tensors(damaged)
            codes.append(caught.value.code)
    assert set(codes) == {"damaged-model", "unreadable-tensors"}
    assert codes[-3:] == ["damaged-model"] * 3  # of a value


def test_a_file_that_others_made_is_read_as_it_is(tmp_path: Path, some) -> None:
    path = tmp_path / "theirs.safetensors"
    some = {name: tensor.contiguous() for name, tensor in some.items()}
    safetensors.torch.save_file(some, path, metadata={"format": "pt", "author": "sha256:me"})
    loaded = load_tensors(path)
    assert fingerprint(loaded) == fingerprint(some)


def test_a_write_that_fails_leaves_no_part_behind(tmp_path: Path, some) -> None:
    (tmp_path / "t.safetensors").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        save_tensors(tmp_path / "t.safetensors", some, None)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_is_exactly_right_has_no_fault(some) -> None:
    assert find_fault(shapes_of(some), some) is None
    assert find_fault({}, {}) is None
