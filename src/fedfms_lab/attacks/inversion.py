"""Pictures out of differences: gradient inversion of SAM's patch embedding, by linear algebra.

Where it does not travel, as with FedMSA, matching.py looks for them; the rest is the same.

The gradient of `pos_embed` is the error E of each token, (T, C); that of `patch_embed.proj.weight`
is E^T X, where X (T, 3 p^2) are the patches of the picture. With as many channels as tokens, or
more, X follows by least squares. An exact gradient of one slice is what a coordinator gets where
the gradient is so small that Adam's epsilon outweighs it: then Adam is linear, and a round's
difference is a known mixture of the gradients of its steps. So many rounds on the same model, each
in another known order, as there are slices, and the mixtures can be undone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.sums import LEAST_SITES
from fedfms.errors import FedfmsError
from fedfms.training.loop import ShuffledBatches, learning_rate
from fedfms_lab.attacks.matching import Matcher
from fedfms_lab.attacks.sites import (
    OPEN,
    Attacked,
    AttackedSite,
    Refusal,
    averaged,
    cases_for,
    enough_patients,
    first_model,
    for_phantoms,
)

_TOKENS = "image_encoder.pos_embed"
_PATCHES = "image_encoder.patch_embed.proj.weight"
# singular values below this share of the largest are left out; who attacks does not know the best
CUTOFFS = (1e-3, 1e-2, 3e-2, 1e-1)
_BETA = 0.9  # Adam's first
_EPSILON = 1e-8  # Adam's; beside a gradient far below it Adam divides by a constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One attack."""

    name: str
    recipe: Mapping[str, Any]  # what it changes in the job's recipe
    policy: Mapping[str, Any]
    patients: int  # of each site, to train on; three in ten more validate
    slices: int  # of each case
    rounds: int
    same_model: bool  # whether each round comes with the same weights
    order_from_seed: bool
    remembers: bool
    new_recipes: bool = False  # whether each round comes by a recipe of its own, with another seed


@dataclass(frozen=True, slots=True)
class Finding:
    """What an attack came to."""

    setting: str
    refused: str  # the sentence of the policy's refusal; empty where the site answered
    rounds: int  # answered
    slices: int  # of the attacked site, or of all in a sum, to train on
    not_attacked: str = ""  # why there was no attack, where it was not the policy that refused
    sums_of: int = 1  # sites of which only the sum is seen
    # correlation with the site's slices after the best public guess was taken out of both: of the
    # slices, each with the picture that fits it best
    median: float = math.nan
    largest: float = math.nan
    # the same of pictures from other sites' answers: 95 % quantiles over these sites
    median_by_chance: float = math.nan
    largest_by_chance: float = math.nan
    # of outlines, where gradients are matched; likewise
    outline: float = math.nan
    outline_by_chance: float = math.nan
    above_chance: int = 0  # sites of which any figure is beyond its quantile
    sites: int = 0  # attacked, each in turn; the figures are means over them

    @property
    def shows_something(self) -> bool:
        """Whether it is more than chance."""
        return (
            self.median > self.median_by_chance
            or self.largest > self.largest_by_chance
            or self.outline > self.outline_by_chance
        )


def settings(job: Recipe, policy: Mapping[str, Any], rounds: int) -> list[Setting]:
    """The attack as it was found, and what is left of it as one measure after the other is added.

    Args:
        job: whose own recipe is tried too.
        policy: a site's, to be tried: each value of the recipe at its bound where that helps who
            attacks, and sites of as few patients as it allows.
        rounds: of each attack; at least the slices of a site, for mixtures that can be undone.
    """
    allowed = Policy(**policy)
    rounds = min(rounds, allowed.max_rounds)
    found: dict[str, Any] = {
        "clip_grad_norm": 1e-12,
        # it makes up for a gradient that is clipped to nothing, against the rounding of fp32
        "learning_rate": 100.0,
        "batch_size": 1,
        "local_epochs": 1,
        "schedule": "constant",
        "warmup_steps": 0,
        "rounds": rounds,
        "evaluate_first": rounds,
        "loss": "bce",
        "transfer_precision": "fp32",
        "optimizer_state": "reset",
        "patient_rate": None,
        "patient_clip_norm": None,
        "patient_noise": 0.0,
    }
    inside = {**found, **at_the_bounds(allowed)}
    few: dict[str, Any] = {"patients": 3, "slices": 2, "rounds": rounds}
    as_found = {**few, "patients": max(3, allowed.min_training_patients)}
    found_here = {
        **found,
        "local_epochs": math.ceil(allowed.min_steps / (2 * as_found["patients"])),
    }
    enough: dict[str, Any] = {"patients": allowed.min_training_patients, "slices": 1}
    enough["rounds"] = rounds
    rate = min(1.0, max(0.5, allowed.min_batch_size / allowed.min_training_patients))
    noised = {**inside, "clip_grad_norm": None, "patient_rate": rate}
    noised["learning_rate"] = min(max(1e-3, allowed.min_learning_rate), allowed.max_learning_rate)
    noised |= {"patient_clip_norm": max(1.0, allowed.min_clip_grad_norm), "patient_noise": 1.0}
    noised["local_epochs"] = max(inside["local_epochs"], math.ceil(allowed.min_steps * rate))
    drawn = {**enough, "patients": max(enough["patients"], allowed.min_batch_size)}
    own: dict[str, Any] = {"rounds": rounds, "evaluate_first": rounds}
    of_own = {**enough, "patients": enough_patients(policy, dataclasses.replace(job, **own))}
    noise_alone = {**OPEN, "clip_norm": 1.0, "noise_std": 0.01}
    known: dict[str, Any] = {"order_from_seed": True, "remembers": False}
    at_work: dict[str, Any] = {"order_from_seed": False, "remembers": True}
    return [
        Setting(
            name="no bounds, known order, the same model each round",
            **{"recipe": found, "policy": OPEN, "same_model": True, **few, **known},
        ),
        Setting(
            name="the same, in an order that nobody knows",
            **{"recipe": found, "policy": OPEN, "same_model": True, **few},
            order_from_seed=False,
            remembers=False,
        ),
        Setting(
            name="the same recipe, under the policy",
            **{"recipe": found_here, "policy": policy, "same_model": True, **as_found, **at_work},
        ),
        Setting(
            name="a recipe at the policy's bounds, the same model each round",
            **{"recipe": inside, "policy": policy, "same_model": True, **enough, **at_work},
        ),
        Setting(
            name="a recipe at the bounds, the same model each round, known order, no history",
            **{"recipe": inside, "policy": policy, "same_model": True, **enough, **known},
        ),
        Setting(
            name="a recipe at the bounds, averaged models",
            **{"recipe": inside, "policy": policy, "same_model": False, **enough, **at_work},
        ),
        Setting(
            name="at the bounds, the same model, each time by another recipe",
            **{"recipe": inside, "policy": policy, "same_model": True, **enough, **at_work},
            new_recipes=True,
        ),
        Setting(
            name="as the first, the whole difference clipped to 1, noise of 0.01",
            **{"recipe": found, "policy": noise_alone, "same_model": True, **few, **known},
        ),
        Setting(
            name="patients drawn, clipped to 1, noise of 1, averaged models",
            **{"recipe": noised, "policy": policy, "same_model": False, **drawn, **at_work},
        ),
        Setting(
            name="the job's own recipe, averaged models",
            **{"recipe": own, "policy": policy, "same_model": False, **of_own, **at_work},
        ),
    ]


def at_the_bounds(policy: Policy) -> dict[str, Any]:
    """Values of a recipe that a policy allows, each where it shows most of a slice.

    Of a loose policy these are the ones with which the attack was found.
    """
    clip = max(1e-12, policy.min_clip_grad_norm)
    # with so small a gradient Adam is linear, and rounding is what a large rate makes up for
    rate = 100.0 if clip < _EPSILON else 1e-3
    steps = math.ceil(policy.min_training_patients / policy.min_batch_size)  # of an epoch
    epochs = math.ceil(policy.min_steps / steps)
    return {
        "clip_grad_norm": clip,
        "learning_rate": min(max(rate, policy.min_learning_rate), policy.max_learning_rate),
        "batch_size": policy.min_batch_size,
        "local_epochs": min(epochs, policy.max_local_epochs),
        "positive_weight": min(max(2.0, policy.min_positive_weight), policy.max_positive_weight),
    }


def attack(
    job: Recipe,
    setting: Setting,
    folder: Path,
    *,
    others: int,
    checkpoints: Path | None = None,
) -> Finding:
    """Attack several phantom sites of one kind, and know of each by the others what is chance.

    Of a recipe with `secure_sum` the server has sums only: then what is attacked is the sum of
    three sites, the fewest that there may be, and chance is known by sums of three others.

    Args:
        job: in small pictures; with a patch embedding that travels, of so many tokens as the
            encoder has channels, or fewer.
        setting: what to try.
        folder: for the sites.
        others: sites beside each attacked one; with 20, the largest is about the 95 % quantile.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
    """
    recipe = for_phantoms(dataclasses.replace(job, **setting.recipe))
    together = LEAST_SITES if recipe.sums_only else 1
    made = [
        AttackedSite(
            folder / f"site-{number}",
            cases=cases_for(setting.patients),
            slices=setting.slices,
            seed=number,
            policy=setting.policy,
            order_from_seed=setting.order_from_seed,
            remembers=setting.remembers,
            checkpoints=checkpoints,
            name=f"site-{number}",
        )
        for number in range((1 + others) * together)
    ]
    sites = [Attacked(made[n : n + together]) for n in range(0, len(made), together)]
    each = [[site.slices(recipe) for site in one.sites] for one in sites]
    sizes = [[len(images) for images, _ in one] for one in each]
    truth = [tuple(map(torch.cat, zip(*one, strict=True))) for one in each]
    model = first_model(recipe, checkpoints)
    matcher = None if _PATCHES in model else Matcher(recipe, folder / "public", checkpoints)
    if matcher is not None:
        model = matcher.first_model()
    names = tuple(model) if matcher is not None else (_TOKENS, _PATCHES)
    answers: list[list[dict[str, Tensor]]] = [[] for _ in sites]
    models = []
    why = Refusal("", "")
    for number in range(setting.rounds):
        asked = recipe
        if setting.new_recipes:
            asked = dataclasses.replace(recipe, seed=recipe.seed + number)
        try:
            came = [one.ask(asked, number, model) for one in sites]
        except FedfmsError as error:
            why = Refusal.of(error, size_is_given=recipe.patient_rate is not None)
            break
        models.append(model)
        for kept, one in zip(answers, came, strict=True):
            kept.append({name: one.tensors[name].double() for name in names})
        if not setting.same_model:
            model = averaged(model, came)
    slices = len(truth[0][0])
    of_it = Finding(setting.name, why.by_policy, len(models), slices, why.not_attacked, together)
    if not models:
        return of_it
    shown, outlines = [], []
    for given, of_site in zip(answers, sizes, strict=True):
        if matcher is None:
            shown.append(reconstruct(given, recipe, of_site))
            continue
        if setting.same_model and len(given) >= slices:
            by_slice = unmixed(given, recipe, of_site)
            given = [{name: by_slice[name][n] for name in names} for n in range(slices)]
        pictures, drawn = matcher.found(given, models[: len(given)])
        shown.append(pictures)
        outlines.append(drawn)
    figures = [_against_chance(shown, [images.mean(dim=1) for images, _ in truth])]
    if outlines:
        figures.append(_against_chance(outlines, [target[:, 0] for _, target in truth])[:, :, :1])
    own, chance = np.concatenate(figures, axis=2)  # (sites, figures) each
    means = [
        float(value) for pair in zip(own.mean(0), chance.mean(0), strict=True) for value in pair
    ]
    median, median_by_chance, largest, largest_by_chance, *of_outlines = means
    outline, outline_by_chance = of_outlines or (math.nan, math.nan)
    return dataclasses.replace(
        of_it,
        median=median,
        largest=largest,
        outline=outline,
        median_by_chance=median_by_chance,
        largest_by_chance=largest_by_chance,
        outline_by_chance=outline_by_chance,
        above_chance=int((own > chance).any(axis=1).sum()),
        sites=len(sites),
    )


def _against_chance(shown: Sequence[Tensor], truth: Sequence[Tensor]) -> NDArray[np.float64]:
    """Median and largest fit of each site's images, and what is chance: (2, sites, 2).

    Args:
        shown: what each site's answers show, (P, S, S) each.
        truth: what each has, (N, S, S) each.
    """
    own, chance = [], []
    for number, images in enumerate(truth):
        public = torch.cat([one for n, one in enumerate(truth) if n != number]).mean(dim=0)
        fits = [best_fits(one, images, public) for one in shown]
        figures = np.array([(np.median(one), one.max()) for one in fits])
        own.append(figures[number])
        chance.append(np.quantile(np.delete(figures, number, axis=0), 0.95, axis=0))
    return np.array([own, chance])


def reconstruct(
    answers: Sequence[Mapping[str, Tensor]], recipe: Recipe, slices: Sequence[int]
) -> Tensor:
    """Pictures from a site's differences, (P, S, S): what each round shows, and what each slice.

    Args:
        answers: of each round the difference of `pos_embed` (1, H, W, C) and of the patch
            embedding's weight (C, 3, p, p), fp64.
        recipe: whose public order is taken for the order of the slices.
        slices: how many the site trains on, or each one in a sum; the averaging weight tells.
    """
    stacked = _stacked(answers)
    by_slice = unmixed(answers, recipe, slices)
    pictures = [
        picture(group[_TOKENS][number], group[_PATCHES][number], cutoff)
        for group in (stacked, by_slice)
        for number in range(len(group[_TOKENS]))
        for cutoff in CUTOFFS
    ]
    return torch.stack(pictures)


def unmixed(
    answers: Sequence[Mapping[str, Tensor]], recipe: Recipe, slices: Sequence[int]
) -> dict[str, Tensor]:
    """What each slice added to a site's differences, (slices, ...), as `reconstruct` takes them."""
    undo = torch.linalg.pinv(torch.from_numpy(mixtures(recipe, slices, len(answers))))
    return {
        name: torch.tensordot(undo, values, dims=1) for name, values in _stacked(answers).items()
    }


def _stacked(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}


def mixtures(recipe: Recipe, slices: Sequence[int], rounds: int) -> NDArray[np.float64]:
    """How much of each slice's gradient is in each round's difference, where Adam is linear.

    (rounds, slices), up to a common factor: the sum over steps t, from the slice's step s on, of
    lr_t (1 - b) b^(t - s) / (1 - b^(t + 1)), Kingma and Ba 2015, Algorithm 1, without the root. Of
    several sites, one after the other, each weighed by its slices as in their average.
    """
    whole = np.concatenate([one * _mixtures(recipe, one, rounds) for one in slices], axis=1)
    scaled: NDArray[np.float64] = whole / whole.max()
    return scaled


def _mixtures(recipe: Recipe, slices: int, rounds: int) -> NDArray[np.float64]:
    found = np.zeros((rounds, slices))
    for number in range(rounds):
        batches = ShuffledBatches(slices, recipe, number)
        steps = len(batches)
        for step, batch in enumerate(batches):
            weight = sum(
                learning_rate(recipe, number * steps + later, steps)
                * (1 - _BETA)
                * _BETA ** (later - step)
                / (1 - _BETA ** (later + 1))
                for later in range(step, steps)
            )
            for item in batch:
                found[number, item] += weight / len(batch)
    return found


def picture(tokens: Tensor, patches: Tensor, cutoff: float) -> Tensor:
    """The picture of which these are the gradients, grey, (S, S).

    Args:
        tokens: of `pos_embed`, (1, H, W, C).
        patches: of the patch embedding's weight, (C, 3, p, p).
        cutoff: see CUTOFFS.
    """
    _, rows, columns, channels = tokens.shape
    side = patches.shape[-1]
    errors = tokens.reshape(-1, channels).T  # (C, T)
    found = torch.linalg.pinv(errors, rtol=cutoff) @ patches.reshape(channels, -1)  # (T, 3 p^2)
    grey = found.reshape(rows, columns, 3, side, side).mean(dim=2)
    whole: Tensor = grey.permute(0, 2, 1, 3).reshape(rows * side, columns * side)
    return whole


def best_fits(pictures: Tensor, truth: Tensor, public: Tensor) -> NDArray[np.float64]:
    """Of each true slice the correlation with the picture that fits it best.

    What the best public guess explains is taken out of both sides: partial correlation.

    Args:
        pictures: (P, S, S), in any scale.
        truth: (N, S, S).
        public: (S, S), the mean slice of other sites.
    """
    known = torch.stack([torch.ones_like(public), public]).reshape(2, -1).double()
    basis, _ = torch.linalg.qr(known.T)  # (S^2, 2), orthonormal

    def rest(images: Tensor) -> Tensor:
        flat = images.double().flatten(1)
        left = flat - flat @ basis @ basis.T
        normed: Tensor = left / left.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return normed

    best: NDArray[np.float64] = (rest(truth) @ rest(pictures).T).amax(dim=1).numpy()
    return best
