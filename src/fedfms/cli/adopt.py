"""`fedfms adopt`: a folder as it lies to a site.yml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedfms.cli.common import AsJson, Classes, names_in, out, progress, styled

commands = typer.Typer()


@commands.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="The folder with your images and labels.")],
    output: Annotated[
        Path, typer.Option(help="The new site.yml; one that is there is never written over.")
    ] = Path("site.yml"),
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Look at a folder and write the site.yml that reads it; no other file is written or changed.

    It knows nnU-Net raw, Decathlon, BIDS, BraTS and FeTS, TotalSegmentator, a
    folder for each patient, folders of images and labels, and DICOM as archives
    and planning systems export it, X-rays and other pictures with their masks
    too. It says what it is not sure of.

    Exit code 1 if something is missing for it to work; then it says what.
    """
    from fedfms.control import Control
    from fedfms.data.adopt.propose import propose
    from fedfms.data.adopt.write import site_yml, write_site
    from fedfms.errors import ConfigError

    if output.exists():
        raise ConfigError(
            f"{output} is there already and is not written over",
            "name another file with --output, or move this one away",
            code="output-exists",
        )
    with progress(as_json) as on_progress:
        found = propose(folder, names_in(classes), Control(on_progress))
    write_site(found, output)
    if as_json:
        out.print_json(
            json.dumps(
                {
                    "layout": found.layout,
                    "site": str(output),
                    "text": site_yml(found),
                    "seen": dict(found.seen),
                    "not_sure": found.unsure,
                    "needs": [
                        {"code": one.code, "problem": one.problem, "fix": one.fix}
                        for one in found.needs
                    ],
                }
            )
        )
        raise typer.Exit(1 if found.needs else 0)
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    values = found.values
    globs = [
        *(values.get("contrasts") or {"images": values["images"]}).items(),
        *list((values.get("label_files") or {"labels": values["labels"]}).items())[:12],
    ]
    for name, text in [*found.seen, *globs]:
        lines.add_row(styled((name, "bold")), text)
    out.print(lines, soft_wrap=False, width=min(out.width, 80))
    for one in found.unsure:
        out.print(styled(("not sure", "bold yellow"), " ", one))
    for need in found.needs:
        out.print(styled(("needs", "bold red"), " ", need.problem))
        out.print(styled("  ", ("fix:", "bold"), " ", need.fix))
    out.print(f"{output} is written; next: fedfms check-data {output}")
    raise typer.Exit(1 if found.needs else 0)
