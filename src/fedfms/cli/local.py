"""Commands for one machine: phantoms, simulation, a look at the data, local training, report."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from fedfms.cli.common import (
    AsJson,
    Checkpoints,
    Classes,
    Data,
    Job,
    Overrides,
    RecipeFile,
    names_in,
    out,
    progress,
    show_result,
    styled,
    watching,
)
from fedfms.cli.site import SITE_YML, WORK
from fedfms.contracts.machine import Machine
from fedfms.errors import ConfigError
from fedfms.pages.numbers import numerals
from fedfms.shipped import find_shipped

if TYPE_CHECKING:
    from fedfms.contracts.recipe import Recipe
    from fedfms.contracts.site import SiteConfig
    from fedfms.data.numbers import DataSummary

commands = typer.Typer()


@commands.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="New folder; gets one folder for each site.")],
    cases: Annotated[int, typer.Option(help="Patients of each site.")] = 18,
    slices: Annotated[int, typer.Option(help="Slices of each volume.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    pictures: Annotated[bool, typer.Option("--pictures", help="PNG instead of NIfTI.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave sites that are there.")] = False,
    lesion: Annotated[
        Literal["largest", "small"],
        typer.Option(help="Which object is the lesion: small ones have to be learnt."),
    ] = "largest",
    validate: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Share of the patients that validates.")
    ] = 0.3,
) -> None:
    """Make phantoms: four synthetic sites that differ as scanners do."""
    from fedfms.local.synthetic import write_phantom_federation

    names = write_phantom_federation(
        folder,
        cases=cases,
        slices=slices,
        seed=seed,
        format="image" if pictures else "nifti",
        keep=keep,
        lesion=lesion,
        validation_fraction=validate,
    )
    out.print(f"{folder}: {', '.join(names)}, {cases} patients each, {slices} slices a patient")


@commands.command()
def simulate(
    job: Job,
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
    canary: Annotated[
        bool, typer.Option("--canary", help="First a canary, as fedfms submit --canary.")
    ] = False,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Then train each site by itself, to compare with."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine: provisioning, mutual TLS, two processes a site."""
    from fedfms.cli.canary import show
    from fedfms.flare.canary import Findings
    from fedfms.flare.simulate import simulate as run
    from fedfms.local.sites import find_sites

    if alone and as_json:
        raise typer.BadParameter("--alone prints for people: leave --json out")
    folder = results or workspace / "results" / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.monotonic()
    found: list[Findings] = []
    places = find_sites(sites, data)
    with watching(False, as_json=as_json) as on_event:
        logs = run(
            job,
            places,
            overrides=overrides,
            results=folder,
            workspace=workspace,
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            model=model,
            recipe=recipe,
            on_event=on_event,
            on_canary=found.append if canary else None,
        )
    for one in found if not as_json else ():
        show(one)
    show_result(folder, as_json)
    if alone:
        from fedfms.cli.alone import each_alone, words
        from fedfms.contracts.recipe import read_job_recipe

        chosen = read_job_recipe(job, recipe, overrides)
        found_alone = each_alone(
            chosen, places, checkpoints or Machine.from_environment().checkpoints
        )
        out.print("\n".join(words(found_alone)))
    if not as_json:
        out.print("order of slices: from the recipe's seed; a hospital's is its own secret")
        out.print(f"logs: {logs}")
        out.print(f"took {time.monotonic() - started:.0f} s")


@commands.command("check-data")
def check_data(
    site: Annotated[Path, typer.Argument(help="The site's site.yml.")],
    data: Data = None,
    classes: Classes = None,
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="JOB",
            parser=find_shipped,
            help="The job that is to run, such as fedmsa: its classes and sizes count.",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    recipe: RecipeFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what a site's images and labels are; name every problem with its fix. Changes nothing.

    Exit code 1 if there is an error. What is printed is for the site: it may name files.
    """
    from fedfms.contracts.recipe import read_job_recipe
    from fedfms.control import Control
    from fedfms.data.check import examine

    if job is None and (overrides or recipe is not None):
        raise typer.BadParameter("--set and --recipe change a job: name it with --job")
    chosen = None if job is None else read_job_recipe(job, recipe, overrides)
    config = _site(site, data)
    with progress(as_json) as on_progress:
        found = examine(config, names_in(classes), Control(on_progress), chosen)
    errors = sum(finding.severity == "error" for finding in found.findings)
    if as_json:
        findings = [dataclasses.asdict(finding) for finding in found.findings]
        out.print_json(json.dumps({"summary": found.summary.as_json(), "findings": findings}))
    else:
        _show_data(found.summary)
        for finding in found.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            out.print(styled((finding.severity, f"bold {colour}"), " ", finding.problem))
            out.print(styled("  ", ("fix:", "bold"), " ", finding.fix))
        warnings = len(found.findings) - errors
        verdict = ("PASS", "bold green") if errors == 0 else ("FAIL", "bold red")
        counted = f"{numerals(errors, 'error')}, {numerals(warnings, 'warning')}"
        out.print(styled(verdict, f" {site}: {counted}"))
    raise typer.Exit(1 if errors else 0)


def _show_data(summary: DataSummary) -> None:
    """What was read, as two tables that fit 80 columns."""
    from fedfms.data.numbers import percent

    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in summary.rows_for_print():
        lines.add_row(styled((name, "bold")), text)
    out.print(lines, soft_wrap=False, width=min(out.width, 80))
    if not summary.read:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("class", overflow="fold")
    table.add_column("in cases", justify="right")
    table.add_column("validate", justify="right")
    table.add_column("slices", justify="right")
    table.add_column("share of a slice that has it", no_wrap=True)
    for name, numbers in summary.classes.items():
        share = "–"
        if numbers.share is not None:
            low, mean, high = map(percent, numbers.share)
            share = f"{mean} ({low} to {high})"
        cases = f"{numbers.cases.total} of {summary.read}"
        validate, slices = str(numbers.cases.validation), str(numbers.slices)
        table.add_row(name, cases, validate, slices, share)
    out.print(table, soft_wrap=False, width=min(out.width, 80))


@commands.command("train-local")
def train_local(
    job: Job,
    site: Annotated[Path, typer.Option(help="The site's site.yml.")],
    data: Data = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    recipe: RecipeFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the trained tensors to this .safetensors file, and recipe.json beside it; "
            "fedfms predict takes the file."
        ),
    ] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Train a job's recipe on one site alone, without FLARE; print its validation scores."""
    from fedfms.contracts.recipe import read_job_recipe
    from fedfms.control import Control
    from fedfms.data.memory import CACHE_FOLDER
    from fedfms.exchange.tensors import save_tensors
    from fedfms.training.pooled import PooledRound, train_pooled

    chosen = read_job_recipe(job, recipe, overrides).alone
    if output is not None:
        _require_place(output, chosen)  # before the hours that it holds
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
        out.print(f"round {result.rounds_trained}: {loss}{scores}  {seconds:.1f} s")

    with progress(False) as on_progress:
        trained = train_pooled(
            chosen,
            {"site": _site(site, data)},
            checkpoints=checkpoints or Machine.from_environment().checkpoints,
            control=Control(on_progress),
            on_round=show,
            folder=WORK / CACHE_FOLDER if site == SITE_YML else None,  # as compose mounts them
        )
    if output is not None:
        save_tensors(output, trained, "fp32")
        (output.parent / "recipe.json").write_text(chosen.to_json(), encoding="utf-8")


@commands.command()
def report(
    run: Annotated[Path, typer.Argument(help="A results folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html and report.md of a results folder again, and print its scores."""
    from fedfms.report.render import render

    render(run)
    show_result(run, as_json)


def _require_place(output: Path, recipe: Recipe) -> None:
    """A model of this recipe can be written here; makes its folder."""
    from fedfms.contracts.recipe import Recipe

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{output.parent} cannot be made: {error.strerror}", "name another --output"
        ) from None
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"{output} cannot be written",
            "name a new file in a folder that may be written with --output",
        )
    beside = output.parent / "recipe.json"
    if beside.exists() and Recipe.from_json(beside) != recipe:
        raise ConfigError(
            f"{beside} is of a model with another recipe",
            "name an --output in another folder: a model's recipe lies beside it",
        )


def _site(path: Path, data: Path | None) -> SiteConfig:
    from fedfms.contracts.site import SiteConfig

    if data is not None:
        return SiteConfig.from_yaml(path, data, "--data")
    return SiteConfig.from_yaml(path, Machine.from_environment().site_data, "SITE_DATA")
