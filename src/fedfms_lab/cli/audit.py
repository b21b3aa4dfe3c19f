"""The command that attacks the product: what a site's policy lets a coordinator find out."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

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
        chosen = [
            one
            for n, one in enumerate(settings(recipe, values, rounds), 1)
            if not only or n in only
        ]

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
        _show(found, cases, told)
    raise typer.Exit(1 if failed else 0)


def _show(found: list[Finding], cases: dict[str, list[Recovered]], told: Told) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    chance = "by chance"
    for heading in (
        *("pictures", "rounds", "median", chance, "largest", chance, "outline", chance, ""),
    ):
        table.add_column(heading, justify="left" if heading in ("pictures", "") else "right")
    for one in found:
        figures = (
            *(one.median, one.median_by_chance, one.largest, one.largest_by_chance),
            *(one.outline, one.outline_by_chance),
        )
        table.add_row(
            one.setting,
            str(one.rounds),
            *("–" if value != value else f"{value:.2f}" for value in figures),
            _why(one.refused, one.not_attacked),
        )
    out.print(table)
    if any(one.sums_of > 1 for one in found):
        out.print(f"secure_sum: each figure is of the sum of {found[0].sums_of} sites")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("single patients", "under", "what left", "error of the Dice that follows"):
        table.add_column(heading)
    for whose, attacks in cases.items():
        for attempt in attacks:
            error = "none follows" if attempt.error is None else f"{attempt.error:.4f}"
            if attempt.not_attacked:
                error = "–"
            told_of_it = attempt.told or _why("", attempt.not_attacked)
            table.add_row(attempt.attack, whose, told_of_it, error)
    out.print(table)
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
