"""One trained model to one format: checked early, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fedfms.contracts.site import Reading, SiteConfig
from fedfms.errors import ConfigError
from fedfms.export import bundle, onnx
from fedfms.export.fedfms import write_fedfms
from fedfms.export.place import refuse_existing, require_room, whole_or_nothing
from fedfms.export.sam import write_sam
from fedfms.files import file_sha256
from fedfms.models.build import SamSegmenter
from fedfms.models.methods import Method
from fedfms.models.trained import load_trained

Format = Literal["sam", "fedfms", "onnx", "bundle"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[Format, str] = {"sam": ".pth", "fedfms": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file of an export."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that is in its place."""

    format: Format
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
    kind = _format(format)
    _check_output(output, kind, overwrite=overwrite)
    if kind == "onnx":
        onnx.require_packages()
    # the site's data is not read, so that the folder it lies in need not be here
    config = None if site is None else SiteConfig.from_yaml(site, data_root=site.parent)
    trained = load_trained(model, checkpoints)
    recipe = trained.recipe
    _check_method(trained.model.method, kind)
    network_bytes = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    require_room(output, 2 * network_bytes + 2**20)  # TorchScript is written twice
    notes: tuple[str, ...]
    difference: float | None = None
    with whole_or_nothing(output, folder=kind == "bundle") as part:
        if kind == "sam":
            notes = write_sam(trained, config, part / output.name)
        elif kind == "fedfms":
            notes = write_fedfms(trained, config, part / output.name)
        else:
            if isinstance(trained.model, SamSegmenter):
                trained.model.encoder_dtype = torch.float32  # bf16 is a trainer's choice
            if kind == "onnx":
                notes, difference = onnx.write_onnx(trained, config, part / output.name)
            else:
                facts = config or Reading(format="nifti")  # every default of site.yml
                notes, difference = bundle.write_bundle(trained, facts, part)
            if recipe.precision == "bf16":
                notes += (
                    "It computes in fp32, and evaluation in the job's bf16: logits differ by "
                    "about 0.01, and a few pixels at the edge of a mask with them.",
                )
        if config is None:
            notes += (
                "Those are site.yml's defaults: if the sites had others, name a site's file with "
                "--site."
                if kind == "bundle"
                else "It does not say plane, channels and intensity of the pictures that it was "
                "trained on: name a site's file with --site to have them written in.",
            )
        if recipe.holdout:
            notes += (
                f"The recipe inside names the sites that only evaluated: "
                f"{', '.join(recipe.holdout)}.",
            )
        names = _written(part)
    if kind != "bundle":
        paths = sorted((output.with_name(name.name) for name in names), key=lambda p: p != output)
    else:
        paths = sorted((output / name for name in names), key=lambda p: p.suffix != ".ts")
    files = tuple(ExportedFile(p, p.stat().st_size, file_sha256(p)) for p in paths)
    return Exported(kind, recipe.backbone, recipe.image_size, files, notes, difference)


def _format(name: str) -> Format:
    for known in FORMATS:
        if name == known:
            return known
    raise ConfigError(
        f"there is no format {name!r}",
        f"use one of {', '.join(FORMATS)} with --as",
        code="unknown-format",
    )


def _check_method(method: Method, kind: Format) -> None:
    if kind in method.exports:
        return
    others = ", ".join(f"--as {one}" for one in FORMATS if one in method.exports)
    if kind == "sam" and method.adds:
        problem = (
            f"a {method.title} model has {method.adds}, for which SAM's own checkpoint has no place"
        )
    else:
        problem = f"a {method.title} model cannot be exported as {kind}"
    raise ConfigError(
        problem,
        f"export it with {others}" if others else "it can be used with fedfms predict alone",
        code="no-sam-checkpoint" if kind == "sam" else "not-of-this-method",
    )


def _check_output(output: Path, kind: Format, *, overwrite: bool) -> None:
    suffix = SUFFIXES.get(kind)
    if suffix is None:
        refuse_existing(output, overwrite=overwrite, mark=bundle.MARK)
        return
    if output.suffix != suffix:
        raise ConfigError(
            f"--as {kind} writes a {suffix} file, and OUTPUT is {output.name}",
            f"name it {output.stem or 'model'}{suffix}, or choose another format",
            code="wrong-suffix",
        )
    refuse_existing(output, overwrite=overwrite)
    if kind == "sam":
        refuse_existing(output.with_name(f"{output.name}.md"), overwrite=overwrite)


def _written(folder: Path) -> list[Path]:
    """The files in a folder, relative to it, in order of name."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
