"""The `fedfms` command: arguments in, one call, exit code out."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True)


def main() -> None:
    """Entry point."""
    app()
