"""`fedfms verify`: whether a finished run is what it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedfms.cli.common import AsJson, Checkpoints, out, progress, styled

if TYPE_CHECKING:
    from fedfms.report.verify import Check

commands = typer.Typer()

_STUDY = "Of a study's run"
_SHOWN = 20  # problems of one check
_STUDY_RUN = "run.json"  # that a folder of the laboratory's has, whether or not it is installed


@commands.command()
def verify(
    run: Annotated[
        Path,
        typer.Argument(help="A results folder, or a run's folder below runs/ in a study's folder."),
    ],
    kit: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDFMS_KIT",
            help="Any kit of the project: its authority is the one that signatures have to be of. "
            "Without it, compare the fingerprint that is printed.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="What the server kept of the run's answers, where it was told to (KEEP_ANSWERS): "
            "each round is closed again and compared with the models. Without it, answers/ in the "
            "run's folder."
        ),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key of each site's trainer, as the site read it off the "
            'trainer\'s log: {"site-1": "64 digits"}, as in policy/peers.json. Without it, keys '
            "are printed and compared with nothing."
        ),
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder for each site.", rich_help_panel=_STUDY),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with each site's images in a folder of the site's name.",
            rich_help_panel=_STUDY,
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Of scores computed again, in [0, 1], and mm or pixels.", rich_help_panel=_STUDY
        ),
    ] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Check a finished run: each line of its records, seal, receipts, models, tables and report.

    Where the server kept the sites' answers, each round is closed again from them. Of a study's
    run: its files, its images, and its scores computed again from the model. Exit code 1 if a line
    says FAIL.
    """
    with progress(as_json) as on_progress:
        checks = _checks(
            run,
            kit,
            answers,
            peers,
            {
                "sites": sites,
                "data": data,
                "checkpoints": checkpoints,
                "tolerance": tolerance,
                "on_progress": on_progress,
            },
        )
    if as_json:
        out.print_json(json.dumps([dataclasses.asdict(check) for check in checks]))
    else:
        for check in checks:
            _show(check)
    if any(check.problems for check in checks):
        raise typer.Exit(1)


def _checks(
    run: Path,
    kit: Path | None,
    answers: Path | None,
    peers: Path | None,
    options: dict[str, Any],
) -> list[Check]:
    from fedfms.contracts.machine import Machine
    from fedfms.contracts.peers import read_peers
    from fedfms.errors import ConfigError
    from fedfms.kits.kit import read_kit
    from fedfms.plugins import find_part, installed
    from fedfms.report.verify import GROUP, OtherRuns, verify_run

    for name in installed(GROUP, {}):
        other = find_part(OtherRuns, GROUP, {}, "check of runs", name)()
        if other.is_one(run):
            here = Machine.from_environment().checkpoints
            return other.verify(run, **options | {"checkpoints": options["checkpoints"] or here})
    if (run / _STUDY_RUN).is_file():
        raise ConfigError(
            f"{run} is a run of a study, and their check is in the package fedfms-lab, which is "
            "not here",
            "install it beside this one, from the same checkout: pip install ./src/fedfms_lab "
            "(in containers: the image's target lab)",
            code="no-laboratory",
        )
    project = read_kit(kit) if kit is not None else None
    keys = read_peers(peers) if peers is not None else None
    return verify_run(run, project, answers, keys)


def _show(check: Check) -> None:
    verdict = ("PASS", "bold green") if check.looked else ("SKIP", "bold yellow")
    if check.warnings:
        verdict = ("WARN", "bold yellow")
    if check.problems:
        verdict = ("FAIL", "bold red")
    out.print(styled(verdict, " ", check.what))
    for line in check.note.splitlines():
        out.print(styled("     ", (line, "dim")))
    said = [*check.problems, *check.warnings]
    for problem in said[:_SHOWN]:
        out.print(f"     {problem}")
    if len(said) > _SHOWN:
        out.print(f"     and {len(said) - _SHOWN} more")
