import math
import statistics as standard

import numpy as np
import pytest
from scipy import stats

from fedfms_lab.study.analysis.size import Layout, draw, share_excluding_zero
from fedfms_lab.study.analysis.statistics import (
    Interval,
    PatientDifference,
    holm,
    interval,
    mean,
    p_value,
    site_balanced_mean,
)


def patients(by_seed):
    """One case a patient; `by_seed` is (patients, seeds)."""
    return [PatientDifference(tuple(map(float, row)), 1) for row in by_seed]


def the_same(values, seeds=3):
    """Patients whose difference is that of every seed."""
    return patients([[value] * seeds for value in values])


def test_mean_is_that_of_the_standard_library():
    values = [0.91, 0.87, 0.902, 0.55]
    assert mean(values) == pytest.approx(standard.mean(values), rel=1e-15)
    assert mean([]) is None


# ------------------------------------------------------------------------------------- intervals


def test_each_site_counts_once_whatever_its_number_of_cases():
    sites = {
        "a": [
            PatientDifference((0.2, 0.4), 3),
            PatientDifference((0.1, -0.1), 1),
        ],  # mean over 4 cases: 0.075
        "b": [PatientDifference((-0.2,), 1)] * 50,
        "empty": [],
    }
    assert site_balanced_mean(sites) == pytest.approx((0.075 - 0.2) / 2)
    assert site_balanced_mean({"empty": []}) is None


def test_where_runs_do_not_differ_it_is_the_t_interval_of_patients():
    values = np.random.default_rng(3).normal(0.02, 0.05, 9)
    ours = interval({"a": the_same(values)})
    theirs = stats.ttest_1samp(values, 0.0)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))
    assert p_value({"a": the_same(values)}) == pytest.approx(theirs.pvalue, rel=1e-6)


def test_where_patients_do_not_differ_it_is_the_t_interval_of_seeds():
    of_seeds = [0.03, 0.011, 0.024, 0.017]
    sites = {"a": patients([of_seeds] * 6), "b": patients([of_seeds] * 4)}
    theirs = stats.ttest_1samp(of_seeds, 0.0)
    low, high = theirs.confidence_interval(0.95)
    ours = interval(sites)
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))
    assert p_value(sites) == pytest.approx(theirs.pvalue, rel=1e-6)


def test_both_parts_are_added_as_squares():
    generator = np.random.default_rng(8)
    table = generator.normal(0.01, 0.03, (12, 1)) + generator.normal(0, 0.02, (1, 3))
    both = interval({"a": patients(table)})
    of_patients = stats.ttest_1samp(table.mean(axis=1), 0).confidence_interval(0.95)
    of_seeds = stats.ttest_1samp(table.mean(axis=0), 0).confidence_interval(0.95)
    widths = [(one.high - one.low) / 2 for one in (of_patients, of_seeds)]
    assert (both.high - both.low) / 2 == pytest.approx(math.hypot(*widths))
    assert (both.high + both.low) / 2 == pytest.approx(table.mean())


def test_sites_are_given_and_their_errors_add_up():
    a, b = [0.0, 0.1, 0.4], [-0.3, 0.2]
    found = interval({"a": the_same(a), "b": the_same(b)})
    parts = [np.var(values, ddof=1) / len(values) / 4 for values in (a, b)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)  # Satterthwaite
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert (found.high - found.low) / 2 == pytest.approx(half)


def test_patients_are_drawn_with_all_their_cases():
    """The linearized error of a ratio against resampling patients with their cases."""
    generator = np.random.default_rng(2)
    cases = generator.integers(1, 6, 200)
    totals = cases * generator.normal(0.02, 0.05, 200)
    drawn = generator.integers(0, 200, (4000, 200))
    resampled = totals[drawn].sum(axis=1) / cases[drawn].sum(axis=1)
    found = interval(
        {
            "a": [
                PatientDifference((t, t), int(n))
                for t, n in zip(totals.tolist(), cases, strict=True)
            ]
        }
    )
    half = stats.t.ppf(0.975, 199) * np.std(resampled)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.04)


def test_p_is_the_level_at_which_the_interval_touches_zero():
    table = np.random.default_rng(6).normal(0.02, 0.02, (7, 3))
    sites = {"a": patients(table), "b": patients(table[:4] - 0.01)}
    p = p_value(sites)
    assert 0.0 < p < 1.0
    touching = interval(sites, confidence=1 - p)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-9)


def test_it_is_the_same_in_any_order_of_sites():
    sites = {"a": the_same([0.1, 0.2, 0.3]), "b": the_same([0.0, -0.1])}
    again = {"b": sites["b"], "a": sites["a"]}
    assert interval(sites) == interval(again) and p_value(sites) == p_value(again)


def test_a_site_with_one_patient_gives_no_interval():
    assert interval({"a": the_same([0.1, 0.2]), "b": the_same([0.1])}) is None
    assert interval({}) is None and p_value({}) is None
    five = {"a": the_same([0.1, 0.2, 0.3, 0.4, 0.5])}
    assert interval(five, fewest=5) == interval(five)
    assert interval(five, fewest=6) is None and p_value(five, fewest=6) is None


def test_one_seed_gives_no_interval_and_two_give_no_p():
    values = [0.1, 0.2, 0.3, 0.15]
    assert interval({"a": the_same(values, 1)}) is None
    assert interval({"a": the_same(values, 2)}) is not None
    assert [p_value({"a": the_same(values, n)}) is None for n in (1, 2, 3)] == [True, True, False]


def test_no_difference_at_all():
    assert p_value({"a": the_same([0.0, 0.0, 0.0])}) == 1.0
    assert interval({"a": the_same([0.0, 0.0])}) == Interval(0.0, 0.0)
    assert p_value({"a": the_same([0.1, 0.1, 0.1])}) <= 1e-12


def test_excluding_zero():
    assert Interval(0.01, 0.2).excludes_zero and Interval(-0.3, -0.1).excludes_zero
    assert not Interval(-0.1, 0.2).excludes_zero and not Interval(0.0, 0.1).excludes_zero


# ------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(
    ("layout", "run_sd", "seeds"),
    [
        (Layout(sites=4, patients=18), 0.02, 3),
        (Layout(sites=3, patients=3, shared=False), 0.01, 3),
        (Layout(sites=4, patients=5), 0.02, 2),
    ],
)
def test_where_nothing_differs_few_intervals_exclude_zero(layout, run_sd, seeds):
    """At most 8 % at a nominal 5; the whole table, with its rivals: results/study-size.md."""
    assert share_excluding_zero(layout, run_sd, seeds, trials=600, seed=1) <= 0.08


def test_simulated_differences_vary_as_they_are_told_to():
    generator = np.random.default_rng(0)
    layout = Layout(sites=2, patients=40)
    tables = [draw(layout, 0.03, 5, generator) for _ in range(200)]
    by_run = np.array([[table[0].mean(axis=0), table[1].mean(axis=0)] for table in tables])
    assert np.std(by_run - by_run.mean(axis=2, keepdims=True)) == pytest.approx(
        0.03 * math.sqrt(4 / 5), rel=0.05
    )
    np.testing.assert_allclose(
        by_run[:, 0] - by_run[:, 0].mean(axis=1, keepdims=True),
        by_run[:, 1] - by_run[:, 1].mean(axis=1, keepdims=True),
        atol=0.02,
    )
    of_patients = np.concatenate([table[0].mean(axis=1) for table in tables])
    assert np.std(of_patients) == pytest.approx(math.hypot(0.02, 0.03 / math.sqrt(5)), rel=0.1)


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
