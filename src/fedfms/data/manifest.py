"""From `site.yml` to a list of cases: which image belongs to which label, to whom, on which side.

An image and its label are paired by what the wildcards of the two globs match: `images/*.nii.gz`
and `labels/*_seg.nii.gz` put `images/anna.nii.gz` together with `labels/anna_seg.nii.gz`. Where
names do not tell, `pair_by` in site.yml says what does: the folder, the patient, or in DICOM the
series to which a label refers. Only the part below `data_root` is ever matched, so no name in the
path before it can matter, and a file's ending never does: `.nii` and `.nii.gz` are one.
"""

from __future__ import annotations

import dataclasses
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

from fedfms.contracts.site import ImageFormat, SiteConfig
from fedfms.data.content import (
    EXTENSIONS,
    JUNK,
    is_no_slice,
    is_plain_file,
    may_enter,
    unreadable_folder,
)
from fedfms.data.left_out import LeftOut
from fedfms.data.pairs import WILDCARD, some, unpaired
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
    contrasts: tuple[Path | None, ...] = ()  # in the order of site.yml, None where it is missing
    label_files: tuple[Path, ...] = ()  # of the classes, in the order of site.yml

    @property
    def image_files(self) -> tuple[Path, ...]:
        """All its images: one, or those of the contrasts that are there."""
        return tuple(path for path in self.contrasts if path is not None) or (self.image,)

    @property
    def labels(self) -> tuple[Path, ...]:
        """All its label files."""
        return self.label_files or (self.label,)


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look at the folders gave: the cases, and all that is wrong with them."""

    cases: list[Case] = field(default_factory=list)  # sorted by key
    problems: list[SiteDataError] = field(default_factory=list)
    taken: frozenset[Path] = frozenset()  # all that the two globs match, in a case or not
    looked_into: frozenset[Path] = frozenset()  # the folders in which they look for names
    unlabelled: int = 0  # images without a label that site.yml passes over
    left_for_test: int = 0  # cases of which the site's own lists say so; they are none of `cases`


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


def below(site: SiteConfig, found: Scan) -> int:
    """Files that this site could read in folders right below those into which the globs look.

    Where the globs look into these too, none. In DICOM a folder is a series, and not looked into.
    """
    known = {place for into in found.looked_into for place in (into, *into.parents)}
    count = 0
    for folder in found.looked_into if site.format != "dicom" else ():
        try:
            for other in folder.iterdir():
                if other not in known and _is_own(other.name, "*") and other.is_dir():
                    count += sum(
                        bool(ending_of(path, site)) and is_plain_file(path)
                        for path in other.iterdir()
                    )
        except OSError:  # nobody asked for them
            continue
    return count


def ending_of(path: Path, site: SiteConfig) -> str:
    """The file's ending as it is written, `.nii.gz` and `.PNG` too; empty where it is none of the
    format's."""
    for ending in _endings(site.format):
        if path.name.lower().endswith(ending):
            return path.name[-len(ending) :]
    return ""


def _endings(format: ImageFormat) -> list[str]:
    """The endings of the format's files, the longest first."""
    known = EXTENSIONS.get(format) or (".dcm", *EXTENSIONS["nifti"], *EXTENSIONS["image"])
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


def find_whole_cases(site: SiteConfig) -> tuple[list[Case], LeftOut]:
    """As `find_cases`, without cases that lack a file, as far as a job may go on without.

    Returns:
        the cases, and what is left out, to which `prepare_cases` adds.

    Raises:
        SiteDataError: as `find_cases`.
    """
    found = scan(site)
    left_out = LeftOut(site, len(found.cases) + len(not_whole(found)))
    for problem in found.problems:
        if not problem.files or not found.cases:
            raise problem
    for path, problem in not_whole(found).items():
        left_out.add(path, problem)
    return found.cases, left_out


def not_whole(found: Scan) -> dict[Path, SiteDataError]:
    """Of cases without their label, their image, a contrast or a class's file: a file, and why."""
    lacking: dict[Path, SiteDataError] = {}
    for problem in found.problems:
        for path in problem.files:
            lacking.setdefault(path, problem)
    return lacking


def training_patients(cases: Iterable[Case]) -> int:
    """How many patients there are to train on."""
    return len({case.patient for case in cases if case.split == "train"})


def list_matches(site: SiteConfig) -> frozenset[Path]:
    """What the globs of images and labels match; nothing is opened, so that it may be asked often.

    Raises:
        SiteDataError: a folder cannot be read.
    """
    look = _Look()
    found = [*_columns(look, site, "images").values(), *_columns(look, site, "labels").values()]
    if look.problems:
        raise next(iter(look.problems.values()))
    return frozenset(one.path for column in found for one in column)


def scan(site: SiteConfig) -> Scan:
    """Like `find_cases`, but goes on after a problem and reports all of them."""
    if not _is_folder(site.data_root):
        return _stopped(
            f"there is no folder {site.data_root} ({site.data_root_named_by})",
            "name the folder with your images there; --data on the command line goes before "
            "SITE_DATA in the environment, and that before data_root in site.yml"
            + (
                "; a drive of Windows has another name here, such as /mnt/c"
                if re.search(r"(^|/)[A-Za-z]:($|[\\/])", str(site.data_root))
                else ""
            ),
            "no-data-root",
        )
    is_dicom = site.format == "dicom"
    how = pairing(site)
    if how == "wildcards" and (differ := _differing_globs(site)):
        return _stopped(
            f"the globs {differ[0]} and {differ[1]} have different wildcards",
            "use the same wildcards in both, in the same order, what they match pairs the files; "
            "or add pair_by: folder to site.yml where an image and its label share a folder",
            "globs-differ",
        )
    look_for_labels, look_for_images = _Look(), _Look()
    labels = _columns(look_for_labels, site, "labels")
    images = _columns(look_for_images, site, "images")
    # images/*.png also matches a label called images/x_seg.png; a folder of DICOM may hold both
    if how == "wildcards" or not is_dicom:
        label_files = {label.path for column in labels.values() for label in column}
        images = {
            name: [image for image in column if image.path not in label_files]
            for name, column in images.items()
        }
    every = [*images.values(), *labels.values()]
    taken = frozenset(found.path for column in every for found in column)
    into = frozenset(look_for_images.into | look_for_labels.into)
    unreadable = {**look_for_images.problems, **look_for_labels.problems}
    if unreadable:  # all else may follow from them
        return Scan([], list(unreadable.values()), taken, into)
    for what, columns, look in (
        ("images", images, look_for_images),
        ("labels", labels, look_for_labels),
    ):
        for pattern in [pattern for pattern, column in columns.items() if not column]:
            others = untaken(site, Scan(looked_into=frozenset(look.into), taken=taken))
            return Scan([], [_nothing_matches(site, what, pattern, others)], taken, into)
    pairs, lacking, problems, unlabelled = _paired(images, labels, site, how)
    images_by_key = {key: one.image for key, one in pairs.items()}
    patients, unnamed = _patients(images_by_key, site)
    if unnamed:
        problems.append(_patient_not_found(site, unnamed))
    keys = sorted(key for key in pairs if key in patients)
    test: set[str] = set()
    validation: set[str] = set()
    try:
        known = {key: patients[key] for key in keys}
        validation, test = sides(site, known, _patients(lacking, site)[0] if site.split else {})
    except SiteDataError as error:
        if all(one.files for one in problems):  # otherwise it follows from them
            problems.append(error)
    names = {patients[key] for key in keys}
    if site.patient is not None or is_dicom:
        problems.extend(_one_patient_in_two_spellings(names, validation))
    cases = [
        dataclasses.replace(
            pairs[key],
            key=key,
            patient=patients[key],
            split="validation" if patients[key] in validation else "train",
        )
        for key in keys
        if patients[key] not in test
    ]
    return Scan(cases, problems, taken, into, unlabelled, len(keys) - len(cases))


def sides(
    site: SiteConfig, patients: Mapping[str, str], lacking: Mapping[str, str]
) -> tuple[set[str], set[str]]:
    """The patients who validate, and those who are left for a test.

    Args:
        site: its own lists, else its share and seed.
        patients: of each case's key.
        lacking: the same of what lacks a file and is no case; the site's lists may name it.

    Raises:
        SiteDataError: "too-few-patients"; of own lists "split-file", "case-not-in-split",
            "patient-on-both-sides".
    """

    def dealt(names: set[str]) -> set[str]:
        return validation_patients(names, site.validation_fraction, site.validation_seed)

    if site.split is not None:
        from fedfms.data.own_split import own_sides

        return own_sides(site, patients, lacking, dealt)
    return dealt(set(patients.values())), set()


def validation_patients(patients: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The patients whose cases validate, the same on every machine.

    Patients are ordered by the SHA-256 of `seed:patient` and the first ones are taken, so the
    share is exact: `fraction` of the patients, rounded to the nearest whole number, halves up, with
    at least one patient on each side.

    Raises:
        SiteDataError: fewer than two patients ("too-few-patients").
    """

    def place(name: str) -> str:  # of a name that is not UTF-8, its own bytes
        return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).hexdigest()

    order = sorted(set(patients), key=place)
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


def name_wildcards(pattern: str, format: ImageFormat) -> list[str]:
    """The wildcards that stand for a case's name: without those of the ending, as in `*.nii*`."""
    folder, slash, name = pattern.rstrip("/").rpartition("/")
    for dot in re.finditer(r"\.", name):
        tail = name[dot.start() :]
        if any(fnmatch.fnmatchcase(ending, tail) for ending in _endings(format)):
            name = name[: dot.start()]
            break
    return WILDCARD.findall(folder + slash + name)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a glob matches, and what each of its wildcards matches there; no ending is in it."""

    path: Path
    wildcards: tuple[str, ...]


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
            if not WILDCARD.search(part):  # to enter is enough, it need not be listed
                (folder / part).lstat()
                return [part]
            matches = re.compile(fnmatch.translate(part)).match
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if matches(entry.name)]
            if not may_enter(folder):
                raise PermissionError  # it may be listed, and nothing in it opened
        except OSError as error:
            self._cannot_read(folder, error)
            return []
        return sorted(name for name in names if _is_own(name, part))

    def _is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:  # of a link, the folder that it points to
            self._cannot_read(path if may_enter(path.parent) else path.parent, error)
            return False

    def _cannot_read(self, folder: Path, error: OSError) -> None:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        # a link to a drive that is not mounted
        if not is_missing or (folder.is_symlink() and not folder.exists()):
            self.problems.setdefault(folder, unreadable_folder(folder, error))


def _is_own(name: str, part: str) -> bool:
    """A name of the person's own, not hidden and not left by a system."""
    if name.startswith("."):
        return part.startswith(".")
    return name.lower() not in JUNK


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # that it cannot be read is said where it is looked into
        return True


def _matches(
    look: _Look,
    site: SiteConfig,
    pattern: str,
    kind: Literal["files", "folders", "files or folders"],
) -> list[_Found]:
    """What below `data_root` matches, sorted by path."""
    pattern = pattern.rstrip("/")  # images/*/ means the folders that images/* matches
    expression, count = glob_expression(pattern), len(name_wildcards(pattern, site.format))
    found = []
    for name in look.names(site.data_root, pattern):
        path = site.data_root / name
        groups = expression.fullmatch(name)
        is_folder = _is_folder(path)
        if groups is None or (kind != "files or folders" and is_folder != (kind == "folders")):
            continue
        end = len(name) if is_folder else len(name) - len(ending_of(path, site))
        parts = (
            name[slice(*groups.span(n))][: max(0, end - groups.start(n))]
            for n in range(1, count + 1)
        )
        # one spelling of accents, whatever the file system writes
        found.append(
            _Found(path, tuple(unicodedata.normalize("NFC", part.strip("/")) for part in parts))
        )
    return found


def glob_expression(pattern: str) -> re.Pattern[str]:
    """The glob as a regular expression with one group for each wildcard."""
    text, end = "", 0
    for wildcard in WILDCARD.finditer(pattern):
        text += re.escape(pattern[end : wildcard.start()])
        token = wildcard.group()
        if token == "**/":
            text += r"((?:[^/]+/)*)"
        elif token == "*":
            text += r"([^/]*)"
        elif token == "?":
            text += r"([^/])"
        else:
            text += f"({_set_of_characters(token)})"
        end = wildcard.end()
    return re.compile(text + re.escape(pattern[end:]))


def _set_of_characters(token: str) -> str:
    """A part of a glob in brackets as a regular expression, as the standard library reads it."""
    found = re.fullmatch(r"\(\?s:(.*)\)\\[zZ]", fnmatch.translate(token), re.DOTALL)
    assert found is not None  # the form of all versions of Python from 3.7 on
    return found.group(1)


# ------------------------------------------------------------------------------------------ pairs

Pairing = Literal["wildcards", "folder", "patient", "reference"]
_Keyed = tuple[list[tuple[str, Path]], list[SiteDataError]]  # files with their keys


def pairing(site: SiteConfig) -> Pairing:
    """What tells the label of an image at this site: `pair_by`, or what its default comes to."""
    if site.pair_by is not None:
        return site.pair_by
    if site.format != "dicom":
        return "wildcards"
    is_alike = not _differing_globs(site)
    return "wildcards" if is_alike and site.images != site.labels else "reference"


def _differing_globs(site: SiteConfig) -> tuple[str, str] | None:
    """Two globs of this site whose wildcards differ."""
    first, *others = [*_globs(site, "images"), *_globs(site, "labels")]
    wanted = name_wildcards(first, site.format)
    return next(
        ((first, other) for other in others if name_wildcards(other, site.format) != wanted), None
    )


def _globs(site: SiteConfig, what: Literal["images", "labels"]) -> list[str]:
    """Those of the contrasts or of the classes, where each has its own; else the one."""
    if what == "images":
        return list(site.contrasts.values()) or [site.images]
    return list(site.label_files.values()) or [site.labels]


def _columns(
    look: _Look, site: SiteConfig, what: Literal["images", "labels"]
) -> dict[str, list[_Found]]:
    """What each glob matches, by the glob."""
    if site.format != "dicom":
        return {pattern: _matches(look, site, pattern, "files") for pattern in _globs(site, what)}
    if what == "labels":
        kind: Literal["folders", "files or folders"] = "files or folders"
        return {pattern: _matches(look, site, pattern, kind) for pattern in _globs(site, what)}
    # a series is a folder; files are images where they alone match: pictures, enhanced images
    return {
        pattern: _matches(look, site, pattern, "folders")
        or _without_texts(_matches(look, site, pattern, "files"))
        for pattern in _globs(site, what)
    }


def _without_texts(files: list[_Found]) -> list[_Found]:
    """Without what lies beside pictures in DICOM and is none, unless there is nothing else."""
    own = []
    for file in files:
        try:
            is_other = is_no_slice(file.path)
        except SiteDataError:  # its reader says why
            is_other = False
        if not is_other:
            own.append(file)
    return own or files


def _paired(
    images: dict[str, list[_Found]],
    labels: dict[str, list[_Found]],
    site: SiteConfig,
    how: Pairing,
) -> tuple[dict[str, Case], dict[str, Path], list[SiteDataError], int]:
    """Cases by key; a file of each that lacks one; all that is wrong; images passed over."""
    if how == "reference":
        return _by_reference(images[site.images], labels[site.labels], site)
    problems: list[SiteDataError] = []
    columns: list[dict[str, Path]] = []
    for what, patterns in (("images", images), ("labels", labels)):
        for pattern, found in patterns.items():
            keyed, wrong = _keyed(pattern, found, site, how)
            problems += [one for one in wrong if one.problem not in {p.problem for p in problems}]
            groups: dict[str, list[Path]] = {}
            for key, path in keyed:
                groups.setdefault(key, []).append(path)
            several = [paths for paths in groups.values() if len(paths) > 1]
            if several:
                problems.append(_several(several, what, site))
            columns.append({key: paths[0] for key, paths in groups.items()})
    if any(problem.code in ("globs-differ", "patient-not-found") for problem in problems):
        return {}, {}, problems, 0
    of_images, of_labels = columns[: len(images)], columns[len(images) :]
    first_image, first_label = (
        {k: p for one in part[::-1] for k, p in one.items()} for part in (of_images, of_labels)
    )
    alone = sorted(first_image.keys() - first_label.keys())
    orphans = sorted(first_label.keys() - first_image.keys())
    passed_over = len(alone) if site.unlabelled == "pass_over" else 0
    if passed_over:
        alone = []
    if alone or orphans:
        problems.append(
            unpaired(
                [first_image[key] for key in alone],
                len(first_image),
                [first_label[key] for key in orphans],
                len(first_label),
                site,
                _RULES[how],
            )
        )
    both = sorted(first_image.keys() & first_label.keys())
    for names, parts, may_miss in (
        (list(site.contrasts), of_images, site.missing_contrast != "refuse"),
        (list(site.label_files), of_labels, False),
    ):
        for name, column in zip(names, parts, strict=False):
            lacking = [key for key in both if key not in column]
            if lacking and not may_miss:
                cases = [first_image[key] for key in lacking]
                problems.append(_part_is_missing(name, cases, len(both), site, parts is of_images))
    complete = [key for key in both if all(key in column for column in of_labels)]
    cases_by_key = {
        key: Case(
            key,
            "",
            first_image[key],
            first_label[key],
            "train",
            tuple(column.get(key) for column in of_images) if site.contrasts else (),
            tuple(column[key] for column in of_labels) if site.label_files else (),
        )
        for key in complete
        if site.missing_contrast != "refuse" or all(key in column for column in of_images)
    }
    there = {**first_label, **first_image}
    incomplete = {key: path for key, path in there.items() if key not in cases_by_key}
    return cases_by_key, incomplete, problems, passed_over


_RULES = {
    "wildcards": "what the wildcards match must be alike for an image and its label; or see "
    "pair_by there; unlabelled: pass_over makes no case of an image without a label",
    "folder": "each folder needs one image and one label",
    "patient": "each patient needs one image and one label",
}


def _keyed(pattern: str, found: list[_Found], site: SiteConfig, how: Pairing) -> _Keyed:
    """Files that a glob matches, each with what is alike of an image and its label."""
    if how == "wildcards":
        return [("/".join(one.wildcards), one.path) for one in found], []
    if how == "folder":
        count = _folder_wildcards(site)
        if count is None:
            return [], [
                SiteDataError(
                    f"pair_by is folder, but the folders in the globs {site.images} and "
                    f"{site.labels} have no or different wildcards",
                    "write the folders of both with the same wildcards, such as */T1*.nii.gz and "
                    "*/mask.nii.gz",
                    code="globs-differ",
                )
            ]
        return [("/".join(one.wildcards[:count]), one.path) for one in found], []
    patient_of, unnamed = _patients({str(one.path): one.path for one in found}, site)
    if unnamed:
        return [], [_patient_not_found(site, unnamed)]
    return [(patient_of[str(one.path)], one.path) for one in found], []


def _folder_wildcards(site: SiteConfig) -> int | None:
    """How many wildcards the folders of all globs have; None where it differs, or there is none.

    A series in DICOM is a folder itself.
    """
    counts = [
        [len(WILDCARD.findall(glob.rstrip("/").rpartition("/")[0] + "/")) for glob in globs]
        for globs in (_globs(site, "images"), _globs(site, "labels"))
    ]
    count = counts[1][0]
    if site.format == "dicom" and counts[0][0] != count:
        counts[0] = [len(name_wildcards(glob, site.format)) for glob in _globs(site, "images")]
    return count if count and {*counts[0], *counts[1]} == {count} else None


def _by_reference(
    images: list[_Found], labels: list[_Found], site: SiteConfig
) -> tuple[dict[str, Case], dict[str, Path], list[SiteDataError], int]:
    from fedfms.data.dicom.references import pair  # pydicom takes a second to import

    keys = {found.path: "/".join(found.wildcards) for found in images}
    if len(set(keys.values())) < len(keys):  # of several **/
        keys = {path: path.relative_to(site.data_root).as_posix() for path in keys}
    pairs, problems, passed_over = pair(
        [found.path for found in images], [found.path for found in labels], site
    )
    cases = {
        keys[image]: Case(keys[image], "", image, label, "train") for image, label in pairs.items()
    }
    lacking = {key: path for path, key in keys.items() if path not in pairs}
    return cases, lacking, problems, passed_over


def _part_is_missing(
    name: str, cases: Sequence[Path], count: int, site: SiteConfig, is_contrast: bool
) -> SiteDataError:
    """The error for cases that lack one of several contrasts, or the file of a class."""
    if is_contrast:
        error = SiteDataError(
            f"{len(cases)} of {count} cases have no {name}: {some(cases, site)}",
            "add the images, or write missing_contrast: mean in site.yml, and the mean of the "
            "other contrasts takes the place of one that is missing (or black)",
            code="missing-contrast",
        )
    else:
        error = SiteDataError(
            f"{len(cases)} of {count} cases have labels and none of {name}: {some(cases, site)}",
            f"add a file for {name}, an empty one where there is none of it in the image; or take "
            f"{name} out of label_files",
            code="missing-label-file",
        )
    error.files = tuple(cases)
    return error


def _several(groups: list[list[Path]], what: str, site: SiteConfig) -> SiteDataError:
    """Several files where one image or label is to be."""
    first = ", ".join(path.relative_to(site.data_root).as_posix() for path in groups[0][:4])
    more = f"; {len(groups) - 1} more such" if len(groups) > 1 else ""
    stems = {path.name[: len(path.name) - len(ending_of(path, site))] for path in groups[0]}
    if len(stems) == 1 and pairing(site) == "wildcards":
        return SiteDataError(
            f"{first} are one name with several endings{more}",
            "keep one file of each name; the ending is no part of it",
            code=f"several-{what}",
        )
    return SiteDataError(
        f"{len(groups[0])} {what} where one is expected: {first}{more}",
        f"write the glob {what} in site.yml so that it matches one of them, or move the others "
        "away",
        code=f"several-{what}",
    )


# --------------------------------------------------------------------------------------- problems


# What people write who know other globs and other systems, and what to write here.
_NOWILDCARDS = (
    (r"\\", "folders are separated by / and not by \\"),
    (r"\{[^{}]*,", "{a,b} is no wildcard here, * and ? and [ab] are"),
    (r"\*\*$", "** stands for folders, and **/* for the files in them"),
    (r"[“”‘’„«»]", "the quotes of YAML are straight, ' or \""),
)


def _nothing_matches(
    site: SiteConfig, what: str, pattern: str, others: list[Path]
) -> SiteDataError:
    kind = "folder or file" if site.format == "dicom" and what == "images" else "file"
    root = f"{site.data_root} ({site.data_root_named_by})"
    if os.access(site.data_root, os.R_OK) and not any(site.data_root.iterdir()):
        return SiteDataError(
            f"the folder {root} is empty",
            "name the folder with your images; where it is a drive, see that it is mounted",
            code=f"no-{what}",
        )
    beside = f"; beside it lie {some(others, site)}" if others else ""
    return SiteDataError(
        f"no {kind} under {root} matches {what}: {pattern}{beside}",
        f"compare with: ls {site.data_root}; the glob is relative to data_root, and capitals count"
        + "".join(f"; {hint}" for sign, hint in _NOWILDCARDS if re.search(sign, pattern))
        + ("; in DICOM it matches folders, one series each" if kind != "file" else ""),
        code=f"no-{what}",
    )


def _patient_not_found(site: SiteConfig, unnamed: Sequence[Path]) -> SiteDataError:
    if site.patient is None:
        return SiteDataError(
            f"pair_by is patient, and there is no PatientID in {some(unnamed, site)}",
            "add patient: with a regular expression on the path to site.yml",
            code="patient-not-found",
        )
    return SiteDataError(
        f"patient: {site.patient} in site.yml does not match {some(unnamed, site)}",
        "correct the regular expression so that group 1 is the patient in every file name",
        code="patient-not-found",
    )


def _patients(images: Mapping[str, Path], site: SiteConfig) -> tuple[dict[str, str], list[Path]]:
    """Patient of each key, and the files in which the site's expression finds none.

    Without an expression it is the PatientID of DICOM images, where they have one, else the key.
    The expression is searched in the file name and, where it is not there, in the path below
    `data_root`, so that a folder can name the patient.
    """
    if site.patient is None and site.format == "dicom":
        from fedfms.data.dicom.series import patient_of  # pydicom takes a second to import

        named = {key: patient_of(path) for key, path in images.items()}
        if pairing(site) == "patient":
            return (
                {key: name for key, name in named.items() if name is not None},
                [images[key] for key, name in named.items() if name is None],
            )
        return {key: name or key for key, name in named.items()}, []
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
    if len(stems) < 2 or not groups:
        return None
    return sorted(groups[0])[:3]


def _stopped(problem: str, fix: str, code: str) -> Scan:
    return Scan(problems=[SiteDataError(problem, fix, code=code)])
