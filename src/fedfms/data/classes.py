"""From label values to the masks of a recipe's classes."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.prepared import Prepared
from fedfms.errors import SiteDataError


def unknown_classes(site: SiteConfig, classes: Sequence[str]) -> list[SiteDataError]:
    """One problem for each class of a recipe on which `site.yml` is silent."""
    known = [*site.classes, *site.not_annotated]
    problems = []
    for name in classes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(
                SiteDataError(
                    f"the job's class {name} is not in site.yml"
                    + (f"; did you mean {close[0]}?" if close else ""),
                    f"write {name}: [its label values] under classes in site.yml, or list it under "
                    "not_annotated if nobody drew it here",
                    code="unknown-class",
                )
            )
    return problems


def shared_values(site: SiteConfig, classes: Sequence[str]) -> list[SiteDataError]:
    """One problem for each two of these classes that a label value of the site means both.

    For recipes whose classes exclude each other.
    """
    problems = []
    for one, other in itertools.combinations(classes, 2):
        shared = sorted(set(site.classes.get(one, ())) & set(site.classes.get(other, ())))
        if shared:
            problems.append(
                SiteDataError(
                    f"in site.yml the label value {shared[0]} means {one} and {other}, and the "
                    "job's classes exclude each other (exclusive_classes)",
                    f"list {shared[0]} under one of them; if they do overlap, as a whole and its "
                    "part, the job needs exclusive_classes: false",
                    code="classes-share-values",
                )
            )
    return problems


def annotated(site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K,) bool: which of the recipe's classes were drawn at this site.

    Raises:
        SiteDataError: a class that `site.yml` neither maps nor lists as not annotated
            ("unknown-class"), or two that share a label value though they exclude each other
            ("classes-share-values").
    """
    problems = unknown_classes(site, recipe.classes)
    if recipe.exclusive_classes:
        problems += shared_values(site, recipe.classes)
    if problems:
        raise problems[0]
    return torch.tensor([name in site.classes for name in recipe.classes])


def class_masks(prepared: Prepared, site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K, D, H, W) bool at native size, in the order of `recipe.classes`.

    A class that is not annotated here is empty. Classes may overlap (a whole and its parts), unless
    the recipe's exclude each other.
    """
    annotated(site, recipe)
    return masks_of_labels(in_torch(prepared.labels), site, recipe)


def masks_of_labels(labels: Tensor, site: SiteConfig, recipe: Recipe) -> Tensor:
    """Label values of any shape to (K, that shape) bool; see `class_masks`."""
    return torch.stack([_holding(labels, site.classes.get(name, ())) for name in recipe.classes])


def in_torch(array: NDArray[Any]) -> Tensor:
    """An array as a tensor; one that may only be read, as a map of a file, is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _holding(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Where a label is one of the values; a long range costs no more than one value."""
    limits = torch.iinfo(labels.dtype)  # what the type cannot hold occurs nowhere
    runs = [
        (max(first, limits.min), min(last, limits.max))
        for first, last in _runs(values)
        if first <= limits.max and last >= limits.min
    ]
    if len(runs) > 16:
        held = [value for value in values if limits.min <= value <= limits.max]
        return torch.isin(labels, torch.tensor(held, dtype=labels.dtype))
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    for first, last in runs:
        mask |= (labels >= first) & (labels <= last)
    return mask


@functools.lru_cache(maxsize=64)  # asked for each slice, with up to 65535 values
def _runs(values: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The first and the last of values that follow each other, as (1, 3) and (7, 7) of 1 2 3 7."""
    runs: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if runs and runs[-1][1] == value - 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return tuple(runs)
