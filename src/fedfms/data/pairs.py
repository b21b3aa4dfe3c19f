"""Words for files that have no counterpart, whatever rule pairs an image with its label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedfms.contracts.site import SiteConfig
from fedfms.errors import SiteDataError

WILDCARD = re.compile(r"\*\*/|\*|\?|\[!?\]?[^\]]*\]")


def unpaired(
    alone: Sequence[Path],
    images: int,
    orphans: Sequence[Path],
    labels: int,
    site: SiteConfig,
    rule: str,
) -> SiteDataError:
    """The error for images without a label and labels without an image.

    Args:
        alone: images without a label.
        images: number of all images.
        orphans: labels without an image.
        labels: number of all labels.
        rule: what pairs them at this site, as the end of a sentence.
    """
    parts = []
    if alone:
        parts.append(f"{len(alone)} of {images} images have no label: {some(alone, site)}")
    if orphans:
        parts.append(f"{len(orphans)} of {labels} labels have no image: {some(orphans, site)}")
    error = SiteDataError(
        "; ".join(parts),
        f"add the missing files, move the others away, or correct site.yml: {rule}",
        code="unpaired-files",
    )
    error.files = (*alone, *orphans)
    return error


def some(paths: Sequence[Path], site: SiteConfig, limit: int = 3) -> str:
    """The first of some files, as a person would call them, and how many more there are."""

    folders = [glob.rstrip("/").rpartition("/")[0] + "/" for glob in (site.images, site.labels)]
    is_told_by_folder = site.format == "dicom" or any(map(WILDCARD.search, folders))

    def name(path: Path) -> str:
        return path.relative_to(site.data_root).as_posix() if is_told_by_folder else path.name

    names = ", ".join(name(path) for path in paths[:limit])
    return names if len(paths) <= limit else f"{names} and {len(paths) - limit} more"
