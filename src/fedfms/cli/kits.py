"""Commands that make kits: provisioning, keys that sites make themselves, archives of images."""

from __future__ import annotations

import typer

commands = typer.Typer()
