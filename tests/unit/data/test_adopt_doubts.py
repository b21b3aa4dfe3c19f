"""`fedfms adopt` where a folder is not as one would have it: right, or said, and never silently wrong."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.data.adopt.propose import Proposal, propose
from fedfms.data.check import check_data
from fedfms.data.manifest import Case, find_cases

SHAPE = (20, 18, 6)  # of volumes; pictures are as large as their slices


def volume(path: Path, seed: int, shape=SHAPE, low=0, high=800) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def mask(path: Path, *values: int, shape=SHAPE, at: int = 4) -> None:
    """A box a value, side by side; `at` moves all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(shape, np.uint8)
    for number, value in enumerate(values or (1,)):
        labels[4 + 3 * number : 7 + 3 * number, at : at + 8, 1:4] = value
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def picture(path: Path, seed: int, colours: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (*SHAPE[:2], 3) if colours else SHAPE[:2]
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)).save(path)


def drawing(path: Path, *values: int, at: int = 4) -> None:
    """A label picture: a box a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(SHAPE[:2], np.uint8)
    for number, value in enumerate(values or (255,)):
        labels[4 + 3 * number : 7 + 3 * number, at : at + 8] = value
    Image.fromarray(labels).save(path)


def cases_of(found: Proposal) -> dict[str, Case]:
    """By the image's path."""
    root = found.root
    return {case.image.relative_to(root).as_posix(): case for case in find_cases(found.site)}


def label_of(found: Proposal, image: str) -> str:
    return cases_of(found)[image].label.relative_to(found.root).as_posix()


def said(found: Proposal) -> str:
    return " | ".join(found.unsure)


def warnings(site: SiteConfig) -> list[str]:
    return [finding.code for finding in check_data(site)]


# ------------------------------------------------------------------------------------ grey levels


def fractions(root: Path) -> None:
    """NPY of numbers from 0 to 1."""
    for n in range(5):
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(n).random(SHAPE[:2]).astype(np.float32)
        np.save(root / "images" / f"{n}.npy", values)
        np.save(root / "labels" / f"{n}.npy", (values > 0.9).astype(np.uint8))


def fractions_in_tiff(root: Path) -> None:
    for n in range(5):
        drawing(root / "labels" / f"{n}.png")
        (root / "images").mkdir(exist_ok=True)
        values = np.random.default_rng(n).random(SHAPE[:2]).astype(np.float32)
        Image.fromarray(values).save(root / "images" / f"{n}.tif")


def few_of_sixteen_bits(root: Path) -> None:
    for n in range(5):
        drawing(root / "labels" / f"{n}.png")
        (root / "images").mkdir(exist_ok=True)
        values = np.random.default_rng(n).integers(0, 16, SHAPE[:2]).astype(np.uint16)
        Image.fromarray(values).save(root / "images" / f"{n}.tif")


@pytest.mark.parametrize("build", [fractions, fractions_in_tiff, few_of_sixteen_bits])
def test_numbers_of_more_than_8_bits_are_not_read_as_0_to_255(tmp_path, build):
    build(tmp_path)
    site = propose(tmp_path).site
    assert site.intensity.rule == "percentile"
    assert "few-grey-levels" not in warnings(site)


def test_a_range_that_makes_images_black_is_a_warning(tmp_path):
    fractions(tmp_path)
    found = propose(tmp_path)
    found.values["intensity"] = Intensity(rule="range", low=0, high=255)
    assert "few-grey-levels" in warnings(SiteConfig(**{**found.values, "data_root": tmp_path}))
