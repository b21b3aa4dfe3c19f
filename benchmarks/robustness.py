"""What one bad site does to a federation, and what the guard of a round finds in honest ones.

    python benchmarks/robustness.py attacks [--sites 3] [--strategy mean ...] [--inverted]
        [--rounds 4]
    python benchmarks/robustness.py honest [--data ../shared/data]

`--only NAME ...` does these rows alone.

The product's own trainer, door, guard and average, in one process and without FLARE: phantoms,
24 cases of 4 slices a site, 64 pixels, `jobs/fedmsa` with 4 rounds of 2 epochs, from a decoder with
random weights, so that all is to be learnt. `attacks` prints
the mean final Dice of the honest sites, beside that of the same sites where nobody attacks; with
`--inverted` the last of them has inverted contrast. `honest` prints, for federations in which
nobody attacks, how near anyone came to the guard's bounds; those of the hippocampus and of nuclei
need the folder of their images. Ends with 1 where an attack costs more
than 0.03 (0.05 for a turned sign times 5), or where an honest site was scaled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from in_process import ask, trainer_of
from torch import Tensor

from fedfms import __version__
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Verdict
from fedfms.errors import ContributionRefused, FedfmsError
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.round_guard import AGAINST, NORM_FACTOR, RoundGuard, close_round
from fedfms.exchange.strategies import find_strategy
from fedfms.exchange.tensors import fingerprint, shapes_of
from fedfms.local.synthetic import FEDERATION, write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling
from fedfms.records.scores import over_classes

REPOSITORY = Path(__file__).resolve().parents[1]
STYLES = ("noisy", "bright", "unseen")  # of the sites, over and over
CASES, SLICES, PIXELS, ROUNDS = 24, 4, 64, 4
BAD = "site-1"
ALLOWED, ALLOWED_FLIPPED = 0.03, 0.05

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a site sends."""

    tensors: Tensors
    contribution: Contribution


@dataclass(frozen=True, slots=True)
class Sent:
    """What a bad site has to work with."""

    honest: Answer
    model: Mapping[str, Tensor]  # that it received
    first: Answer  # its answer to the first round


def times(factor: float) -> Callable[[Sent], Answer]:
    """The honest difference times a factor."""

    def spoil(sent: Sent) -> Answer:
        tensors = {name: value * factor for name, value in sent.honest.tensors.items()}
        return dataclasses.replace(sent.honest, tensors=tensors)

    return spoil


def filled(sent: Sent) -> Answer:
    """Nearly the largest number of the type that travels, 3e38 of fp32, everywhere."""
    tensors = {
        name: torch.full_like(value, min(3e38, torch.finfo(value.dtype).max))
        for name, value in sent.honest.tensors.items()
    }
    return dataclasses.replace(sent.honest, tensors=tensors)


def heavy(factor: float) -> Callable[[Sent], Answer]:
    """The same with a claim of slices that nobody has."""

    def spoil(sent: Sent) -> Answer:
        said = dataclasses.replace(sent.honest.contribution, training_slices=10**9)
        return Answer(times(factor)(sent).tensors, said)

    return spoil


def against_the_model(sent: Sent) -> Answer:
    """Takes the model away, and more."""
    return dataclasses.replace(sent.honest, tensors={n: -3.0 * v for n, v in sent.model.items()})


def noise(sent: Sent) -> Answer:
    """Normal numbers, ten times as long as the honest difference."""
    generator = torch.Generator().manual_seed(sent.honest.contribution.round)
    drawn = {n: torch.randn(v.shape, generator=generator) for n, v in sent.honest.tensors.items()}
    norms = [
        sum(float(v.norm()) ** 2 for v in of.values()) ** 0.5 for of in (sent.honest.tensors, drawn)
    ]
    scale = 10 * norms[0] / norms[1]
    return dataclasses.replace(sent.honest, tensors={n: v * scale for n, v in drawn.items()})


def turned_after_a_round(sent: Sent) -> Answer:
    """An honest first round, and the sign turned from then on."""
    return sent.honest if sent.honest.contribution.round == 0 else times(-1)(sent)


def turned_later(sent: Sent) -> Answer:
    """Two honest rounds; then the sign turned, as long as passes for a norm."""
    return sent.honest if sent.honest.contribution.round < 2 else times(-2.9)(sent)


def replay(sent: Sent) -> Answer:
    """What this site sent first, as if it were of this round."""
    said = sent.honest.contribution
    return Answer(
        sent.first.tensors, dataclasses.replace(sent.first.contribution, round=said.round)
    )


ATTACKS: dict[str, Callable[[Sent], Answer]] = {
    "x 100": times(100),
    "weight 1e9": heavy(1),
    "weight 1e9, sign turned": heavy(-1),
    "sign turned": times(-1),
    "sign turned after one round": turned_after_a_round,
    "sign turned x 2.9 after two rounds": turned_later,
    "sign turned x 5": times(-5),
    "-3 x the model": against_the_model,
    "the largest number everywhere": filled,
    "replay of the first round": replay,
    "noise of 10 times the norm": noise,
    "x 10": times(10),
}


@dataclass(frozen=True, slots=True)
class Federation:
    """Who takes part, and what is learnt."""

    recipe: Recipe
    sites: Mapping[str, Path]
    images: Path | None = None  # with a folder for each site, where they do not lie in the site's


def write_federation(
    folder: Path,
    recipe: Recipe,
    cases: tuple[int, ...],
    seed: int = 0,
    styles: tuple[str, ...] = STYLES,
) -> Federation:
    """Phantom sites with so many cases each, whose scores leave from the first case on."""
    sites = {}
    for number, count in enumerate(cases):
        site = folder / f"site-{number + 1}"
        style = styles[number % len(styles)]
        write_phantom_site(site, style, cases=count, slices=SLICES, seed=seed * 10 + number)
        settings = yaml.safe_load((site / "site.yml").read_text())
        (site / "site.yml").write_text(yaml.safe_dump({**settings, "min_cases": 1, "workers": 0}))
        path = site / "policy" / "privacy.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "min_cases": 1}))
        sites[site.name] = site
    return Federation(recipe, sites)


def federate(
    federation: Federation,
    work: Path,
    attack: Callable[[Sent], Answer] | None,
    known: dict[tuple[str, ...], Answer] | None = None,
) -> tuple[dict[str, float], list[list[Verdict]], dict[str, str]]:
    """Run it; final Dice of each site, verdicts of each round, refusals by site.

    Args:
        known: what these sites answered to a model of these bytes in this round, of other runs
            with the same recipe but for guard and strategy; more is added.
    """
    known = {} if known is None else known
    recipe, names = federation.recipe, list(federation.sites)
    trainers = {
        name: trainer_of(
            site,
            work / name,
            site / "policy",
            data_root=federation.images / name if federation.images else None,
        )
        for name, site in federation.sites.items()
    }
    model = read_travelling(build_model(recipe, None))
    shapes, guard, strategy = shapes_of(model), RoundGuard(recipe), find_strategy(recipe)
    first: dict[str, Answer] = {}
    verdicts, refused = [], {}

    def answer_of(name: str, kind: Any, number: int) -> Answer:
        key = (name, kind, str(number), hashlib.sha256(fingerprint(model).encode()).hexdigest())
        if key in known:
            said = dataclasses.replace(known[key].contribution, recipe_sha256=recipe.sha256)
            return Answer(known[key].tensors, said)
        outcome = ask(trainers, name, kind, number, recipe, model)
        known[key] = Answer(dict(outcome.tensors), outcome.contribution)
        return known[key]

    for number in range(recipe.rounds):
        slices, taken = {}, {}
        for name in names:
            answer = answer_of(name, "train", number)
            first.setdefault(name, answer)
            if name == BAD and attack is not None:
                answer = attack(Sent(answer, model, first[name]))
            try:
                taken[name] = check_contribution(
                    shapes, recipe, __version__, answer.tensors, answer.contribution
                )
                slices[name] = answer.contribution.training_slices
            except ContributionRefused as error:
                refused[name] = error.code
        closed = close_round(guard, strategy, number, slices, taken)
        verdicts.append([*closed.verdicts])
        model = {name: model[name] + closed.change[name] for name in model}
    dice = {}
    for name in names:
        scored = answer_of(name, "evaluate", recipe.rounds).contribution
        found = over_classes(scored.metrics, "dice")
        dice[name] = found if found is not None else 0.0
    return dice, verdicts, refused


def mean_of_honest(dice: Mapping[str, float]) -> float:
    """Of all sites but the bad one, whether or not it attacks."""
    honest = [value for name, value in dice.items() if name != BAD]
    return sum(honest) / len(honest)


def told(verdicts: list[list[Verdict]], refused: Mapping[str, str]) -> dict[str, str]:
    """What a report would say of whom."""
    found: dict[str, list[str]] = {name: [code] for name, code in refused.items()}
    for of_round in verdicts:
        for one in of_round:
            for finding in one.findings:
                said = found.setdefault(one.site, [])
                if finding not in said:
                    said.append(finding)
    return {site: ", ".join(said) for site, said in sorted(found.items())}


def attacks(options: argparse.Namespace) -> bool:
    """Every attack at one federation; whether all stay within what is allowed."""
    plain = demo_recipe(seed=options.seed, rounds=options.rounds, evaluate_every=options.rounds)
    styles = [STYLES[number % len(STYLES)] for number in range(options.sites)]
    if options.inverted:
        styles[-1] = "inverted"
    good, known = True, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sites = write_federation(
            folder / "sites", plain, (CASES,) * options.sites, styles=tuple(styles)
        ).sites
        rows = {"nobody": None, **ATTACKS}
        tried = itertools.product(dict.fromkeys(["mean", *options.strategy]), rows.items())
        honest = None
        for number, (strategy, (name, attack)) in enumerate(tried):
            if attack is not None and strategy not in options.strategy:
                continue
            if attack is not None and options.only and name not in options.only:
                continue
            started = time.process_time()
            recipe = dataclasses.replace(plain, strategy=strategy)
            row = {"sites": options.sites, "strategy": strategy, "attack": name}
            try:
                dice, verdicts, refused = federate(
                    Federation(recipe, sites), folder / f"work-{number}", attack, known
                )
            except FedfmsError as error:  # what an attack did to honest trainers is the figure
                show(**row, dice=0.0, ended=error.code)
                good = False
                continue
            found = mean_of_honest(dice)
            honest = found if honest is None else honest
            allowed = ALLOWED_FLIPPED if name == "sign turned x 5" else ALLOWED
            said = told(verdicts, refused)
            good &= found >= honest - allowed and not [site for site in said if site != BAD]
            show(
                **row,
                dice=round(found, 3),
                less=round(honest - found, 3),
                of_sites={site: round(value, 3) for site, value in dice.items()},
                told=said,
                times=[[round(one.times, 2) for one in of_round] for of_round in verdicts],
                cosines=[
                    [one.cosine and round(one.cosine, 2) for one in of_round]
                    for of_round in verdicts
                ],
                cpu_s=round(time.process_time() - started, 1),
            )
    return good


def demo_recipe(**values: object) -> Recipe:
    """jobs/fedmsa as shipped, small."""
    recipe = Recipe.from_json(REPOSITORY / "jobs/fedmsa/app/config/recipe.json")
    return recipe.with_values(
        {"image_size": PIXELS, "rounds": ROUNDS, "evaluate_every": ROUNDS, **values},
        "benchmark",
    )


def honest_federations(folder: Path, data: Path) -> Iterator[tuple[str, Callable[[], Federation]]]:
    """By name; the sites of phantoms are written below the folder once they are asked for."""

    def phantoms(
        name: str, recipe: Recipe, cases: tuple[int, ...], seed: int = 0
    ) -> tuple[str, Callable[[], Federation]]:
        styles = tuple(FEDERATION.values())
        own = folder / name.replace(" ", "-")
        return name, functools.partial(write_federation, own, recipe, cases, seed, styles)

    confirmed = ["site-3"]
    yield phantoms("demo", demo_recipe(), (18, 18, 18))
    yield phantoms("demo, seed 1", demo_recipe(seed=1), (18, 18, 18), 1)
    yield phantoms("1 : 10 : 20", demo_recipe(confirmed_weights=confirmed), (2, 14, 28))
    yield phantoms("1 : 1 : 20", demo_recipe(confirmed_weights=confirmed), (2, 2, 28))
    yield phantoms("20 : 20 : 1", demo_recipe(), (28, 28, 2))
    yield phantoms("two sites", demo_recipe(), (12, 6))
    long = {"rounds": 40, "evaluate_every": 40}
    yield phantoms("demo, 40 rounds", demo_recipe(**long), (18, 18, 18))
    hard = demo_recipe(**long, local_epochs=4, batch_size=4)
    yield phantoms("40 rounds of 4 epochs in batches of 4", hard, (16, 16, 16))
    kept = demo_recipe(optimizer_state="keep", local_epochs=6)
    yield phantoms("optimizer kept, 6 epochs", kept, (16, 16, 16))
    fedsam = Recipe.from_json(REPOSITORY / "jobs/fedsam/app/config/recipe.json")
    fedsam = fedsam.with_values({"image_size": PIXELS, "rounds": ROUNDS}, "benchmark")
    yield phantoms("fedsam", fedsam, (18, 18, 18))
    # where nothing makes the inverted contrast of the third site like the others'
    plain = {"augment": False, "rounds": 14}
    yield phantoms("fedsam without augmentation", fedsam.with_values(plain, "x"), (18, 18, 18))
    yield phantoms("demo without augmentation", demo_recipe(**plain), (18, 18, 18))
    for method in ("fedmsa", "fedsam"):
        paper = Recipe.from_json(REPOSITORY / f"jobs/recipes/{method}-paper.json").with_values(
            {
                "backbone": "vit_demo",
                "backbone_sha256": fedsam.backbone_sha256,
                "image_size": PIXELS,
                "rounds": ROUNDS,
                "classes": ["lesion"],
                "site_order": [],
            },
            "benchmark",
        )
        yield phantoms(f"{method}-paper", paper, (24, 18, 16))
    for study, one, rounds in (("hippocampus", "hippocampus", 3), ("nuclei", "nucleus", ROUNDS)):
        sites = {
            path.parent.name: path.parent
            for path in sorted((REPOSITORY / "sites/examples" / study).glob("*/site.yml"))
        }
        if (data / study).is_dir():
            # 20 pictures of nuclei have 3 steps an epoch, below the policy of the example site
            epochs = 2 if study == "nuclei" else 1
            recipe = demo_recipe(classes=[one], rounds=rounds, local_epochs=epochs)
            yield study, functools.partial(Federation, recipe, sites, data / study)
        else:
            print(f"no {data / study}: {study} is left out", file=sys.stderr)


def honest(options: argparse.Namespace) -> bool:
    """Nobody attacks; whether nobody was scaled."""
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, make in honest_federations(folder / "sites", options.data):
            if options.only and name not in options.only:
                continue
            started = time.process_time()
            dice, verdicts, _ = federate(make(), folder / name.replace(" ", "-"), None)
            everyone = [one for of_round in verdicts for one in of_round]
            found = [one for one in everyone if one.findings]
            good &= not found
            show(
                federation=name,
                slices=[one.slices for one in verdicts[0]],
                rounds=len(verdicts),
                most_times=round(max(one.times for one in everyone), 2),
                bound_times=NORM_FACTOR,
                lowest_cosine=min(one.cosine for one in everyone if one.cosine is not None),
                bound_cosine=AGAINST,
                found=told(verdicts, {}),
                cosines=[
                    [one.cosine and round(one.cosine, 2) for one in of_round]
                    for of_round in verdicts
                ],
                dice=round(sum(dice.values()) / len(dice), 3),
                cpu_s=round(time.process_time() - started, 1),
            )
    return good


def show(**values: object) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


def main() -> None:
    """What the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("attacks", "honest"))
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--strategy", nargs="+", default=["mean"])
    parser.add_argument("--inverted", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.exit(0 if {"attacks": attacks, "honest": honest}[options.what](options) else 1)


if __name__ == "__main__":
    main()
