"""Commands inside the containers of a kit: the roles, their health, the check of a site."""

from __future__ import annotations

import typer

commands = typer.Typer()
