"""Commands inside the containers of a kit: the roles, their health, the check of a site."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    styled,
)
from fedfms.contracts.machine import Machine
from fedfms.shipped import JOBS, find_shipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedfms.contracts.recipe import Recipe
    from fedfms.preflight.items import Item
    from fedfms.preflight.link import Advice, Line, RoundTime

commands = typer.Typer()

KIT, POLICY, SITE_YML = Path("/kit"), Path("/policy"), Path("/site/site.yml")
WORKSPACE, EXCHANGE, WORK = Path("/workspace"), Path("/exchange"), Path("/work")
# which container, and what its paths are on the host
_SIDES = {
    "trainer": (
        "The trainer's container, which sees the images and has no network",
        "/data is SITE_DATA in .env, /site/site.yml is site.yml, /policy is policy/",
    ),
    "flare": (
        "The FLARE container, which speaks with the server and sees no image",
        "/kit is kit/, /policy is policy/; /workspace and /exchange are volumes",
    ),
}

KitFolder = Annotated[
    Path, typer.Option("--kit", help="The kit's folder with startup/ and local/; not changed.")
]
PolicyFolder = Annotated[Path, typer.Option("--policy", help="The site's policy folder.")]
Workspace = Annotated[
    Path, typer.Option("--workspace", help="FLARE's workspace; kept between starts.")
]
Exchange = Annotated[
    Path | None, typer.Option(help="Shared by trainer and FLARE client. Or set FEDFMS_EXCHANGE.")
]


# all arguments go on to a parser of the role's own, --help included
_PASSED_ON: dict[str, Any] = {
    "context_settings": {
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
    "add_help_option": False,
}


@commands.command()
def server(kit: KitFolder = KIT, workspace: Workspace = WORKSPACE) -> None:
    """Run the project's FLARE server from its kit."""
    # gRPC reads it when it is imported; it says a word of each health probe otherwise
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from fedfms.flare.start import run_server

    raise typer.Exit(run_server(kit, workspace))


@commands.command()
def flare(
    kit: KitFolder = KIT, policy: PolicyFolder = POLICY, workspace: Workspace = WORKSPACE
) -> None:
    """Run a site's FLARE client from its kit, under the site's own policy."""
    from fedfms.flare.start import run_client

    raise typer.Exit(run_client(kit, policy, workspace))


@commands.command(**_PASSED_ON)
def trainer(context: typer.Context) -> None:
    """Run a site's trainer: the process that sees the images and no network."""
    from fedfms.trainer.__main__ import main as run_trainer

    raise typer.Exit(run_trainer(context.args))


@commands.command(**_PASSED_ON)
def health(context: typer.Context) -> None:
    """Ask a role's process in this container whether it is well: server, flare or trainer."""
    from fedfms.preflight.health import main as probe

    raise typer.Exit(probe(context.args))


@commands.command("check-site")
def check_site(
    role: Annotated[
        str | None,
        typer.Option(help="trainer or flare: what this container is; by default by what is there."),
    ] = None,
    kit: KitFolder = KIT,
    policy: PolicyFolder = POLICY,
    workspace: Workspace = WORKSPACE,
    exchange: Exchange = None,
    config: Annotated[Path, typer.Option(help="The site's site.yml.")] = SITE_YML,
    data: Data = None,
    classes: Classes = None,
    checkpoints: Checkpoints = None,
    work: Annotated[Path, typer.Option(help="The trainer's private folder.")] = WORK,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only say how much memory training would take here, and how."),
    ] = False,
    job: Annotated[
        Path | None,
        typer.Option(
            "--job",
            metavar="JOB",
            parser=find_shipped,
            help="With --plan: fedmsa, lora, fedsam, or a job folder; else all of the package.",
        ),
    ] = None,
    recipe: RecipeFile = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    as_json: AsJson = False,
) -> None:
    """Check all that this container sees of a site; one line each, with the fix. Changes nothing.

    With --plan only this: the peak of memory in training, how many slices are in
    it at once, and whether with checkpointing; of --job, --recipe and --set, or
    of each job of the package.

    Exit code 1 if a line says FAIL.
    """
    from fedfms.preflight import site as checks

    if plan or job or recipe or overrides:
        _show_plans(_recipes(job, recipe, overrides), config, data, as_json)
        return
    here = Machine.from_environment()
    folder = exchange or here.exchange or EXCHANGE
    show = None if as_json else _show_item
    if role is None:
        role = "flare" if (kit / "startup").is_dir() or not config.exists() else "trainer"
    if role not in _SIDES:
        raise typer.BadParameter(f"{role} is no container of a site: use trainer or flare")
    if not as_json:
        title, paths = _SIDES[role]
        out.print(styled((title, "bold")))
        if (kit, config) == (KIT, SITE_YML):  # as compose mounts them
            out.print(styled((paths, "dim")))
    if role == "flare":
        from fedfms.flare.challenge import ask_server
        from fedfms.flare.measure_link import measure

        there = checks.FlarePlaces(kit=kit, policy=policy, workspace=workspace, exchange=folder)
        items = checks.check_flare_side(there, ask_server, measure, show)
    else:
        places = checks.TrainerPlaces(
            config=config,
            policy=policy,
            data=data or here.site_data,
            checkpoints=checkpoints or here.checkpoints,
            exchange=folder,
            work=work,
            classes=names_in(classes) or (),
        )
        items = checks.check_trainer_side(places, show)
    if as_json:
        out.print_json(json.dumps([dataclasses.asdict(item) for item in items]))
    else:
        _show_end(role, items)
    raise typer.Exit(1 if any(item.status == "FAIL" for item in items) else 0)


def _recipes(
    job: Path | None, instead: Path | None, overrides: Sequence[str]
) -> list[tuple[str, Recipe]]:
    """What a person names, with a name; else all jobs and recipes of the package that train."""
    from fedfms.contracts.recipe import JOB_RECIPE, Recipe, read_job_recipe

    if job is not None:
        return [(job.name, read_job_recipe(job, instead, overrides))]
    files = [(one, JOBS / one / JOB_RECIPE) for one in ("fedmsa", "lora", "fedsam")]
    files += [(path.stem, path) for path in sorted((JOBS / "recipes").glob("*.json"))]
    if instead is not None:
        files = [(instead.stem, instead)]
    return [(name, Recipe.from_json(path).with_overrides(overrides)) for name, path in files]


def _show_plans(
    recipes: Sequence[tuple[str, Recipe]], config: Path, data: Path | None, as_json: bool
) -> None:
    from fedfms.contracts.site import Compute, SiteConfig
    from fedfms.preflight.plan import check_plans

    site: Compute = Compute()
    if config.exists():
        site = SiteConfig.from_yaml(config, data or Machine.from_environment().site_data)
    items = check_plans(recipes, site, None if as_json else _show_item)
    if as_json:
        out.print_json(json.dumps([dataclasses.asdict(item) for item in items]))
    raise typer.Exit(1 if any(item.status == "FAIL" for item in items) else 0)


@commands.command("site-page")
def site_page(
    work: Annotated[Path, typer.Option(help="The trainer's private folder.")] = WORK,
    as_html: Annotated[
        bool, typer.Option("--html", help="Print the page itself, to be written into a file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what was asked of this site and what left it, task by task, the newest first.

    In the trainer's container: docker compose exec SITE-trainer fedfms site-page
    """
    from fedfms.errors import ConfigError
    from fedfms.trainer.ledger import LEDGER, PAGE, read_ledger
    from fedfms.trainer.site_page import runs_of

    page = work / PAGE
    if as_html:
        if not page.is_file():
            raise ConfigError(
                f"there is no {page}: no task has come yet",
                "wait for a job, or name the trainer's folder with --work",
                code="no-site-page",
            )
        out.print(page.read_text(encoding="utf-8"))
        return
    entries = read_ledger(work)
    if as_json:
        out.print_json(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return
    for run in runs_of(entries):
        by = f", submitted by {run.submitter}" if run.submitter else ""
        out.print(styled((f"{run.name} {run.id}", "bold"), f"{by}; recipe {run.recipe}"))
        for line in run.lines:
            what = ", ".join(filter(None, (line.tensors, line.pictures))) or line.what
            scores = f"; scores: {line.scores}" if line.event == "left" else f": {line.why}"
            out.print(f"  {line.when}  {line.asked}: {what}{scores}")
        out.print(f"  {run.answers} answers left, {run.total} of tensors\n")
    if not entries:
        out.print("no job has asked this site for anything yet")
    elif entries[-1].event == "asked":
        out.print("a task is being worked on now; nothing of it has left")
    out.print(f"the page: {page}; each line: {work / LEDGER}")


@commands.command("show-batch")
def show_batch(
    job: Annotated[
        Path,
        typer.Option(
            "--job",
            metavar="JOB",
            parser=find_shipped,
            show_default="fedmsa",
            help="Whose classes, size and augmentation count: fedmsa, fedsam, lora, or a folder.",
        ),
    ] = JOBS / "fedmsa",
    recipe: RecipeFile = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    config: Annotated[Path, typer.Option(help="The site's site.yml.")] = SITE_YML,
    data: Data = None,
    work: Annotated[Path, typer.Option(help="The trainer's private folder.")] = WORK,
    slices: Annotated[int, typer.Option(min=1, help="How many slices, each of another case.")] = 6,
    variants: Annotated[int, typer.Option(min=1, help="Of each slice after augmentation.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Draw some training slices with their masks, before and after augmentation, as one page.

    It lies in the trainer's private folder, shows patients, and leaves the site by no way of
    fedfms. In the trainer's container: docker compose exec SITE-trainer fedfms show-batch
    """
    from fedfms.contracts.recipe import read_job_recipe
    from fedfms.contracts.site import SiteConfig
    from fedfms.control import Control
    from fedfms.trainer.batch_page import show_batch as show

    chosen = read_job_recipe(job, recipe, overrides, any_method=True)
    site = SiteConfig.from_yaml(config, data or Machine.from_environment().site_data)
    with progress(as_json) as on_progress:
        page = show(
            *(site, chosen, work), slices=slices, variants=variants, control=Control(on_progress)
        )
    if as_json:
        out.print_json(json.dumps({"page": str(page), "augments": chosen.augment}))
        return
    out.print(f"the page: {page}; it shows patients, and only this user may read it")


@commands.command()
def link(kit: KitFolder = KIT, as_json: AsJson = False) -> None:
    """Measure this site's line to the server: speed, a round's transfers, what to write in .env.

    Over the kit's own connection, while the site's FLARE client runs or not; takes up to half a
    minute and 11 MB.
    """
    from fedfms.flare.internals.settings import set_stream_settings
    from fedfms.flare.measure_link import measure
    from fedfms.preflight.kit import check_kit
    from fedfms.preflight.link import advise, round_times

    here = Machine.from_environment()
    set_stream_settings()
    found = check_kit(kit, "client", here.site_name)
    line = measure(found)
    times = round_times(line)
    advice = advise(line, here.link_megabytes_per_second)
    server = f"{found.about.server_host}:{found.about.server_port}"
    if as_json:
        answer = {
            "server": server,
            **dataclasses.asdict(line),
            "rounds": [{**dataclasses.asdict(one), "seconds": one.seconds} for one in times],
            "link_mb_per_second": dataclasses.asdict(advice),
        }
        out.print_json(json.dumps(answer))
        return
    _show_line(server, line, times, advice)


@commands.command("gpu-check")
def gpu_check() -> None:
    """Say whether this host's NVIDIA driver fits this image; in a container without a GPU."""
    from fedfms.preflight.machine import check_driver, image_cuda

    out.print(check_driver(image_cuda()))


@commands.command("dry-run")
def dry_run(
    job: Job = JOBS / "fedmsa",
    checkpoints: Checkpoints = None,
) -> None:
    """Train a job's recipe for one round on phantoms: everything of a site but its images."""
    from fedfms.preflight.dry_run import dry_run as run

    out.print(f"one round of {job.name} on phantoms, in a temporary folder")
    with progress(False) as on_progress:
        result = run(job, checkpoints or Machine.from_environment().checkpoints, on_progress)
    out.print(
        f"{result.cases} phantoms made and read, {result.recipe.method} on "
        f"{result.recipe.backbone} trained for a round on {result.device}: loss {result.loss:.4f}, "
        f"validation Dice {result.dice_before:.3f} before and {result.dice_after:.3f} after; "
        f"{result.seconds:.0f} s"
    )
    verdict = ("PASS", "bold green")
    out.print(styled(verdict, " this container can train; nothing of it was kept or sent"))


def _show_line(server: str, line: Line, times: Sequence[RoundTime], advice: Advice) -> None:
    from fedfms.preflight.link import as_rate, as_time

    out.print(styled((f"The line to {server}, over this kit's own connection", "bold")))
    out.print(f"  there and back  {1e3 * (line.round_trip or 0.0):.0f} ms")
    out.print(f"  down, to here   {as_rate(line.down)}")
    out.print(f"  up, from here   {as_rate(line.up)}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("  a round on ViT-B", "each way", "down", "up", "both"):
        table.add_column(name, justify="left" if name.startswith(" ") else "right")
    for one in times:
        cells = (as_time(one.down), as_time(one.up), as_time(one.seconds))
        table.add_row(f"  {one.method} {one.precision}", f"{one.megabytes:.0f} MB", *cells)
    out.print(table)
    if advice.site is None:
        out.print("This site's .env: nothing to write; what holds is good for this line.")
    else:
        out.print(f"This site's .env: write LINK_MB_PER_SECOND={advice.site}, and start it again.")
    if advice.server is not None:
        out.print(
            f"The server's .env: ask the coordinator to write LINK_MB_PER_SECOND={advice.server}, "
            "or less if another site needs less."
        )


def _show_item(item: Item) -> None:
    colour = {"PASS": "green", "FAIL": "red", "WARN": "yellow", "SKIP": "dim"}[item.status]
    out.print(styled((item.status, colour), " ", (item.code, "bold"), ": ", item.text))
    if item.fix:
        out.print(styled("     ", ("fix:", "bold"), " ", item.fix))


def _show_end(role: str, items: list[Item]) -> None:
    failed = sum(item.status == "FAIL" for item in items)
    worries = sum(item.status == "WARN" for item in items)
    look = f"; {worries} to look at" if worries else ""
    if failed:
        out.print(styled(("FAIL", "bold red"), f" the {role} side: {failed} to correct{look}\n"))
    else:
        out.print(styled(("PASS", "bold green"), f" the {role} side of this site is ready{look}\n"))
