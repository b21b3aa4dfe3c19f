"""A model as a MONAI bundle: volumes in, masks out, with MONAI and PyTorch alone.

MONAI turns the volume and scales its grey levels; the network in models/model.ts resizes, segments
and undoes the resizing (export/torchscript.py), slice by slice. Both together are this package's
own preprocessing, and a test compares the masks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedfms import __version__
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Reading
from fedfms.data.grid import axis_letters
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase
from fedfms.errors import ConfigError, TrainingError
from fedfms.export.facts import about, greys, input_facts, render, rounded, site_facts, terms
from fedfms.export.torchscript import write_torchscript
from fedfms.geometry import Frame, network_input, to_native
from fedfms.models.trained import Trained

# MONAI's current schema of metadata.json; the models of its own model zoo name this address
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
MARK = Path("configs/metadata.json")  # what every bundle has
LARGEST_DIFFERENCE = 1e-4  # of a logit, against this package's own code; it is 0 on one machine

_PREVIOUS = "torch.cat((image[..., :1], image[..., :-1]), -1)"
_NEXT = "torch.cat((image[..., 1:], image[..., -1:]), -1)"


def write_bundle(
    trained: Trained, site: Reading | None, folder: Path
) -> tuple[tuple[str, ...], float]:
    """Write the bundle into an empty folder and run its network once.

    Args:
        trained: the model.
        site: how this model's pictures come about; None: every default of site.yml.
        folder: empty.

    Returns:
        sentences for the person who exports, and the largest difference of a logit from this
        package's own way from a slice to logits.

    Raises:
        ConfigError: "not-volumes"; the site's images are pictures.
        TrainingError: "wrong-graph"; the network file computes something else than the network.
    """
    recipe, site = trained.recipe, site or Reading(format="nifti")
    if site.format not in ("nifti", "dicom") or site.channels == "rgb":
        raise ConfigError(
            f"site.yml says format: {site.format} and channels: {site.channels}, and a bundle "
            "reads grey NIfTI volumes",
            "for pictures export with --as onnx or --as fedfms",
            code="not-volumes",
        )
    if axis_letters(site.plane) is None:
        raise ConfigError(
            f"the plane in site.yml is {site.plane}, the order of that site's own files, and a "
            "bundle is for anybody's volumes",
            "give --site a site.yml with plane: axial, coronal or sagittal",
            code="plane-is-stored",
        )
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    network = folder / "models/model.ts"
    write_torchscript(trained.model, recipe, network)
    difference = _difference(network, trained, site)
    if not difference <= LARGEST_DIFFERENCE:
        raise TrainingError(
            f"the network of the bundle differs from this package's by up to {difference:.3g}",
            "report this with your version of torch; meanwhile export with --as onnx",
            code="wrong-graph",
        )
    _write_json(folder / "configs/inference.json", inference(recipe, site))
    _write_json(folder / MARK, metadata(recipe, site))
    slices, levels = _slices(site), greys(site, "volume")
    readme = render(
        "bundle-readme.md",
        recipe=recipe,
        site=site,
        about=about(recipe),
        slices=slices,
        greys=levels,
        rounded=rounded(site),
    )
    (folder / "docs/README.md").write_text(readme, encoding="utf-8")
    licence = render("bundle-license", terms=terms(recipe))
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
    return (
        f"It takes slices as this site does: {slices}; {levels}.",
        'It needs MONAI, nibabel and fire, and not this package: pip install "monai[nibabel,fire]"',
    ), difference


def inference(recipe: Recipe, site: Reading) -> dict[str, Any]:
    """configs/inference.json: MONAI's names for what is between a NIfTI file and a mask."""
    return {
        "imports": ["$import collections", "$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "probability_threshold": recipe.probability_threshold,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": (
            "$[{'image': name} for pattern in ('*.nii', '*.nii.gz')"
            " for name in sorted(glob.glob(os.path.join(@dataset_dir, pattern)))]"
        ),
        "network_def": ("$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)"),
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(site)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "slices": {
            "_target_": "SliceInferer",
            "spatial_dim": 2,
            "roi_size": [-1, -1],  # whole slices
            "sw_batch_size": 4 if recipe.image_size <= 512 else 1,
            "overlap": 0.0,
        },
        # the network wants to know how high and wide a pixel is: the image's own affine says it
        "inferer": (
            "$lambda image, network, slices=@slices: slices(image, lambda part:"
            " network(part, image.affine.reshape(-1, 4, 4)[0, :3, :2].norm(dim=0)))"
        ),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(recipe)},
        "evaluator": {  # for programs that ask for one; it needs pytorch-ignite, `run` does not
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        # what is called by name inside a lambda has to come in as a default of an argument
        "segment": (
            "$lambda case, infer=@inferer, network=@network_def, finish=@postprocessing,"
            " device=@device: finish({**case, 'pred':"
            " infer(case['image'][None].to(device), network)[0].cpu()})"
        ),
        "initialize": [
            "$print(len(@datalist), 'volumes (*.nii, *.nii.gz) in', @dataset_dir)",
            "$@network_def.eval()",
            "$torch.set_grad_enabled(False)",
        ],
        "run": ["$collections.deque(map(@segment, @dataset), maxlen=0)"],
        "finalize": ["$torch.set_grad_enabled(True)"],
    }


def _on(keys: str, target: str, **arguments: Any) -> dict[str, Any]:
    """One of MONAI's transforms of dictionaries."""
    return {"_target_": target, "keys": keys, **arguments}


def _preprocessing(site: Reading) -> list[dict[str, Any]]:
    low, high = site.intensity.bounds
    to_grey = {"b_min": 0.0, "b_max": 255.0, "clip": True}
    transforms = [
        _on("image", "LoadImaged", ensure_channel_first=True),
        _on("image", "Orientationd", axcodes=axis_letters(site.plane), labels=None),
        _on("image", "ScaleIntensityRangePercentilesd", lower=low, upper=high, **to_grey)
        if site.intensity.rule == "percentile"
        else _on("image", "ScaleIntensityRanged", a_min=low, a_max=high, **to_grey),
    ]
    if site.intensity.rounding == "truncate":  # model.ts rounds
        transforms.append(_on("image", "Lambdad", func="$lambda image: torch.floor(image)"))
    if site.channels == "neighbours":
        together = f"$lambda image: torch.cat(({_PREVIOUS}, image, {_NEXT}))"
        transforms.append(_on("image", "Lambdad", func=together))
    return transforms


# of classes that exclude each other: the number of the likeliest, from 1, where it is likely enough
_LABEL_MAP = (
    "$lambda pred, least=@probability_threshold:"
    " (pred.argmax(0, keepdim=True) + 1) * (pred.amax(0, keepdim=True) >= least)"
)


def _postprocessing(recipe: Recipe) -> list[dict[str, Any]]:
    to_mask = (
        _on("pred", "Lambdad", func=_LABEL_MAP)
        if recipe.exclusive_classes
        else _on("pred", "AsDiscreted", threshold="@probability_threshold")
    )
    return [
        _on("pred", "Activationsd", sigmoid=True),
        # back to the axes of the file
        _on("pred", "Invertd", transform="@preprocessing", orig_keys="image", nearest_interp=False),
        to_mask,
        _on(
            "pred",
            "SaveImaged",
            output_dir="@output_dir",
            output_postfix="seg",
            output_ext=".nii.gz",
            output_dtype="uint8",
            separate_folder=False,
            resample=False,
        ),
    ]


def metadata(recipe: Recipe, site: Reading) -> dict[str, Any]:
    """configs/metadata.json, by MONAI's schema; `fedfms` is ours and beyond the schema."""
    neighbours = site.channels == "neighbours"
    channel_names = ["slice before", "slice", "slice after"] if neighbours else ["slice"]
    classes = ", ".join(recipe.classes)
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by fedfms {__version__}, recipe {recipe.sha256}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "name": f"Segment Anything for {classes}",
        "task": f"Segmentation of {classes} in slices of volumes",
        "description": f"{about(recipe)}. {_slices(site)}; {greys(site, 'volume')}.",
        "authors": "The participants of the federation that trained it",
        "copyright": "See LICENSE",
        "data_source": "Images of the federation's sites, which they did not give away",
        "data_type": "nibabel",
        "image_classes": f"grey levels 0 to 255 of {', '.join(channel_names)}",
        "pred_classes": f"one channel of logits a class, {_overlap(recipe)}: {classes}",
        "intended_use": "Research; not a medical device",
        "references": [
            "Kirillov et al. 2023, Segment Anything, arXiv 2304.02643",
            "Liu et al. 2024, FedFMS, arXiv 2403.05408",
        ],
        "network_data_format": {
            "inputs": {"image": _tensor("magnitude", channel_names, [0, 255])},
            "outputs": {"pred": _tensor("segmentation", recipe.classes, [])},  # logits
        },
        "fedfms": {
            "version": __version__,
            "recipe": recipe.to_dict(),
            "input": input_facts(recipe),
            "site": site_facts(site),
        },
    }


def _tensor(kind: str, channels: Sequence[str], value_range: list[int]) -> dict[str, Any]:
    """A picture of any size, as MONAI's schema describes what a network takes or gives."""
    return {
        "type": "image",
        "format": kind,
        "num_channels": len(channels),
        "spatial_shape": ["*", "*"],
        "dtype": "float32",
        "value_range": value_range,
        "is_patch_data": False,
        "channel_def": {str(n): name for n, name in enumerate(channels)},
    }


def _overlap(recipe: Recipe) -> str:
    return "which exclude each other" if recipe.exclusive_classes else "which may overlap"


def _slices(site: Reading) -> str:
    with_what = ", each with its two neighbours" if site.channels == "neighbours" else ""
    return f"{site.plane} slices{with_what}"


def _difference(network: Path, trained: Trained, site: Reading) -> float:
    """Largest difference of a logit on one random volume of odd sides and voxels."""
    recipe = trained.recipe
    side = recipe.image_size
    random = np.random.default_rng(0)
    shape = (2, max(2, side * 2 // 3 + 1), max(2, side // 2))
    grey = random.integers(0, 256, shape).astype(np.uint8)
    nowhere = Case("check", "check", Path("check"), Path("check"), "validation")
    spacing = (1.0, 0.7, 1.2)  # mm
    case = PreparedCase(nowhere, grey, np.zeros(shape, np.int16), spacing, True)
    slices = torch.from_numpy(grey).float()
    pictures = slices[:1, None]
    if site.channels == "neighbours":
        pictures = torch.stack([slices[0], slices[0], slices[1]])[None]
    with torch.inference_mode():
        scripted = torch.jit.load(network, map_location="cpu")  # type: ignore[no-untyped-call]
        got = scripted(pictures, torch.tensor(spacing[1:]))
        own = trained.model(network_input(case, 0, site, recipe)[None])
        expected = to_native(own, Frame.of(case), recipe)
    return float((got - expected).abs().max())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
