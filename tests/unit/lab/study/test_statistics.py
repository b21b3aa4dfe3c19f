import itertools
import statistics as standard

import numpy as np
import pytest
from scipy import stats

from fedfms_lab.study.analysis.statistics import (
    Interval,
    PatientDifference,
    bootstrap_interval,
    holm,
    mean,
    signed_rank_p,
    site_balanced_mean,
)


def patients(values):
    return [PatientDifference(float(value), 1) for value in values]


def test_mean_is_that_of_the_standard_library():
    values = [0.91, 0.87, 0.902, 0.55]
    assert mean(values) == pytest.approx(standard.mean(values), rel=1e-15)
    assert mean([]) is None


# ------------------------------------------------------------------------------------- bootstrap


def test_each_site_counts_once_whatever_its_number_of_cases():
    sites = {
        "a": [PatientDifference(0.3, 3), PatientDifference(0.0, 1)],  # mean over 4 cases: 0.075
        "b": [PatientDifference(-0.2, 1)] * 50,
        "empty": [],
    }
    assert site_balanced_mean(sites) == pytest.approx((0.075 - 0.2) / 2)
    assert site_balanced_mean({"empty": []}) is None


def test_interval_of_one_site_is_the_one_that_scipy_draws():
    values = np.random.default_rng(3).normal(0.02, 0.05, 40)
    ours = bootstrap_interval({"a": patients(values)}, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=8e-4)
    assert ours.high == pytest.approx(theirs.high, abs=8e-4)


def test_interval_of_two_small_sites_is_the_one_of_all_possible_draws():
    a, b = [0.0, 0.1, 0.4], [-0.3, 0.2]
    draws_a = [np.mean(draw) for draw in itertools.product(a, repeat=3)]
    draws_b = [np.mean(draw) for draw in itertools.product(b, repeat=2)]
    means = [(x + y) / 2 for x in draws_a for y in draws_b]
    expected = np.percentile(means, [2.5, 97.5])
    ours = bootstrap_interval({"a": patients(a), "b": patients(b)}, resamples=40_000)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected), abs=1e-9)


def test_patients_are_drawn_with_all_their_cases():
    """Two patients, one with many equal cases: only three different draws exist."""
    sites = {"a": [PatientDifference(9 * 0.5, 9), PatientDifference(0.0, 1)]}
    interval = bootstrap_interval(sites)
    assert (interval.low, interval.high) == (0.0, 0.5)
    half = bootstrap_interval(sites, confidence=0.4)  # its bounds lie in the middle draw, 4.5 / 10
    assert (half.low, half.high) == (pytest.approx(0.45), pytest.approx(0.45))


def test_interval_is_the_same_again_and_in_any_order_of_sites():
    sites = {"a": patients([0.1, 0.2, 0.3]), "b": patients([0.0, -0.1])}
    again = {"b": sites["b"], "a": sites["a"]}
    assert bootstrap_interval(sites) == bootstrap_interval(again)
    assert bootstrap_interval(sites, seed=1) != bootstrap_interval({"a": patients([0.1, 0.25])})


def test_a_site_with_one_patient_gives_no_interval():
    assert bootstrap_interval({"a": patients([0.1, 0.2]), "b": patients([0.1])}) is None
    assert bootstrap_interval({}) is None
    five = {"a": patients([0.1, 0.2, 0.3, 0.4, 0.5])}
    assert bootstrap_interval(five, fewest=5) == bootstrap_interval(five)
    assert bootstrap_interval(five, fewest=6) is None


def test_chunks_do_not_change_the_size_of_what_is_drawn(monkeypatch):
    from fedfms_lab.study.analysis import statistics

    values = patients(np.random.default_rng(0).normal(size=30))
    whole = bootstrap_interval({"a": values})
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 1000)
    assert bootstrap_interval({"a": values}) == whole


def test_excluding_zero():
    assert Interval(0.01, 0.2).excludes_zero and Interval(-0.3, -0.1).excludes_zero
    assert not Interval(-0.1, 0.2).excludes_zero and not Interval(0.0, 0.1).excludes_zero


# ---------------------------------------------------------------------------------- signed ranks


def all_signs_p(values):
    """Two-sided p by trying every sign: the share of rank sums at least as far from the middle."""
    values = np.array([v for v in values if v != 0])
    ranks = stats.rankdata(np.abs(values))
    observed = ranks[values > 0].sum()
    middle = ranks.sum() / 2
    signs = np.array(list(itertools.product([0, 1], repeat=len(values))))
    return float(np.mean(np.abs(signs @ ranks - middle) >= abs(observed - middle) - 1e-9))


@pytest.mark.parametrize(
    "values",
    [
        [0.1, 0.2, -0.05, 0.3, 0.25],
        [0.1, 0.1, -0.1, 0.3, 0.3, 0.3, -0.2],  # ties
        [0.0, 0.2, 0.0, 0.4, 0.1],  # zeros
        [-0.3],
        list(np.random.default_rng(5).normal(0.3, 1, 12)),
    ],
)
def test_few_differences_are_tested_exactly(values):
    assert signed_rank_p(values) == pytest.approx(all_signs_p(values), abs=1e-12)


def test_differences_of_zero_do_not_make_few_others_many():
    """Ten with ties and five zeros: exact, not the approximation that fifteen would get."""
    values = [0.0] * 5 + [0.1, 0.1, 0.2, -0.1, 0.3, 0.3, 0.4, 0.5, -0.2, 0.6]
    assert signed_rank_p(values) == pytest.approx(all_signs_p(values), abs=1e-12)


def test_the_example_of_darwins_maize():
    """Fisher 1935, Design of Experiments: 15 pairs of plants, in eighths of an inch."""
    darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert signed_rank_p(darwin) == pytest.approx(all_signs_p(darwin), abs=1e-9)
    assert signed_rank_p(darwin) == pytest.approx(0.0413, abs=5e-5)


def test_many_differences_agree_with_signs_drawn_at_random():
    generator = np.random.default_rng(11)
    values = np.round(generator.normal(0.004, 0.02, 60), 3)  # with ties and perhaps zeros
    kept = values[values != 0]
    ranks = stats.rankdata(np.abs(kept))
    observed = abs(ranks[kept > 0].sum() - ranks.sum() / 2)
    draws = (generator.integers(0, 2, (40_000, len(kept))) @ ranks) - ranks.sum() / 2
    drawn = np.mean(np.abs(draws) >= observed - 1e-9)
    assert signed_rank_p(list(values)) == pytest.approx(drawn, abs=0.01)


def test_no_difference_and_no_data():
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert signed_rank_p([]) is None


# ------------------------------------------------------------------------------------------ Holm


def test_holm_on_a_known_example():
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    generator = np.random.default_rng(4)
    for _ in range(50):
        p = list(generator.uniform(0, 0.1, 6))
        rejected = set()
        for step, place in enumerate(np.argsort(p)):
            if p[place] > 0.05 / (len(p) - step):
                break
            rejected.add(int(place))
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.05} == rejected


def test_holm_leaves_out_what_was_not_tested():
    assert holm([0.02, None, 0.5]) == [0.04, None, 0.5]
    assert holm([None]) == [None]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
