"""Phantoms: small synthetic sites with which a federation can be tried and is tested.

A phantom is a round body with one irregular, lobed target ("lesion") and three distractors, of
which one is as bright as the target, one darker than the body and one in between. In a harder task
the lesion is that first distractor: small, round, and of the lobed object's own grey. Sites differ
as scanners do: grey levels, contrast, noise, bias field, size and shape of the target, voxel size,
orientation and number format of the stored volume. Nothing here is anybody's image.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import yaml
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from fedfms.contracts.policy import Policy
from fedfms.errors import ConfigError

Volume = NDArray[np.float64]

# which object of a phantom its label shows: the lobed one, the largest, which a backbone may find
# as it is; or the small round one of the same grey level, which has to be learnt
Lesion = Literal["largest", "small"]
CLASS_NAME = "lesion"
FEDERATION = {"site-1": "bright", "site-2": "noisy", "site-3": "inverted", "site-4": "unseen"}
_UNFINISHED = ".phantoms-"  # prefix of the folder in which they are written


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a site's scanner and patients differ from the others."""

    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float, float]  # mm along x, y, z
    body: float  # grey level of the body; air is 0, all levels are shares of the full scale
    target: float
    distractors: tuple[float, float, float]
    radius: tuple[float, float]  # of the target, as a share of the shorter side
    lobes: float  # how irregular its outline is, as a share of its radius
    texture: float  # standard deviation of smooth texture inside the body
    noise: float  # standard deviation of white noise
    bias: float  # range of a smooth multiplicative field
    blur: float  # Gaussian, in pixels
    inverted: bool
    full_scale: float  # stored value of grey level 1
    dtype: str  # as stored
    axes: str  # stored orientation


STYLES: dict[str, Style] = {
    "bright": Style(
        size=(112, 112), spacing=(1.0, 1.0, 3.0), body=0.42, target=0.76,
        distractors=(0.76, 0.22, 0.62), radius=(0.14, 0.2), lobes=0.14, texture=0.015, noise=0.02,
        bias=0.0, blur=0.7, inverted=False, full_scale=230.0, dtype="uint8", axes="RAS",
    ),
    "noisy": Style(
        size=(96, 96), spacing=(1.2, 1.2, 4.0), body=0.35, target=0.6,
        distractors=(0.6, 0.2, 0.48), radius=(0.12, 0.18), lobes=0.18, texture=0.02, noise=0.09,
        bias=0.5, blur=0.6, inverted=False, full_scale=1800.0, dtype="int16", axes="LPS",
    ),
    "inverted": Style(
        size=(104, 120), spacing=(0.8, 0.8, 2.5), body=0.45, target=0.74,
        distractors=(0.74, 0.25, 0.6), radius=(0.15, 0.22), lobes=0.2, texture=0.02, noise=0.03,
        bias=0.1, blur=0.9, inverted=True, full_scale=400000.0, dtype="float32", axes="PIR",
    ),
    "unseen": Style(
        size=(120, 104), spacing=(0.9, 0.9, 3.5), body=0.3, target=0.52,
        distractors=(0.52, 0.15, 0.42), radius=(0.11, 0.2), lobes=0.24, texture=0.035, noise=0.045,
        bias=0.3, blur=1.3, inverted=False, full_scale=30000.0, dtype="uint16", axes="LAI",
    ),
}  # fmt: skip


def phantom(
    style: str, *, slices: int, seed: int, lesion: Lesion = "largest"
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """One phantom in RAS: image values as a scanner would store them, and its label of 0 and 1.

    Args:
        style: one of STYLES.
        slices: number of slices D, at least 1; the target is in most of them.
        seed: the same seed gives the same phantom.
        lesion: what the label shows.

    Returns:
        (X, Y, D) image in the style's dtype and (X, Y, D) label.
    """
    look = STYLES[style]
    random = np.random.default_rng([seed, list(STYLES).index(style)])
    rows, columns = look.size
    side = min(rows, columns)
    heights = (np.arange(slices) + 0.5) / slices * 2 - 1  # -1 to 1 through the volume
    y, x, z = np.meshgrid(np.arange(rows) * 1.0, np.arange(columns) * 1.0, heights, indexing="ij")

    centre = (rows / 2 + random.uniform(-3, 3), columns / 2 + random.uniform(-3, 3))
    body_radii = (rows * random.uniform(0.4, 0.46), columns * random.uniform(0.4, 0.46))
    body = _blob(random, y, x, z, centre, body_radii, lobes=0.03, reach=2.5)

    radius = side * random.uniform(*look.radius)
    angle, distance = random.uniform(0, 2 * np.pi), side * random.uniform(0.0, 0.17)
    at = (centre[0] + distance * np.sin(angle), centre[1] + distance * np.cos(angle))
    stretch = random.uniform(0.75, 1.3)
    radii = (radius * stretch, radius / stretch)
    target = _blob(random, y, x, z, at, radii, lobes=look.lobes, reach=random.uniform(0.95, 1.3))

    level = np.where(body, look.body, 0.0)
    level += (
        body
        * gaussian_filter(random.standard_normal(level.shape), (4, 4, 1))
        * (
            look.texture / 0.06  # the filter leaves a standard deviation of about 0.06
        )
    )
    for number, grey in enumerate(look.distractors):
        turn = angle + np.pi * (0.55 + 0.45 * number) + random.uniform(-0.2, 0.2)
        away = side * random.uniform(0.27, 0.33)
        place = (centre[0] + away * np.sin(turn), centre[1] + away * np.cos(turn))
        small = side * random.uniform(0.045, 0.08)
        shape = (small * random.uniform(0.7, 1.4), small)
        spot = _blob(random, y, x, z, place, shape, lobes=0.05, reach=random.uniform(0.7, 2.0))
        level = np.where(spot & body, grey, level)
        if number == 0:
            alike = spot & body
    target &= body
    level = np.where(target, look.target + 0.5 * (level - look.body) * body, level)

    level = gaussian_filter(level, (look.blur, look.blur, 0))
    if look.bias:
        field = gaussian_filter(random.standard_normal(level.shape), (side / 4, side / 4, 1))
        level = level * (1 + look.bias * (field / np.abs(field).max()))
    if look.inverted:
        level = 1.0 - level
    level = np.clip(level + look.noise * random.standard_normal(level.shape), 0.0, 1.0)
    # rows run from anterior to posterior, columns from the patient's right to the left
    image = (level[::-1, ::-1] * look.full_scale).transpose(1, 0, 2)
    shown = target if lesion == "largest" else alike & ~target
    label = shown[::-1, ::-1].transpose(1, 0, 2)
    if np.dtype(look.dtype).kind in "iu":
        image = np.rint(image)
    return image.astype(look.dtype), label.astype(np.uint8)


def _blob(
    random: np.random.Generator,
    y: Volume,
    x: Volume,
    z: Volume,
    centre: tuple[float, float],
    radii: tuple[float, float],
    *,
    lobes: float,
    reach: float,
) -> NDArray[np.bool_]:
    """An ellipse with a wavy outline that shrinks towards the volume's ends, z of -1 and 1."""
    angle = np.arctan2(y - centre[0], x - centre[1])
    outline = np.ones_like(angle)
    for waves in (2, 3, 5):
        phase = random.uniform(0, 2 * np.pi)
        outline += lobes * random.uniform(0.3, 1.0) / waves**0.5 * np.sin(waves * angle + phase)
    distance = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
    inside: NDArray[np.bool_] = (distance / outline) ** 2 + (z / reach) ** 2 < 1
    return inside


# ---------------------------------------------------------------------------------------- folders


def write_phantom_site(
    folder: Path,
    style: str,
    *,
    cases: int = 18,
    slices: int = 4,
    seed: int = 0,
    format: Literal["nifti", "image"] = "nifti",
    lesion: Lesion = "largest",
    validation_fraction: float = 0.3,
    methods: Sequence[str] = (),
) -> None:
    """Write one site: images/, labels/, site.yml and policy/privacy.json.

    Everything is written in a hidden folder first and then moved, site.yml last: a folder with a
    site.yml is complete.

    Args:
        folder: the site's folder; made if it is not there, refused if it has other files.
        style: one of STYLES.
        cases: number of patients, at least 2.
        slices: slices of a volume, or pictures of a patient with `format="image"`.
        seed: the same numbers give the same files.
        format: "nifti" volumes, or "image" for 8-bit PNG.
        lesion: what the labels show.
        validation_fraction: of the patients.
        methods: that may run there; none: those of a new site's policy.

    Raises:
        ConfigError: an unknown style, too few cases or slices, or a folder that is in use.
    """
    if style not in STYLES:
        raise ConfigError(f"there is no style {style!r}", f"use one of {', '.join(STYLES)}")
    if cases < 2 or slices < 1:
        raise ConfigError(
            f"{cases} cases of {slices} slices are too few", "ask for at least 2 cases of 1 slice"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):  # of a run that was interrupted
        shutil.rmtree(left)
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty", "name a new folder, or remove this one if it can go"
        )
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        for name in ("images", "labels", "policy"):
            (unfinished / name).mkdir()
        for number in range(cases):
            image, label = phantom(
                style, slices=slices, seed=seed * 100_003 + number, lesion=lesion
            )
            name = f"phantom-{number + 1:03d}"
            if format == "nifti":
                _write_nifti(unfinished, name, image, label, STYLES[style])
            else:
                _write_pictures(unfinished, name, image, label, STYLES[style])
        _write_settings(unfinished, style, format, cases, validation_fraction, methods)
        for name in ("images", "labels", "policy", "site.yml"):
            (unfinished / name).rename(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_phantom_federation(
    folder: Path,
    *,
    cases: int = 18,
    slices: int = 4,
    seed: int = 0,
    format: Literal["nifti", "image"] = "nifti",
    keep: bool = False,
    lesion: Lesion = "largest",
    validation_fraction: float = 0.3,
    methods: Sequence[str] = (),
) -> list[str]:
    """Write the sites of FEDERATION below `folder`; returns their names in order.

    Three sites differ from each other; the fourth, "unseen", differs from all of them. With `keep`
    a site that is there already stays as it is. For the others see `write_phantom_site`.
    """
    for number, (name, style) in enumerate(FEDERATION.items()):
        if keep and (folder / name / "site.yml").is_file():
            continue
        write_phantom_site(
            folder / name,
            style,
            cases=cases,
            slices=slices,
            seed=seed * 101 + number,
            format=format,
            lesion=lesion,
            validation_fraction=validation_fraction,
            methods=methods,
        )
    return list(FEDERATION)


def _write_nifti(
    folder: Path, name: str, image: NDArray[Any], label: NDArray[np.uint8], look: Style
) -> None:
    affine = np.diag([*look.spacing, 1.0])
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(look.axes))
    for kind, values in (("images", image), ("labels", label)):
        stored = nibabel.Nifti1Image(values, affine).as_reoriented(turn)
        nibabel.save(stored, folder / kind / f"{name}.nii.gz")


def _write_pictures(
    folder: Path, name: str, image: NDArray[Any], label: NDArray[np.uint8], look: Style
) -> None:
    grey = np.rint(image / look.full_scale * 255).astype(np.uint8)
    for index in range(grey.shape[2]):
        for kind, values in (("images", grey), ("labels", label)):
            picture = np.ascontiguousarray(values[::-1, ::-1, index].T)
            Image.fromarray(picture).save(folder / kind / f"{name}_{index:02d}.png")


def _write_settings(
    folder: Path,
    style: str,
    format: str,
    cases: int,
    validation_fraction: float,
    methods: Sequence[str],
) -> None:
    ending = "nii.gz" if format == "nifti" else "png"
    settings = {
        "data_root": ".",
        "format": format,
        "images": f"images/*.{ending}",
        "labels": f"labels/*.{ending}",
        "classes": {CLASS_NAME: [1]},
        "patient": r"^(phantom-\d+)",
        "validation_fraction": validation_fraction,
        "threads": 1,
    }
    text = re.sub(  # in quotes, as site.yml's template teaches
        r"(?m)^(images|labels): (.*)$", r'\1: "\2"', yaml.safe_dump(settings, sort_keys=False)
    )
    (folder / "site.yml").write_text(f"# synthetic phantoms, style {style}\n{text}")
    policy: dict[str, Any] = {"min_cases": 3, "pictures": True}
    if methods:
        policy["methods"] = list(methods)
    if cases * (1 - validation_fraction) < Policy().min_training_patients + 1:
        policy.update(min_training_patients=1, min_steps=1)  # so few are no patients
    (folder / "policy" / "privacy.json").write_text(json.dumps(policy, indent=2) + "\n")
