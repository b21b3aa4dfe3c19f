"""How much each site counts, and that its average does not hang on who answered first."""

from __future__ import annotations

import dataclasses
import itertools
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.averaging import (
    LARGEST_TOTAL,
    LARGEST_VALUE,
    SCALE,
    FixedSum,
    average,
    averaging_weights,
)

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256="a" * 64,
    classes=("disc",),
    rounds=5,
    holdout=("site-9",),
)
PAPER = dataclasses.replace(RECIPE, paper_compat=True)


def differences(sites: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Differences of very unlike sizes, so that the order of a sum shows in its last bits."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (37, 53), "b.bias": (101,), "c": ()}
    return {
        f"site-{number}": {
            name: torch.tensor(
                rng.normal(0, 10.0 ** rng.uniform(-7, 1, shape)), dtype=torch.float32
            )
            for name, shape in shapes.items()
        }
        for number in range(1, sites + 1)
    }


# -------------------------------------------------------------------------------------- weights


def test_weights_are_the_training_slices() -> None:
    slices = {"site-2": 30, "site-1": 11_979, "site-3": 20, "site-9": 500}
    weights = averaging_weights(RECIPE, slices)
    assert weights == {"site-1": 11_979, "site-2": 30, "site-3": 20, "site-9": 0}
    assert list(weights) == sorted(slices)


def test_more_slices_than_a_sum_can_hold_are_halved_until_they_fit() -> None:
    slices = {"site-1": 5_000_000, "site-2": 1_250_000, "site-3": 1}
    weights = averaging_weights(RECIPE, slices)
    assert weights == {"site-1": 1_250_000, "site-2": 312_500, "site-3": 1}
    assert sum(weights.values()) <= LARGEST_TOTAL


def by_decimals(slices: dict[str, int]) -> dict[str, int]:
    """The paper's weights in decimal arithmetic: two places, the last site gets the rest."""
    *others, last = sorted(slices)
    total = Decimal(sum(slices.values()))
    weights = {
        site: (Decimal(slices[site]) / total).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
        for site in others
    }
    weights[last] = 1 - sum(weights.values(), Decimal(0))
    return {site: int(weight * 100) for site, weight in weights.items()}


def test_the_papers_weights_are_rounded_to_two_decimals_and_the_last_site_gets_the_rest() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        sites = [f"site-{n}" for n in range(1, rng.integers(2, 9))]
        slices = {site: int(rng.integers(1, 10 ** rng.integers(1, 5))) for site in sites}
        got = averaging_weights(PAPER, {**slices, "site-9": 77})
        assert got.pop("site-9") == 0
        assert got == by_decimals(slices)
        assert sum(got.values()) == 100


def test_the_papers_weights_worked_out_by_hand() -> None:
    # 2/3 is 0.67, so the last of two gets 0.33 and not 1/3
    assert averaging_weights(PAPER, {"site-2": 1, "site-1": 2}) == {"site-1": 67, "site-2": 33}
    # 20 of 12 029 slices are 0.0017: the site trains, travels, and counts for nothing
    small = averaging_weights(PAPER, {"site-1": 20, "site-2": 6000, "site-3": 6009})
    assert small == {"site-1": 0, "site-2": 50, "site-3": 50}
    # six sites of 0.1665 are rounded up to 0.17 each; the last one pays for it
    many = {**{f"site-{n}": 1665 for n in range(1, 7)}, "site-7": 10}
    assert averaging_weights(PAPER, many)["site-7"] == -2
    assert averaging_weights(PAPER, {"site-1": 5}) == {"site-1": 100}


def test_the_last_site_in_the_papers_order_gets_the_rest() -> None:
    # Fundus without REFUGE: by name ORIGA would be the last, in the paper's order Drishti-GS1 is
    slices = {"ORIGA": 650, "G1020": 1020, "Drishti-GS1": 101, "REFUGE": 1200}
    order = ("REFUGE", "ORIGA", "G1020", "Drishti-GS1")
    fundus = dataclasses.replace(PAPER, holdout=("REFUGE",), site_order=order)
    ordered = averaging_weights(fundus, slices)
    assert ordered == {"REFUGE": 0, "ORIGA": 37, "G1020": 58, "Drishti-GS1": 5}
    by_name = averaging_weights(dataclasses.replace(fundus, site_order=()), slices)
    assert (by_name["Drishti-GS1"], by_name["ORIGA"]) == (6, 36)
    # a site that is not listed comes behind those that are
    some = dataclasses.replace(fundus, site_order=("ORIGA", "Drishti-GS1"))
    assert averaging_weights(some, slices)["G1020"] == 57


def test_a_weight_that_the_paper_rounds_away_is_told_at_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    averaging_weights(PAPER, {"site-1": 20, "site-2": 6000, "site-3": 6009})
    assert "site-1 0.00" in caplog.text and "site-2" not in caplog.text
    caplog.clear()
    averaging_weights(RECIPE, {"site-1": 20, "site-2": 6000, "site-3": 6009})
    assert caplog.text == ""


def test_a_round_without_a_training_site_has_no_weight_and_no_average() -> None:
    weights = averaging_weights(PAPER, {"site-9": 0})
    assert weights == {"site-9": 0}
    assert average({"site-9": {}}, weights) == {}


def test_a_training_site_without_slices_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="site-1 trained on 0 slices"):
        averaging_weights(RECIPE, {"site-1": 0, "site-2": 3})


# -------------------------------------------------------------------------------------- average


def test_the_average_equals_numpy() -> None:
    given, slices = differences(3), {"site-1": 10, "site-2": 30, "site-3": 60}
    got = average(given, averaging_weights(RECIPE, slices))
    assert list(got) == sorted(given["site-1"])
    for name, tensor in got.items():
        values = np.stack([given[site][name].numpy().astype(np.float64) for site in slices])
        expected = np.average(values, axis=0, weights=list(slices.values()))
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-7, atol=0.5 / SCALE)


@pytest.mark.parametrize("recipe", [RECIPE, PAPER], ids=["exact", "paper"])
def test_the_average_is_the_same_to_the_last_bit_in_whatever_order_sites_answer(
    recipe: Recipe,
) -> None:
    given, slices = differences(4, seed=5), {f"site-{n}": 7 * n + 1 for n in range(1, 5)}
    expected = average(given, averaging_weights(recipe, slices))
    in_fp32 = set()
    for order in itertools.permutations(slices):
        counts = {site: slices[site] for site in order}
        got = average({site: given[site] for site in order}, averaging_weights(recipe, counts))
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        # FLARE's own way, in fp32 as they come, does hang on the order
        total = sum(slices[site] * given[site]["a.weight"] for site in order)
        in_fp32.add((total / sum(slices.values())).numpy().tobytes())
    assert len(in_fp32) > 1


def test_the_average_does_not_hang_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(11)
    given = {
        f"site-{n}": {"w": torch.tensor(rng.normal(size=200_003), dtype=torch.float32)}
        for n in (1, 2, 3)
    }
    weights = averaging_weights(RECIPE, {"site-1": 3, "site-2": 5, "site-3": 11})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(average(given, weights)["w"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    units = [np.rint(given[site]["w"].numpy().astype(np.float64) * SCALE) for site in given]
    total = sum(
        unit.astype(np.int64) * weights[site] for site, unit in zip(given, units, strict=True)
    )
    np.testing.assert_array_equal(found[0].numpy(), (total / (19 * SCALE)).astype(np.float32))


def test_sums_of_sums_have_the_bits_of_the_flat_sum_however_sites_are_grouped() -> None:
    given, weights = differences(6, seed=2), {f"site-{n}": 3 * n + 1 for n in range(1, 7)}
    weights["site-6"] = -2  # as the paper's last site can have
    expected = average(given, weights)
    for groups in (((1, 2), (3, 4, 5, 6)), ((6, 1), (2, 5), (4, 3)), ((1,), (2,), (3, 4, 5, 6))):
        together = FixedSum()
        for group in groups:
            part = FixedSum()
            for number in group:
                part.add(given[f"site-{number}"], weights[f"site-{number}"])
            together.merge(part)
        got = together.mean()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_no_sum_overflows_at_its_bounds_and_nothing_beyond_them_is_added() -> None:
    most = {"w": torch.tensor([LARGEST_VALUE, -LARGEST_VALUE])}
    full = FixedSum()
    full.add(most, LARGEST_TOTAL - 1)
    full.add(most, 1)
    assert full.mean()["w"].tolist() == [LARGEST_VALUE, -LARGEST_VALUE]
    with pytest.raises(ValueError, match="weights of"):
        full.add(most, 1)
    for value in (np.nextafter(np.float32(LARGEST_VALUE), np.float32(100)), np.inf, np.nan, 3e38):
        with pytest.raises(ValueError, match="beyond 64"):
            FixedSum().add({"w": torch.tensor([0.0, float(value)])}, 1)


def test_what_the_sites_sent_is_left_as_it_was() -> None:
    given = differences(2)
    given["site-2"] = {name: tensor.double() for name, tensor in given["site-2"].items()}
    before = {s: {n: t.clone() for n, t in tensors.items()} for s, tensors in given.items()}
    average(given, averaging_weights(RECIPE, {"site-1": 1, "site-2": 2}))
    for site, tensors in before.items():
        assert all(torch.equal(given[site][name], tensor) for name, tensor in tensors.items())


def test_sites_with_other_tensors_are_never_averaged() -> None:
    given = differences(2)
    del given["site-2"]["b.bias"]
    with pytest.raises(ValueError, match=r"one site has no b\.bias"):
        average(given, {"site-1": 1, "site-2": 1})
