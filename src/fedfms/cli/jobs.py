"""Commands of a coordinator with an admin kit: submit, watch, fetch; shut a site out.

Exit codes as everywhere; besides, 1 from `submit --watch` and `watch` where the job failed. Ctrl-C
ends the command, not the job.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from fedfms.cli.common import (
    AsJson,
    Job,
    Overrides,
    RecipeFile,
    WholeWords,
    err,
    out,
    print_error,
    show_result,
    styled,
    watching,
)
from fedfms.cli.telling import Notify, notifier_of, tell_end, telling
from fedfms.errors import ConfigError, FederationError, FedfmsError

if TYPE_CHECKING:
    from fedfms.contracts.announcement import Announcement, PrivacySpent
    from fedfms.contracts.recipe import Recipe
    from fedfms.flare.follow import JobEnd, OnEvent
    from fedfms.flare.progress import Event
    from fedfms.flare.session import Coordinator, JobState
    from fedfms.notify import Notifier

commands = typer.Typer()

Kit = Annotated[
    Path,
    typer.Option(
        "--kit", envvar="FEDFMS_KIT", help="Where the coordinator's kit (an admin's) was unpacked."
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="JOB_ID", help="FLARE's id; its beginning is enough.")
]
Results = Annotated[
    Path | None,
    typer.Option(
        help="New folder for the results; in a mounted volume, a new folder JOB-TIME is made. "
        "Otherwise WORKSPACE/results/JOB-TIME."
    ),
]
Workspace = Annotated[
    Path, typer.Option(envvar="FEDFMS_WORKSPACE", help="For copies of jobs and for results.")
]
WORKSPACE = Path("workspace")
_OWN_WORDS = "a site's own words are in its trainer's log and errors.log"


@commands.command()
def submit(
    job: Job,
    kit: Kit,
    overrides: Overrides = [],  # noqa: B006 - typer reads it and does not change it
    recipe: RecipeFile = None,
    model: Annotated[
        Path | None, typer.Option(help="A .safetensors model to start from, or to evaluate.")
    ] = None,
    without: Annotated[
        list[str], typer.Option(metavar="SITE", help="Leave a site out; may be repeated.")
    ] = [],  # noqa: B006
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Refuse sites without a GPU; sets require_gpu=true.")
    ] = False,
    different_slices: Annotated[
        bool,
        typer.Option(
            "--allow-different-slices",
            help="Go on where sites cut other planes or use other channels.",
        ),
    ] = False,
    wait_for: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Wait until N sites are connected and ready."),
    ] = None,
    wait_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="S",
            help="Wait at most so long: for N sites (600 by default), or until the job fits.",
        ),
    ] = None,
    canary: Annotated[
        bool,
        typer.Option(
            "--canary",
            help="First one round on two cases a site, of which zeros leave; submit if it passes.",
        ),
    ] = False,
    canary_only: Annotated[
        bool, typer.Option("--canary-only", help="The canary, and no run after it.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay until its end and write the results folder.")
    ] = False,
    notify: Notify = None,
    results: Results = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Check a job against what the sites announce, and submit it."""
    from fedfms.cli.canary import run_canary, values_of
    from fedfms.flare.coordinator import Patience, connect_patiently, wait_for_sites
    from fedfms.flare.lint import (
        check_announcements,
        check_for_canary,
        pausing,
        slicing_warnings,
    )
    from fedfms.flare.session import deploy, new_copy, prepare_job
    from fedfms.report.write import check_results_folder

    notifier = notifier_of(notify)
    folder = _new_results(results if watch else None, workspace, job.resolve().name)
    if watch:
        check_results_folder(folder)
    scratch = _scratch(workspace)
    prepared = prepare_job(
        job,
        new_copy(job, workspace),
        [*overrides, *(["require_gpu=true"] if gpu else [])],
        model,
        recipe,
    )
    started = time.monotonic()
    patience = Patience(wait_for, wait_seconds)
    say = _saying(as_json)
    once = functools.cache(lambda: say("waiting for the server"))
    with connect_patiently(kit, scratch, patience, once) as coordinator:
        coordinator.require_right("submit_job", "submit the job")
        check = functools.partial(
            check_announcements,
            prepared,
            without=without,
            allow_different_slices=different_slices,
        )
        announced: list[tuple[str, ConfigError]] = []
        try:
            told, sites = wait_for_sites(coordinator, check, patience, without=without, tell=say)
        except ConfigError:
            if not (canary or canary_only):
                raise
            told = coordinator.announcements()  # the canary says what is wrong, beside the rest
            sites, announced = check_for_canary(
                prepared, told, without, allow_different_slices=different_slices
            )
        taking_part = [one for one in told if one.site in sites]
        warnings = [*slicing_warnings(taking_part), *pausing(taking_part)]
        for text in warnings:
            say(f"warning: {text}")
        for text in _privacy_lines(taking_part, prepared.recipe if prepared.trains else None):
            say(text)
        found = None
        if canary or canary_only:
            found = run_canary(coordinator, prepared, sites, announced, scratch, say, as_json)
        if canary_only:
            shutil.rmtree(prepared.folder, ignore_errors=True)
            if as_json and found is not None:
                out.print_json(json.dumps({"canary": values_of(found)}))
            return
        deploy(prepared, sites, leaves_out=bool(without))
        job_id = coordinator.submit_prepared(prepared.folder)
        if not watch:
            if as_json:
                said: dict[str, Any] = {"job_id": job_id, "sites": sites, "warnings": warnings}
                said |= {"canary": values_of(found)} if found is not None else {}
                out.print_json(json.dumps(said))
            else:
                out.print(f"submitted {prepared.folder.name} as {job_id}")
                out.print(f"  to {', '.join(sites)}")
                out.print(f"  fedfms watch {job_id[:8]}; fedfms fetch {job_id[:8]}")
            return
        say(f"submitted as {job_id} to {', '.join(sites)}")
        state, tell = _follow(coordinator, job_id, as_json, notifier)
        completed = _fetch(coordinator, state, folder, workspace, as_json, tell)
    tell_end(notifier, state)
    if completed and not as_json:
        out.print(f"took {time.monotonic() - started:.0f} s")
    if not completed:
        raise typer.Exit(1)


@commands.command()
def status(
    kit: Kit,
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB_ID]", help="One job in more detail.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sites that are connected and what they can do, and the last jobs."""
    with _connected(kit) as coordinator:
        if job is not None:
            state = coordinator.state(coordinator.find_job(job))
            event = coordinator.event(state.job_id) if state.status == "RUNNING" else None
            _show_job(state, event, as_json)
            return
        told, jobs = coordinator.announcements(), coordinator.jobs()
        # FLARE's list does not say why a site is missing, or why a job waits
        jobs = [j if j.is_completed else coordinator.state(j.job_id) for j in jobs[:10]] + jobs[10:]
    if as_json:
        values = {
            "sites": [one.to_dict() for one in told],
            "jobs": [_job_values(one) for one in jobs],
        }
        out.print_json(json.dumps(values))
        return
    out.print(WholeWords(_sites_table(told)))
    for text in _about_sites(told):
        out.print(text)
    out.print(WholeWords(_jobs_table(jobs)) if jobs else "no jobs yet")


@commands.command()
def watch(
    kit: Kit,
    job: Annotated[
        str | None,
        typer.Argument(metavar="[JOB_ID]", help="By default the one that runs; of --page, all."),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Serve a page for a browser, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any.")] = 8090,
    host: Annotated[
        str,
        typer.Option(help="Where the page listens. Elsewhere than here: with a secret address."),
    ] = "127.0.0.1",
    notify: Notify = None,
    as_json: AsJson = False,
) -> None:
    """Follow a job to its end, here or on a page. Ctrl-C ends the watching, not the job."""
    notifier = notifier_of(notify)
    if page:
        _serve_page(kit, job, host, port)
        return
    with _connected(kit) as coordinator:
        job_id = coordinator.find_job(job) if job is not None else _the_running_job(coordinator)
        state, _ = _follow(coordinator, job_id, as_json, notifier)
        tell_end(notifier, state)
        if as_json:
            out.print(json.dumps(_job_values(state)))
        elif state.is_completed:
            out.print(f"{state.job_id} has finished; fetch it: fedfms fetch {state.job_id[:8]}")
        if not state.is_completed:
            raise _failed(coordinator, state)


def _the_running_job(coordinator: Coordinator) -> str:
    going = [job for job in coordinator.jobs() if not job.is_finished]
    if len(going) == 1:
        return going[0].job_id
    raise FederationError(
        f"{len(going) or 'no'} jobs run or wait",
        "name one, as fedfms status shows it",
        code="ambiguous-job" if going else "no-such-job",
    )


def _serve_page(kit: Path, job: str | None, host: str, port: int) -> None:
    """Serve the page of a run, or of all of them, until Ctrl-C."""
    from fedfms.watch.known import watcher_of
    from fedfms.watch.page import Pages
    from fedfms.watch.serve import PageServer

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # as process 1 of a container it would be ignored
    watcher = watcher_of(kit, job)
    server = PageServer(Pages(lambda: watcher.known), host, port)
    watcher.start()
    out.print(server.url)
    if not server.is_local:
        err.print(
            "this address is a secret: whoever has it, and reaches this machine, reads the page; "
            "it is a new one at each start. From another machine, put this one's name into it"
        )
    err.print("Ctrl-C ends the page, not the run")
    try:
        server.serve()
    except KeyboardInterrupt:
        err.print("the page has ended; the run goes on")
    finally:
        watcher.stop()
        server.close()


@commands.command()
def fetch(
    job: JobId,
    kit: Kit,
    results: Results = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Fetch a finished job and write its results folder: models, tables, report."""
    from fedfms.report.write import check_results_folder

    with _connected(kit, _scratch(workspace)) as coordinator:
        state = coordinator.state(coordinator.find_job(job))
        if not state.is_finished:
            raise FederationError(
                f"{state.job_id} has not finished: {state.status}",
                f"wait for it with fedfms watch {state.job_id[:8]}",
                code="still-running",
            )
        folder = _new_results(results, workspace, state.name or "job")
        check_results_folder(folder)
        completed = _fetch(coordinator, state, folder, workspace, as_json)
    raise typer.Exit(0 if completed else 1)


@commands.command()
def revoke(site: Annotated[str, typer.Argument(help="Name of the site.")], kit: Kit) -> None:
    """Shut a site out: the server ends its connection and lets it in no more. See readmit."""
    with _connected(kit) as coordinator:
        is_there = site in coordinator.sites()
        coordinator.revoke(site)
    if not is_there:  # FLARE notes any name
        out.print(f"{site} was not connected; is the name right?")
    out.print(f"{site} is shut out; the others go on. Undo: fedfms readmit {site}")


@commands.command()
def readmit(site: Annotated[str, typer.Argument(help="Name of the site.")], kit: Kit) -> None:
    """Let a site in again that was shut out."""
    with _connected(kit) as coordinator:
        coordinator.readmit(site)
    out.print(f"{site} may connect again; a running client of it does so by itself")


# ---------------------------------------------------------------------------------- waiting


def _connected(
    kit: Path, scratch: Path | None = None
) -> contextlib.AbstractContextManager[Coordinator]:
    from fedfms.flare.session import connect

    return connect(kit, scratch=scratch)


def _saying(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else err.print


# --------------------------------------------------------------------------------- following


def _follow(
    coordinator: Coordinator, job_id: str, quiet: bool, notifier: Notifier | None = None
) -> tuple[JobState, OnEvent]:
    """Show how far a job is until FLARE calls it finished.

    Returns:
        FLARE's last word, and what showed the news: it says nothing twice.
    """
    from fedfms.flare.follow import follow, news_from, wait_for_start

    say = _saying(quiet)
    waits = ""

    def on_wait(state: JobState) -> None:
        nonlocal waits
        text = f"FLARE has not started it yet: {state.detail}"
        if state.detail and text != waits:
            waits = text
            say(text)

    try:
        with watching(quiet, {}, as_json=quiet) as on_event:
            tell = telling(notifier, job_id, on_event or _say_nothing)
            state = wait_for_start(coordinator, job_id, on_wait=on_wait)
            if state.detail:
                say(f"FLARE says: {state.detail}")
            news = news_from(coordinator, job_id)
            return follow(coordinator, job_id, news=news, tell=tell), tell
    except KeyboardInterrupt:
        short = job_id[:8]
        err.print(f"the job goes on: fedfms watch {short}, or stop it: fedfms stop {short}")
        raise SystemExit(130) from None  # not Exit: "stopped" would be read as said of the job


def _say_nothing(event: Event) -> None:
    pass


def _fetch(
    coordinator: Coordinator,
    state: JobState,
    folder: Path,
    workspace: Path,
    as_json: bool,
    tell: OnEvent = _say_nothing,
) -> bool:
    """Fetch, write the results folder, show it; whether the job completed.

    `tell` gets what the records say, since nobody answers about progress in a job's last seconds.
    """
    from fedfms.flare.follow import read_end
    from fedfms.report.write import write_results

    _saying(as_json)("fetching the result")
    scratch = Path(tempfile.mkdtemp(prefix="fetch-", dir=_scratch(workspace)))
    try:
        downloaded = coordinator.download(state.job_id, scratch)
        end = read_end(downloaded, state.status)
        tell(end.event)
        write_results(downloaded, folder)
    except FederationError as error:
        if state.is_completed:
            raise
        if state.is_aborted and error.code == "no-records":
            raise FederationError(
                "the job was aborted before it began, so there is nothing to fetch",
                "submit it again",
                code="aborted",
            ) from None
        raise FederationError(
            f"FLARE ended the job as {state.status}"
            f"{f': {state.detail}' if state.detail else ''}; {error.problem}",
            error.fix,
            code="job-failed",
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if as_json or not end.aborted or end.event.finished:  # else there is no score to show
        show_result(folder, as_json)
    if not end.completed:
        fix = f"{_fix_of(end)}; what there is of results lies in {folder}"
        print_error(end.problem, fix)
    return end.completed


def _fix_of(end: JobEnd) -> str:
    return end.fix if end.aborted else f"{end.fix}; {_OWN_WORDS}"


def _failed(coordinator: Coordinator, state: JobState) -> FederationError:
    """Why a watched job failed, from its records if they can be had."""
    from fedfms.flare.follow import read_end

    problem = f"FLARE ended the job as {state.status}"
    fix = _OWN_WORDS
    if state.detail:
        problem += f": {state.detail}"
    with (
        contextlib.suppress(FedfmsError, OSError),
        tempfile.TemporaryDirectory(prefix="fedfms-") as scratch,
    ):
        end = read_end(coordinator.download(state.job_id, Path(scratch)), state.status)
        problem = end.problem if not end.completed else f"{problem}; its records are complete"
        fix = _fix_of(end)
    return FederationError(
        problem,
        f"{fix}; see what there is with fedfms fetch {state.job_id[:8]}",
        code="job-failed",
    )


def _new_results(asked: Path | None, workspace: Path, name: str) -> Path:
    """The results folder: what was asked for, or a new one in the workspace or a mounted volume.

    A volume that this user cannot write, such as root's folder in a container of another user, must
    not cost the run: then results stay in the workspace, and how to get them is said.
    """
    if asked is not None and not asked.is_mount():
        return asked
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)  # a job's name was chosen by its submitter
    folder = f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"
    if asked is not None and os.access(asked, os.W_OK):
        return asked / folder
    kept = workspace / "results"
    if asked is not None:
        err.print(
            f"{asked} cannot be written by user {os.getuid()}, so results go to {kept}. Out of a "
            f"container they come with: docker compose cp coordinator:{kept}/. results"
        )
    return kept / folder


def _scratch(workspace: Path) -> Path:
    """Where results come to before they are a results folder; it needs room for models."""
    folder = workspace / "scratch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{workspace.absolute()} cannot be written: {error.strerror}",
            "name a folder that you may write with --workspace, or in FEDFMS_WORKSPACE",
            code="workspace",
        ) from None
    return folder


# ------------------------------------------------------------------------------------ tables


def _sites_table(told: Sequence[Announcement]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="connected sites")
    for name in ("site", "ready", "version", "device", "classes", "methods", "rounds"):
        table.add_column(name)
    for one in told:
        ready = styled(("yes", "green")) if one.ready else styled(("no", "red"))
        classes = ", ".join([*one.classes, *(f"({name})" for name in one.not_annotated)])
        table.add_row(
            one.site,
            styled(ready, ", busy") if one.busy else ready,
            one.version or "–",
            one.device or "–",
            classes or "–",
            ", ".join(one.methods) or "–",
            f"≤ {one.max_rounds}" if one.max_rounds else "–",
        )
    if any(one.not_annotated for one in told):
        table.caption = "(class): known there and not annotated"
    return table


def _about_sites(told: Sequence[Announcement]) -> list[str]:
    """What has no room in the table: why a site is not ready, and how sites make pictures."""
    from fedfms.flare.lint import grouped, not_ready, slicing_words

    lines = [not_ready(one) for one in told if not one.ready]
    lines += _privacy_lines(told)
    if slices := grouped((slicing_words(one.slicing), one.site) for one in told if one.ready):
        lines.append(f"slices: {slices}")
    return [*lines, ""] if lines else []


def _privacy_lines(told: Sequence[Announcement], recipe: Recipe | None = None) -> list[str]:
    """What training has cost the sites that limit it or add noise, and after a job's rounds."""
    return [
        f"{one.site}: epsilon {'is infinite' if cost.epsilon is None else f'{cost.epsilon:.2f}'} "
        f"{'without a limit' if cost.limit is None else f'of {cost.limit:g}'} so far"
        f"{_after(cost, one, recipe)} for {'a patient' if cost.unit == 'patient' else 'the site'} "
        f"(differential privacy, delta {cost.delta:g})"
        for one in told
        for cost in one.privacy
    ]


def _after(cost: PrivacySpent, site: Announcement, recipe: Recipe | None) -> str:
    """What it would be after the rounds of a job that trains there."""
    if recipe is None or site.site in recipe.holdout:
        return ""
    from fedfms.trainer.budget import after, epsilon_text

    then = after(cost, recipe)
    return "" if then is None else f", {epsilon_text(then)} after {recipe.rounds} rounds more"


def _jobs_table(jobs: Sequence[JobState]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="jobs, newest first")
    for name in ("id", "name", "status", "submitted", "detail"):
        table.add_column(name)
    for one in jobs:
        cells = (one.job_id[:8], one.name, one.status, one.submitted[:19], one.detail)
        table.add_row(*cells)
    return table


def _job_values(state: JobState) -> dict[str, str]:
    keys = ("job_id", "name", "status", "submitted", "detail")
    return {key: getattr(state, key) for key in keys}


def _show_job(state: JobState, event: Event | None, as_json: bool) -> None:
    if as_json:
        progress = event.to_dict() if event is not None else None
        out.print_json(json.dumps({**_job_values(state), "progress": progress}))
        return
    out.print(f"{state.job_id} {state.name}: {state.status}")
    out.print(f"  submitted {state.submitted[:19]} by {state.submitter}")
    if state.detail:
        out.print(f"  FLARE says: {state.detail}")
    if event is not None:
        _show_now(event)


def _show_now(event: Event) -> None:
    """Rounds that are over, what each site does now, the worst first, and what went wrong."""
    from fedfms.cli.common import _round_line
    from fedfms.cli.screen import Clock, doing, duration, headline

    clock = Clock(event)
    for text in (*(_round_line(one, event) for one in event.finished[-3:]), headline(clock)):
        if text:
            out.print(f"  {text}")
    for one in event.worst_first:
        heard = clock.since(one.heard)
        told = "" if heard is None else f"; heard {duration(heard)} ago"
        dice = "" if one.dice is None else f"; Dice {one.dice:.3f}"
        missed = f"; missed {one.missed} rounds" if one.missed else ""
        out.print(f"    {one.name} {doing(one, clock, 300)}{dice}{missed}{told}")
    for text in (*event.missed, *event.notes):
        out.print(f"  {text}")
