"""Small sites on disk for the tests of this folder, written without the code under test."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"

ENDINGS = {"nifti": "nii.gz", "image": "png", "npy": "npy"}


def site_config(root: Path | str, format: str = "nifti", **changes: Any) -> SiteConfig:
    ending = ENDINGS.get(format, "dcm")
    values: dict[str, Any] = {
        "data_root": Path(root),
        "format": format,
        "images": f"images/*.{ending}",
        "labels": f"labels/*.{ending}",
        "classes": {"lesion": (1,)},
    }
    return SiteConfig(**{**values, **changes})


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "method": "fedmsa",
        "backbone": "vit_demo",
        "backbone_sha256": "0" * 64,
        "classes": ("lesion",),
        "rounds": 1,
        "image_size": 128,
    }
    return Recipe(**{**values, **changes})


def picture(seed: int, shape: tuple[int, ...] = (24, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def disk(shape: tuple[int, int], radius: float, value: int = 1) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = (y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2 < radius**2
    return (inside * value).astype(np.uint8)


def write_volume(
    path: Path, values: np.ndarray, affine: np.ndarray | None = None, dtype: Any = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if dtype is not None:
        image.set_data_dtype(dtype)
    nibabel.save(image, path)


def write_site(root: Path, format: str = "nifti", cases: int = 5, label_value: int = 1) -> None:
    """`cases` cases c01, c02, …; NIfTI volumes of 6 x 8 x 3 voxels, pictures of 24 x 32."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number in range(1, cases + 1):
        write_case(root, format, f"c{number:02d}", number, label_value)


def write_case(root: Path, format: str, name: str, seed: int, label_value: int = 1) -> None:
    image, label = (root / part / f"{name}.{ENDINGS[format]}" for part in ("images", "labels"))
    if format == "nifti":
        values = np.zeros((6, 8, 3), np.uint8)
        values[2:4, 3:6, 1:] = label_value
        write_volume(image, picture(seed, (6, 8, 3)).astype(np.int16))
        write_volume(label, values)
    elif format == "npy":
        np.save(image, picture(seed))
        np.save(label, disk((24, 32), 6, label_value))
    else:
        Image.fromarray(picture(seed)).save(image)
        Image.fromarray(disk((24, 32), 6, label_value)).save(label)


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def gunzip(path: Path) -> Path:
    """Unpack x.nii.gz to x.nii."""
    plain = path.with_suffix("")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return plain
