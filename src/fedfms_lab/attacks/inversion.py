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

from fedfms.contracts.recipe import Recipe
from fedfms.errors import DoorClosed
from fedfms.training.loop import ShuffledBatches, learning_rate
from fedfms_lab.attacks.matching import Matcher
from fedfms_lab.attacks.sites import OPEN, AttackedSite, averaged, first_model, for_phantoms

_TOKENS = "image_encoder.pos_embed"
_PATCHES = "image_encoder.patch_embed.proj.weight"
# singular values below this share of the largest are left out; who attacks does not know the best
CUTOFFS = (1e-3, 1e-2, 3e-2, 1e-1)
_BETA = 0.9  # Adam's first


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One attack."""

    name: str
    recipe: Mapping[str, Any]  # what it changes in the job's recipe
    policy: Mapping[str, Any]
    cases: int  # of each site; seven in ten train
    slices: int  # of each case
    rounds: int
    same_model: bool  # whether each round comes with the same weights
    order_from_seed: bool
    remembers: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What an attack came to."""

    setting: str
    refused: str  # the sentence of the refusal; empty where the site answered
    rounds: int  # answered
    slices: int  # of the attacked site, to train on
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


def settings(policy: Mapping[str, Any], rounds: int) -> list[Setting]:
    """The attack as it was found, and what is left of it as one measure after the other is added.

    Args:
        policy: a site's, to be tried.
        rounds: of each attack; at least the slices of a site, for mixtures that can be undone.
    """
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
        "patient_rate": None,
        "patient_clip_norm": None,
        "patient_noise": 0.0,
    }
    inside = {**found, "clip_grad_norm": 0.1, "learning_rate": 1e-3, "batch_size": 4}
    inside["local_epochs"] = 2
    few: dict[str, Any] = {"cases": 4, "slices": 2, "rounds": rounds}
    enough: dict[str, Any] = {"cases": 15, "slices": 1, "rounds": rounds}
    noised = {**inside, "clip_grad_norm": None, "patient_rate": 0.5}
    noised |= {"patient_clip_norm": 1.0, "patient_noise": 1.0}
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
            **{"recipe": found, "policy": policy, "same_model": True, **few, **at_work},
        ),
        Setting(
            name="a recipe within bounds, the same model each round",
            **{"recipe": inside, "policy": policy, "same_model": True, **enough, **at_work},
        ),
        Setting(
            name="a recipe within bounds, the same model each round, known order, no history",
            **{"recipe": inside, "policy": policy, "same_model": True, **enough, **known},
        ),
        Setting(
            name="a recipe within bounds, averaged models",
            **{"recipe": inside, "policy": policy, "same_model": False, **enough, **at_work},
        ),
        Setting(
            name="as the first, the whole difference clipped to 1, noise of 0.01",
            **{"recipe": found, "policy": noise_alone, "same_model": True, **few, **known},
        ),
        Setting(
            name="patients drawn, clipped to 1, noise of 1, averaged models",
            **{"recipe": noised, "policy": policy, "same_model": False, **enough, **at_work},
        ),
        Setting(
            name="the job's own recipe, averaged models",
            recipe={"rounds": rounds, "evaluate_first": rounds},
            **{"policy": policy, "same_model": False, **enough, **at_work},
        ),
    ]


def attack(job: Recipe, setting: Setting, folder: Path, *, others: int) -> Finding:
    """Attack several phantom sites of one kind, and know of each by the others what is chance.

    Args:
        job: in small pictures; with a patch embedding that travels, of so many tokens as the
            encoder has channels, or fewer.
        setting: what to try.
        folder: for the sites.
        others: sites beside each attacked one; with 20, the largest is about the 95 % quantile.
    """
    recipe = for_phantoms(dataclasses.replace(job, **setting.recipe))
    sites = [
        AttackedSite(
            folder / f"site-{number}",
            cases=setting.cases,
            slices=setting.slices,
            seed=number,
            policy=setting.policy,
            order_from_seed=setting.order_from_seed,
            remembers=setting.remembers,
        )
        for number in range(1 + others)
    ]
    truth = [site.slices(recipe) for site in sites]
    model = first_model(recipe)
    matcher = None if _PATCHES in model else Matcher(recipe, folder / "public")
    if matcher is not None:
        model = matcher.first_model()
    names = tuple(model) if matcher is not None else (_TOKENS, _PATCHES)
    answers: list[list[dict[str, Tensor]]] = [[] for _ in sites]
    models = []
    refused = ""
    for number in range(setting.rounds):
        try:
            came = [site.ask(recipe, number, model) for site in sites]
        except DoorClosed as error:
            refused = f"{error.problem} ({error.code})"
            break
        models.append(model)
        for kept, one in zip(answers, came, strict=True):
            kept.append({name: one.tensors[name].double() for name in names})
        if not setting.same_model:
            model = averaged(model, came)
    slices = len(truth[0][0])
    of_it = Finding(setting.name, refused, len(models), slices)
    if not models:
        return of_it
    shown, outlines = [], []
    for given in answers:
        if matcher is None:
            shown.append(reconstruct(given, recipe, slices))
            continue
        if setting.same_model and len(given) >= slices:
            by_slice = unmixed(given, recipe, slices)
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


def reconstruct(answers: Sequence[Mapping[str, Tensor]], recipe: Recipe, slices: int) -> Tensor:
    """Pictures from a site's differences, (P, S, S): what each round shows, and what each slice.

    Args:
        answers: of each round the difference of `pos_embed` (1, H, W, C) and of the patch
            embedding's weight (C, 3, p, p), fp64.
        recipe: whose public order is taken for the order of the slices.
        slices: how many the site trains on; the averaging weight tells.
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
    answers: Sequence[Mapping[str, Tensor]], recipe: Recipe, slices: int
) -> dict[str, Tensor]:
    """What each slice added to a site's differences, (slices, ...), as `reconstruct` takes them."""
    undo = torch.linalg.pinv(torch.from_numpy(mixtures(recipe, slices, len(answers))))
    return {
        name: torch.tensordot(undo, values, dims=1) for name, values in _stacked(answers).items()
    }


def _stacked(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}


def mixtures(recipe: Recipe, slices: int, rounds: int) -> NDArray[np.float64]:
    """How much of each slice's gradient is in each round's difference, where Adam is linear.

    (rounds, slices), up to a common factor: the sum over steps t, from the slice's step s on, of
    lr_t (1 - b) b^(t - s) / (1 - b^(t + 1)), Kingma and Ba 2015, Algorithm 1, without the root.
    """
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
    scaled: NDArray[np.float64] = found / found.max()
    return scaled


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
