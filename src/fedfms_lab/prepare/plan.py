"""What a site will hold, decided before anything is written.

A data set's module looks at the download and returns one `SitePlan` for each site; `write.prepare`
carries them out. All that can be seen from file names is checked while planning.
"""

from __future__ import annotations

import csv
import functools
import hashlib
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """One site."""

    name: str  # usable in FLARE
    given_name: str  # as the paper or the provider writes it
    items: tuple[Item, ...]
    site_yml: str
    format: Literal["nifti", "image"]
    label_values: frozenset[int]  # those a label may hold
    pictures: bool = True  # may the report show predictions on these images?
    count_names: tuple[str, ...] = ()  # extra columns of the manifest
    notices: tuple[str, ...] = ()  # for the person at the machine

    @property
    def ending(self) -> str:
        """Of the images and the labels."""
        return ".nii.gz" if self.format == "nifti" else ".png"


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


def make_plan(
    *,
    command: str,
    given_name: str,
    items: Sequence[Item],
    settings: Mapping[str, Any],
    patient: str,
    paper: bool,
    comments: Sequence[str],
    label_values: Iterable[int],
    known_cases: int | None = None,
    pictures: bool = True,
    count_names: Sequence[str] = (),
    notices: Sequence[str] = (),
) -> SitePlan:
    """A site's plan from what a data set's module knows.

    Args:
        command: of `fedfms prepare`, such as fundus.
        given_name: the site's name; what FLARE does not take becomes - in the plan's `name`.
        items: at least two patients.
        settings: keys of site.yml beside the other arguments and what is the same for each format;
            format must be among them.
        patient: the expression that finds the patient in a file's name.
        paper: one in ten patients validates; volumes are cut at the 99th percentile and not below,
            and cast to 8 bits, which takes the level below.
        comments: lines for the head of site.yml.
        label_values: that a label may hold.
        known_cases: the provider's own number; another one found gives a notice.

    Raises:
        SiteDataError: too few patients ("too-few-patients"), two cases of one name
            ("ambiguous-download").
    """
    patients = {item.patient for item in items}
    if len(patients) < 2:
        raise SiteDataError(
            f"site {given_name} has {len(patients)} patients in this download; 2 are needed, one "
            "to train and one to validate",
            "download the whole set, or leave the site out",
            code="too-few-patients",
        )
    names: set[str] = set()
    for item in items:
        if item.case.casefold() in names:
            raise SiteDataError(
                f"site {given_name} has two cases called {item.case}",
                "keep one copy of the download below the folder that you name",
                code="ambiguous-download",
            )
        names.add(item.case.casefold())
    notices = list(notices)
    if known_cases is not None and len(items) != known_cases:
        notices.append(
            f"{len(items)} cases, the provider's set has {known_cases}: is the download whole?"
        )
    format_ = settings["format"]
    ending = ".nii.gz" if format_ == "nifti" else ".png"
    name = flare_name(given_name)
    head = [f"{given_name}: {comments[0]}", *comments[1:]]
    if name != given_name:
        head.append(f"The folder is called {name}, since FLARE does not take {given_name}.")
    head.append(f"Written by: fedfms prepare {command} (format {FORMAT})")
    values = {
        "data_root": ".",
        "format": format_,
        "images": f"images/*{ending}",
        "labels": f"labels/*{ending}",
        **{key: value for key, value in settings.items() if key != "format"},
        "intensity": _INTENSITY[format_, paper],
        "patient": patient,
        **({"validation_fraction": PAPER_VALIDATION_FRACTION} if paper else {}),
    }
    text = "".join(f"# {line}\n" for line in head)
    text += yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    return SitePlan(
        name=name,
        given_name=given_name,
        items=tuple(items),
        site_yml=text,
        format=format_,
        label_values=frozenset(label_values),
        pictures=pictures,
        count_names=tuple(count_names),
        notices=tuple(notices),
    )


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
