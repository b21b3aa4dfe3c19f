"""Commands in a site's FLARE container: pause for the clinic's hours, and go on."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfms.cli.common import out
from fedfms.cli.site import WORKSPACE, Workspace
from fedfms.errors import ConfigError

if TYPE_CHECKING:
    from fedfms.contracts.pause import Pause

commands = typer.Typer()


@commands.command()
def pause(
    until: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="When it is over by itself.")
    ] = None,
    workspace: Workspace = WORKSPACE,
) -> None:
    """Take no task from now on: the GPU is free within half a minute, whatever was under way.

    The server is told, and rounds go on without this site. It survives restarts.
    """
    from fedfms.contracts.pause import Pause

    now = datetime.now().astimezone()
    wanted = Pause.begin(_moment(until, now) if until else None, now)
    _keep(workspace, wanted)
    left = "" if wanted.until is None else f", in {_length(wanted.until - wanted.since)}"
    out.print(f"paused {wanted.words}{left} (the clock here shows {now:%H:%M %Z})")
    out.print("  before that: fedfms unpause" if until else "  go on with: fedfms unpause")


@commands.command()
def unpause(workspace: Workspace = WORKSPACE) -> None:
    """Take part again, in the round that is open or in the next."""
    from fedfms.contracts.pause import read_pause

    before = read_pause(workspace)
    _keep(workspace, None)
    out.print("takes part again" if before is not None else "it was not paused")


def _keep(workspace: Path, wanted: Pause | None) -> None:
    from fedfms.contracts.pause import write_pause

    if not (workspace / "startup").is_dir():
        raise ConfigError(
            f"{workspace} is no workspace of a FLARE client",
            "type it in the site's FLARE container: docker compose exec SITE-flare fedfms pause",
            code="workspace",
        )
    try:
        write_pause(workspace, wanted)
    except OSError as error:
        raise ConfigError(
            f"{workspace} cannot be written: {error.strerror}",
            "make room there; at once: docker compose stop",
            code="not-writable",
        ) from None


def _moment(text: str, now: datetime) -> datetime:
    """The next time that a clock here shows this."""
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text)
    if found is None:
        raise ConfigError(f"{text} is no time of day", "use HH:MM, such as 18:00", code="until")
    moment = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
    return moment if moment > now else moment + timedelta(days=1)


def _length(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
