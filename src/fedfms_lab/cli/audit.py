"""The command that attacks the product: what a site's policy lets a coordinator find out."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedfms.cli.common import (
    AsJson,
    Checkpoints,
    Job,
    Overrides,
    RecipeFile,
    out,
    progress,
)
from fedfms_lab.cli import PANEL

if TYPE_CHECKING:
    from fedfms_lab.attacks.inversion import Finding
    from fedfms_lab.attacks.membership import Told
    from fedfms_lab.attacks.single_cases import Recovered

commands = typer.Typer()


@commands.command("audit-privacy", rich_help_panel=PANEL)
def audit_privacy(
    job: Job,
    policy: Annotated[
        Path | None,
        typer.Option(help="A site's policy folder. Otherwise a policy of nothing but defaults."),
    ] = None,
    recipe_file: RecipeFile = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    checkpoints: Checkpoints = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each attack on pictures.")] = 12,
    others: Annotated[
        int, typer.Option(min=1, help="Other sites, by whose answers chance is known.")
    ] = 8,
    only: Annotated[
        list[int],
        typer.Option(min=1, metavar="N", help="Number of an attack on pictures; may be repeated."),
    ] = [],  # noqa: B006 - typer reads it and does not change it
    as_json: AsJson = False,
) -> None:
    """Attack sites of phantoms by a recipe and under a policy; print what came out.

    Pictures are looked for by gradient inversion: of fedsam out of SAM's patch embedding, of other
    methods by matching gradients, with their outlines; ask for small ones (--set image_size=64).
    Scores of single patients are looked for in what is told of several, and who was there in the
    loss of the job's final model. Of a recipe with secure_sum the sum of three sites is attacked.
    Exit code 1 if an attack under the policy shows anything, or one could not be made.
    """
    from fedfms.contracts.machine import Machine
    from fedfms.contracts.policy import Policy
    from fedfms.contracts.recipe import read_job_recipe
    from fedfms.models.sam import find_checkpoint
    from fedfms_lab.attacks.inversion import attack, settings
    from fedfms_lab.attacks.membership import attack_members
    from fedfms_lab.attacks.single_cases import all_single_cases
    from fedfms_lab.attacks.sites import OPEN

    recipe = read_job_recipe(job, recipe_file, overrides)
    checkpoints = checkpoints or Machine.from_environment().checkpoints
    find_checkpoint(recipe, checkpoints)  # before anything is made
    values: dict[str, Any] = {}
    if policy is not None:
        values = dataclasses.asdict(Policy.from_folder(policy))
    found: list[Finding] = []
    with tempfile.TemporaryDirectory() as name, progress(as_json) as on_progress:
        numbered = {
            n: one
            for n, one in enumerate(settings(recipe, values, rounds), 1)
            if not only or n in only
        }
        chosen = list(numbered.values())

        def tell(number: int) -> None:
            if on_progress is not None:
                on_progress("attack", number, len(chosen) + 3)

        for number, setting in enumerate(chosen):
            tell(number)
            folder = Path(name) / str(number)
            found.append(attack(recipe, setting, folder, others=others, checkpoints=checkpoints))
        cases = {}
        for number, (whose, rules) in enumerate((("no bounds", OPEN), ("the policy", values))):
            tell(len(chosen) + number)
            cases[whose] = all_single_cases(recipe, rules, Path(name) / whose, checkpoints)
        tell(len(chosen) + 2)
        told = attack_members(recipe, values, Path(name) / "members", checkpoints)
    under = [one for one, setting in zip(found, chosen, strict=True) if setting.remembers]
    failed = bool(told.shows_something or told.not_attacked)
    failed |= any(one.shows_something or one.not_attacked for one in under)
    failed |= any(one.shows_something or one.not_attacked for one in cases["the policy"])
    if as_json:
        out.print_json(
            json.dumps(
                {
                    "pictures": [dataclasses.asdict(one) for one in found],
                    "cases": {k: [dataclasses.asdict(o) for o in v] for k, v in cases.items()},
                    "members": dataclasses.asdict(told),
                }
            )
        )
    else:
        _show(list(numbered), found, cases, told)
    raise typer.Exit(1 if failed else 0)


def _show(
    numbers: list[int], found: list[Finding], cases: dict[str, list[Recovered]], told: Told
) -> None:
    """In lines and not in a table, whose columns no terminal has room for."""
    out.print(
        "pictures out of answers: correlation with the site's slices, and by chance (95 % quantile "
        "over other sites)"
    )
    for number, one in zip(numbers, found, strict=True):
        out.print(f"{number:>3}  {one.setting}")
        figures = [
            f"{what} {value:.2f} (by chance {chance:.2f})"
            for what, value, chance in (
                ("median", one.median, one.median_by_chance),
                ("largest", one.largest, one.largest_by_chance),
                ("outline", one.outline, one.outline_by_chance),
            )
            if value == value
        ]
        why = _why(one.refused, one.not_attacked)
        rounds = f"{one.rounds} round{'' if one.rounds == 1 else 's'} answered"
        out.print(f"     {rounds}{': ' * bool(figures)}{', '.join(figures)}")
        if why:
            out.print(f"     {why}")
    if any(one.sums_of > 1 for one in found):
        out.print(f"secure_sum: each figure is of the sum of {found[0].sums_of} sites")
    out.print("Dice of single patients out of what is told of several")
    for whose, attacks in cases.items():
        out.print(f"  under {whose}")
        for attempt in attacks:
            what_left = attempt.told or _why("", attempt.not_attacked)
            follows = "" if attempt.not_attacked else ": none follows"
            if attempt.error is not None and not attempt.not_attacked:
                follows = f": it follows, {attempt.error:.4f} off"
            out.print(f"     {attempt.attack}{follows} ({what_left})")
    if told.refused or told.not_attacked:
        out.print(f"who was there: {_why(told.refused, told.not_attacked)}")
    else:
        out.print(
            f"who was there: AUC {told.auc:.2f} ± {told.half_width:.2f} (0.5 is guessing) after "
            f"{told.rounds} rounds; {told.members} members, {told.others} others"
        )


def _why(refused: str, not_attacked: str) -> str:
    """Why there is no figure, or none of more rounds: the policy's doing, or the bench's."""
    if not_attacked:
        return f"not attacked: {not_attacked}"
    return f"refused: {refused}" if refused else ""
