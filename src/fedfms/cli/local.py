"""Commands for one machine: phantoms, simulation, a look at the data, local training, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedfms.cli.common import (
    AsJson,
    Checkpoints,
    Classes,
    Data,
    Overrides,
    RecipeFile,
    names_in,
    out,
    progress,
    show_result,
    watching,
)
from fedfms.config import Machine, SiteConfig, read_job_recipe

commands = typer.Typer()


@commands.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="New folder; gets one folder for each site.")],
    cases: Annotated[int, typer.Option(help="Patients of each site.")] = 18,
    slices: Annotated[int, typer.Option(help="Slices of each volume.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    pictures: Annotated[bool, typer.Option("--pictures", help="PNG instead of NIfTI.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave sites that are there.")] = False,
) -> None:
    """Make phantoms: four synthetic sites that differ as scanners do."""
    from fedfms.data.synthetic import write_phantom_federation

    names = write_phantom_federation(
        folder,
        cases=cases,
        slices=slices,
        seed=seed,
        format="image" if pictures else "nifti",
        keep=keep,
    )
    out.print(f"{folder}: {', '.join(names)}, {cases} patients each, {slices} slices a patient")


@commands.command()
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
    recipe: RecipeFile = None,
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
    with watching(as_json) as on_event:
        result = run(
            job,
            sites,
            data=data,
            overrides=overrides,
            results=folder,
            workspace=workspace,
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            model=model,
            recipe=recipe,
            on_event=on_event,
        )
    show_result(folder, as_json)
    if not as_json:
        out.print(f"logs: {result.logs}")
        out.print(f"took {time.monotonic() - started:.0f} s")


@commands.command("check-data")
def check_data(
    site: Annotated[Path, typer.Argument(help="The site's site.yml.")],
    data: Data = None,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Check a site's images and labels; name every problem with its fix. Changes nothing."""
    from fedfms.control import Control
    from fedfms.data.check import check_data as check

    config = _site(site, data)
    with progress(as_json) as on_progress:
        findings = check(config, names_in(classes), Control(on_progress))
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


@commands.command("train-local")
def train_local(
    job: Annotated[Path, typer.Argument(help="A job folder, such as jobs/fedmsa.")],
    site: Annotated[Path, typer.Option(help="The site's site.yml.")],
    data: Data = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    recipe: RecipeFile = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the trained tensors to this .safetensors file.")
    ] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Train a job's recipe on one site alone, without FLARE; print its validation scores."""
    from fedfms.control import Control
    from fedfms.exchange.payload import save_tensors
    from fedfms.trainer.pooled import PooledRound, train_pooled

    chosen = read_job_recipe(job, recipe, overrides)
    every = "each round" if chosen.evaluate_every == 1 else f"every {chosen.evaluate_every} rounds"
    when = f"before training and after {every}"
    if chosen.evaluate_first > 0:
        when = f"first after round {chosen.evaluate_first}, then after {every}"
    out.print(
        "Scores are means over this site's validation cases, at native resolution "
        f"(3-D for volumes), {when}."
    )

    def show(result: PooledRound) -> None:
        scores = "  ".join(
            f"{m.class_name} {m.metric} {'–' if m.mean is None else f'{m.mean:.3f}'}"
            for m in result.metrics["site"]
            if m.metric in ("dice", "hd95")
        )
        loss = "" if result.loss is None else f"loss {result.loss:.4f}  "
        seconds = result.seconds.get("train", 0.0) + result.seconds["evaluate"]
        out.print(f"round {result.rounds_trained}: {loss}{escape(scores)}  {seconds:.1f} s")

    with progress(False) as on_progress:
        trained = train_pooled(
            chosen,
            {"site": _site(site, data)},
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            control=Control(on_progress),
            on_round=show,
        )
    if output is not None:
        save_tensors(output, trained, "fp32")


@commands.command()
def report(
    run: Annotated[Path, typer.Argument(help="A results folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html and report.md of a results folder again, and print its scores."""
    from fedfms.report.render import render

    render(run)
    show_result(run, as_json)


def _site(path: Path, data: Path | None) -> SiteConfig:
    return SiteConfig.from_yaml(path, data or Machine.from_environment().site_data)
