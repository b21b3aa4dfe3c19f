"""The command for studies: many runs that answer one question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedfms.cli.common import Checkpoints, err, out, styled
from fedfms.contracts.machine import Machine
from fedfms_lab.cli import PANEL

if TYPE_CHECKING:
    from fedfms_lab.study.runner import StudyProgress

commands = typer.Typer()

SitesOption = Annotated[
    Path | None,
    typer.Option("--sites", help="Folder with one folder for each site. Goes before the file's."),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder with each site's images in a folder of the site's name."),
]


@commands.command(rich_help_panel=PANEL)
def study(
    file: Annotated[Path, typer.Argument(help="A study, such as studies/demo.yml.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the study. Otherwise workspace/studies/NAME.")
    ] = None,
    sites: SitesOption = None,
    data: DataOption = None,
    engine: Annotated[
        Literal["flare", "loop"] | None,
        typer.Option(help="Of federated runs: FLARE, or a plain averaging loop."),
    ] = None,
    only: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="Only runs with this in their name; may be repeated."),
    ] = [],  # noqa: B006 - typer reads it and does not change it
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side. Otherwise as many as fit."),
    ] = None,
    checkpoints: Checkpoints = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs and do none.")] = False,
) -> None:
    """Run a study: federated and other training, and whether it paid, for whom, at what cost.

    Starting it again goes on where it was stopped; a finished run is never repeated.
    """
    from fedfms.report.words import numerals
    from fedfms_lab.study.page.write import write_answer
    from fedfms_lab.study.plan import Study
    from fedfms_lab.study.runner import PHANTOMS_FOLDER, run_study

    asked = Study.from_yaml(file, sites=sites, data=data, engine=engine)
    folder = output or Path("workspace/studies") / asked.name
    if plan:
        names = [site.name for site in asked.find_sites(folder / PHANTOMS_FOLDER)]
        for key in (*asked.tries(names), *asked.runs(names)):
            out.print(key.name)
        return
    started = time.monotonic()
    with _watching() as on_progress:
        result = run_study(
            asked,
            folder,
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            parallel=parallel,
            only=only,
            on_progress=on_progress,
        )
    write_answer(folder)
    out.print(
        f"{numerals(result.planned, 'run')}: {result.repeated} done before, "
        f"{result.done} done now, {len(result.failed)} failed"
    )
    out.print(f"page: {folder / 'study.html'}")
    out.print(f"took {time.monotonic() - started:.0f} s")
    if result.failed:
        raise typer.Exit(1)


@contextmanager
def _watching() -> Iterator[Callable[[StudyProgress], None]]:
    """A bar for all runs, and what runs now; a line for each run that ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", markup=False),
        console=err,
        transient=True,
    ) as bars:
        bar = bars.add_task("runs", total=None, now="")

        def on_progress(progress: StudyProgress) -> None:
            now = ", ".join(f"{name} {share:.0%}" for name, share in progress.running.items())
            bars.update(bar, total=progress.planned, completed=progress.done, now=now)
            if progress.finished is not None:
                name, seconds = progress.finished
                bars.print(f"done {progress.done} of {progress.planned}: {name}, {seconds:.0f} s")
            if progress.failed is not None:
                name, why = progress.failed
                bars.print(styled(("failed", "bold red"), f" {name}: {why}"))

        yield on_progress
