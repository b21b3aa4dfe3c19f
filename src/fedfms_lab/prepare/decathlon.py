"""Any task of the Medical Segmentation Decathlon: a folder with dataset.json, imagesTr, labelsTr.

Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022. dataset.json
names the labels and the modalities, and lists the training pairs; test images have no labels and
are not used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.bounded import read_json_object
from fedfms.errors import ConfigError, SiteDataError
from fedfms_lab.prepare.plan import (
    Made,
    SitePlan,
    deal,
    flare_name,
    items_of,
    read_assignment,
)
from fedfms_lab.prepare.source import Source
from fedfms_lab.prepare.volumes import read_channel, read_volume, volume_pair


@dataclass(frozen=True, slots=True)
class Task:
    """What dataset.json says."""

    name: str
    licence: str
    modalities: tuple[str, ...]  # in the order of the channels
    labels: Mapping[int, str]  # value -> name as written; 0 is the background
    pairs: tuple[tuple[str, Path, Path], ...]  # case, image, label; sorted by case


def plan_decathlon(
    source: Source,
    *,
    paper: bool = False,
    channel: int | None = None,
    sites: int = 1,
    sites_from: Path | None = None,
    plane: str = "axial",
) -> list[SitePlan]:
    """One plan for each site.

    Args:
        source: the task's folder.
        paper: the paper's clip at the 99th percentile and share of validation.
        channel: which modality of a task with several, counted from 0 as in dataset.json.
        sites: number of sites, site-1 to site-N, among which the cases are dealt by a hash.
        sites_from: CSV of case and site, in place of `sites`.
        plane: axial, coronal or sagittal.

    Raises:
        SiteDataError: "missing-download-file", "unexpected-file".
        ConfigError: a channel that there is not, too many sites, what is wrong with the CSV.
    """
    task = read_task(source)
    channel = _channel(task, channel)
    cases = [case for case, _, _ in task.pairs]
    if sites_from is not None:
        site_of = read_assignment(sites_from, "case", cases)
        names = sorted(set(site_of.values()))
    else:
        if not 1 <= sites <= len(cases):
            raise ConfigError(
                f"{sites} sites cannot share {len(cases)} cases",
                "ask for fewer sites: each needs 2 cases",
            )
        names = [f"site-{number + 1}" for number in range(sites)]
        site_of = deal(cases, names)
    classes = class_values(task)
    several = len(task.modalities) > 1
    modality = task.modalities[channel]
    part = f"channel {channel}" if several else ""
    make = functools.partial(_make_of_channel, channel) if several else volume_pair
    return [
        SitePlan(
            command="decathlon",
            given_name=name,
            items=items_of(
                (pair for pair in task.pairs if site_of[pair[0]] == name), make, part=part
            ),
            settings={
                "format": "nifti",
                "classes": classes,
                "plane": plane,
                "channels": "neighbours",
                "keep_empty_every": 5,
            },
            patient=r"^(.+)\.nii\.gz$",
            paper=paper,
            comments=[
                f"{task.name}, Medical Segmentation Decathlon, {modality}; {task.licence}.",
            ],
        )
        for name in names
    ]


def class_values(task: Task) -> dict[str, list[int]]:
    """Class name in site.yml -> its label value: "Non-enhancing tumor" is non-enhancing_tumor.

    Raises:
        SiteDataError: two labels whose names become one, or one that becomes none.
    """
    classes: dict[str, list[int]] = {}
    for value, name in sorted(task.labels.items()):
        if value == 0:
            continue
        plain = re.sub(r"[^a-z0-9_-]+", "_", name.strip().lower()).strip("_-")[:63]
        if not plain or plain in classes:
            raise SiteDataError(
                f"dataset.json of {task.name} has a label {name!r} that makes no class of its own",
                "give each label a name of letters and digits, in a copy of the task",
                code="unexpected-file",
            )
        classes[plain] = [value]
    return classes


def read_task(source: Source) -> Task:
    """dataset.json and the files that it lists.

    Raises:
        SiteDataError: "missing-download-file", "ambiguous-download", "unexpected-file".
    """
    found = source.where(lambda path: path.name == "dataset.json")
    if not found:
        raise source.missing("dataset.json", "Task04_Hippocampus/dataset.json")
    if len(found) > 1:
        raise SiteDataError(
            f"{source.root} holds {len(found)} tasks: "
            + ", ".join(map(source.relative, found[:3])),
            "name the folder of one task",
            code="ambiguous-download",
        )
    file = found[0]
    try:
        content = read_json_object(file)
        labels = {int(value): str(name) for value, name in content["labels"].items()}
        modalities = tuple(
            str(content["modality"][key]) for key in sorted(content["modality"], key=int)
        )
        listed = [(entry["image"], entry["label"]) for entry in content["training"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SiteDataError(
            f"{source.relative(file)} is not as the Decathlon writes it "
            f"({type(error).__name__}: {error})",
            "download it again; it needs modality, labels, and training with image and label",
            code="unexpected-file",
        ) from None
    if not listed or not any(labels) or not modalities:
        raise SiteDataError(
            f"{source.relative(file)} lists no training pairs, no labels or no modality",
            "download it again",
            code="unexpected-file",
        )
    return Task(
        name=str(content.get("name", file.parent.name)),
        licence=str(content.get("licence", content.get("license", "licence not stated"))),
        modalities=modalities,
        labels=labels,
        pairs=tuple(_pairs(source, file.parent, listed)),
    )


def _pairs(
    source: Source, folder: Path, listed: Sequence[tuple[str, str]]
) -> list[tuple[str, Path, Path]]:
    there = set(source.files)
    pairs, missing = [], []
    for names in listed:
        image, label = (folder / Path(name) for name in names)
        missing += [source.relative(path) for path in (image, label) if path not in there]
        case = re.sub(r"\.nii(\.gz)?$", "", image.name)
        flare_name(case[:63])
        pairs.append((case, image, label))
    if missing:
        raise source.lacking("that dataset.json lists", missing, "unpack the task again, all of it")
    return sorted(pairs)


def _channel(task: Task, channel: int | None) -> int:
    if channel is None:
        if len(task.modalities) > 1:
            raise ConfigError(
                f"{task.name} has {len(task.modalities)} modalities and one is learnt from",
                "add --channel N: "
                + ", ".join(f"{number} {name}" for number, name in enumerate(task.modalities)),
            )
        return 0
    if not 0 <= channel < len(task.modalities):
        raise ConfigError(
            f"{task.name} has no channel {channel}",
            f"choose 0 to {len(task.modalities) - 1}: {', '.join(task.modalities)}",
        )
    return channel


def _make_of_channel(channel: int, image: Path, label: Path) -> Made:
    return Made(read_channel(image, channel), read_volume(label))
