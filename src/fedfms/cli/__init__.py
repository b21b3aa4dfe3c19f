"""The `fedfms` command: arguments in, one call, exit code out.

Exit codes: 0 done, 1 something is wrong and the message says what, 2 the command line, 130 Ctrl-C.
Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer
from rich.markup import escape

from fedfms import __version__
from fedfms.cli import export, jobs, kits, local, predict, prepare, site, study
from fedfms.cli.common import err, out
from fedfms.errors import FedfmsError

app = typer.Typer(
    name="fedfms",
    help="Hospitals fine-tune Segment Anything (SAM) together, without moving an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for title, modules in {
    "On one machine": (local,),
    "Data sets and studies": (prepare, study),
    "A trained model": (predict, export),
    "Kits: who takes part": (kits,),
    "A coordinator's jobs, with an admin's kit": (jobs,),
    "In the containers of a kit": (site,),
}.items():
    for module in modules:
        own = module.commands
        for command in (*own.registered_commands, *own.registered_groups):
            command.rich_help_panel = title
        app.add_typer(own)


def main() -> None:
    """Run the command line; a user's mistake ends with one message and no traceback."""
    for stream in (sys.stdout, sys.stderr):  # file names may be of any bytes; see os.fsdecode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"fedfms {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
