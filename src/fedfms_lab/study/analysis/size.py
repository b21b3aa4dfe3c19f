"""How often intervals exclude 0 where two ways to train do not differ: by simulation.

A difference of Dice is drawn as that of a patient (sd `CASE_SD`) plus that of a run, which all
patients of a site share. What is asked of the tables so drawn is what the page of a study asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfms_lab.study.analysis.statistics import PatientDifference, interval

CASE_SD = 0.02  # Dice; of patients, as in the studies in results/

Tables = Sequence[NDArray[np.float64]]  # of each site, (patients, seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a simulated study has."""

    sites: int
    patients: int  # at each site
    shared: bool = True  # whether a run does better or worse at all sites alike, or at each anew
    skewed: bool = False  # patients as a centred exponential distribution in place of a normal one


def draw(layout: Layout, run_sd: float, seeds: int, generator: np.random.Generator) -> Tables:
    """One study in which nothing differs: (patients, seeds) of each site, one case a patient.

    Args:
        run_sd: standard deviation of the difference between one run's Dice and another's.
    """
    of_runs = generator.normal(0.0, run_sd, (layout.sites, seeds))
    if layout.shared:
        of_runs[:] = of_runs[0]
    shape = (layout.sites, layout.patients, 1)
    if layout.skewed:
        of_patients = CASE_SD * (generator.exponential(1.0, shape) - 1.0)
    else:
        of_patients = generator.normal(0.0, CASE_SD, shape)
    return list(of_patients + of_runs[:, None, :])


def excludes_zero(tables: Tables) -> bool:
    """Whether the page's interval over all sites excludes 0; not where it gives none."""
    sites = {
        str(number): [PatientDifference(tuple(row), 1) for row in table.tolist()]
        for number, table in enumerate(tables)
    }
    found = interval(sites)
    return found is not None and found.excludes_zero


def share_excluding_zero(
    layout: Layout,
    run_sd: float,
    seeds: int,
    *,
    trials: int,
    seed: int,
    rule: Callable[[Tables], bool] = excludes_zero,
) -> float:
    """Of so many simulated studies the share in which a rule finds a difference; nominal 0.05."""
    generator = np.random.default_rng(seed)
    hits = sum(rule(draw(layout, run_sd, seeds, generator)) for _ in range(trials))
    return hits / trials
