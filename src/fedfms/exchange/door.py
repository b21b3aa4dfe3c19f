"""The door: what may leave a site, by the site's own policy. Closed when in doubt.

Runs in the trainer, on everything that the trainer hands to the process with the network. What is
not named here does not pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedfms.contracts.contribution import (
    MAX_PICTURE_BYTES,
    MAX_PICTURES,
    Contribution,
    Metric,
)
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.errors import ConfigError, ContributionRefused, DoorClosed
from fedfms.exchange.bounds import check_recipe
from fedfms.exchange.noise import random_normal
from fedfms.exchange.pictures import is_plain_png
from fedfms.exchange.tensors import (
    Shapes,
    difference,
    find_coded_fault,
    find_fault,
    from_wire,
    to_precision,
    update_norm,
)

DECIMALS = 3  # of scores and losses that leave; the site's own table has them in full
_SLICE_METRICS = {"dice_slice", "iou_slice"}


def check_job(policy: Policy, recipe: Recipe, *, trains: bool = True) -> None:
    """Whether the policy lets this recipe run here at all; asked before any computing.

    Args:
        policy: the site's own.
        recipe: the job's.
        trains: whether the site is to train by it, and not only to score.

    Raises:
        DoorClosed: code no-policy, method-not-allowed, or one of `check_recipe`.
    """
    if not isinstance(policy, Policy):
        raise DoorClosed(
            "there is no policy",
            "put privacy.json into the site's policy folder",
            code="no-policy",
        )
    if recipe.method not in policy.methods:
        raise DoorClosed(
            f"the site's policy allows {' and '.join(policy.methods)}, not {recipe.method}",
            f"add {recipe.method} to methods in privacy.json, if the site agrees to such jobs",
            code="method-not-allowed",
        )
    if policy.require_secure_sum and trains and not (recipe.secure_sum or recipe.canary):
        raise DoorClosed(
            "the site's policy trains only where the server sees sums",
            "submit the recipe with --set secure_sum=true, or ask the site to set "
            "require_secure_sum to false in privacy.json",
            code="sum-required",
        )
    check_recipe(policy, recipe, trains=trains)


def pass_door(
    policy: Policy,
    site: SiteConfig,
    recipe: Recipe,
    expected: Shapes,
    tensors: Mapping[str, Tensor],
    contribution: Contribution,
    unsent: dict[str, Tensor] | None = None,
    still: Collection[str] = (),
) -> tuple[dict[str, Tensor], Contribution]:
    """What leaves the site of one task, exactly as it leaves.

    Args:
        policy: the site's own.
        site: its `min_cases` counts where it is larger than the policy's.
        recipe: the job's.
        expected: the travelling tensors and their shapes.
        tensors: the round's difference, fp32 on the CPU; empty for an evaluation or a holdout.
        contribution: the report about it.
        unsent: what eight bits took from this site's differences until now, fp32 by name, or empty
            (error feedback, Seide et al. 2014, Interspeech; Karimireddy et al. 2019, arXiv
            1901.09847). It is added to the difference before that is clipped, and is replaced,
            in place, by what is taken from what leaves now: after clipping and noise, so that
            nothing that a policy takes away comes back. None: nothing is added or noted.
        still: names of tensors that this site does not move, by the recipe alone: zeros leave,
            without noise, which there is nothing to hide by.

    Returns:
        The difference, scaled to `policy.clip_norm` and with noise where the policy says so, in the
        recipe's transfer precision; the report without any figure over too few cases, and with the
        L2 norm of the difference as sent. Means leave in three decimals, a spread over at least
        `min_cases_for_spread` cases, and a count below `min_cases` as 0. The noise is drawn from
        the operating system's random source, so that nobody who knows the recipe can subtract it.
        What it costs is counted by who lets it out (trainer/budget.py). Of a canary, whose
        difference has passed all of this: zeros of the same names, shapes and types, and a report
        of pace alone.

    Raises:
        DoorClosed: anything that is not exactly right; the codes of `check_job` and `find_fault`,
            tensors-not-asked-for, malformed-report, other-recipe, fp16-overflow.
    """
    check_job(policy, recipe, trains=False)
    report = _checked_report(recipe, contribution)
    gives_tensors = report.kind == "train" and report.role == "train"
    check_job(policy, recipe.at(report.site), trains=gives_tensors)
    if not gives_tensors and tensors:
        raise _ours(
            "an evaluation or a holdout site gives no tensors", code="tensors-not-asked-for"
        )
    leaving: dict[str, Tensor] = {}
    if gives_tensors:
        _check_tensors(expected, tensors)
        try:
            bound = recipe.max_update_norm if recipe.sums_only else None
            leaving = _clipped_and_noised(policy, _clipped(_with_unsent(tensors, unsent), bound))
            leaving |= {name: torch.zeros_like(leaving[name]) for name in still}
            leaving = _coded(recipe, leaving, unsent)
        except ConfigError as error:
            raise DoorClosed(error.problem, error.fix, code=error.code) from None
        _check_tensors(expected, leaving, coded=recipe.transfer_precision == "int8")
    if recipe.canary:
        return {name: torch.zeros_like(t) for name, t in leaving.items()}, _of_a_canary(report)
    smallest = max(policy.min_cases, site.min_cases)
    # of training cases, and without noise: no word of it where patients were promised noise
    may_say_loss = report.training_cases >= smallest and recipe.patient_rate is None
    for_spread = max(smallest, policy.min_cases_for_spread)
    return leaving, dataclasses.replace(
        report,
        rehearsal=None,
        metrics=tuple(_of_many_cases(report, m, smallest, for_spread) for m in report.metrics),
        training_cases=_coarse(report.training_cases, smallest),
        evaluated_cases=_coarse(report.evaluated_cases, smallest),
        left_out=_coarse(report.left_out, smallest),
        left_out_by_reason=_by_reason(report, smallest),
        loss=_rounded(report.loss) if may_say_loss else None,
        # of a sum nobody sees a part, nor how long it is
        update_norm=update_norm(from_wire(leaving))
        if gives_tensors and not recipe.sums_only
        else None,
    )


def _of_a_canary(report: Contribution) -> Contribution:
    """The report without all that hangs on the few cases: no score, loss, norm or time of them."""
    trains = report.kind == "train" and report.role == "train"
    return dataclasses.replace(
        report,
        training_slices=1 if trains else 0,  # its weight among zeros
        training_cases=1 if trains else 0,
        evaluated_cases=0,
        left_out=0,
        left_out_by_reason={},
        metrics=(),
        loss=None,
        seconds={},
        peak_memory_bytes={},
        update_norm=0.0 if trains else None,
    )


def pass_pictures(policy: Policy, recipe: Recipe, pictures: Sequence[bytes]) -> list[bytes]:
    """The pictures that may leave: none unless the policy says so, and then pixels only.

    None of a canary.

    Raises:
        DoorClosed: code picture; too many, too large, no PNG, or a PNG with more than pixels in it.
    """
    if not policy.pictures or recipe.canary:
        return []
    if len(pictures) > MAX_PICTURES or any(len(p) > MAX_PICTURE_BYTES for p in pictures):
        raise _ours("there are too many pictures, or one is too large", code="picture")
    for picture in pictures:
        if not is_plain_png(picture):
            raise _ours("a picture is no PNG, or holds more than pixels", code="picture")
    return list(pictures)


def _checked_report(recipe: Recipe, contribution: Contribution) -> Contribution:
    try:
        report = Contribution.from_dict(contribution.to_dict())
    except ContributionRefused as error:
        raise _ours(error.problem, code="malformed-report") from None
    except Exception as error:
        raise _ours(
            f"the report cannot be read: {type(error).__name__}", code="malformed-report"
        ) from error
    if any(metric.class_name not in recipe.classes for metric in report.metrics):
        raise _ours(
            "the report names a class that the recipe does not have", code="malformed-report"
        )
    if (report.recipe_sha256, report.backbone_sha256) != (recipe.sha256, recipe.backbone_sha256):
        raise _ours("the report is about another recipe", code="other-recipe")
    return report


def _with_unsent(
    tensors: Mapping[str, Tensor], unsent: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    if not unsent:
        return tensors
    return {name: tensor.float() + unsent[name] for name, tensor in tensors.items()}


def _coded(
    recipe: Recipe, leaving: Mapping[str, Tensor], unsent: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    coded = to_precision(leaving, recipe.transfer_precision)
    if unsent is not None and recipe.transfer_precision == "int8":
        lost = difference(leaving, from_wire(coded))
        unsent.clear()
        unsent.update(lost)
    return coded


def _check_tensors(expected: Shapes, tensors: Mapping[str, Tensor], *, coded: bool = False) -> None:
    if fault := (find_coded_fault if coded else find_fault)(expected, tensors):
        code, problem = fault
        raise DoorClosed(
            f"the round's result may not leave: {problem}",
            "if the loss is NaN, lower learning_rate in the recipe",
            code=code,
        )


def _clipped_and_noised(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if policy.clip_norm is None:
        return dict(tensors)
    within = _clipped(tensors, policy.clip_norm)
    if policy.noise_std == 0:
        return within
    spread = policy.noise_std * policy.clip_norm
    return {name: t + spread * random_normal(t.shape) for name, t in within.items()}


def _clipped(tensors: Mapping[str, Tensor], bound: float | None) -> dict[str, Tensor]:
    """Tensors scaled so that their L2 norm is at most the bound; None: as they are."""
    if bound is None:
        return dict(tensors)
    norm = update_norm(tensors)
    scale = min(1.0, bound / norm) if norm > 0 else 1.0
    return {name: tensor.float() * scale for name, tensor in tensors.items()}


def _of_many_cases(report: Contribution, metric: Metric, smallest: int, for_spread: int) -> Metric:
    """The metric in three decimals, or its name alone where too few cases are behind it.

    Its spread only over more cases, and no count from which one of few cases follows. The slices of
    one volume are one case: a slice metric counts the cases of its class's Dice.
    """
    whole = next(
        (m for m in report.metrics if (m.class_name, m.metric) == (metric.class_name, "dice")),
        None,
    )
    by_slice = metric.metric in _SLICE_METRICS
    cases = metric.cases if not by_slice else whole.cases if whole is not None else 0
    if report.evaluated_cases < smallest:  # then even the number of empty ones is about a case
        return dataclasses.replace(metric, mean=None, std=None, cases=0, empty=0)
    # those without a value, those that are empty, those whose score stays: of fewer than `smallest`
    # nothing is told
    total = metric.cases + metric.empty if by_slice else report.evaluated_cases
    empty = _coarse(metric.empty, smallest)
    counted = _coarse(metric.cases, smallest)
    if 0 < total - metric.cases < smallest:
        counted = total
    if cases < smallest:
        return dataclasses.replace(metric, mean=None, std=None, cases=counted, empty=empty)
    return dataclasses.replace(
        metric,
        mean=_rounded(metric.mean),
        std=_rounded(metric.std) if cases >= for_spread else None,
        cases=counted,
        empty=empty,
    )


def _by_reason(report: Contribution, smallest: int) -> dict[str, int]:
    """Reasons of enough cases; none from which, with all together, one of few would follow."""
    shown = {
        reason: count
        for reason, count in sorted(report.left_out_by_reason.items())
        if count >= smallest
    }
    while shown and 0 < report.left_out - sum(shown.values()) < smallest:
        del shown[min(shown, key=lambda reason: shown[reason])]
    return shown


def _coarse(count: int, smallest: int) -> int:
    """A count that leaves: 0 stands for any that is smaller than `smallest`."""
    return count if count >= smallest else 0


def _rounded(value: float | None) -> float | None:
    """A mean that leaves; more digits would tell one case from the difference of two means."""
    return None if value is None else round(value, DECIMALS)


def _ours(problem: str, *, code: str) -> DoorClosed:
    """What no site can mend."""
    return DoorClosed(problem, "report this as an error in fedfms", code=code)
