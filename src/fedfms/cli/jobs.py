"""Commands of a coordinator with an admin kit: submit, watch and fetch jobs."""

from __future__ import annotations

import typer

commands = typer.Typer()
