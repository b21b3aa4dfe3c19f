"""What a site will hold, decided before anything is written.

A data set's module looks at the download and returns one `SitePlan` for each site; `write.prepare`
carries them out. All that can be seen from file names is checked while planning.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fedfms.errors import ConfigError, SiteDataError

FORMAT = 1  # raise it when the same download and options would be prepared differently
PAPER_VALIDATION_FRACTION = 0.1
_8_BIT = {"rule": "range", "low": 0, "high": 255}
_INTENSITY: Mapping[tuple[str, bool], Mapping[str, Any]] = {  # by format, and whether as the paper
    ("nifti", False): {"rule": "percentile", "low": 0.5, "high": 99.5},
    ("nifti", True): {"rule": "percentile", "low": 0, "high": 99, "rounding": "truncate"},
    ("image", False): _8_BIT,
    ("image", True): _8_BIT,
}
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True)
class Made:
    """The two files of a case, and what is worth a column in the manifest.

    image, label: the bytes of the files to be written.
    counts: one number for each of the site's `count_names`.
    """

    image: bytes
    label: bytes
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One case that is to be prepared."""

    case: str  # stem of the two files
    patient: str  # what the site's expression will find in that stem
    sources: tuple[Path, ...]  # files of the download; for volumes the image, then the label
    make: Callable[[], Made]
    part: str = ""  # which part of the sources is meant, such as [17] or channel 1
    index_pairs: bool = False  # the label is drawn on the image's grid, whatever its header says


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One site, from what a data set's module knows.

    Raises:
        SiteDataError: too few patients ("too-few-patients"), two cases of one name
            ("ambiguous-download").
    """

    command: str  # of `fedfms prepare`, such as fundus
    given_name: str  # as the paper or the provider writes it
    items: Sequence[Item]  # of two patients at least
    settings: Mapping[str, Any]  # keys of site.yml beside those that follow from the format
    patient: str  # the expression that finds the patient in a file's name
    # one in ten patients validates; volumes are cut at the 99th percentile and not below, and cast
    # to 8 bits, which takes the level below
    paper: bool
    comments: Sequence[str]  # lines for the head of site.yml
    known_cases: int | None = None  # the provider's own number; another one found gives a notice
    pictures: bool = True  # may the report show predictions on these images?
    count_names: Sequence[str] = ()  # extra columns of the manifest
    notes: Sequence[str] = ()  # for the person at the machine

    def __post_init__(self) -> None:
        patients = {item.patient for item in self.items}
        if len(patients) < 2:
            raise SiteDataError(
                f"site {self.given_name} has {len(patients)} patients in this download; 2 are "
                "needed, one to train and one to validate",
                "download the whole set, or leave the site out",
                code="too-few-patients",
            )
        names: set[str] = set()
        for item in self.items:
            if item.case.casefold() in names:
                raise SiteDataError(
                    f"site {self.given_name} has two cases called {item.case}",
                    "keep one copy of the download below the folder that you name",
                    code="ambiguous-download",
                )
            names.add(item.case.casefold())

    @functools.cached_property
    def name(self) -> str:
        """Usable in FLARE."""
        return flare_name(self.given_name)

    @property
    def format(self) -> Literal["nifti", "image"]:
        """Of the images and labels."""
        return self.settings["format"]  # type: ignore[no-any-return]

    @property
    def ending(self) -> str:
        """Of the images and the labels."""
        return ".nii.gz" if self.format == "nifti" else ".png"

    @property
    def label_values(self) -> set[int]:
        """Those a label may hold."""
        classes = self.settings["classes"].values()
        return {*itertools.chain(*classes), *self.settings.get("background", [0])}

    @property
    def notices(self) -> list[str]:
        """For the person at the machine."""
        if self.known_cases in (None, len(self.items)):
            return list(self.notes)
        counted = f"{len(self.items)} cases, the provider's set has {self.known_cases}"
        return [*self.notes, f"{counted}: is the download whole?"]

    @functools.cached_property
    def site_yml(self) -> str:
        """The text of the site's own file."""
        head = [f"{self.given_name}: {self.comments[0]}", *self.comments[1:]]
        if self.name != self.given_name:
            head.append(
                f"The folder is called {self.name}, since FLARE does not take {self.given_name}."
            )
        head.append(f"Written by: fedfms prepare {self.command} (format {FORMAT})")
        values = {
            "data_root": ".",
            "format": self.format,
            "images": f"images/*{self.ending}",
            "labels": f"labels/*{self.ending}",
            **{key: value for key, value in self.settings.items() if key != "format"},
            "intensity": _INTENSITY[self.format, self.paper],
            "patient": self.patient,
            **({"validation_fraction": PAPER_VALIDATION_FRACTION} if self.paper else {}),
        }
        text = "".join(f"# {line}\n" for line in head)
        return text + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def items_of(
    pairs: Iterable[tuple[str, Path, Path]],
    make: Callable[[Path, Path], Made],
    patient_of: Callable[[str], str] = str,
    *,
    part: str = "",
    index_pairs: bool = False,
) -> list[Item]:
    """An item for each (case, image, label), made of these two files.

    Args:
        patient_of: from the case; every case is a patient of its own where it is left out.
    """
    return [
        Item(
            case=case,
            patient=patient_of(case),
            sources=(image, label),
            make=functools.partial(make, image, label),
            part=part,
            index_pairs=index_pairs,
        )
        for case, image, label in pairs
    ]


def flare_name(given: str) -> str:
    """A site's name as FLARE, Docker and the rest of this kit take it: ISBI_1.5 is ISBI_1-5.

    Letters, digits, - and _ stay; every other character becomes -.

    Raises:
        ConfigError: nothing usable is left.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "-", given.strip())
    if _SITE_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{given!r} cannot be the name of a site",
            "use letters, digits, - and _, at most 63, the first a letter or digit",
        )
    return name


def chosen(all_names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """The sites that were asked for, in the order of `all_names`; None: all.

    Raises:
        ConfigError: a name that is none of them.
    """
    if only is None:
        return list(all_names)
    unknown = [name for name in only if name not in all_names]
    if unknown or not only:
        raise ConfigError(
            f"there is no site {unknown[0]}" if unknown else "no site is named",
            f"choose among {', '.join(all_names)}",
        )
    return [name for name in all_names if name in only]


def deal(patients: Iterable[str], sites: Sequence[str]) -> dict[str, str]:
    """Patient -> site: patients in the order of their SHA-256, dealt like cards.

    Every site gets the same number, or one more; the same on every machine.
    """
    order = sorted(set(patients), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return {name: sites[number % len(sites)] for number, name in enumerate(order)}


def read_assignment(path: Path, column: str, wanted: Iterable[str]) -> dict[str, str]:
    """A CSV with the columns `column` and `site`: which of `wanted` belongs to which site.

    Raises:
        ConfigError: the file, a column, or a row is missing, doubled or unknown.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "check the file") from None
    if not rows or not {column, "site"} <= rows[0].keys():
        raise ConfigError(
            f"{path} has no rows with the columns {column} and site",
            f"write a first line {column},site and one line for each {column}",
        )
    wanted = set(wanted)
    sites: dict[str, str] = {}
    for row in rows:
        name, site = (row[column] or "").strip(), (row["site"] or "").strip()
        if name not in wanted:
            raise ConfigError(
                f"{path} names {column} {name!r}, which is not in the download",
                "correct the name or remove the line",
            )
        if sites.setdefault(name, site) != site:
            raise ConfigError(f"{path} puts {name} at two sites", "keep one line for it")
        flare_name(site)
    missing = sorted(wanted - sites.keys())
    if missing:
        raise ConfigError(
            f"{path} does not say where {missing[0]} belongs, and {len(missing) - 1} others",
            f"add a line for each {column}",
        )
    return sites
