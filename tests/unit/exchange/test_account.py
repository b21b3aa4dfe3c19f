"""The account of differential privacy, against one that others wrote."""

from __future__ import annotations

import math

import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

from fedfms.exchange.account import Noised, epsilon

DELTA = 1e-5


def by_another(let_out: list[Noised], delta: float) -> float:
    accountant = PLDAccountant()
    for one in let_out:
        event = GaussianDpEvent(one.noise)
        if one.rate < 1:
            event = PoissonSampledDpEvent(one.rate, event)
        accountant.compose(event, one.steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    "let_out",
    [
        [Noised(1.0, 0.1, 100)],
        [Noised(0.8, 0.05, 400)],
        [Noised(4.0, 0.2, 1000)],
        [Noised(0.6, 0.01, 50)],
        [Noised(8.0, 0.5, 20)],
        [Noised(1.0, 0.1, 50), Noised(2.0, 0.3, 30)],
        [Noised(1.5, 0.1, 50), Noised(6.0, 1.0, 3)],
        [Noised(5.0, 1.0, 10)],
        [Noised(1.0, 1.0, 1)],
        [Noised(3.0), Noised(9.0, 1.0, 4)],
        [Noised(0.938, 0.1, 100)],  # and those of results/privacy.md
        [Noised(1.396, 0.1, 100)],
        [Noised(2.254, 0.1, 100)],
    ],
)
def test_epsilon_is_that_of_an_independent_accountant(let_out: list[Noised]) -> None:
    wanted = by_another(let_out, DELTA)
    assert epsilon(let_out, DELTA) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_at_another_delta(delta: float) -> None:
    let_out = [Noised(1.2, 0.1, 60)]
    assert epsilon(let_out, delta) == pytest.approx(by_another(let_out, delta), rel=0.01)


def test_epsilons_that_are_published() -> None:
    """results/privacy.md: what that noise comes to there."""
    for noise, published in ((0.938, 7.98), (1.396, 3.96), (2.254, 2.00)):
        assert epsilon([Noised(noise, 0.1, 100)], DELTA) == pytest.approx(published, abs=0.005)


def test_rounds_one_by_one_cost_what_they_cost_together() -> None:
    alone = [Noised(1.0, 0.1, 10)] * 7
    assert epsilon(alone, DELTA) == epsilon([Noised(1.0, 0.1, 70)], DELTA)


def test_nothing_costs_nothing_and_a_sum_without_noise_everything() -> None:
    assert epsilon([], DELTA) == epsilon([Noised(0.0, 0.1, 0)], DELTA) == 0
    assert epsilon([Noised(5.0), Noised(0.0, 0.1, 1)], DELTA) == math.inf
    assert epsilon([Noised(1e-3)], DELTA) == epsilon([Noised(1e-3, 0.5, 9)], DELTA) == 200


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([Noised(1.0)], delta)


@pytest.mark.parametrize("noise", [1e-200, 5e-324, 1e-3])
def test_next_to_no_noise_is_counted_and_does_not_break_the_account(noise: float) -> None:
    assert epsilon([Noised(noise)], DELTA) == epsilon([Noised(noise, 0.5, 4)], DELTA) == 200


def test_noise_beyond_measure_costs_next_to_nothing() -> None:
    assert epsilon([Noised(1e200)], DELTA) == 0
    of_all = epsilon([Noised(1e200, 0.5, 4)], DELTA)  # counted as 100, which is a little more
    assert of_all == epsilon([Noised(100.0, 0.5, 4)], DELTA) < 0.1


def test_a_delta_too_small_for_the_numbers_is_bounded_by_moments() -> None:
    let_out = [Noised(1.0, 0.1, 40)]
    assert epsilon(let_out, 1e-5) < epsilon(let_out, 1e-30) < epsilon(let_out, 1e-300) < 200


def test_a_delta_that_is_nearly_one_costs_nothing_and_no_less() -> None:
    assert epsilon([Noised(1.0, 0.1, 40)], 0.9) == 0
