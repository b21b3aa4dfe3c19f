"""The data of a study's sites as a run found it: every case with the SHA-256 of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from fedfms.contracts.site import SiteConfig
from fedfms.data.content import content_sha256, read_bytes
from fedfms.data.manifest import Split, find_cases
from fedfms.errors import ConfigError
from fedfms.files import file_sha256
from fedfms.local.sites import Site
from fedfms.records.rows import read_rows, write_rows
from fedfms_lab.study.record import SiteFacts


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One case; a row of a run's manifest.csv. File names are relative to the site's images."""

    site: str
    case: str
    patient: str
    split: Split
    image: str
    image_sha256: str
    label: str
    label_sha256: str


def site_config(site: Site) -> SiteConfig:
    """The site.yml of one site, with its images where the study says."""
    return SiteConfig.from_yaml(site.folder / "site.yml", site.data, "--data")


def read_site(site: Site) -> tuple[SiteFacts, list[ManifestRow]]:
    """Hash all images and labels of a site.

    Raises:
        FedfmsError: site.yml cannot be used or has several files a case, or a file cannot be read.
    """
    config = site_config(site)
    if config.contrasts or config.label_files:
        raise ConfigError(
            f"{site.name} has several files a case (contrasts, label_files), and a study's "
            "manifest has one image and one label",
            "study one contrast: name its glob under images in site.yml, and one label map under "
            "labels",
        )
    rows = []
    for case in find_cases(config):
        rows.append(
            ManifestRow(
                site.name,
                case.key,
                case.patient,
                case.split,
                case.image.relative_to(config.data_root).as_posix(),
                content_sha256(read_bytes(case.image, config)),
                case.label.relative_to(config.data_root).as_posix(),
                content_sha256(read_bytes(case.label, config)),
            )
        )
    facts = SiteFacts(
        manifest_sha256=manifest_sha256(rows),
        config_sha256=file_sha256(site.folder / "site.yml"),
        cases=len(rows),
        validation_cases=sum(row.split == "validation" for row in rows),
    )
    return facts, rows


def manifest_sha256(rows: Sequence[ManifestRow]) -> str:
    """SHA-256 over all values of one site's rows, in the order of the cases' keys."""
    values = [astuple(row) for row in sorted(rows, key=lambda row: row.case)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def write_manifest(path: Path, rows: Mapping[str, Sequence[ManifestRow]]) -> None:
    """Write manifest.csv with the cases of all sites."""
    write_rows(path, ManifestRow, [row for site in sorted(rows) for row in rows[site]])


def read_manifest(path: Path) -> dict[str, list[ManifestRow]]:
    """Read manifest.csv back, by site.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    rows: dict[str, list[ManifestRow]] = {}
    for row in read_rows(path, ManifestRow):
        rows.setdefault(row.site, []).append(row)
    return rows
