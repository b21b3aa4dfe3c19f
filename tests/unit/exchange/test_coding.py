"""Eight bits a value: how far off, exactly which bytes, and what a decoder does not take."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfms.errors import CheckpointError, ConfigError
from fedfms.exchange.coding import SCALES, row_length
from fedfms.exchange.tensors import (
    find_coded_fault,
    fingerprint,
    from_wire,
    load_tensors,
    payload_bytes,
    save_tensors,
    shapes_of,
    to_precision,
)


@pytest.fixture
def some() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "weight": torch.randn(40, 96, generator=generator),
        "conv": 1e-4 * torch.randn(8, 16, 3, 3, generator=generator),  # rows of 16 x 3 x 3
        "position": 3.0 * torch.randn(1, 4, 4, 64, generator=generator),
        "bias": torch.randn(96, generator=generator),
        "little": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(70, 9, generator=generator).T,
        "zeros": torch.zeros(2, 64),
    }
    tensors["weight"][7] *= 1e6
    tensors["weight"][8] *= 1e-20
    tensors["weight"][9] *= 1e-40  # denormal: zeros
    return tensors


def test_a_value_is_off_by_half_a_step_of_its_row_at_most(some) -> None:
    decoded = from_wire(to_precision(some, "int8"))
    for name, tensor in some.items():
        length = row_length(tensor.shape)
        got, expected = decoded[name].numpy(), tensor.numpy()
        if length is None:
            np.testing.assert_array_equal(got, expected.astype(np.float16).astype(np.float32))
            continue
        rows = expected.reshape(-1, length).astype(np.float64)
        step = np.abs(rows).max(1) / 127 * (1 + 2.0**-15)
        assert (np.abs(got.reshape(rows.shape) - rows) <= 0.5 * step[:, None] + 1e-30).all()
    assert not decoded["zeros"].any() and not decoded["weight"][9].any()
    assert decoded["weight"][8].any()


def test_rows_are_the_last_dimensions_of_64_values_or_more() -> None:
    lengths = {(192, 768): 768, (768, 192): 192, (768, 3, 16, 16): 256, (1, 64, 64, 768): 768}
    lengths |= {(256, 64, 2, 2): 256, (127, 64): 64, (768, 4): 3072, (256, 768, 1, 1): 768}
    lengths |= {(768,): None, (3, 5): None, (): None, (0, 768): 768, (1, 64): 64}
    assert {shape: row_length(shape) for shape in lengths} == lengths


def test_it_costs_a_byte_a_value_and_four_a_row(some) -> None:
    coded = to_precision(some, "int8")
    rows = {"weight": 40, "conv": 8, "position": 16, "transposed": 9, "zeros": 2}
    values = {name: tensor.numel() for name, tensor in some.items()}
    in_rows = sum(values[name] for name in rows)
    others = sum(values.values()) - in_rows
    assert "transposed" in rows and row_length((9, 70)) == 70
    assert payload_bytes(coded) == in_rows + 4 * sum(rows.values()) + 2 * others


@pytest.mark.parametrize("seed", range(20))
def test_what_was_decoded_is_encoded_to_the_same_bytes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(20 * torch.randn(300, 1, generator=generator))
    tensors = {
        "w": (spread * torch.randn(300, 64, generator=generator)).clamp(-1e38, 1e38),
        "b": torch.randn(5, generator=generator),
    }
    coded = to_precision(tensors, "int8")
    decoded = from_wire(coded)
    assert fingerprint(to_precision(decoded, "int8")) == fingerprint(coded)
    assert find_coded_fault(shapes_of(tensors), coded) is None


def test_it_is_written_and_read_as_any_file(tmp_path, some) -> None:
    save_tensors(tmp_path / "a.safetensors", some, "int8")
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert fingerprint(loaded) == fingerprint(to_precision(some, "int8"))
    # kept answers: written from the decoded numbers, the same bytes as came
    save_tensors(tmp_path / "b.safetensors", from_wire(loaded), "int8")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_value_beyond_half_precision_is_refused_where_it_travels_so() -> None:
    with pytest.raises(ConfigError, match="transfer_precision to fp32") as caught:
        to_precision({"b": torch.tensor([7e4])}, "int8")
    assert caught.value.code == "fp16-overflow"
    assert from_wire(to_precision({"w": torch.full((1, 64), 7e4)}, "int8"))["w"].isfinite().all()


SPOILS = [
    (lambda c: c.pop(SCALES), "missing-tensor"),
    (lambda c: c.pop("weight"), "missing-tensor"),
    (lambda c: c.update(more=torch.zeros(2)), "unknown-tensor"),
    (lambda c: c.update({SCALES: c[SCALES][1:]}), "wrong-shape"),
    (lambda c: c.update({SCALES: torch.cat([c[SCALES], c[SCALES]])}), "wrong-shape"),
    (lambda c: c.update({SCALES: c[SCALES].double()}), "wrong-type"),
    (lambda c: c.update(weight=c["weight"].float()), "wrong-type"),
    (lambda c: c.update(weight=c["weight"][:1]), "wrong-shape"),
    (lambda c: c.update(weight=torch.zeros(40, 96, dtype=torch.int8, device="meta")), "wrong-type"),
    (lambda c: c.update(bias=c["bias"].float()), "wrong-type"),
    (lambda c: c["bias"].fill_(math.inf), "non-finite"),
    (lambda c: c[SCALES].fill_(math.nan), "non-finite"),
    (lambda c: c[SCALES].fill_(math.inf), "non-finite"),
    (lambda c: c[SCALES].fill_(3e38), "non-finite"),  # times 127
    (lambda c: c[SCALES].neg_(), "wrong-coding"),
    (lambda c: c[SCALES].mul_(1 + 2.0**-20), "wrong-coding"),
    (lambda c: c["weight"].fill_(-128), "wrong-coding"),
    (lambda c: c["weight"].div_(2, rounding_mode="trunc"), "wrong-coding"),
    (lambda c: c["zeros"].fill_(1), "wrong-coding"),  # times a scale of 0
]


@pytest.mark.parametrize(("spoil", "code"), SPOILS)
def test_anything_but_what_encoding_gives_is_refused(some, spoil, code: str) -> None:
    coded = to_precision(some, "int8")
    spoil(coded)
    found = find_coded_fault(shapes_of(some), coded)
    assert found is not None and found[0] == code, found


def test_nothing_at_all_is_right_where_nothing_is_expected(some) -> None:
    assert find_coded_fault({}, {}) is None
    assert find_coded_fault({}, to_precision(some, "int8")) is not None
    assert find_coded_fault({}, 3) is not None  # type: ignore[arg-type]
    assert find_coded_fault(shapes_of(some), {}) is not None


def test_a_model_whose_scales_do_not_fit_is_an_error_and_no_guess(some) -> None:
    coded = to_precision(some, "int8")
    for spoil in (
        lambda c: c.update({SCALES: c[SCALES][1:]}),
        lambda c: c.update(weight=c["weight"].float()),
        lambda c: c.update(bias=c["bias"].float()),
    ):
        bad = dict(coded)
        spoil(bad)
        with pytest.raises(CheckpointError) as caught:
            from_wire(bad)
        assert caught.value.code == "wrong-coding"


def test_errors_that_are_added_to_the_next_difference_do_not_add_up() -> None:
    """Error feedback, against numpy: what was sent of all rounds is off by one round's error."""
    generator = torch.Generator().manual_seed(3)
    small = 1e-3 * torch.rand(4, 64, generator=generator)  # below half a step of the row's largest
    small[:, 0] = 1.0
    total, with_feedback = np.zeros((4, 64)), np.zeros((4, 64))
    without, unsent = np.zeros((4, 64)), torch.zeros(4, 64)
    for _ in range(50):
        total += small.numpy()
        without += from_wire(to_precision({"w": small}, "int8"))["w"].numpy()
        sent = from_wire(to_precision({"w": small + unsent}, "int8"))["w"]
        unsent = small + unsent - sent
        with_feedback += sent.numpy()
    assert np.abs(with_feedback - total).max() < 0.51 / 127
    assert np.abs(without - total).max() > 5 * 0.51 / 127
