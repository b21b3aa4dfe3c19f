"""The guard of a round: one site can neither carry the average away nor turn it round.

`guard.check_contribution` takes or refuses an answer by itself, when it comes. Here a round's
differences are compared with one another, when it closes:

*norm*. An honest difference grows with the number of optimizer steps, by a power between 0 (a rate
that warms up and decays) and 1 (steps that agree). So the norm of each site lets expect one of
every other: of a site of more steps that norm times their ratio to the power 3/4, of one of fewer
steps that norm as it is, since such a site weighs less anyway. The median of these is the site's
usual norm. A difference of more than `NORM_FACTOR` times that, or of `LONG_AGAINST` times where it
points against the others, is scaled down to `LONG_FACTOR` of it: about what the shorter ones of
honest sites have.

*direction*. The cosine of a difference to the mean of the others, each of which counts alike and at
most with its usual norm. A difference below `AGAINST` points against the others. Of a site that did
so in one of its first `FIRST_ROUNDS` answers it is scaled down to `AGAINST_FACTOR` of its usual
norm at most: of the one that was lowest then first, and the others are compared anew, without it,
as long as a minority was found. Where all of a round are below, nobody is scaled: nobody can tell
who is wrong. Only the start tells, when a model has everything to learn and what it learns is of
use to all: of honest sites -0.3 was the lowest then, with up to 16 epochs a round. Where it comes
to rest between unlike sites their differences add up to nothing: then each points against the sum
of the others, whoever is honest (-0.7 was seen, and -0.5 round after round of a site of inverted
contrast, 1.5 times as long as usual). One of three that turns later can stop the others, and not
turn them.

*rest*. A model that has learnt all that a site has moves by next to nothing there, and how it does
so is chance: a site that missed a round is then many times as long as the others. What is below
`AT_REST` of the largest usual norm that a round had is left alone by the two rules above, since it
moves the model by no more than that.

*weight*. The number of slices, or of cases with `weigh_by`, is what a site says of itself. A site
that says more than `WEIGHT_FACTOR` times the median of the sites counts for the median, unless the
recipe confirms it by name. Of two sites the one that says more than so many times the other's
counts for so many.

*replay*. A difference that is, bit for bit, one of an earlier round is left out.

Medians need a majority of honest sites. Of two sites the shorter difference is the measure, and the
smaller number of slices. The bounds follow norm clipping (Sun et al. 2019, arXiv 1911.07963)
and the cosine to the others as in FLTrust (Cao et al. 2021, arXiv 2012.13995), with the others in
the place of a trusted data set.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Finding, Verdict
from fedfms.exchange.strategies import Strategy, combine
from fedfms.exchange.tensors import update_norm
from fedfms.exchange.waiting import Scaled

NORM_FACTOR = 3.0  # times the usual norm, that is taken as it came
LONG_AGAINST = 1.8  # the same of one that points against the others: more would turn two of three
STEPS_POWER = 0.75  # by which a norm may grow with the steps; see above
LONG_FACTOR = 0.5  # of the usual norm, that is left of a difference that is too long
AGAINST = -0.45  # cosine to the mean of the others, below which a difference is against them
FIRST_ROUNDS = 3  # answers of a site that tell whether it is against the others for good
AGAINST_FACTOR = 0.1  # of the usual norm, that is left of a difference against the others
AT_REST = 0.1  # of the largest usual norm of a round, below which a difference harms nobody
WEIGHT_FACTOR = 3  # times the median of the sites' slices, that an unconfirmed site counts for

_DIGITS = 24  # of a mark: enough that no two differences share them by chance

Differences = Mapping[str, Mapping[str, Tensor]]


@dataclass(slots=True)
class Memory:
    """What a guard knows of the rounds before; kept with a run's state."""

    slices: dict[str, int] = field(default_factory=dict)  # of each training site, when last heard
    # the same of what the recipe's weigh_by counts, where that is something else
    weights: dict[str, int] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)  # the same, at most the usual one
    largest: float = 0.0  # of the norms that are in the middle of a round
    cosines: dict[str, tuple[float, int]] = field(default_factory=dict)  # lowest of first, number
    seen: dict[str, str] = field(default_factory=dict)  # mark of a difference: whose


_DECODE = TypeAdapter(Memory)


@dataclass(frozen=True, slots=True)
class Closed:
    """What a round came to."""

    change: dict[str, Tensor]  # to add to the global model; see `combine`
    verdicts: tuple[Verdict, ...]  # of each training site, by name


def acts(recipe: Recipe) -> bool:
    """Whether an average follows what the guard finds; else it is only recorded."""
    return recipe.guard == "scale" and not recipe.paper_compat


class RoundGuard:
    """Judges the rounds of one job, in their order.

    Args:
        recipe: with `guard` "record", and under `paper_compat`, findings are told and nothing of
            the average is changed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.acts = acts(recipe)
        self._memory = Memory()

    def judge(
        self,
        slices: Mapping[str, int],
        differences: Differences,
        weights: Mapping[str, int] | None = None,
    ) -> tuple[Verdict, ...]:
        """What is found of each training site of a round; call it once a round.

        Each difference is read three times, one after another.

        Args:
            slices: that each site says it trained on; of a holdout any number.
            differences: by site, as `check_contribution` gave them; none of a holdout.
            weights: that each site counts for by `averaging.weight_of`; None: its slices.
        """
        others = weights if self._recipe.weigh_by != "slices" else None
        sites = [site for site in sorted(differences) if differences[site]]
        looks = {site: _look(differences[site]) for site in sites}
        norms = {site: norm for site, (norm, _) in looks.items()}
        marks = {site: mark for site, (_, mark) in looks.items()}
        old = {site for site in sites if norms[site] > 0 and marks[site] in self._memory.seen}
        fresh = [site for site in sites if site not in old]
        counted = self._counted({site: slices[site] for site in fresh})
        says, counts = slices, counted  # what a site says that it counts for, and what it does
        if others is not None:
            says, counts = others, self._weighed({site: others[site] for site in fresh})
        usual = self._usual({site: norms[site] for site in fresh}, counted)
        there = [norms[site] for site in fresh if norms[site] > 0]
        middle = statistics.median_low(there) if there else 0.0
        self._memory.largest = max(self._memory.largest, middle)
        moving = {site for site in fresh if norms[site] > AT_REST * self._memory.largest}
        bounded = {site: min(norms[site], usual[site]) for site in fresh}
        factors = {site: _ratio(bounded[site], norms[site]) for site in fresh}
        given = {site: differences[site] for site in fresh}
        cosines = _cosines(given, factors, norms)
        opposed = _opposed(cosines)
        long = {
            site
            for site in moving
            if norms[site] > (LONG_AGAINST if site in opposed else NORM_FACTOR) * usual[site] > 0
        }
        against = _against(given, factors, norms, cosines, self._at_first(cosines)) & moving
        self._remember(counted, bounded, {marks[site]: site for site in fresh if norms[site] > 0})

        verdicts = []
        for site in sites:
            found: dict[Finding, bool] = {
                "norm": site in long,
                "direction": site in against,
                "weight": site in fresh and counts[site] < says[site],
                "replay": site in old,
            }
            factor = 0.0 if site in old else 1.0
            if site in against:
                factor = AGAINST_FACTOR * factors[site]
            elif site in long:
                factor = LONG_FACTOR * factors[site]
            taken = counts.get(site, 0) if self.acts else says[site]
            verdicts.append(
                Verdict(
                    site=site,
                    norm=norms[site],
                    usual_norm=usual.get(site, 0.0),
                    cosine=round(cosines[site], 4) if site in cosines else None,
                    slices=slices[site],
                    counted_slices=counted.get(site, 0) if self.acts else slices[site],
                    factor=factor if self.acts else 1.0,
                    weight=None if others is None else says[site],
                    counted_weight=None if others is None else taken,
                    findings=tuple(finding for finding, is_so in found.items() if is_so),
                )
            )
        return tuple(verdicts)

    def to_keep(self) -> dict[str, Any]:
        """What has to be known to go on after this round, as JSON types."""
        values: dict[str, Any] = _DECODE.dump_python(self._memory, mode="json")
        return values

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on from `to_keep`; from nothing where nothing was kept.

        Raises:
            ValueError: that is something else.
        """
        self._memory = _DECODE.validate_python(dict(kept))

    def _at_first(self, cosines: Mapping[str, float]) -> dict[str, float]:
        """Of each site the lowest of its first answers, this one included if it is one of them."""
        for site, cosine in cosines.items():
            lowest, number = self._memory.cosines.get(site, (1.0, 0))
            if number < FIRST_ROUNDS:
                self._memory.cosines[site] = (min(lowest, cosine), number + 1)
        return {site: self._memory.cosines[site][0] for site in cosines}

    def _counted(self, slices: Mapping[str, int]) -> dict[str, int]:
        """Slices that each site counts for."""
        known = {**self._memory.slices, **slices}
        return counted_slices(slices, known, self._recipe.confirmed_weights)

    def _weighed(self, weights: Mapping[str, int]) -> dict[str, int]:
        """What each site counts for, where that is no number of slices; it is remembered."""
        known = {**self._memory.weights, **weights}
        counted = counted_slices(weights, known, self._recipe.confirmed_weights)
        self._memory.weights |= counted
        return counted

    def _usual(self, norms: Mapping[str, float], counted: Mapping[str, int]) -> dict[str, float]:
        """The norm that is usual for each site; see above."""
        known, of = dict(norms), dict(counted)
        if len(known) < 3:
            known = {**self._memory.norms, **known}
            of = {**self._memory.slices, **of}
        steps = {site: math.ceil(of[site] / self._recipe.batch_size) for site in known}
        measures = {site: norm for site, norm in known.items() if norm > 0}
        return {
            site: statistics.median_low(
                norm * max(1.0, steps[site] / steps[other]) ** STEPS_POWER
                for other, norm in measures.items()
            )
            if measures
            else 0.0
            for site in norms
        }

    def _remember(
        self, counted: Mapping[str, int], norms: Mapping[str, float], seen: Mapping[str, str]
    ) -> None:
        self._memory.slices |= counted
        self._memory.norms |= norms
        self._memory.seen |= seen


def counted_slices(
    slices: Mapping[str, int], known: Mapping[str, int], confirmed: Collection[str]
) -> dict[str, int]:
    """Slices that each site of a round counts for; see *weight* above.

    Args:
        slices: that each training site says it trained on.
        known: the same, with those of sites that are known from earlier rounds.
        confirmed: sites whose number the recipe confirms.
    """
    if len(known) < 2:
        return dict(slices)
    middle = min(known.values()) if len(known) == 2 else statistics.median(known.values())
    instead = WEIGHT_FACTOR * middle if len(known) == 2 else max(1, round(middle))
    return {
        site: count if count <= WEIGHT_FACTOR * middle or site in confirmed else int(instead)
        for site, count in slices.items()
    }


def weigh(slices: Mapping[str, int], confirmed: Collection[str], *, acts: bool) -> list[Verdict]:
    """The sites of a secure sum that say they have far too much; of no other figure is any.

    Args:
        slices: of each training site in the sum, or what else it counts for.
        confirmed: sites whose number the recipe confirms.
        acts: whether they are left out.
    """
    counted = counted_slices(slices, slices, confirmed)
    return [
        Verdict(
            site=site,
            norm=0.0,
            usual_norm=0.0,
            cosine=None,
            slices=count,
            counted_slices=0 if acts else count,
            factor=0.0 if acts else 1.0,
            findings=("weight",),
        )
        for site, count in sorted(slices.items())
        if counted[site] < count
    ]


def close_round(
    guard: RoundGuard,
    strategy: Strategy,
    round_number: int,
    slices: Mapping[str, int],
    differences: Differences,
    weights: Mapping[str, int] | None = None,
) -> Closed:
    """What a round comes to: judged, then combined. The server and a study's loop both call it.

    Args:
        guard, strategy: of this job, with what they kept of the rounds before.
        round_number: from 0.
        slices: training slices of each site whose answer was taken; of a holdout any number.
        differences: site to its tensors by name, as `check_contribution` gave them; they may lie
            on a disk. None of a holdout.
        weights: as `RoundGuard.judge`.

    Raises:
        FederationError: bad-strategy; see `combine`.
    """
    verdicts = guard.judge(slices, differences, weights)
    return Closed(combine_judged(strategy, round_number, slices, differences, verdicts), verdicts)


def combine_judged(
    strategy: Strategy,
    round_number: int,
    slices: Mapping[str, int],
    differences: Differences,
    verdicts: Iterable[Verdict],
) -> dict[str, Tensor]:
    """What to add to the global model after a round that was judged before; see `close_round`.

    Args:
        verdicts: of each site that has a difference.
    """
    counted = {site: count for site, count in slices.items() if not differences.get(site)}
    taken: dict[str, Mapping[str, Tensor]] = {}
    for verdict in verdicts:
        if verdict.factor == 0:
            continue
        tensors = differences[verdict.site]
        counted[verdict.site] = verdict.counts_for
        taken[verdict.site] = tensors if verdict.factor == 1 else Scaled(tensors, verdict.factor)
    return combine(strategy, round_number, counted, taken)


def _opposed(cosines: Mapping[str, float]) -> set[str]:
    """The sites whose differences point against the others; nobody where all do, or of two."""
    found = {site for site, cosine in cosines.items() if cosine < AGAINST}
    return found if 2 < len(cosines) > len(found) else set()


def _against(
    differences: Differences,
    factors: Mapping[str, float],
    norms: Mapping[str, float],
    cosines: Mapping[str, float],
    at_first: Mapping[str, float],
) -> set[str]:
    """The sites that pointed against the others at the start, and do: a minority, one by one."""
    if len(differences) < 3 or not _opposed(cosines):
        return set()
    found: set[str] = set()
    rest = dict(cosines)
    while 2 * (len(found) + 1) < len(differences) and rest:
        below = sorted(site for site in rest if max(rest[site], at_first[site]) < AGAINST)
        if not below:
            break
        found.add(min(below, key=lambda site: at_first[site]))
        left = {site: differences[site] for site in differences if site not in found}
        if 2 * (len(found) + 1) < len(differences):
            rest = _cosines(left, factors, norms)
    return found


def _cosines(
    differences: Differences, factors: Mapping[str, float], norms: Mapping[str, float]
) -> dict[str, float]:
    """Of each site the cosine to the sum of the others, each of them times its factor.

    One pass sums up, a second compares: with d of a site, f its factor and S the sum of all, the
    others are S - f d, and all that is needed of them follows from d S, d d and S S.
    """
    total: dict[str, Tensor] = {}
    for site, tensors in differences.items():
        for name, tensor in tensors.items():
            if name not in total:
                total[name] = torch.zeros(tensor.shape, dtype=torch.float32)
            total[name].add_(tensor, alpha=factors[site])
    square = update_norm(total) ** 2
    cosines = {}
    for site, tensors in differences.items():
        with_all = sum(_dot(tensor, total[name]) for name, tensor in tensors.items())
        factor, norm = factors[site], norms[site]
        others = square - 2 * factor * with_all + (factor * norm) ** 2
        if others > 1e-12 * square and norm > 0:
            cosine = (with_all - factor * norm**2) / (norm * math.sqrt(others))
            cosines[site] = max(-1.0, min(1.0, cosine))
    return cosines


def _look(tensors: Mapping[str, Tensor]) -> tuple[float, str]:
    """L2 norm of a difference, and a mark that it has in common with equal ones alone.

    The mark is of the norm and the sum of each tensor, in fp64, which costs a tenth of a hash of
    all bytes. Whoever wants to repeat a difference unseen has only to change a bit of it anyway.
    """
    square, digest = 0.0, hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        square += norm**2
        digest.update(f"{name} {norm!r} {float(tensor.sum(dtype=torch.float64))!r}\n".encode())
    return math.sqrt(square), digest.hexdigest()[:_DIGITS]


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.float().reshape(-1), other.reshape(-1)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0
