"""Federated averaging in a plain loop, without FLARE, trainer or exchange: what a run must equal.

McMahan et al. 2017, Algorithm 1, arXiv 1602.05629, with every site in every round. In numpy, and in
the same arithmetic as a run, so that both agree to the last bit: Adam turns a difference in the
last bit, where a gradient is next to nothing, into one of 1e-5 a round later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.training.loop import train_round

UNITS = 2**36  # of 1: sums are of integers


def federated_average(
    recipe: Recipe,
    sites: Path,
    names: Sequence[str],
    *,
    gone: Mapping[int, str] | None = None,
    changes: dict[tuple[str, int], np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The travelling tensors after the recipe's rounds, and each site's number of slices.

    Args:
        gone: of a round the site whose answer does not arrive.
        changes: is filled with each site's difference of each round, as it travelled, tensors in
            the order of names.
    """
    torch.set_num_threads(1)  # as the phantoms' site.yml says
    model = build_model(recipe, find_checkpoint(recipe, None))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    datasets = {}
    for name in names:
        site = SiteConfig.from_yaml(sites / name / "site.yml")
        cases = prepare_cases(find_cases(site), site, Control())
        training = [case for case in cases if case.case.split == "train"]
        datasets[name] = (SliceDataset(training, site, recipe), site)
    slices = {name: len(dataset) for name, (dataset, _) in datasets.items()}
    weights = {name: slices[name] for name in sorted(names)}
    if recipe.paper_compat:  # two decimals, and the rest for the last site
        *others, last = weights
        weights = {name: round(slices[name] / sum(slices.values()) * 100) for name in others}
        weights[last] = 100 - sum(weights.values())
    average = {key: p.detach().numpy().copy() for key, p in learning.items()}
    unsent: dict[str, dict[str, np.ndarray]] = {}
    for number in range(recipe.rounds):
        total = {key: np.zeros(value.shape, np.int64) for key, value in average.items()}
        arrived = [name for name in sorted(names) if name != (gone or {}).get(number)]
        received = {key: travelled(average[key], recipe) for key in average}
        for name in sorted(names):
            for key, parameter in learning.items():
                parameter.data.copy_(torch.from_numpy(received[key]))
            dataset, site = datasets[name]
            train_round(
                model,
                dataset,
                recipe,
                site,
                round_number=number,
                optimizer=None,
                control=Control(),
            )
            wanted = {key: p.detach().numpy() - received[key] for key, p in learning.items()}
            if recipe.transfer_precision == "int8" and name in unsent:
                wanted = {key: wanted[key] + unsent[name][key] for key in wanted}
            change = {key: travelled(wanted[key], recipe) for key in wanted}
            unsent[name] = {key: wanted[key] - change[key] for key in wanted}
            if changes is not None:
                parts = [change[key].reshape(-1) for key in sorted(change)]
                changes[name, number] = np.concatenate(parts)
            if name in arrived:
                for key in average:
                    units = np.rint(change[key].astype(np.float64) * UNITS).astype(np.int64)
                    total[key] += weights[name] * units
        for key in average:
            mean = total[key] / (UNITS * sum(weights[name] for name in arrived))
            average[key] = average[key] + mean.astype(np.float32)
    return average, slices


def travelled(values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """What arrives of a tensor in the recipe's transfer precision, in fp32; new values."""
    if recipe.transfer_precision == "fp32":
        return values.copy()
    lengths = np.cumprod(values.shape[::-1]) if values.ndim > 1 else []
    length = next((int(n) for n in lengths if n >= 64), None)
    if recipe.transfer_precision == "fp16" or length is None:
        return values.astype(np.float16).astype(np.float32)
    rows = values.reshape(-1, length)
    steps = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    mantissa, exponent = np.frexp(steps.astype(np.float64))
    steps = np.ldexp(np.ceil(mantissa * 2**16) / 2**16, exponent).astype(np.float32)
    divisors = np.where(steps > 0, steps, np.float32(1))
    return (np.rint(rows / divisors) * steps).reshape(values.shape)


def largest_difference(path: Path, expected: dict[str, np.ndarray]) -> float:
    """Between a model file and named arrays; they must have the same names."""
    from safetensors.numpy import load_file

    found = load_file(path)
    assert set(found) == set(expected)
    return max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
