"""The guard: what the server takes from a site into the average."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ContributionRefused
from fedfms.exchange.tensors import Shapes, find_fault, update_norm

NORM_TOLERANCE = 1e-3  # relative; what half precision may add to a difference clipped at the bound


def check_contribution(
    expected: Shapes,
    recipe: Recipe,
    package_version: str,
    tensors: Mapping[str, Tensor],
    contribution: Contribution,
) -> dict[str, Tensor]:
    """The site's difference as fp32, or a refusal that says why.

    Args:
        expected: names and shapes of the travelling tensors, of the server's own model.
        recipe: the job's recipe as the server has it.
        package_version: the server's own.
        tensors: as they came, fp32 or fp16; none from a holdout site.
        contribution: the site's report. That `contribution.site` is who sent it, the caller checks:
            only FLARE knows whose certificate it was.

    Raises:
        ContributionRefused: code other-version, other-recipe, other-backbone, wrong-role,
            no-training-slices, unknown-tensor, missing-tensor, wrong-type, wrong-shape, non-finite
            or too-large.
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
    if fault := find_fault(expected if expected_role == "train" else {}, tensors):
        code, problem = fault
        raise _refused(
            f"{site} sent tensors that cannot be averaged: {problem}",
            "look at the site's log of this round; with NaN, lower learning_rate in the recipe",
            code,
        )
    accepted = {name: tensors[name].float() for name in sorted(tensors)}
    norm, bound = update_norm(accepted), recipe.max_update_norm
    if bound is not None and norm > bound * (1 + NORM_TOLERANCE):
        raise _refused(
            f"{site} sent a difference with L2 norm {norm:.4g}, the recipe allows {bound:.4g}",
            "look at the site's loss; raise max_update_norm in the recipe if the norm is sound",
            "too-large",
        )
    return accepted


def _refused(problem: str, fix: str, code: str) -> ContributionRefused:
    return ContributionRefused(problem, fix, code=code)
