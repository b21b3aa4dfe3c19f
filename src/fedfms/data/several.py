"""A case of several files to one image and one label: contrasts as channels, a file for each class.

All lie on one grid, that of the first contrast that is there; nothing is resampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfms.contracts.site import Reading, SiteConfig
from fedfms.data.content import Content, read_bytes
from fedfms.data.formats import Notice, Stored, read_image, read_label
from fedfms.data.grid import largest_shift, same_grid
from fedfms.data.manifest import Case
from fedfms.errors import SiteDataError

Images = tuple[Content | None, ...]  # of the contrasts, None where one is missing; or of the one


def read_contents(case: Case, site: SiteConfig) -> tuple[Images, tuple[Content, ...]]:
    """All files of a case, images and labels; raises as `read_bytes`."""
    images = case.contrasts or (case.image,)
    return (
        tuple(None if path is None else read_bytes(path, site) for path in images),
        tuple(read_bytes(path, site) for path in case.labels),
    )


def read_case_image(case: Case, contents: Images, site: Reading) -> Stored:
    """A case's one image as of `read_image`, or its contrasts as of `read_contrasts`."""
    if not case.contrasts:
        assert contents[0] is not None
        return read_image(case.image, contents[0], site)
    return read_contrasts(case.contrasts, contents, site)


def read_contrasts(paths: Sequence[Path | None], contents: Images, site: Reading) -> Stored:
    """Images of one case as (D, H, W, N) float32, zeros where one is missing; `present` says where.

    Raises:
        SiteDataError: "contrasts-differ", "missing-contrast" where all are, and as `read_image`.
    """
    first: Stored | None = None
    values: np.ndarray | None = None
    named = Path()
    notices: list[Notice] = []
    for number, (path, content) in enumerate(zip(paths, contents, strict=True)):
        if path is None or content is None:
            continue
        one = read_image(path, content, site)
        notices += one.notices
        if first is None or values is None:
            first, named = one, path
            values = np.zeros((*one.values.shape[:3], len(paths)), np.float32)
        _require_one_grid(named, first, path, one, "contrasts-differ")
        values[..., number] = one.values
    if first is None or values is None:
        raise SiteDataError(
            "a case has none of the contrasts",
            "add an image of it, or leave the case out",
            code="missing-contrast",
        )
    present = tuple(path is not None for path in paths)
    return dataclasses.replace(first, values=values, notices=tuple(notices), present=present)


def read_case_label(
    case: Case, contents: Sequence[Content], site: SiteConfig, image: Stored | None
) -> Stored:
    """A case's label as of `read_label`, or the files of its classes as one.

    Raises:
        SiteDataError: "several-values-of-a-class", "segments-overlap", "shapes-differ",
            "geometry-differs", and as `read_label`.
    """
    if not case.label_files:
        return read_label(case.label, contents[0], site, image)
    first: Stored | None = None
    together: np.ndarray | None = None
    undecided: np.ndarray | None = None
    notices: list[Notice] = []
    for number, (path, content) in enumerate(zip(case.label_files, contents, strict=True)):
        one = read_label(path, content, site, image)
        notices += one.notices
        is_void = np.isin(one.values, site.void)
        drawn = (one.values != 0) & ~is_void
        if len(np.unique(one.values[drawn])) > 1:
            raise SiteDataError(
                f"{path} holds several values, and under label_files it is to be one class: all "
                "that is not 0 and not void",
                "let labels: match it and say under classes what its values mean, or draw one "
                "class alone in it; a value that nobody could decide belongs under void",
                code="several-values-of-a-class",
            )
        if first is None or together is None or undecided is None:
            first = one
            together = np.zeros(one.values.shape, np.int16)
            undecided = np.zeros(one.values.shape, bool)
        _require_one_grid(case.label_files[0], first, path, one, "geometry-differs")
        undecided |= is_void
        if site.overlap == "keep":
            together[drawn] |= 1 << number
            continue
        if site.overlap == "refuse" and (met := together[drawn]).any():
            names = list(site.label_files)
            below = names[int(met[met != 0][0]) - 1]
            raise SiteDataError(
                f"{path} and the file of {below} share {int(np.count_nonzero(met))} voxels",
                "set overlap: keep in site.yml, so that a voxel may have both classes, or highest, "
                "so that it has the later one of label_files",
                code="segments-overlap",
            )
        together[drawn] = number + 1
    assert first is not None and together is not None and undecided is not None  # there are files
    for value in site.void_values:  # one, or none; what one file calls void is void for all classes
        together[undecided] = value
    return dataclasses.replace(first, values=together, notices=tuple(notices), palette=None)


def _require_one_grid(named: Path, first: Stored, path: Path, one: Stored, code: str) -> None:
    if one.values.shape[:3] != first.values.shape[:3]:
        shapes = [" x ".join(map(str, stored.values.shape[:3])) for stored in (first, one)]
        raise SiteDataError(
            f"{named} is {shapes[0]}, {path} is {shapes[1]} (slices x rows x columns)",
            "bring all files of a case onto one grid (register and resample the images)",
            code=code,
        )
    if first.cut is None or one.cut is None:
        return
    if not same_grid(one.cut.affine, first.cut.affine, first.cut.shape):
        shift = largest_shift(first.cut.affine, one.cut.affine, first.cut.shape)
        raise SiteDataError(
            f"{named} and {path} lie up to {shift:.1f} mm apart",
            "bring all files of a case onto one grid (register and resample the images)",
            code=code,
        )
