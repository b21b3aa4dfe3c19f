"""When a run ends, as a range: from the rounds that are over and from how far its sites are now.

A round lasts as long as its slowest site. What it took is split into what each round has (training,
the way of the model) and what only some have: preparing images in the first, evaluating the model
where the recipe says so. Of the last rounds the median counts, so that one that a restart or a slow
site drew out does not; rounds in which something happened to a site count only while there are no
others. The rest of the running round follows from the sites' own progress.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from fedfms.contracts.now import SiteNow

LAST_ROUNDS = 4  # that the pace is taken from: a machine may become busy, or a site leave
MODELS = 2  # that the final evaluation scores: the final and the best one
BETWEEN_SECONDS = 1.0  # from one task of the evaluation to the next, and to the end of the job

# How far from the truth an estimate may be, in parts of it: what is known of one round says less of
# the next than what is known of five.
SPREAD = {1: 0.30, 2: 0.20, 3: 0.12}
LEAST_SPREAD = 0.05
SPREAD_OF_THIS_ROUND = 0.20
SPREAD_OF_EVALUATION = 0.35
WIDTH = 1.3  # standard deviations to each side: four of five ends lie between


@dataclass(slots=True)
class RoundTimes:
    """When a round was, in seconds since the epoch, and what its answers took."""

    number: int  # from 0
    started: float
    ended: float | None = None  # None: it runs
    disturbed: bool = False  # something happened to a site or to the server
    ended_in_order: bool = True  # the same process of the server began the next one
    # seconds by phase (Contribution.seconds) of the sites that answered
    answers: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def slowest(self, phase: str) -> float:
        """Seconds of a phase at the site that took longest for all of them."""
        if not self.answers:
            return 0.0
        longest = max(self.answers.values(), key=lambda seconds: sum(seconds.values()))
        return longest.get(phase, 0.0)


@dataclass(frozen=True, slots=True)
class _Pace:
    """What a round takes, by the rounds that are over; in seconds."""

    train: float  # every round
    evaluate: float  # where the model is scored
    between: float  # from the end of a round to the beginning of the next
    spread: float  # standard deviation of a round, in parts of it
    rounds: int  # that this rests on

    def of_round(self, evaluates: bool) -> float:
        return self.train + (self.evaluate if evaluates else 0.0)


def time_left(
    times: Sequence[RoundTimes],
    *,
    rounds: int,
    evaluates: Callable[[int], bool],
    sites: Sequence[SiteNow],
    models: Mapping[str, int],
    in_evaluation: bool,
    began: float | None,
    now: float,
) -> tuple[float, float] | None:
    """Seconds until the run ends, from and to.

    Args:
        times: of the rounds that are over, and of the one that runs.
        rounds: of the recipe.
        evaluates: whether the model is scored in the round of a number.
        sites: what each does now.
        models: how many models each site has scored in the final evaluation.
        in_evaluation: whether that is what runs.
        began: when the round or the final evaluation began.
        now: seconds since the epoch.

    Returns:
        None as long as no round is over.
    """
    pace = _pace(times)
    if pace is None or began is None:
        return None
    if in_evaluation:
        left = _evaluation_left(pace, sites, models, began, now)
        return _range(left, SPREAD_OF_EVALUATION * left)
    running = times[-1] if times[-1].ended is None else None
    number = running.number if running is not None else times[-1].number + 1
    this = high = 0.0
    if running is not None:
        whole = pace.of_round(evaluates(number))
        by_clock = max(0.0, whole - (now - running.started))
        this, high = _round_left(whole, by_clock, sites, evaluates(number), now)
        number += 1
    elif number < rounds:
        this = high = max(0.0, pace.between - (now - (times[-1].ended or now)))
    later = sum(pace.between + pace.of_round(evaluates(one)) for one in range(number, rounds))
    more = rounds - number
    final = MODELS * (pace.evaluate + BETWEEN_SECONDS)
    # the median of n rounds is off by about 1.25 / sqrt(n) of their spread, for all rounds alike
    together = 1.25 * pace.spread / math.sqrt(pace.rounds) * later
    each = pace.spread * later / math.sqrt(more) if more else 0.0
    deviation = math.sqrt(
        together**2
        + each**2
        + (SPREAD_OF_THIS_ROUND * this) ** 2
        + (SPREAD_OF_EVALUATION * final) ** 2
    )
    low, top = _range(this + later + final, deviation)
    return low, top + (high - this)


def _pace(times: Sequence[RoundTimes]) -> _Pace | None:
    """What the rounds that are over say of those to come."""
    over = [one for one in times if one.ended is not None]
    if not over:
        return None
    quiet = [one for one in over if not one.disturbed] or over
    usual = [one for one in quiet if one.number > 0] if len(quiet) > 2 else quiet
    usual = usual[-LAST_ROUNDS:]
    scoring = [seconds for one in over[-LAST_ROUNDS:] if (seconds := one.slowest("evaluate")) > 0]
    evaluate = median(scoring) if scoring else max(one.slowest("evaluate") for one in over)
    each = [
        max(
            0.0,
            (one.ended or 0.0) - one.started - one.slowest("prepare") - one.slowest("evaluate"),
        )
        for one in usual
    ]
    train = median(each)
    gaps = [
        after.started - before.ended
        for before, after in itertools.pairwise(times)
        if before.ended is not None and before.ended_in_order and not before.disturbed
    ]
    spread = SPREAD.get(len(each), LEAST_SPREAD)
    if len(each) > 2 and train > 0:
        spread = max(LEAST_SPREAD, 1.4826 * median(abs(one - train) for one in each) / train)
    return _Pace(train, evaluate, median(gaps) if gaps else 0.5, spread, len(each))


def _round_left(
    whole: float, by_clock: float, sites: Sequence[SiteNow], evaluates: bool, now: float
) -> tuple[float, float]:
    """Seconds until the running round ends, and if a site that is gone comes back and answers."""
    known: list[float] = []
    gone = False
    for one in sites:
        if one.phase == "gone":
            gone = True
        elif one.phase not in ("answered", "failed", "paused"):
            left = _site_left(one, evaluates, now)
            known.append(by_clock if left is None else left)
    this = max(known, default=0.0 if any(one.phase == "answered" for one in sites) else by_clock)
    return this, max(this, whole) if gone else this


def _site_left(one: SiteNow, evaluates: bool, now: float) -> float | None:
    """Seconds until one site's answer is there; None where its own pace says nothing of that."""
    phases = ["download", "evaluate", "train", "upload"]
    if not evaluates:
        phases.remove("evaluate")
    if one.role == "holdout":
        phases.remove("train")
    if one.phase not in phases:  # waits, start, prepare
        return None
    left = 0.0
    for phase in phases[phases.index(one.phase) :]:
        usual = one.pace.get(phase, 0.0)
        since = one.since if one.since is not None else now
        if phase != one.phase:
            left += usual
        elif one.share is None or one.told is None:
            left += max(0.0, usual - (now - since))
        else:
            # what this round shows counts the more, the more of it there is
            seen = (one.told - since) / one.share if one.share > 0.02 else usual
            whole = one.share * seen + (1 - one.share) * (usual or seen)
            left += max(0.0, whole * (1 - one.share) - (now - one.told))
    return left


def _evaluation_left(
    pace: _Pace, sites: Sequence[SiteNow], models: Mapping[str, int], began: float, now: float
) -> float:
    """Seconds until the final evaluation, and with it the run, ends."""
    asked = max(MODELS, *models.values()) if models else MODELS
    left = 0.0
    for one in sites:
        more = max(0, asked - models.get(one.name, 0))
        if one.phase in ("gone", "paused") or more == 0:
            continue
        usual = one.pace.get("evaluate", pace.evaluate) + BETWEEN_SECONDS
        this = (
            usual * (1 - one.share) if one.share is not None and one.phase == "evaluate" else usual
        )
        left = max(left, this + (more - 1) * usual)
    return left + BETWEEN_SECONDS


def _range(middle: float, deviation: float) -> tuple[float, float]:
    return max(0.0, middle - WIDTH * deviation), middle + WIDTH * deviation
