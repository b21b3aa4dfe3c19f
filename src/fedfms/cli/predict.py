"""`fedfms predict`: a trained model on images of your own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfms.cli.common import AsJson, Checkpoints, err, out, progress, show_details, show_error
from fedfms.contracts.machine import Machine
from fedfms.errors import FedfmsError

if TYPE_CHECKING:
    from fedfms.predict.run import Predicted

commands = typer.Typer()

_TEXTS = ("code", "problem", "fix")


@commands.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="A results folder, or a .safetensors model beside recipe.json.")
    ],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A NIfTI file, a PNG, JPEG, TIFF or NPY, the folder of a DICOM series, or a "
            "folder of such.",
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
        str | None,
        typer.Option(metavar="axial|coronal|sagittal|stored", help="Of a volume's slices."),
    ] = None,
    channels: Annotated[
        str | None, typer.Option(metavar="gray|rgb|neighbours", help="As in site.yml.")
    ] = None,
    intensity: Annotated[
        str | None,
        typer.Option(
            metavar="RULE:A:B",
            help="percentile:0.5:99.5, window:CENTER:WIDTH or range:LOW:HIGH; with :truncate "
            "behind it grey levels are cut off and not rounded.",
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
    own: Annotated[
        Path | None,
        typer.Option(
            "--own",
            help="What your trainer kept of a run with personal parts: the last "
            "runs/JOB/learnt-*/staying.safetensors in its private folder.",
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    as_json: AsJson = False,
) -> None:
    """Write the masks that a trained model finds in images; the images are never changed."""
    from fedfms.contracts.site import Intensity
    from fedfms.models.trained import load_trained
    from fedfms.predict.find import find_items, passed_over
    from fedfms.predict.run import origin_of, predict_items, site_for_prediction
    from fedfms.training.device import torch_device

    folder = checkpoints or Machine.from_environment().checkpoints
    trained = load_trained(model, folder, own)
    recipe = trained.recipe
    config = site_for_prediction(
        trained,
        source,
        site,
        plane=plane,
        channels=channels,
        intensity=Intensity.from_text(intensity) if intensity else None,
        device=device,
    )
    items = find_items(
        source,
        output,
        recipe,
        probabilities=probabilities,
        separate=separate,
        contrasts=config.contrasts,
    )
    others = passed_over(source, output, items)
    origin = origin_of(trained, config)
    used = {
        "model": str(trained.file),
        "name": origin.name,
        **origin.parameters,
        "site": None if site is None else str(site),
        "read_as": (
            "site.yml"
            if site is not None
            else "defaults"
            if trained.pictures is None
            else "as the model's file says"
        ),
        "device": str(torch_device(config)),
    }
    done: list[Predicted] = []
    ended: FedfmsError | None = None
    try:
        with progress(as_json) as on_progress:
            for one in predict_items(
                trained, items, config, overwrite=overwrite, on_progress=on_progress
            ):
                done.append(one)
    except FedfmsError as error:  # the next image would fail alike
        ended = error
    except KeyboardInterrupt:
        if not as_json:
            _show(used, recipe.classes, done, len(items), output)
        raise
    failed = [one for one in done if one.error is not None]
    if as_json:
        out.print_json(
            json.dumps(
                {
                    "used": used,
                    "classes": recipe.classes,
                    "images": [_as_json(one) for one in done],
                    "passed_over": [str(path.relative_to(source)) for path in others],
                    "ended_by": None if ended is None else _error_as_json(ended),
                }
            )
        )
    else:
        _show(used, recipe.classes, done, len(items), output)
        if others:
            out.print(_passed_over(others))
        if ended is not None:
            show_error(ended)
    show_details([*(one.error for one in failed if one.error), *([ended] if ended else [])])
    raise typer.Exit(1 if failed or ended else 0)


def _show(
    used: dict[str, str | None],
    classes: Sequence[str],
    done: Sequence[Predicted],
    count: int,
    output: Path,
) -> None:
    """What became of the images so far, of `count` in all."""
    source = used["site"] or f"{used['read_as']}; --site takes a site.yml"
    out.print(
        f"model: {used['name']}, {', '.join(classes)}; {used['model']}, SHA-256 "
        f"{str(used['model_sha256'])[:12]}…\n"
        f"read as: plane {used['plane']}, channels {used['channels']}, intensity "
        f"{used['intensity']} ({source})\n"
        f"foreground: probability of at least {used['probability_threshold']}; computed on "
        f"{used['device']}"
    )
    for one in done:
        if one.error is not None:
            show_error(one.error, f"error: {one.item.name}")
            continue
        sizes = (
            [f"{count} pixels" for count in one.pixels]
            if one.millilitres is None
            else [_volume(volume) for volume in one.millilitres]
        )
        found = ", ".join(f"{name} {size}" for name, size in zip(classes, sizes, strict=True))
        places = ", ".join(map(str, [one.item.labels] if one.item.labels else one.item.separate))
        out.print(f"{one.item.name} -> {places}: {found}")
        for note in one.notes:
            out.print(f"  note: {note.problem}\n  fix: {note.fix}")
    failed = [one for one in done if one.error is not None]
    out.print(f"{len(done) - len(failed)} of {count} images predicted; masks are in {output}")
    if failed:
        names = ", ".join(one.item.name for one in failed)
        err.print(f"{len(failed)} failed: {names}")


def _volume(millilitres: float) -> str:
    """To a hundredth, and with two digits where that would be nothing, as under a microscope."""
    digits = ".2g" if 0 < millilitres < 0.005 else ".2f"
    return f"{millilitres:{digits}} ml"


def _passed_over(paths: Sequence[Path]) -> str:
    endings = Counter(path.suffix.lower() or "without ending" for path in paths)
    some = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(6))
    return (
        f"passed over, since they are no images for this: {some}; it reads NIfTI, PNG, JPEG, TIFF, "
        "NPY and folders of DICOM"
    )


def _as_json(one: Predicted) -> dict[str, object]:
    error = one.error
    return {
        "name": one.item.name,
        "outputs": [] if error else [str(path) for path in one.item.outputs],
        "pixels": list(one.pixels),
        "millilitres": None if one.millilitres is None else list(one.millilitres),
        "overlap": one.overlap,
        "notes": [{key: getattr(note, key) for key in _TEXTS} for note in one.notes],
        "error": None if error is None else _error_as_json(error),
    }


def _error_as_json(error: FedfmsError) -> dict[str, str]:
    return {key: getattr(error, key) for key in _TEXTS}
