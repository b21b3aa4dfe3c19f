"""What the guard makes of a round: honest sites are left alone, one that stands out is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Verdict
from fedfms.exchange.averaging import average, averaging_weights
from fedfms.exchange.round_guard import (
    AGAINST,
    AGAINST_FACTOR,
    FIRST_ROUNDS,
    LONG_AGAINST,
    LONG_FACTOR,
    NORM_FACTOR,
    Closed,
    RoundGuard,
    close_round,
    weigh,
)
from fedfms.exchange.strategies import find_strategy
from fedfms.records.verdicts import sentence

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256="a" * 64,
    classes=("disc",),
    rounds=9,
    batch_size=2,
    holdout=("site-9",),
)
SLICES = {"site-1": 20, "site-2": 24, "site-3": 16, "site-4": 20, "site-5": 28}
VALUES = 4000


def honest(
    sites: int, seed: int = 0, *, alike: float = 0.5, slices: dict[str, int] = SLICES
) -> dict[str, dict[str, torch.Tensor]]:
    """Differences with a common part; cosine `alike` between two, norms as of their steps."""
    rng = np.random.default_rng(seed)
    common, power = rng.normal(size=VALUES), rng.uniform(0.0, 1.0)
    found = {}
    for number in range(1, sites + 1):
        own = rng.normal(size=VALUES)
        values = np.sqrt(alike) * common + np.sqrt(1 - alike) * own
        length = (slices[f"site-{number}"] / 20) ** power * rng.uniform(0.8, 1.25)
        values = torch.tensor(values * 1e-3 * length, dtype=torch.float32)
        found[f"site-{number}"] = {"a": values[:1000].reshape(20, 50), "b": values[1000:]}
    return found


def turned(tensors: dict[str, torch.Tensor], times: float) -> dict[str, torch.Tensor]:
    return {name: tensor * times for name, tensor in tensors.items()}


def counts(sites: int) -> dict[str, int]:
    return {f"site-{number}": SLICES[f"site-{number}"] for number in range(1, sites + 1)}


def closed(
    differences: dict[str, dict[str, torch.Tensor]],
    slices: dict[str, int],
    recipe: Recipe = RECIPE,
    guard: RoundGuard | None = None,
) -> tuple[Closed, dict[str, Verdict]]:
    result = close_round(guard or RoundGuard(recipe), find_strategy(recipe), 0, slices, differences)
    return result, {one.site: one for one in result.verdicts}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """L2 distance by the norm of `other`."""
    flat = [torch.cat([tensors[name].reshape(-1) for name in "ab"]) for tensors in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


# ------------------------------------------------------------------------------- honest rounds


@pytest.mark.parametrize("sites", [2, 3, 5])
@pytest.mark.parametrize("alike", [0.0, 0.2, 0.9])
def test_an_honest_round_is_the_average_bit_for_bit(sites: int, alike: float) -> None:
    for seed in range(20):
        given, slices = honest(sites, seed, alike=alike), counts(sites)
        result, verdicts = closed(given, slices)
        assert all(one.factor == 1 and one.findings == () for one in verdicts.values())
        expected = average(given, averaging_weights(RECIPE, slices))
        assert all(torch.equal(result.change[name], expected[name]) for name in "ab")


@pytest.mark.parametrize("slices", [(10, 100, 200), (10, 10, 200), (200, 200, 10), (10, 80, 200)])
def test_sites_of_one_to_twenty_slices_are_left_alone_once_the_largest_is_confirmed(
    slices: tuple[int, ...],
) -> None:
    of_sites = {f"site-{number}": count for number, count in enumerate(slices, 1)}
    recipe = dataclasses.replace(RECIPE, confirmed_weights=("site-3",))
    for seed in range(50):
        given = honest(3, seed, slices=of_sites)
        _, verdicts = closed(given, of_sites, recipe)
        assert all(one.factor == 1 and one.findings == () for one in verdicts.values())
        assert [one.counted_slices for one in verdicts.values()] == [*slices]


def test_norms_and_cosines_are_those_of_numpy() -> None:
    given, slices = honest(4, seed=3), counts(4)
    _, verdicts = closed(given, slices)
    flat = {
        site: np.concatenate([tensors[name].numpy().reshape(-1) for name in "ab"]).astype(float)
        for site, tensors in given.items()
    }
    norms = {site: np.linalg.norm(values) for site, values in flat.items()}
    for site, verdict in verdicts.items():
        assert verdict.norm == pytest.approx(norms[site], rel=1e-6)
        steps = {other: slices[other] // 2 for other in flat}
        usual = sorted(norms[other] * max(1, steps[site] / steps[other]) ** 0.75 for other in flat)[
            1
        ]
        assert verdict.usual_norm == pytest.approx(usual, rel=1e-6)
        others = sum(
            flat[other] * min(1, verdicts[other].usual_norm / norms[other])
            for other in flat
            if other != site
        )
        cosine = flat[site] @ others / norms[site] / np.linalg.norm(others)
        assert verdict.cosine == pytest.approx(cosine, abs=2e-4)


# -------------------------------------------------------------------------- one that stands out


@pytest.mark.parametrize("sites", [3, 5])
@pytest.mark.parametrize("times", [10.0, 100.0, 1e5])
def test_a_difference_that_is_far_too_long_is_scaled_down_to_the_usual(
    sites: int, times: float
) -> None:
    given = honest(sites)
    expected = closed(given, counts(sites))[0].change
    _, before = closed(given, counts(sites))
    given["site-1"] = turned(given["site-1"], times)
    result, verdicts = closed(given, counts(sites))
    bad = verdicts.pop("site-1")
    assert bad.findings == ("norm",) and bad.times > NORM_FACTOR
    assert bad.norm * bad.factor == pytest.approx(LONG_FACTOR * bad.usual_norm)
    assert bad.norm == pytest.approx(before["site-1"].norm * times, rel=1e-5)
    assert all(one.findings == () for one in verdicts.values())
    assert distance(result.change, expected) < 0.25


@pytest.mark.parametrize("sites", [3, 5])
@pytest.mark.parametrize("times", [-1.0, -5.0, -1000.0])
def test_a_difference_against_the_others_hardly_counts(sites: int, times: float) -> None:
    given = honest(sites, alike=0.6)
    honest_ones = {site: given[site] for site in given if site != "site-1"}
    given["site-1"] = turned(given["site-1"], times)
    result, verdicts = closed(given, counts(sites))
    bad = verdicts.pop("site-1")
    assert "direction" in bad.findings and bad.cosine is not None and bad.cosine < AGAINST
    assert bad.norm * bad.factor <= AGAINST_FACTOR * max(bad.usual_norm, bad.norm) * 1.001
    assert all(one.findings == () for one in verdicts.values())
    # about as if it had sent nothing, which it still counts for
    weights = {site: SLICES[site] for site in honest_ones}
    flat = average(honest_ones, weights)
    share = sum(weights.values()) / (sum(weights.values()) + SLICES["site-1"])
    assert distance(result.change, {name: share * flat[name] for name in "ab"}) < 0.15


def test_where_half_point_against_half_nobody_is_scaled() -> None:
    given = honest(4, alike=0.9)
    for site in ("site-1", "site-2"):
        given[site] = turned(given[site], -1.0)
    _, verdicts = closed(given, counts(4))
    assert all(one.factor == 1 for one in verdicts.values())


def test_two_of_five_against_the_others_are_found_one_after_the_other() -> None:
    given = honest(5, alike=0.7)
    for site in ("site-2", "site-4"):
        given[site] = turned(given[site], -1.0)
    _, verdicts = closed(given, counts(5))
    found = [site for site, one in verdicts.items() if "direction" in one.findings]
    assert found == ["site-2", "site-4"]


def test_an_absurd_weight_counts_for_the_median_and_a_confirmed_one_for_itself() -> None:
    slices = {"site-1": 10**9, "site-2": 24, "site-3": 16}
    given = honest(3)
    result, verdicts = closed(given, slices)
    assert verdicts["site-1"].counted_slices == 24 and verdicts["site-1"].findings == ("weight",)
    expected = average(given, {"site-1": 24, "site-2": 24, "site-3": 16})
    assert all(torch.equal(result.change[name], expected[name]) for name in "ab")
    slices["site-1"] = 400
    confirmed = dataclasses.replace(RECIPE, confirmed_weights=("site-1",))
    given = honest(3, slices=slices)
    _, verdicts = closed(given, slices, confirmed)
    assert verdicts["site-1"].counted_slices == 400 and verdicts["site-1"].findings == ()


def test_of_two_sites_neither_counts_for_more_than_three_times_the_other_unconfirmed() -> None:
    given = honest(2)
    for slices, heavy, counted in (
        ({"site-1": 20, "site-2": 10**9}, "site-2", {"site-1": 20, "site-2": 60}),
        ({"site-1": 21, "site-2": 1}, "site-1", {"site-1": 3, "site-2": 1}),
        ({"site-1": 20, "site-2": 60}, None, {"site-1": 20, "site-2": 60}),
    ):
        result, verdicts = closed(given, slices)
        found = {site for site, one in verdicts.items() if "weight" in one.findings}
        assert found == ({heavy} if heavy else set())
        assert {site: one.counted_slices for site, one in verdicts.items()} == counted
        factors = {site: verdicts[site].factor for site in given}
        scaled = {site: turned(given[site], factors[site]) for site in given}
        expected = average(scaled, counted)
        assert all(torch.equal(result.change[name], expected[name]) for name in "ab")
    slices = {"site-1": 20, "site-2": 400}
    confirmed = dataclasses.replace(RECIPE, confirmed_weights=("site-2",))
    assert closed(given, slices, confirmed)[1]["site-2"].counted_slices == 400
    for recorded in ({"guard": "record"}, {"paper_compat": True}):
        recipe = dataclasses.replace(RECIPE, **recorded)
        one = closed(given, slices, recipe)[1]["site-2"]
        assert (one.counted_slices, one.factor, "weight" in one.findings) == (400, 1.0, True)


def test_of_two_sites_one_that_missed_a_round_is_still_the_measure_of_the_other() -> None:
    guard = RoundGuard(RECIPE)
    closed(honest(2), counts(2), guard=guard)
    _, verdicts = closed({"site-2": honest(2, 1)["site-2"]}, {"site-2": 10**6}, guard=guard)
    assert verdicts["site-2"].counted_slices == 60


def test_in_a_secure_sum_who_says_far_too_much_is_named_and_left_out_unless_confirmed() -> None:
    slices = {"site-1": 20, "site-2": 24, "site-3": 73}
    (one,) = weigh(slices, (), acts=True)
    assert (one.site, one.factor, one.counted_slices) == ("site-3", 0.0, 0)
    text = sentence(one, acts=True)
    assert "site-3's answer is of 73 slices" in text and "left out" in text
    assert "confirmed_weights names site-3" in text
    assert weigh(slices, ("site-3",), acts=True) == []
    assert weigh({**slices, "site-3": 72}, (), acts=True) == []
    (one,) = weigh(slices, (), acts=False)
    assert (one.factor, one.counted_slices) == (1.0, 73)


def test_a_difference_of_an_earlier_round_is_left_out_whoever_sends_it() -> None:
    guard = RoundGuard(RECIPE)
    first = honest(3)
    closed(first, counts(3), guard=guard)
    for by, seed in (("site-1", 5), ("site-2", 6)):
        given = honest(3, seed)
        given[by] = {name: tensor.clone() for name, tensor in first["site-1"].items()}
        result, verdicts = closed(given, counts(3), guard=guard)
        assert verdicts[by].findings == ("replay",) and verdicts[by].factor == 0
        others = {site: count for site, count in counts(3).items() if site != by}
        expected = average(given, others)
        assert all(torch.equal(result.change[name], expected[name]) for name in "ab")


def test_nothing_at_all_is_no_replay_and_harms_nobody() -> None:
    guard = RoundGuard(RECIPE)
    for seed in range(3):
        given = honest(3, seed)
        given["site-1"] = turned(given["site-1"], 0.0)
        _, verdicts = closed(given, counts(3), guard=guard)
        assert all(one.factor == 1 and one.findings == () for one in verdicts.values())
        assert verdicts["site-1"].cosine is None


@pytest.mark.parametrize("change", [{"paper_compat": True}, {"guard": "record"}])
def test_a_guard_that_only_records_changes_no_bit(change: dict) -> None:
    recipe = dataclasses.replace(RECIPE, **change)
    given, slices = honest(3), {"site-1": 20, "site-2": 24, "site-3": 4000}
    given["site-1"] = turned(given["site-1"], -100.0)
    result, verdicts = closed(given, slices, recipe)
    assert {"norm", "direction"} <= {*verdicts["site-1"].findings}
    assert verdicts["site-3"].findings == ("weight",)
    assert all(one.factor == 1 for one in verdicts.values())
    assert [one.counted_slices for one in verdicts.values()] == [*slices.values()]
    expected = average(given, averaging_weights(recipe, slices))
    assert all(torch.equal(result.change[name], expected[name]) for name in "ab")


# ----------------------------------------------------------------------------- round after round


def test_a_round_that_an_honest_site_missed_is_judged_by_what_is_known_of_it() -> None:
    guard = RoundGuard(RECIPE)
    closed(honest(3), counts(3), guard=guard)
    given = honest(3, 1)
    del given["site-3"]
    given["site-1"] = turned(given["site-1"], 50.0)
    slices = {"site-1": 10**6, "site-2": 24}
    _, verdicts = closed(given, slices, guard=guard)
    assert verdicts["site-1"].findings == ("norm", "weight")
    assert verdicts["site-1"].counted_slices == 24
    assert verdicts["site-2"].findings == ()


def at_rest(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """A hundredth of an honest round, in which site-1 is five times as long, and turned round."""
    given = {site: turned(tensors, 0.01) for site, tensors in honest(3, seed).items()}
    given["site-1"] = turned(given["site-1"], -5.0)
    return given


def test_once_the_model_is_at_rest_nobody_is_scaled_for_what_moves_it_by_nothing() -> None:
    guard = RoundGuard(RECIPE)
    closed(honest(3), counts(3), guard=guard)
    after = RoundGuard(RECIPE)
    after.go_on(guard.to_keep())
    for one in (guard, after):
        _, verdicts = closed(at_rest(1), counts(3), guard=one)
        assert not any(one.findings or one.factor != 1.0 for one in verdicts.values())
        assert (
            verdicts["site-1"].times > NORM_FACTOR and verdicts["site-1"].cosine < AGAINST
        )  # told
        given = honest(3, 2)
        given["site-1"] = turned(given["site-1"], 4.0)  # is not at rest
        assert closed(given, counts(3), guard=one)[1]["site-1"].findings == ("norm",)


def parted(seed: int, length: float) -> dict[str, dict[str, torch.Tensor]]:
    """Two honest sites that pull a model to and fro between them, and a third; so many times."""
    given = honest(3, seed, alike=0.7)
    third = honest(3, seed + 1)["site-3"]
    to = {"site-1": given["site-1"], "site-2": turned(given["site-2"], -1.0), "site-3": third}
    return {site: turned(tensors, length) for site, tensors in to.items()}


def test_honest_sites_that_part_at_the_end_of_a_long_run_are_not_scaled() -> None:
    guard = RoundGuard(RECIPE)
    for seed in range(6):
        closed(honest(3, seed), counts(3), guard=guard)
    for seed in range(6, 15):  # is not at rest
        _, verdicts = closed(parted(seed, 0.4), counts(3), guard=guard)
        assert verdicts["site-1"].cosine < AGAINST
        assert not any(one.findings or one.factor != 1.0 for one in verdicts.values())


def along(tensors: dict[str, torch.Tensor], others: list[dict[str, torch.Tensor]]) -> float:
    """Cosine to the mean of the others, in fp64."""
    own = torch.cat([tensors[name].double().flatten() for name in "ab"])
    mean = torch.stack(
        [torch.cat([one[name].double().flatten() for name in "ab"]) for one in others]
    ).mean(0)
    return float(own @ mean / own.norm() / mean.norm())


@pytest.mark.parametrize("times", [1.0, 1.9, 2.1, 2.3, 2.5, 2.9])
def test_a_site_that_turns_late_turns_no_round(times: float) -> None:
    guard = RoundGuard(RECIPE)
    for seed in range(FIRST_ROUNDS):
        closed(honest(3, seed), counts(3), guard=guard)
    for seed in range(3, 10):
        given = honest(3, seed, alike=0.6)
        given["site-1"] = turned(given["site-1"], -times)
        result, verdicts = closed(given, counts(3), guard=guard)
        assert verdicts["site-1"].cosine < AGAINST
        assert ("norm" in verdicts["site-1"].findings) == (verdicts["site-1"].times > LONG_AGAINST)
        assert along(dict(result.change), [given["site-2"], given["site-3"]]) > 0.0


def unlike(seed: int, against: float, times: float) -> dict[str, dict[str, torch.Tensor]]:
    """Three sites, of which the third goes so much against the others, and is so many times as long
    as the first."""
    given = honest(3, seed, alike=0.8)
    own = honest(1, 100 + seed)["site-1"]
    third = {n: own[n] - against * (given["site-1"][n] + given["site-2"][n]) for n in own}
    length, own_length = (
        sum(float(value.norm()) ** 2 for value in of.values()) ** 0.5
        for of in (given["site-1"], third)
    )
    return {**given, "site-3": turned(third, times * length / own_length)}


def test_an_honest_site_of_other_images_is_not_scaled_where_a_model_comes_to_rest_between() -> None:
    """As a site of inverted contrast beside two others: first at right angles, then against."""
    guard = RoundGuard(RECIPE)
    for seed, against in enumerate((0.0, 0.05, 0.1, *[0.6] * 8)):
        _, verdicts = closed(unlike(seed, against, 1.0), counts(3), guard=guard)
        assert not any(one.findings or one.factor != 1.0 for one in verdicts.values())
    assert verdicts["site-3"].cosine < AGAINST
    _, verdicts = closed(unlike(20, 0.6, 2.5), counts(3), guard=guard)
    assert verdicts["site-3"].findings == ("norm",) and verdicts["site-3"].times < NORM_FACTOR


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_site_that_turns_after_an_honest_round_is_found_when_it_turns(rounds: int) -> None:
    guard = RoundGuard(RECIPE)
    for seed in range(rounds):
        closed(honest(3, seed), counts(3), guard=guard)
    for seed in range(rounds, 7):
        given = honest(3, seed, alike=0.6)
        given["site-1"] = turned(given["site-1"], -1.0)
        _, verdicts = closed(given, counts(3), guard=guard)
        assert verdicts["site-1"].findings == ("direction",)


def test_a_site_that_was_against_the_others_from_the_start_stays_bounded() -> None:
    guard = RoundGuard(RECIPE)
    for seed in range(6):
        given = honest(3, seed, alike=0.6)
        given["site-1"] = turned(given["site-1"], -1.0)
        _, verdicts = closed(given, counts(3), guard=guard)
        assert verdicts["site-1"].findings == ("direction",)
        assert verdicts["site-1"].factor <= AGAINST_FACTOR * 1.001


def test_a_round_of_a_model_that_never_moved_much_is_judged_as_any_other() -> None:
    _, verdicts = closed(at_rest(1), counts(3))
    assert verdicts["site-1"].findings == ("norm", "direction")


def test_a_long_difference_does_not_make_later_ones_look_at_rest() -> None:
    guard = RoundGuard(RECIPE)
    given = honest(3)
    given["site-1"] = turned(given["site-1"], 1e5)
    closed(given, counts(3), guard=guard)
    given = honest(3, 1)
    given["site-1"] = turned(given["site-1"], 5.0)
    _, verdicts = closed(given, counts(3), guard=guard)
    assert verdicts["site-1"].findings == ("norm",)


def test_a_guard_goes_on_from_what_it_kept_as_if_it_had_not_ended() -> None:
    rounds = [honest(3, seed) for seed in range(3)]
    rounds[2]["site-2"] = rounds[0]["site-2"]
    del rounds[2]["site-3"]
    whole, ended = RoundGuard(RECIPE), RoundGuard(RECIPE)
    for given in rounds[:2]:
        closed(given, counts(3), guard=whole)
        closed(given, counts(3), guard=ended)
    after = RoundGuard(RECIPE)
    after.go_on(ended.to_keep())
    slices = {site: counts(3)[site] for site in rounds[2]}
    results = [closed(rounds[2], slices, guard=guard)[0] for guard in (whole, after)]
    assert results[0].verdicts == results[1].verdicts
    assert "replay" in results[0].verdicts[1].findings
    assert all(torch.equal(results[0].change[n], results[1].change[n]) for n in "ab")
    RoundGuard(RECIPE).go_on({})  # of a run that an earlier version kept


def test_a_holdout_is_not_judged() -> None:
    given = {**honest(3), "site-9": {}}
    result, verdicts = closed(given, {**counts(3), "site-9": 0})
    assert [*verdicts] == ["site-1", "site-2", "site-3"] and result.change
    assert close_round(
        RoundGuard(RECIPE), find_strategy(RECIPE), 0, {"site-9": 0}, {"site-9": {}}
    ) == Closed({}, ())
