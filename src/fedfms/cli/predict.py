"""`fedfms predict`: a trained model on images of your own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedfms.cli.common import AsJson, Checkpoints, err, out, progress
from fedfms.config import Intensity, Machine

if TYPE_CHECKING:
    from fedfms.predict.run import Predicted

commands = typer.Typer()


@commands.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="A results folder, or a .safetensors model beside recipe.json.")
    ],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A NIfTI file, a PNG, JPEG or TIFF, the folder of a DICOM series, or a folder of "
            "such.",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="A new file, or a folder in which the names are kept.")
    ],
    site: Annotated[
        Path | None,
        typer.Option(help="A site.yml: how pixels are read, and the device. Else its defaults."),
    ] = None,
    plane: Annotated[
        str | None, typer.Option(metavar="axial|coronal|sagittal", help="Of a volume's slices.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(metavar="gray|rgb|neighbours", help="As in site.yml.")
    ] = None,
    intensity: Annotated[
        str | None,
        typer.Option(
            metavar="RULE:A:B", help="percentile:0.5:99.5, window:CENTER:WIDTH or range:LOW:HIGH."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="A probability map for each class too.")
    ] = False,
    separate: Annotated[
        bool,
        typer.Option(
            "--separate", help="A mask for each class too; always where classes may overlap."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over masks that are there.")
    ] = False,
    checkpoints: Checkpoints = None,
    as_json: AsJson = False,
) -> None:
    """Write the masks that a trained model finds in images; the images are never changed."""
    from fedfms.exchange.trained import load_trained
    from fedfms.predict.find import find_items
    from fedfms.predict.run import origin_of, predict_items, site_for_prediction
    from fedfms.training.device import torch_device

    trained = load_trained(model, checkpoints or Machine.from_environment().checkpoints)
    recipe = trained.recipe
    config = site_for_prediction(
        recipe,
        source,
        site,
        plane=plane,
        channels=channels,
        intensity=Intensity.from_text(intensity) if intensity else None,
        device=device,
    )
    items = find_items(source, output, recipe, probabilities=probabilities, separate=separate)
    origin = origin_of(trained, config)
    used = {
        "model": str(trained.file),
        "name": origin.name,
        **origin.parameters,
        "site": None if site is None else str(site),
        "device": str(torch_device(config)),
    }
    with progress(as_json) as on_progress:
        done = list(
            predict_items(trained, items, config, overwrite=overwrite, on_progress=on_progress)
        )
    failed = [one for one in done if one.error is not None]
    if as_json:
        out.print_json(
            json.dumps(
                {"used": used, "classes": recipe.classes, "images": [_as_json(one) for one in done]}
            )
        )
    else:
        _show(used, recipe.classes, done, failed, output)
    raise typer.Exit(1 if failed else 0)


def _show(
    used: dict[str, str | None],
    classes: Sequence[str],
    done: Sequence[Predicted],
    failed: Sequence[Predicted],
    output: Path,
) -> None:
    source = used["site"] or "defaults; --site takes a site.yml"
    out.print(
        escape(
            f"model: {used['name']}, {', '.join(classes)}; {used['model']}, SHA-256 "
            f"{str(used['model_sha256'])[:12]}…\n"
            f"read as: plane {used['plane']}, channels {used['channels']}, intensity "
            f"{used['intensity']} ({source})\n"
            f"foreground: probability of at least {used['probability_threshold']}; computed on "
            f"{used['device']}"
        )
    )
    for one in done:
        if one.error is not None:
            err.print(f"[bold red]error:[/] {escape(f'{one.item.name}: {one.error.problem}')}")
            err.print(f"  [bold]fix:[/] {escape(one.error.fix)}")
            continue
        sizes = (
            [f"{count} pixels" for count in one.pixels]
            if one.millilitres is None
            else [f"{volume:.2f} ml" for volume in one.millilitres]
        )
        found = ", ".join(f"{name} {size}" for name, size in zip(classes, sizes, strict=True))
        places = ", ".join(map(str, [one.item.labels] if one.item.labels else one.item.separate))
        out.print(escape(f"{one.item.name} -> {places}: {found}"))
    verdict = f"{len(done) - len(failed)} of {len(done)} images predicted; masks are in {output}"
    out.print(escape(verdict))
    if failed:
        names = ", ".join(one.item.name for one in failed)
        err.print(escape(f"{len(failed)} failed: {names}"))


def _as_json(one: Predicted) -> dict[str, object]:
    error = one.error
    return {
        "name": one.item.name,
        "outputs": [] if error else [str(path) for path in one.item.outputs],
        "pixels": list(one.pixels),
        "millilitres": None if one.millilitres is None else list(one.millilitres),
        "overlap": one.overlap,
        "error": None
        if error is None
        else {"code": error.code, "problem": error.problem, "fix": error.fix},
    }
