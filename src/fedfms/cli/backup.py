"""Commands on the server's machine: its archive, and a server from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedfms.cli.common import out
from fedfms.cli.site import KIT, WORKSPACE, Workspace

commands = typer.Typer()

Archive = Annotated[Path, typer.Argument(metavar="FILE.tar", help="Such as /here/server.tar.")]


@commands.command()
def backup(
    file: Archive,
    workspace: Workspace = WORKSPACE,
    kit: Annotated[Path, typer.Option(help="The server's kit.")] = KIT,
    provisioning: Annotated[
        Path | None, typer.Option(help="Also the output folder of fedfms provision.")
    ] = None,
) -> None:
    """Write jobs, runs, records and keys of the server into one file, also while a run goes on."""
    from fedfms.provisioning.backup import backup as write

    made = write(file, workspace, kit if kit.is_dir() else None, provisioning)
    out.print(
        f"{made.file}: {made.size / 1e6:.0f} MB, {made.jobs} jobs, {made.runs} runs that are not "
        "over"
    )
    out.print("It holds private keys and is readable for you alone (mode 600): keep it so.")


@commands.command()
def restore(
    file: Archive,
    workspace: Workspace = WORKSPACE,
    kit: Annotated[Path | None, typer.Option(help="New folder for the server's kit.")] = None,
    provisioning: Annotated[
        Path | None, typer.Option(help="New folder for what fedfms provision had written.")
    ] = None,
) -> None:
    """Put a server's archive into a new volume or folder; its runs go on when it is started."""
    from fedfms.provisioning.backup import restore as put_back

    made = put_back(file, workspace, kit, provisioning)
    out.print(f"{workspace}: {made.jobs} jobs, {made.runs} runs that go on when the server starts")
    out.print("Start this server only where the old one is stopped: there is one for its sites.")
