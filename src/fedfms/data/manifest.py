"""From `site.yml` to a list of cases: which image belongs to which label, to whom, on which side.

An image and its label are paired by what the wildcards of the two globs match: `images/*.nii.gz`
and `labels/*_seg.nii.gz` put `images/anna.nii.gz` together with `labels/anna_seg.nii.gz`. Only the
part below `data_root` is ever matched, so no name in the path before it can matter.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedfms.config import SiteConfig
from fedfms.data.content import EXTENSIONS, JUNK, is_plain_file, unreadable_folder
from fedfms.errors import SiteDataError

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Case:
    """One image with its label."""

    key: str  # what the wildcards matched; unique within the site
    patient: str  # never on both sides of the split
    image: Path
    label: Path
    split: Split


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look at the folders gave: the cases, and all that is wrong with them."""

    cases: list[Case] = field(default_factory=list)  # sorted by key
    problems: list[SiteDataError] = field(default_factory=list)
    taken: frozenset[Path] = frozenset()  # all that the two globs match, in a case or not
    looked_into: frozenset[Path] = frozenset()  # the folders in which they look for names


def untaken(site: SiteConfig, found: Scan) -> list[Path]:
    """Files that this site could read, beside those that the globs take; by ending, then by name.

    Of files in the folders into which the globs look, those with an ending of the site's format
    that no glob matches: `.PNG` beside `*.png`, `.jpg` beside `.png`, a second contrast. Files of a
    DICOM series whose folder is taken are the series and do not count.
    """
    files = []
    for folder in found.looked_into - found.taken:
        try:
            files += [
                path for path in folder.iterdir() if ending_of(path, site) and is_plain_file(path)
            ]
        except OSError:  # it is among the problems
            continue
    return sorted(set(files) - found.taken, key=lambda path: (ending_of(path, site), path))


def ending_of(path: Path, site: SiteConfig) -> str:
    """The file's ending as it is written, `.nii.gz` and `.PNG` too; empty where it is none of the
    format's."""
    for ending in _endings(site):
        if path.name.lower().endswith(ending):
            return path.name[-len(ending) :]
    return ""


def _endings(site: SiteConfig) -> list[str]:
    """The endings of the format's files, the longest first."""
    known = (".dcm", *EXTENSIONS["nifti"]) if site.format == "dicom" else EXTENSIONS[site.format]
    return sorted(known, key=len, reverse=True)


def find_cases(site: SiteConfig) -> list[Case]:
    """The cases of a site, sorted by key; no image is opened, of DICOM one header each.

    Raises:
        SiteDataError: the first thing wrong with folders, names, pairs or patients.
    """
    found = scan(site)
    if found.problems:
        raise found.problems[0]
    return found.cases


def scan(site: SiteConfig) -> Scan:
    """Like `find_cases`, but goes on after a problem and reports all of them."""
    if not _is_folder(site.data_root):
        return _stopped(
            f"there is no folder {site.data_root}",
            "set SITE_DATA to the folder with your images, or correct data_root in site.yml",
            "no-data-root",
        )
    if _wildcards(site.images) != _wildcards(site.labels):
        return _stopped(
            f"the globs {site.images} and {site.labels} have different wildcards",
            "use the same wildcards in both, in the same order: what they match pairs the files",
            "globs-differ",
        )
    is_dicom = site.format == "dicom"
    look = _Look()
    labels = _matches(
        look, site.data_root, site.labels, "files or folders" if is_dicom else "files"
    )
    label_files = set(labels.values())
    images = {
        key: path
        for key, path in _matches(
            look, site.data_root, site.images, "folders" if is_dicom else "files"
        ).items()
        if path not in label_files  # images/*.png also matches a label called images/x_seg.png
    }
    taken = frozenset((*images.values(), *label_files))
    problems = list(look.problems.values())
    if not images or not labels:
        if not problems:  # otherwise it follows from them
            problems.append(_nothing_matches(site, "images" if not images else "labels"))
        return Scan([], problems, taken, frozenset(look.into))
    if not problems:  # otherwise it may follow from them
        problems += _unpaired(images, labels)
    patients, unnamed = _patients(images, site)
    if unnamed:
        problems.append(
            SiteDataError(
                f"patient: {site.patient} in site.yml does not match {_some(unnamed)}",
                "correct the regular expression so that group 1 is the patient in every file name",
                code="patient-not-found",
            )
        )
    keys = sorted(key for key in images.keys() & labels.keys() if key in patients)
    names = {patients[key] for key in keys}
    try:
        validation = validation_patients(names, site.validation_fraction, site.validation_seed)
    except SiteDataError as error:
        validation = set()
        if not problems:  # otherwise it follows from them
            problems.append(error)
    if site.patient is not None or is_dicom:
        problems.extend(_one_patient_in_two_spellings(names, validation))
    cases = [
        Case(
            key=key,
            patient=patients[key],
            image=images[key],
            label=labels[key],
            split="validation" if patients[key] in validation else "train",
        )
        for key in keys
    ]
    return Scan(cases, problems, taken, frozenset(look.into))


def validation_patients(patients: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The patients whose cases validate, the same on every machine.

    Patients are ordered by the SHA-256 of `seed:patient` and the first ones are taken, so the
    share is exact: `fraction` of the patients, rounded to the nearest whole number, halves up, with
    at least one patient on each side.

    Raises:
        SiteDataError: fewer than two patients ("too-few-patients").
    """
    order = sorted(
        set(patients), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
    )
    if len(order) < 2:
        raise SiteDataError(
            f"the site has {len(order)} patient{'' if len(order) == 1 else 's'}; at least 2 are "
            "needed, one to train and one to validate",
            "add cases, or correct patient in site.yml if it takes several patients for one",
            code="too-few-patients",
        )
    share = math.floor(fraction * len(order) + 0.5)
    return set(order[: min(max(share, 1), len(order) - 1)])


# ------------------------------------------------------------------------------------------ globs


_WILDCARD = re.compile(r"\*\*/|\*|\?|\[!?\]?[^\]]*\]")


def _wildcards(pattern: str) -> list[str]:
    return _WILDCARD.findall(pattern)


class _Look:
    """A look into folders: which ones, and what stood in the way."""

    def __init__(self) -> None:
        self.into: set[Path] = set()  # in which the last part of a glob was looked for
        self.problems: dict[Path, SiteDataError] = {}  # by folder

    def names(self, root: Path, pattern: str) -> list[str]:
        """What below `root` matches, sorted; hidden and system files and folders do not count.

        As the standard library's glob, but a folder that cannot be read is a problem and not
        empty, and a link to a folder that it lies in is not followed.
        """
        *folders, last = pattern.split("/")
        places = [""]
        for part in folders:
            places = [place for start in places for place in self._below(root, start, part)]
        found: set[str] = set()
        for place in places:
            self.into.add(root / place)
            found.update(place + name for name in self._entries(root / place, last))
        return sorted(found)

    def _below(self, root: Path, place: str, part: str) -> list[str]:
        """The folders in `place` that a part of a glob matches, each with a / at its end."""
        if part == "**":
            return self._all_below(root, place, ())
        return [f"{place}{name}/" for name in self._folders(root / place, part)]

    def _all_below(self, root: Path, place: str, above: tuple[tuple[int, int], ...]) -> list[str]:
        try:
            status = (root / place).stat()
        except OSError as error:
            self._cannot_read(root / place, error)
            return []
        here = (status.st_dev, status.st_ino)
        if here in above:
            return []
        found = [place]
        for name in self._folders(root / place, "*"):
            found += self._all_below(root, f"{place}{name}/", (*above, here))
        return found

    def _folders(self, folder: Path, part: str) -> list[str]:
        return [name for name in self._entries(folder, part) if self._is_folder(folder / name)]

    def _entries(self, folder: Path, part: str) -> list[str]:
        """Names in a folder that a part of a glob matches."""
        try:
            if not _WILDCARD.search(part):  # to enter is enough, it need not be listed
                (folder / part).lstat()
                return [part]
            matches = re.compile(fnmatch.translate(part)).match
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if matches(entry.name)]
            if not _may_enter(folder):
                raise PermissionError  # it may be listed, and nothing in it opened
        except OSError as error:
            self._cannot_read(folder, error)
            return []
        return sorted(name for name in names if _is_own(name, part))

    def _is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:  # of a link, the folder that it points to
            self._cannot_read(path if _may_enter(path.parent) else path.parent, error)
            return False

    def _cannot_read(self, folder: Path, error: OSError) -> None:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if not is_missing or folder.is_symlink():  # a link to a drive that is not mounted
            self.problems.setdefault(folder, unreadable_folder(folder, error))


# what file systems and file browsers leave in folders; hidden ones do not count anyway
_SYSTEM = ("lost+found", "$recycle.bin", "system volume information", "@eadir", "__macosx")


def _is_own(name: str, part: str) -> bool:
    """A name of the person's own, not hidden and not left by a system."""
    if name.startswith("."):
        return part.startswith(".")
    return name.lower() not in (*_SYSTEM, *JUNK)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # that it cannot be read is said where it is looked into
        return True


def _may_enter(folder: Path) -> bool:
    return os.access(folder, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _matches(
    look: _Look, root: Path, pattern: str, kind: Literal["files", "folders", "files or folders"]
) -> dict[str, Path]:
    """What below `root` matches, by what the wildcards matched; hidden files do not count."""
    pattern = pattern.rstrip("/")  # images/*/ means the folders that images/* matches
    expression = _groups(pattern)
    found: dict[str, Path] = {}
    for name in look.names(root, pattern):
        groups = expression.fullmatch(name)
        is_right = kind == "files or folders" or _is_folder(root / name) == (kind == "folders")
        if groups is not None and is_right:
            # one spelling of accents, whatever the file system writes
            key = unicodedata.normalize(
                "NFC", "/".join(part.strip("/") for part in groups.groups())
            )
            found[key] = root / name
    return found


def _groups(pattern: str) -> re.Pattern[str]:
    """The glob as a regular expression with one group for each wildcard."""
    text, end = "", 0
    for wildcard in _WILDCARD.finditer(pattern):
        text += re.escape(pattern[end : wildcard.start()])
        token = wildcard.group()
        if token == "**/":
            text += r"((?:[^/]+/)*)"
        elif token == "*":
            text += r"([^/]*)"
        elif token == "?":
            text += r"([^/])"
        else:
            text += f"([{'^' + token[2:-1] if token[1] == '!' else token[1:-1]}])"
        end = wildcard.end()
    return re.compile(text + re.escape(pattern[end:]))


# --------------------------------------------------------------------------------------- problems


def _nothing_matches(site: SiteConfig, what: Literal["images", "labels"]) -> SiteDataError:
    pattern = site.images if what == "images" else site.labels
    kind = "folder" if site.format == "dicom" and what == "images" else "file"
    return SiteDataError(
        f"no {kind} under {site.data_root} matches {what}: {pattern}",
        f"compare with: ls {site.data_root}; the glob is relative to data_root"
        + ("; in DICOM it matches folders, one series each" if kind == "folder" else ""),
        code=f"no-{what}",
    )


def _unpaired(images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[SiteDataError]:
    alone = [images[key] for key in sorted(images.keys() - labels.keys())]
    orphans = [labels[key] for key in sorted(labels.keys() - images.keys())]
    if not alone and not orphans:
        return []
    parts = []
    if alone:
        parts.append(f"{len(alone)} of {len(images)} images have no label: {_some(alone)}")
    if orphans:
        parts.append(f"{len(orphans)} of {len(labels)} labels have no image: {_some(orphans)}")
    return [
        SiteDataError(
            "; ".join(parts),
            "add the missing files, move the others away, or correct the globs in site.yml: what "
            "the wildcards match must be alike for an image and its label",
            code="unpaired-files",
        )
    ]


def _patients(images: Mapping[str, Path], site: SiteConfig) -> tuple[dict[str, str], list[Path]]:
    """Patient of each key, and the files in which the site's expression finds none.

    Without an expression it is the PatientID of DICOM images, where they have one, else the key.
    The expression is searched in the file name and, where it is not there, in the path below
    `data_root`, so that a folder can name the patient.
    """
    if site.patient is None and site.format == "dicom":
        from fedfms.data.dicom.series import patient_of  # pydicom takes a second to import

        return {key: patient_of(path) or key for key, path in images.items()}, []
    if site.patient is None:
        return {key: key for key in images}, []
    expression = re.compile(site.patient)
    patients: dict[str, str] = {}
    unnamed: list[Path] = []
    for key, path in images.items():
        below = path.relative_to(site.data_root).as_posix()
        found = expression.search(path.name) or expression.search(below)
        if found is None or not found.group(1):
            unnamed.append(path)
        else:
            patients[key] = unicodedata.normalize("NFC", found.group(1))
    return patients, unnamed


def _one_patient_in_two_spellings(
    patients: Iterable[str], validation: set[str]
) -> list[SiteDataError]:
    """P01, p01 and P1 are taken for one patient: an error where the split separates them."""
    spellings: dict[str, list[str]] = {}
    for name in sorted(patients):
        plain = re.sub(r"(?<!\d)0+(?=\d)", "", name).casefold()
        spellings.setdefault(plain, []).append(name)
    return [
        SiteDataError(
            f"patients {', '.join(names)} look like one patient written in {len(names)} ways, and "
            "the split puts them on both sides",
            "rename the files so that one patient has one name",
            code="patient-on-both-sides",
        )
        for names in spellings.values()
        if len({name in validation for name in names}) == 2
    ]


def several_files_a_patient(keys: Sequence[str]) -> list[str] | None:
    """Example of keys that look like slices or visits of one patient, as p1_01 and p1_02; or None.

    Names with one stem only, as scan_001 to scan_072, look like one file for each patient.
    """
    stems: dict[str, list[str]] = {}
    for key in keys:
        numbered = re.fullmatch(r"(.*\d.*?)[-_ .]+[A-Za-z]*\d+", key)
        stems.setdefault(numbered.group(1) if numbered else key, []).append(key)
    groups = [group for group in stems.values() if len(group) > 1]
    if len(stems) < 2 or sum(map(len, groups)) * 2 < len(keys):
        return None
    return sorted(groups[0])[:3]


def _stopped(problem: str, fix: str, code: str) -> Scan:
    return Scan(problems=[SiteDataError(problem, fix, code=code)])


def _some(paths: list[Path], limit: int = 3) -> str:
    names = ", ".join(path.name for path in paths[:limit])
    return names if len(paths) <= limit else f"{names} and {len(paths) - limit} more"
