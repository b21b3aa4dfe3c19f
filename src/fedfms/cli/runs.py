"""Commands of a coordinator about runs: which there are; stop, resume and forget one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.table import Table

from fedfms.cli.common import AsJson, WholeWords, out
from fedfms.cli.jobs import JobId, Kit

if TYPE_CHECKING:
    from fedfms.flare.runs import RunInfo

commands = typer.Typer()


@commands.command("runs")
def list_runs(kit: Kit, as_json: AsJson = False) -> None:
    """List the runs that the server knows and how each is."""
    from fedfms.flare.session import connect

    with connect(kit) as coordinator:
        runs = coordinator.runs()
    if as_json:
        out.print_json(json.dumps([one.to_dict() for one in runs]))
        return
    out.print(WholeWords(_table(runs)) if runs else "no runs yet")
    for one in runs:
        if one.why and one.state != "stopped":
            out.print(f"{one.job_id[:8]} {one.state}: {one.why}")


@commands.command()
def stop(job: JobId, kit: Kit) -> None:
    """Stop a run and keep its state: it stays stopped until somebody resumes it."""
    _stop(job, kit)


@commands.command(hidden=True)
def abort(job: JobId, kit: Kit) -> None:
    """Do what stop does; its name of before."""
    _stop(job, kit)


@commands.command()
def resume(job: JobId, kit: Kit) -> None:
    """Go on with a run that was stopped, given up or failed, from its last finished round."""
    from fedfms.flare.session import connect

    with connect(kit) as coordinator:
        job_id = coordinator.find_job(job)
        rounds = coordinator.resume(job_id)
    out.print(f"{job_id} goes on after {_count(rounds)}; fedfms watch {job_id[:8]}")


@commands.command()
def forget(job: JobId, kit: Kit) -> None:
    """Remove all of a run: models, caches, answers, logs, at the server and at connected sites.

    What stays is one small file at the server: whose run it was, and the hashes of its records and
    models. Results that were fetched are yours and stay.
    """
    from fedfms.flare.session import connect

    with connect(kit) as coordinator:
        job_id = coordinator.find_job(job)
        done = coordinator.forget(job_id)
    where = ", ".join(["the server", *done.sites])
    out.print(f"{job_id} is forgotten at {where}")
    for site, code in done.failed.items():
        out.print(f"not at {site}: {code or 'it did not answer'}")
    if done.not_connected:
        out.print(
            f"not at {', '.join(done.not_connected)}: not connected. There it goes with the "
            "fourth run after it, or by hand: /work/runs in the trainer's container"
        )


def _stop(job: str, kit: Kit) -> None:
    from fedfms.flare.session import connect

    with connect(kit) as coordinator:
        job_id = coordinator.find_job(job)
        rounds = coordinator.stop(job_id)
    short = job_id[:8]
    if rounds:
        out.print(f"{job_id} is being stopped; {_count(rounds)} of it are kept")
        out.print(f"  fedfms resume {short}; fedfms fetch {short}; fedfms forget {short}")
    else:
        out.print(f"{job_id} is being stopped; nothing of it is kept yet")


def _count(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def _table(runs: Sequence[RunInfo]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="runs, newest first")
    for name in ("id", "name", "by", "state", "round", "since", "sites", "starts"):
        table.add_column(name)
    for one in runs:
        state = f"{one.state} {one.why}" if one.state == "stopped" and one.why else one.state
        table.add_row(
            one.job_id[:8],
            one.name,
            one.submitter,
            state,
            f"{one.round} of {one.rounds or '–'}",
            "–" if one.since is None else time.strftime("%m-%d %H:%M", time.localtime(one.since)),
            ", ".join(one.sites) if len(one.sites) <= 3 else str(len(one.sites)),
            str(one.starts),
        )
    if any(one.is_kept for one in runs):
        kept = ", ".join(one.job_id[:8] for one in runs if one.is_kept)
        table.caption = f"may be resumed: {kept}"
    return table
