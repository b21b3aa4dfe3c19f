"""The guard: what the server takes from a site, each answer by itself.

How differences of one round compare with one another is seen when it closes (`round_guard`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ContributionRefused
from fedfms.exchange.averaging import LARGEST_VALUE
from fedfms.exchange.tensors import (
    Shapes,
    find_coded_fault,
    find_fault,
    find_masked_fault,
    from_wire,
    largest_value,
    update_norm,
)

# relative; what half precision may add to a difference clipped at the bound, and eight bits
NORM_TOLERANCE, NORM_TOLERANCE_INT8 = 1e-3, 1e-2
METRIC_TOLERANCE = 1e-6  # of a mean of values in [0, 1], by rounding


def check_contribution(
    expected: Shapes,
    recipe: Recipe,
    package_version: str,
    tensors: Mapping[str, Tensor],
    contribution: Contribution,
) -> dict[str, Tensor]:
    """The site's difference as fp32, or a refusal that says why.

    With the recipe's `secure_sum` it is masked: names, shapes and type are all that can be checked.

    Args:
        expected: names and shapes of the travelling tensors, of the server's own model.
        recipe: the job's recipe as the server has it.
        package_version: the server's own.
        tensors: as they came, fp32, fp16, or in the recipe's eight bits; none from a holdout site.
        contribution: the site's report. That `contribution.site` is who sent it, the caller checks:
            only FLARE knows whose certificate it was.

    Raises:
        ContributionRefused: code other-version, other-recipe, other-backbone, wrong-role,
            no-training-slices, metric-range, unknown-tensor, missing-tensor, wrong-type,
            wrong-shape, wrong-coding, non-finite, value-too-large or too-large.
    """
    site = contribution.site
    if contribution.package_version != package_version:
        raise _refused(
            f"{site} runs fedfms {contribution.package_version}, the server {package_version}",
            "start the same image at the server and every site",
            "other-version",
        )
    if contribution.recipe_sha256 != recipe.sha256:
        raise _refused(
            f"{site} worked with another recipe",
            "abort the job and submit it again; every party has to run the same recipe.json",
            "other-recipe",
        )
    if contribution.backbone_sha256 != recipe.backbone_sha256:
        raise _refused(
            f"{site} started from another backbone",
            "give the site the checkpoint whose SHA-256 is the recipe's backbone_sha256",
            "other-backbone",
        )
    expected_role = "holdout" if site in recipe.holdout else "train"
    if contribution.kind != "train" or contribution.role != expected_role:
        raise _refused(
            f"{site} answered a round as {contribution.role} ({contribution.kind}), "
            f"the recipe says {expected_role}",
            "list exactly the sites that only evaluate under holdout in the recipe",
            "wrong-role",
        )
    if expected_role == "train" and contribution.training_slices < 1:
        raise _refused(
            f"{site} trained on no slice",
            "look at the site's labels with: fedfms check-data",
            "no-training-slices",
        )
    check_metrics(contribution)
    shapes = expected if expected_role == "train" else {}
    if recipe.sums_only:
        fault = find_masked_fault(shapes, tensors, recipe.secure_sum_bits)
    elif recipe.transfer_precision == "int8":
        fault = find_coded_fault(shapes, tensors)
    else:
        fault = find_fault(shapes, tensors)
    if fault:
        code, problem = fault
        raise _refused(
            f"{site} sent tensors that cannot be averaged: {problem}",
            "look at the site's log of this round; with NaN, lower learning_rate in the recipe",
            code,
        )
    if recipe.sums_only:
        return {name: tensors[name] for name in sorted(tensors)}
    decoded = from_wire(tensors)
    accepted = {name: decoded[name].float() for name in sorted(decoded)}
    for name, tensor in accepted.items():
        if largest_value(tensor) > LARGEST_VALUE:
            raise _refused(
                f"{site} sent a difference with a value beyond {LARGEST_VALUE:g} in {name}",
                "look at the site's log of this round; no training comes to such a value",
                "value-too-large",
            )
    norm, bound = update_norm(accepted), recipe.max_update_norm
    is_int8 = recipe.transfer_precision == "int8"
    tolerance = NORM_TOLERANCE_INT8 if is_int8 else NORM_TOLERANCE
    if bound is not None and norm > bound * (1 + tolerance):
        raise _refused(
            f"{site} sent a difference with L2 norm {norm:.4g}, the recipe allows {bound:.4g}",
            "look at the site's loss; raise max_update_norm in the recipe if the norm is sound",
            "too-large",
        )
    return accepted


def check_metrics(contribution: Contribution) -> None:
    """Refuse scores that no prediction can have.

    Raises:
        ContributionRefused: code metric-range. Dice and IoU are in [0, 1], and their standard
            deviation in [0, 0.5]; a distance is not negative, as its deviation.
    """
    for metric in contribution.metrics:
        most, widest = (math.inf, math.inf) if metric.metric == "hd95" else (1.0, 0.5)
        for value, bound in ((metric.mean, most), (metric.std, widest)):
            if value is not None and not 0 <= value <= bound + METRIC_TOLERANCE:
                raise _refused(
                    f"{contribution.site} reports {_named(metric)} outside [0, {bound:g}]",
                    "run the same version of fedfms at the server and every site",
                    "metric-range",
                )


def _named(metric: Metric) -> str:
    return f"a {metric.metric} of {metric.class_name}"


def _refused(problem: str, fix: str, code: str) -> ContributionRefused:
    return ContributionRefused(problem, fix, code=code)
