"""The time left, against runs whose end is known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from statistics import median

import pytest

from fedfms.contracts.now import SiteNow
from fedfms.flare.time_left import RoundTimes, time_left

Told = tuple[float, tuple[float, float]]  # seconds truly left, the range


class Replay:
    """A run with known durations, asked each second how long it lasts yet.

    Args:
        rounds: durations of training of three sites in each round.
        evaluates: whether a round scores the model, which takes 5 s.
        first: seconds of preparing images in the first round.
    """

    def __init__(
        self, rounds: list[tuple[float, ...]], evaluate_every: int = 1, first: float = 0.0
    ) -> None:
        self.rounds = rounds
        self.every = evaluate_every
        self.first = first

    def scores(self, number: int) -> bool:
        return number % self.every == 0

    def seconds(self, number: int, site: int) -> dict[str, float]:
        return {
            "prepare": self.first if number == 0 else 0.0,
            "evaluate": 5.0 if self.scores(number) else 0.0,
            "train": self.rounds[number][site],
        }

    def lasts(self, number: int) -> float:
        return max(sum(self.seconds(number, site).values()) for site in range(3))

    def told(self) -> Iterator[Told]:
        evaluation = 2 * 6.0 + 1.0
        whole = sum(self.lasts(n) + 0.5 for n in range(len(self.rounds))) + evaluation
        times: list[RoundTimes] = []
        now = 0.0
        for number in range(len(self.rounds)):
            times.append(RoundTimes(number, now))
            for second in range(int(self.lasts(number))):
                sites = [self.site(number, site, float(second), now) for site in range(3)]
                if (left := self.ask(times, sites, now + second, in_evaluation=False)) is not None:
                    yield whole - now - second, left
            now += self.lasts(number)
            times[-1].ended = now
            times[-1].answers = {f"s{site}": self.seconds(number, site) for site in range(3)}
            now += 0.5

    def ask(
        self, times: list[RoundTimes], sites: list[SiteNow], now: float, in_evaluation: bool
    ) -> tuple[float, float] | None:
        return time_left(
            times,
            rounds=len(self.rounds),
            evaluates=self.scores,
            sites=sites,
            models={},
            in_evaluation=in_evaluation,
            began=times[-1].started,
            now=now,
        )

    def site(self, number: int, site: int, second: float, began: float) -> SiteNow:
        pace = self.seconds(number - 1, site) if number else {}
        at = 0.0
        for phase, seconds in self.seconds(number, site).items():
            if second < at + seconds:
                told = max(at, second - second % 3)  # once in three seconds
                return SiteNow(
                    name=f"s{site}",
                    phase=phase,
                    since=began + at,
                    told=began + told,
                    done=int(1000 * (told - at) / seconds),
                    total=1000,
                    pace=pace,
                )
            at += seconds
        return SiteNow(name=f"s{site}", phase="answered", pace=pace)


def errors(replay: Replay) -> list[float]:
    return [abs(sum(left) / 2 - true) / true for true, left in replay.told()]


def noisy(seed: int, count: int, share: float) -> list[tuple[float, ...]]:
    dice = random.Random(seed)
    return [tuple(base * dice.uniform(1, 1 + share) for base in (20, 26, 31)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("every", "first"), [(1, 0.0), (1, 40.0), (4, 40.0)])
def test_the_middle_of_the_range_is_near_the_truth(seed: int, every: int, first: float) -> None:
    off = errors(Replay(noisy(seed, 10, 0.25), every, first))
    assert len(off) > 200
    assert median(off) < 0.12
    assert max(off) < 0.5


def test_most_ends_lie_in_the_range_and_it_narrows() -> None:
    inside, widths = [], []
    for seed in range(5):
        told = list(Replay(noisy(seed, 10, 0.25), 1, 30.0).told())
        inside += [low <= true <= high for true, (low, high) in told]
        widths.append([high - low for _, (low, high) in told])
    assert sum(inside) / len(inside) > 0.7
    for one in widths:
        assert median(one[:20]) > 2 * median(one[-20:])


def test_nothing_is_said_before_a_round_is_over() -> None:
    replay = Replay(noisy(1, 3, 0.1))
    assert replay.ask([RoundTimes(0, 0.0)], [], 30.0, in_evaluation=False) is None


def rounds_over(*seconds: float, disturbed: int | None = None) -> list[RoundTimes]:
    times, now = [], 0.0
    for number, lasts in enumerate(seconds):
        times.append(RoundTimes(number, now, now + lasts, disturbed=number == disturbed))
        now += lasts + 0.5
    times.append(RoundTimes(len(seconds), now))
    return times


def middle(times: list[RoundTimes], rounds: int = 10, sites: tuple[SiteNow, ...] = ()) -> float:
    left = time_left(
        times,
        rounds=rounds,
        evaluates=lambda number: True,
        sites=sites,
        models={},
        in_evaluation=False,
        began=times[-1].started,
        now=times[-1].started,
    )
    assert left is not None
    return sum(left) / 2


def test_a_round_that_a_restart_drew_out_does_not_count() -> None:
    quiet = middle(rounds_over(30, 30, 30, 30))
    assert middle(rounds_over(30, 30, 600, 30, disturbed=2)) == pytest.approx(quiet, rel=0.05)


def test_the_time_in_which_no_server_ran_is_no_pace() -> None:
    times = rounds_over(30, 30, 30)
    quiet = middle(times)
    times[2].ended_in_order = False
    times[3].started += 500
    assert middle(times) == pytest.approx(quiet, rel=0.01)


def test_a_site_that_is_gone_makes_the_range_wider() -> None:
    times = rounds_over(30, 30, 30)
    there = SiteNow(name="a", phase="train", since=times[-1].started, done=0, total=10,
                    told=times[-1].started, pace={"train": 20.0})  # fmt: skip
    gone = SiteNow(name="b", phase="gone", pace={"train": 20.0})
    ranges = []
    for sites in ([there], [there, gone]):
        now = times[-1].started + 19
        left = time_left(
            times, rounds=4, evaluates=lambda n: True, sites=sites, models={},
            in_evaluation=False, began=times[-1].started, now=now,
        )  # fmt: skip
        assert left is not None
        ranges.append(left)
    assert ranges[1][0] == ranges[0][0]
    assert ranges[1][1] > ranges[0][1]
