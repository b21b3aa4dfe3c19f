"""The `fedfms` command: arguments in, one call, exit code out.

Exit codes: 0 done, 1 something is wrong and the message says what, 2 the command line, 130 Ctrl-C.
Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedfms import __version__
from fedfms.config import Machine, Recipe, SiteConfig
from fedfms.errors import FedfmsError

if TYPE_CHECKING:
    from fedfms.flare.progress import Event, FinishedRound

app = typer.Typer(
    name="fedfms",
    help="Hospitals fine-tune Segment Anything (SAM) together, without moving an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="Set a value of the recipe; may be repeated."),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Folder with Meta's SAM checkpoints; not for vit_demo. Or set FEDFMS_CHECKPOINTS.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """Run the command line; a user's mistake ends with one message and no traceback."""
    try:
        app()
    except FedfmsError as error:
        err.print(
            f"[bold red]error:[/] {escape(error.problem)}\n  [bold]fix:[/] {escape(error.fix)}"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    if version:
        out.print(f"fedfms {__version__}")
        raise typer.Exit


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="New folder; gets one folder for each site.")],
    cases: Annotated[int, typer.Option(help="Patients of each site.")] = 18,
    slices: Annotated[int, typer.Option(help="Slices of each volume.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    pictures: Annotated[bool, typer.Option("--pictures", help="PNG instead of NIfTI.")] = False,
) -> None:
    """Make phantoms: four synthetic sites that differ as scanners do."""
    from fedfms.data.synthetic import write_phantom_federation

    names = write_phantom_federation(
        folder, cases=cases, slices=slices, seed=seed, format="image" if pictures else "nifti"
    )
    out.print(f"{folder}: {', '.join(names)}, {cases} patients each, {slices} slices a patient")


@app.command()
def simulate(
    job: Annotated[Path, typer.Argument(help="A job folder, such as jobs/fedmsa.")],
    sites: Annotated[
        Path, typer.Option(help="Folder with one folder for each site, each with a site.yml.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with each site's images in a folder of the site's name."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    results: Annotated[
        Path | None,
        typer.Option(help="New folder for the results. Otherwise WORKSPACE/results/JOB-TIME."),
    ] = None,
    workspace: Annotated[
        Path, typer.Option(help="For everything else: startup kits, logs.")
    ] = Path("workspace"),
    model: Annotated[
        Path | None, typer.Option(help="A .safetensors model to start from, or to evaluate.")
    ] = None,
    checkpoints: Checkpoints = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine: provisioning, mutual TLS, two processes a site."""
    from fedfms.flare.simulate import simulate as run

    folder = results or workspace / "results" / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.monotonic()
    with _watching(as_json) as on_event:
        result = run(
            job,
            sites,
            data=data,
            overrides=overrides,
            results=folder,
            workspace=workspace,
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            model=model,
            on_event=on_event,
        )
    _show_result(folder, as_json)
    if not as_json:
        out.print(f"logs: {result.logs}")
        out.print(f"took {time.monotonic() - started:.0f} s")


@app.command("check-data")
def check_data(
    site: Annotated[Path, typer.Argument(help="The site's site.yml.")],
    data: Annotated[
        Path | None, typer.Option(help="The folder with the images. Or set SITE_DATA.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes of the job that is to run, such as disc,cup.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a site's images and labels; name every problem with its fix. Changes nothing."""
    from fedfms.control import Control
    from fedfms.data.check import check_data as check

    config = _site(site, data)
    names = [name.strip() for name in classes.split(",")] if classes else None
    with _progress(as_json) as on_progress:
        findings = check(config, names, Control(on_progress))
    if as_json:
        keys = ("severity", "code", "problem", "fix")
        out.print_json(json.dumps([{key: getattr(f, key) for key in keys} for f in findings]))
    for finding in [] if as_json else findings:
        colour = "red" if finding.severity == "error" else "yellow"
        out.print(f"[bold {colour}]{finding.severity}[/] {escape(finding.problem)}")
        out.print(f"  [bold]fix:[/] {escape(finding.fix)}")
    errors = sum(finding.severity == "error" for finding in findings)
    if not as_json:
        warnings = len(findings) - errors
        verdict = "[bold green]PASS[/]" if errors == 0 else "[bold red]FAIL[/]"
        out.print(f"{verdict} {escape(str(site))}: {errors} errors, {warnings} warnings")
    raise typer.Exit(1 if errors else 0)


@app.command("train-local")
def train_local(
    job: Annotated[Path, typer.Argument(help="A job folder, such as jobs/fedmsa.")],
    site: Annotated[Path, typer.Option(help="The site's site.yml.")],
    data: Annotated[
        Path | None, typer.Option(help="The folder with the images. Or set SITE_DATA.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    output: Annotated[
        Path | None, typer.Option(help="Write the trained tensors to this .safetensors file.")
    ] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Train a job's recipe on one site alone, without FLARE; print its validation scores."""
    from fedfms.control import Control
    from fedfms.trainer.local import LocalRound
    from fedfms.trainer.local import train_local as train

    recipe = Recipe.from_json(job / "app/config/recipe.json").with_overrides(overrides)
    out.print(
        "Scores are means over this site's validation cases, at native resolution "
        "(3-D for volumes), before training and after each round."
    )

    def show(result: LocalRound) -> None:
        scores = "  ".join(
            f"{m.class_name} {m.metric} {'–' if m.mean is None else f'{m.mean:.3f}'}"
            for m in result.metrics
            if m.metric in ("dice", "hd95")
        )
        loss = "" if result.loss is None else f"loss {result.loss:.4f}  "
        out.print(f"round {result.rounds_trained}: {loss}{escape(scores)}  {result.seconds:.1f} s")

    with _progress(False) as on_progress:
        train(
            recipe,
            _site(site, data),
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            output=output,
            control=Control(on_progress),
            on_round=show,
        )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A results folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html and report.md of a results folder again, and print its scores."""
    from fedfms.report.render import render

    render(run)
    _show_result(run, as_json)


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def trainer(context: typer.Context) -> None:
    """Run a site's trainer: the process that sees the images and no network."""
    from fedfms.trainer.__main__ import main as run_trainer

    raise typer.Exit(run_trainer(context.args))


# ------------------------------------------------------------------------------------- helpers


def _site(path: Path, data: Path | None) -> SiteConfig:
    return SiteConfig.from_yaml(path, data or Machine.from_environment().site_data)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A progress bar on standard error for (phase, done, total)."""
    if quiet:
        yield None
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bars:
        task = bars.add_task("start", total=None)
        phase_shown = ""

        def on_progress(phase: str, done: int, total: int) -> None:
            nonlocal phase_shown
            if phase != phase_shown:
                bars.reset(task, description=phase, total=total)
                phase_shown = phase
            bars.update(task, completed=done, total=total)

        yield on_progress


@contextlib.contextmanager
def _watching(quiet: bool) -> Iterator[Callable[[Event], None] | None]:
    """Lines for what has happened, and a bar for what happens now, on standard error."""
    if quiet:
        yield None
        return
    said = {
        "provision": "provisioning: keys and certificates for the server and each site",
        "start": "starting the server, and a FLARE client and a trainer for each site",
        "submit": "all sites are there; submitting the job",
        "fetch": "fetching the result",
    }
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
        console=err,
        transient=True,
    ) as bars:
        bar = bars.add_task("", total=None, left="")
        told: set[str] = set()

        def once(text: str) -> None:
            if text and text not in told:
                told.add(text)
                bars.print(text)

        def show(event: Event, what: str, done: int, of: int) -> None:
            sites, left = len(event.sites), event.seconds_left
            bars.update(
                bar,
                description=f"{what}: {len(event.answered)} of {sites} sites in",
                total=of * sites,
                completed=done * sites + len(event.answered),
                left="" if left is None else f"about {left:.0f} s left",
            )

        def on_event(event: Event) -> None:
            once(said.get(event.phase, ""))
            if event.text:
                bars.print(event.text)
            for finished in event.finished:
                once(_round_line(finished, event))
            if event.phase == "train" and event.round is not None:
                show(event, f"round {event.round}", event.round, event.rounds)
            if event.phase == "evaluate":
                show(event, "final evaluation", 0, 1)
                once("training is done; every site evaluates the final and the best model")

        yield on_event


def _round_line(done: FinishedRound, event: Event) -> str:
    dice = "withheld" if done.dice is None else f"{done.dice:.3f}"
    return (
        f"round {done.number} ({done.number + 1} of {event.rounds}): {done.answered} of "
        f"{len(event.sites)} sites; mean validation Dice of the model that it started from: {dice}"
    )


def _show_result(folder: Path, as_json: bool) -> None:
    """The last word of a run: a table of Dice by site, and where the report is."""
    from fedfms.report.collect import load_result, summary_table

    rows, summary = summary_table(folder), load_result(folder).summary
    if as_json:
        out.print_json(json.dumps({"results": str(folder), "sites": rows, "summary": summary}))
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        title="Dice at native resolution: mean over a site's validation cases",
        caption=(
            "Round 0 is before training; missed counts rounds. "
            "An unseen site never trained; all its cases are evaluated."
        ),
    )
    table.add_column("site", overflow="fold")
    table.add_column("role")
    for name in ("cases", "round 0", "final", "change", "best"):
        table.add_column(name, justify="right")
    table.add_column("missed", justify="right")
    for row in rows:
        scores = [_score(row[key]) for key in ("dice_before", "dice_after")]
        change = "–" if row["change"] is None else f"{row['change']:+.3f}"
        role = "trains" if row["role"] == "train" else "unseen"
        cells = [row["site"], role, str(row["cases"] or "–"), *scores, change]
        table.add_row(*map(escape, cells), _score(row["dice_best"]), str(row["missed"]))
    out.print(table)
    gain = summary["dice"]["gain"]  # over the training sites that have both
    before, after = _score(gain["before"]), _score(gain["after"])
    out.print(f"mean of the training sites: {before} before, {after} after")
    out.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
