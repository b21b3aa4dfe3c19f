"""`fedfms export`: a trained model to a file that other programs load."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfms.cli.common import AsJson, Checkpoints, out
from fedfms.contracts.machine import Machine

if TYPE_CHECKING:
    from fedfms.export.run import Exported

commands = typer.Typer()


@commands.command()
def export(
    model: Annotated[
        Path,
        typer.Argument(help="A results folder, a .safetensors file beside its recipe.json."),
    ],
    output: Annotated[
        Path, typer.Argument(help="New file: .pth, .safetensors or .onnx; for a bundle a folder.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="FORMAT",
            help="sam: Segment Anything's own checkpoint (FedSAM, one class). "
            "fedfms: one file with everything. "
            "onnx: a graph for onnxruntime. "
            "bundle: a MONAI bundle that segments NIfTI volumes without fedfms.",
        ),
    ],
    site: Annotated[
        Path | None,
        typer.Option(
            help="A site.yml: plane, channels and intensity of its images are written in. "
            "A bundle has site.yml's defaults otherwise."
        ),
    ] = None,
    checkpoints: Checkpoints = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export at OUTPUT.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for other programs: SAM, ONNX, MONAI, or one file of our own."""
    from fedfms.export.run import export_model

    done = export_model(
        model,
        output,
        format,
        site=site,
        checkpoints=checkpoints or Machine.from_environment().checkpoints,
        overwrite=overwrite,
    )
    if as_json:
        files = [
            {"path": str(file.path), "bytes": file.size_bytes, "sha256": file.sha256}
            for file in done.files
        ]
        values = {"format": done.format, "files": files, "notes": done.notes}
        out.print_json(json.dumps({**values, "largest_difference": done.largest_difference}))
        return
    for file in done.files:
        out.print(f"{file.path}  {_size(file.size_bytes)}  SHA-256 {file.sha256}")
    if done.largest_difference == 0.0:
        out.print("checked: its logits are exactly PyTorch's")
    elif done.largest_difference is not None:
        out.print(f"checked: logits differ from PyTorch's by at most {done.largest_difference:.1g}")
    for note in done.notes:
        out.print(f"- {note}")
    out.print(f"next: {_next_command(done, output)}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _next_command(done: Exported, output: Path) -> str:
    """What to type to use the export, or to look at it."""
    name = shlex.quote(str(output))
    if done.format == "bundle":
        return (
            f"python -m monai.bundle run --bundle_root {name} "
            f"--config_file {shlex.quote(str(output / 'configs/inference.json'))} "
            f"--meta_file {shlex.quote(str(output / 'configs/metadata.json'))} "
            "--dataset_dir IMAGES --output_dir MASKS"
        )
    if done.format == "onnx":
        code = (
            f"import onnxruntime; s = onnxruntime.InferenceSession({json.dumps(str(output))}); "
            "print(s.get_modelmeta().custom_metadata_map)"
        )
        return f"ORT_DISABLE_TELEMETRY=1 python -c {shlex.quote(code)}"
    if done.format == "sam":
        return f"read {output}.md: the code that loads it and segments with it"
    return f"fedfms predict --help, or fedfms export {name} model.onnx --as onnx"
