"""One trained model to one format: checked early, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Reading, SiteConfig
from fedfms.errors import ConfigError
from fedfms.export import bundle, onnx
from fedfms.export.fedfms import write_fedfms
from fedfms.export.place import refuse_existing, require_room, whole_or_nothing
from fedfms.export.sam import write_sam
from fedfms.files import file_sha256
from fedfms.models.build import SamSegmenter
from fedfms.models.methods import Method
from fedfms.models.trained import Trained, load_trained

Writer = Callable[[Trained, Reading | None, Path], tuple[tuple[str, ...], float | None]]
_WRITERS: dict[str, Writer] = {
    "sam": write_sam,
    "fedfms": write_fedfms,
    "onnx": onnx.write_onnx,
    "bundle": bundle.write_bundle,
}
FORMATS = tuple(_WRITERS)
_SUFFIXES = {"sam": ".pth", "fedfms": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file of an export."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that is in its place."""

    format: str  # one of FORMATS
    backbone: str
    image_size: int  # pixels
    files: tuple[ExportedFile, ...]  # the one with the network first
    notes: tuple[str, ...]  # sentences: what differs, what to mind
    largest_difference: float | None  # of a logit, against the network; None: the same tensors


def export_model(
    model: Path,
    output: Path,
    format: str,
    *,
    site: Path | None = None,
    checkpoints: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a model that `models.trained.load_trained` finds.

    Args:
        model: a results folder, a .safetensors file beside its recipe.json, or an earlier export.
        output: a new file, or a new folder for a bundle; parent folders are made.
        format: one of FORMATS.
        site: site.yml: plane, channels and intensity of the pictures, which are written in.
        checkpoints: folder of SAM checkpoints; see `load_trained`.
        overwrite: replace an earlier export at `output`.

    Raises:
        ConfigError: an unknown format ("unknown-format"), a file name that does not fit
            ("wrong-suffix"), and what `place`, `load_trained` and the format raise.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"there is no format {format!r}",
            f"use one of {', '.join(FORMATS)} with --as",
            code="unknown-format",
        )
    _check_output(output, format, overwrite=overwrite)
    if format == "onnx":
        onnx.require_packages()
    # the site's data is not read, so that the folder it lies in need not be here
    config = None if site is None else SiteConfig.from_yaml(site, data_root=site.parent)
    trained = load_trained(model, checkpoints)
    recipe = trained.recipe
    _check_method(trained.model.method, recipe, format)
    network_bytes = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    require_room(output, 2 * network_bytes + 2**20)  # TorchScript is written twice
    is_bundle = format == "bundle"
    is_graph = format in ("onnx", "bundle")
    if is_graph and isinstance(trained.model, SamSegmenter):
        trained.model.encoder_dtype = torch.float32  # bf16 is a trainer's choice
    with whole_or_nothing(output, folder=is_bundle) as part:
        target = part if is_bundle else part / output.name
        notes, difference = _WRITERS[format](trained, config, target)
        if is_graph and recipe.precision == "bf16":
            notes += (
                "It computes in fp32, and evaluation in the job's bf16: logits differ by "
                "about 0.01, and a few pixels at the edge of a mask with them.",
            )
        if config is None:
            notes += (
                "Those are site.yml's defaults: if the sites had others, name a site's file with "
                "--site."
                if is_bundle
                else "It does not say plane, channels and intensity of the pictures that it was "
                "trained on: name a site's file with --site to have them written in.",
            )
        if recipe.holdout:
            notes += (
                f"The recipe inside names the sites that only evaluated: "
                f"{', '.join(recipe.holdout)}.",
            )
        names = sorted(p.relative_to(part) for p in part.rglob("*") if p.is_file())
    place = output if is_bundle else output.parent
    paths = sorted((place / n for n in names), key=lambda p: p != output and p.suffix != ".ts")
    files = tuple(ExportedFile(p, p.stat().st_size, file_sha256(p)) for p in paths)
    return Exported(format, recipe.backbone, recipe.image_size, files, notes, difference)


def _check_method(method: Method, recipe: Recipe, format: str) -> None:
    if recipe.tile is not None and format in ("onnx", "bundle"):
        raise ConfigError(
            f"the model sees parts of {recipe.tile} pixels of a picture (tile), and {format} would "
            "squeeze whole pictures into one",
            "export it with --as fedfms, and use fedfms predict, which puts the parts together",
            code="tiles-not-exported",
        )
    if recipe.contrasts and format in ("sam", "bundle"):
        what = {
            "sam": "SAM's own checkpoint has no place for the layer that mixes them",
            "bundle": "a bundle reads one file a volume",
        }
        raise ConfigError(
            f"the model sees {len(recipe.contrasts)} contrasts ({', '.join(recipe.contrasts)}), "
            f"and {what[format]}",
            "export it with --as fedfms or --as onnx",
            code="contrasts-not-exported",
        )
    if format in method.exports:
        return
    if format == "sam" and recipe.adapter_blocks == "last:0":  # nothing was added to SAM
        return
    others = ", ".join(f"--as {one}" for one in FORMATS if one in method.exports)
    if format == "sam" and method.adds:
        problem = (
            f"a {method.title} model has {method.adds}, for which SAM's own checkpoint has no place"
        )
    else:
        problem = f"a {method.title} model cannot be exported as {format}"
    raise ConfigError(
        problem,
        f"export it with {others}" if others else "it can be used with fedfms predict alone",
        code="no-sam-checkpoint" if format == "sam" else "not-of-this-method",
    )


def _check_output(output: Path, format: str, *, overwrite: bool) -> None:
    suffix = _SUFFIXES.get(format)
    if suffix is None:
        refuse_existing(output, overwrite=overwrite, mark=bundle.MARK)
        return
    if output.suffix != suffix:
        raise ConfigError(
            f"--as {format} writes a {suffix} file, and OUTPUT is {output.name}",
            f"name it {output.stem or 'model'}{suffix}, or choose another format",
            code="wrong-suffix",
        )
    refuse_existing(output, overwrite=overwrite)
    if format == "sam":
        refuse_existing(output.with_name(f"{output.name}.md"), overwrite=overwrite)
