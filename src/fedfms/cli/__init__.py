"""The `fedfms` command: arguments in, one call, exit code out.

Exit codes: 0 done, 1 something is wrong and the message says what, 2 the command line, 130 Ctrl-C.
Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import logging
import re
import sys
from importlib.metadata import entry_points
from typing import Annotated, TextIO, cast

import typer

from fedfms import __version__
from fedfms.cli import (
    adopt,
    backup,
    egress,
    export,
    jobs,
    kits,
    local,
    pause,
    predict,
    runs,
    site,
    verify,
)
from fedfms.cli.common import err, out, print_error, show_details, show_error
from fedfms.errors import FedfmsError, unexpected
from fedfms.user import refuse_root

app = typer.Typer(
    name="fedfms",
    help="Hospitals fine-tune Segment Anything (SAM) together, without moving an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS = {
    "On one machine": (local, adopt),
    "A trained model": (predict, export),
    "Kits: who takes part": (kits,),
    "A coordinator's jobs, with an admin's kit": (jobs, runs, verify),
    "In the containers of a kit": (site, egress, pause, backup),
}
_INTERRUPTED = 130
# commands of the other package of this repository, for who looks for one where only ours is
_IN_THE_LABORATORY = ("prepare", "study")

# The base of typer's own errors. Its name is the same in every version; its module is not.
_UsageError = cast(
    "type[Exception]",
    next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)


def _add(commands: typer.Typer, panel: str) -> None:
    for command in commands.registered_commands:
        command.rich_help_panel = command.rich_help_panel or panel
    for group in commands.registered_groups:
        group.rich_help_panel = group.rich_help_panel or panel
    app.add_typer(commands)


def _add_commands() -> list[str]:
    """Our commands and those of other packages here; why the commands of one are missing."""
    for panel, modules in _PANELS.items():
        for module in modules:
            _add(module.commands, panel)
    missing = []
    for point in sorted(entry_points(group="fedfms.commands"), key=lambda point: point.name):
        try:
            _add(point.load(), f"From {point.dist.name}" if point.dist else "From other packages")
        except Exception as error:  # a package that is not ours must not end ours
            missing.append(f"fedfms {point.name} is not there: {error}")
    return missing


_missing = _add_commands()


def main() -> None:
    """Run the command line; whatever goes wrong ends with one message and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        _let_any_name_through(stream)
    for problem in _missing:
        err.print(problem)
    try:
        refuse_root()
        code = app(prog_name="fedfms", standalone_mode=False)
    except FedfmsError as error:
        show_error(error)
        show_details([error])
        sys.exit(1)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except _UsageError as error:  # typer would draw a box and break what was typed at its edge
        _print_wrong_usage(error)
        sys.exit(2)
    except Exception as error:
        told = unexpected(error, "the command cannot go on", FedfmsError)
        show_error(told)
        show_details([told])
        sys.exit(1)
    if code == _INTERRUPTED:  # typer makes this of Ctrl-C, without a word
        err.print("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _let_any_name_through(stream: TextIO) -> None:
    """Escape what cannot be encoded, such as names of files of any bytes, and do not end there.

    Not the bytes themselves: what scripts read of `--json` has to stay UTF-8.
    """
    if hasattr(stream, "reconfigure"):  # not where a test took its place
        stream.reconfigure(errors="backslashreplace")


def _print_wrong_usage(error: Exception) -> None:
    """Say what is wrong with the command line, in the words of typer."""
    unknown = re.fullmatch(r"No such command '([\w-]+)'.*", str(error), re.DOTALL)
    if unknown and unknown[1] in _IN_THE_LABORATORY:
        print_error(
            f"fedfms {unknown[1]} is a command of the package fedfms-lab, which is not here",
            "install it beside this one, from the same checkout: pip install ./src/fedfms_lab "
            "(in containers: the image's target lab)",
        )
        return
    context = getattr(error, "ctx", None)
    problem = getattr(error, "format_message", error.__str__)()
    if not problem.strip():  # no command was named: the help has been shown
        return
    command = context.command_path if context is not None else "fedfms"
    print_error(problem, f"{command} --help")


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
