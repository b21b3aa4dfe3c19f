"""From label values to the masks of a recipe's classes."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.prepared import Labels, Prepared
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


def unknown_contrasts(site: SiteConfig, recipe: Recipe) -> list[SiteDataError]:
    """What of a recipe's contrasts `site.yml` cannot give; or that it gives several unasked."""
    if not recipe.contrasts and not site.contrasts:
        return []
    there = ", ".join(site.contrasts) or "one image of a case, without a name"
    if not recipe.contrasts:
        return [
            SiteDataError(
                f"the job asks for one image of a case, and site.yml has the contrasts {there}",
                "name those that it learns from with --set contrasts=NAME,NAME in the job; one is "
                "enough",
                code="unknown-contrast",
            )
        ]
    unknown = [name for name in recipe.contrasts if name not in site.contrasts]
    if not unknown or (site.missing_contrast != "refuse" and len(unknown) < len(recipe.contrasts)):
        return []
    return [
        SiteDataError(
            f"the job's contrast {unknown[0]} is not in site.yml, which has {there}",
            f"write {unknown[0]}: and the glob of its images under contrasts in site.yml; where "
            "nobody took it, missing_contrast: mean lets the others stand for it",
            code="unknown-contrast",
        )
    ]


def annotated(site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K,) bool: which of the recipe's classes were drawn at this site.

    Raises:
        SiteDataError: a class that `site.yml` neither maps nor lists as not annotated
            ("unknown-class"), or two that share a label value though they exclude each other
            ("classes-share-values"), or a contrast that it does not have ("unknown-contrast").
    """
    problems = unknown_classes(site, recipe.classes)
    if recipe.exclusive_classes:
        problems += shared_values(site, recipe.classes)
    problems += unknown_contrasts(site, recipe)
    if problems:
        raise problems[0]
    return torch.tensor([name in site.classes for name in recipe.classes])


def annotated_in(key: str, site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K,) bool: `annotated`, without the classes that nobody drew in this case.

    Args:
        key: of the case.
    """
    drawn = annotated(site, recipe)
    for name, globs in (site.not_annotated_in or {}).items():
        if name in recipe.classes and any(fnmatch.fnmatchcase(key, glob) for glob in globs):
            drawn[recipe.classes.index(name)] = False
    return drawn


def void_of_labels(labels: Labels, site: SiteConfig) -> NDArray[np.bool_]:
    """Of label values of any shape, which are void."""
    return np.isin(labels, sorted(site.void_values))


def planes_of_labels(
    labels: Labels, site: SiteConfig, recipe: Recipe, *, with_void: bool
) -> Tensor:
    """Label values of any shape to (K, that shape) bool: `masks_of_labels`; or K + 1, void last.

    Under void pixels no class is.
    """
    masks = masks_of_labels(labels, site, recipe)
    if not with_void:
        return masks
    return torch.cat([masks, torch.from_numpy(void_of_labels(labels, site))[None]])


def class_masks(prepared: Prepared, site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K, D, H, W) bool at native size, in the order of `recipe.classes`.

    A class that is not annotated here is empty. Classes may overlap (a whole and its parts), unless
    the recipe's exclude each other.
    """
    annotated(site, recipe)
    return masks_of_labels(prepared.labels, site, recipe)


def masks_of_labels(labels: Labels, site: SiteConfig, recipe: Recipe) -> Tensor:
    """Label values of any shape to (K, that shape) bool; see `class_masks`."""
    masks = [np.isin(labels, site.classes.get(name, ())) for name in recipe.classes]
    return torch.from_numpy(np.stack(masks))
