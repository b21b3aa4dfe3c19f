"""A folder as it lies: its files by kind, and groups of files that one glob takes.

A group is what lies in one place of every case and is called alike there: all `*/*_t1.nii.gz`. How
names become such a glob: folders that differ from case to case are a *, and of a file's name the
words that are known or that stand in most of the cases' folders stay.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from fedfms.contracts.site import ImageFormat
from fedfms.control import Control
from fedfms.data.adopt.names import (
    Role,
    collapsed,
    contrast_of,
    glob_literal,
    known_ends,
    known_words,
    part_of,
    role_of,
)
from fedfms.data.content import EXTENSIONS, is_plain_file, opened, walk
from fedfms.data.manifest import glob_expression, name_wildcards
from fedfms.data.pairs import WILDCARD
from fedfms.errors import SiteDataError

_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_ENDINGS = (*(ending for of in EXTENSIONS.values() for ending in of), *_DICOM_ENDINGS)
_TOLD_EVERY = 500  # files


@dataclass(frozen=True, slots=True)
class Tree:
    """The plain files below a folder, each as a path relative to it."""

    root: Path
    nifti: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    npy: tuple[str, ...] = ()
    dicom: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def of(self, kind: ImageFormat) -> tuple[str, ...]:
        """Files of a format."""
        found: tuple[str, ...] = getattr(self, kind)
        return found


def look(root: Path, control: Control | None = None) -> Tree:
    """All plain files below a folder; what is none of a known ending is asked for DICOM's magic.

    Raises:
        SiteDataError: "unreadable-folder", or "no-data-root".
        TaskAborted: somebody asked to stop.
    """
    if not root.is_dir():
        raise SiteDataError(
            f"there is no folder {root}", "name the folder with your images", code="no-data-root"
        )
    control = control or Control()
    kinds: dict[str, list[str]] = defaultdict(list)
    count = 0
    for folder, folders, names in walk(root, links=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = folder / name
            if is_plain_file(path):
                kinds[_kind_of(path)].append(path.relative_to(root).as_posix())
            count += 1
            if count % _TOLD_EVERY == 0:
                control.report("look", count, count)
    return Tree(root, **{kind: tuple(paths) for kind, paths in kinds.items()})


def _kind_of(path: Path) -> str:
    name = path.name.lower()
    for kind, endings in EXTENSIONS.items():
        if name.endswith(endings):
            return kind
    # most files of an archive have the ending of DICOM, none, or a part of a UID as one
    ending = path.suffix[1:]
    if ending.isalnum() and not ending.isdigit() and not name.endswith(_DICOM_ENDINGS):
        return "others"
    try:
        with opened(path) as file:
            return "dicom" if file.read(132)[128:] == b"DICM" else "others"
    except (OSError, SiteDataError):
        return "others"


# ------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True, slots=True)
class Group:
    """Files that one glob takes.

    pattern: the glob, relative to the root.
    files: that it takes, relative to the root; but for those of another group with a longer name.
    role: by the names; None where they do not say.
    part: of a split, by the names of folders: train, validation, test.
    """

    pattern: str
    files: tuple[str, ...]
    role: Role | None
    contrast: str | None = None
    part: Literal["train", "validation", "test"] | None = None
    variants: tuple[str, ...] = field(default=())  # other globs that take the same files

    @property
    def name(self) -> str:
        """The last part of the pattern, without its ending."""
        return glob_stem_and_ending(self.pattern.rpartition("/")[2])[0]


def groups_of(files: Sequence[str], *, by_folder: bool = False, kinds: bool = True) -> list[Group]:
    """The groups of files, the largest first.

    Args:
        files: relative to the root.
        by_folder: the files of each folder are groups of their own, whatever folders are called.
        kinds: what is called alike in most folders is a group of its own; else */LCC.dcm and
            */RCC.dcm are one.
    """
    common = _common_folders(files)
    by_place: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in files:
        *folders, name = file.split("/")
        _, ending = stem_and_ending(name)
        parts = tuple(
            glob_literal(part) if by_folder or depth < common else _folder_signature(part)
            for depth, part in enumerate(folders)
        )
        by_place[(*parts, _ending_glob(ending))].append(file)
    groups = []
    added = _added(files)
    for place, together in by_place.items():
        for pattern, taken in _by_name(together, place[:-1], added, kinds).items():
            groups.append(_group(place, pattern, taken, common))
    return sorted(groups, key=lambda group: (-len(group.files), group.pattern))


def stem_and_ending(name: str) -> tuple[str, str]:
    """A name without the ending of its format, and the ending; the latter empty if unknown."""
    lower = name.lower()
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if lower.endswith(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return name, ""


def glob_stem_and_ending(name: str) -> tuple[str, str]:
    """As `stem_and_ending`, of a glob whose ending may hold wildcards, as in *.nii*."""
    for dot in re.finditer(r"\.", name):
        stem, tail = name[: dot.start()], name[dot.start() :]
        if any(tail.lower() == one or fnmatch.fnmatchcase(one, tail) for one in _ENDINGS):
            return stem, tail
    return name, ""


def _ending_glob(ending: str) -> str:
    return ending


def _common_folders(files: Iterable[str]) -> int:
    """How many of the outermost folders all files share."""
    every = [file.split("/")[:-1] for file in files]
    count = 0
    for parts in zip(*every, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def _folder_signature(name: str) -> str:
    """As a glob; a folder that names a role, a contrast or a part of a split keeps its name."""
    pattern = known_ends(name)
    if pattern == "*" and (role_of(name) or part_of(name)):
        return glob_literal(name)
    if part_of(name):
        return glob_literal(name)
    return pattern


def _added(files: Sequence[str]) -> dict[str, str]:
    """Of files called as another one of their folder with words behind (a_1stHO), these words.

    They count where at least half of the others have such a file.
    """
    stems: dict[str, set[str]] = defaultdict(set)
    for file in files:
        folder, _, name = file.rpartition("/")
        stems[folder].add(stem_and_ending(name)[0])
    found: dict[str, str] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        stem = stem_and_ending(name)[0]
        for mark in reversed([*re.finditer(r"[-_ .]+", stem)]):
            if stem[: mark.start()] in stems[folder]:
                if re.search(r"[^\W\d_]", stem[mark.start() :]):
                    found[file] = stem[mark.start() :]
                break
    counts = Counter(found.values())
    others = sum(map(len, stems.values())) - len(found)
    return {file: words for file, words in found.items() if counts[words] * 2 >= others}


def _by_name(
    files: Sequence[str], place: Sequence[str], added: Mapping[str, str], by_kind: bool
) -> dict[str, list[str]]:
    """Files of one place by the glob of their names.

    Where each case has a folder, what is called alike in at least half of the folders is a kind of
    its own; numbers that differ count as alike.
    """
    found: dict[str, list[str]] = defaultdict(list)
    folders = {file.rpartition("/")[0] for file in files}
    rest = list(files)
    if by_kind and any("*" in part for part in place) and len(folders) > 1:
        kinds: dict[str, list[str]] = defaultdict(list)
        for file in files:
            kinds[_kind(file, place)].append(file)
        rest = []
        for kind, alike in kinds.items():
            where = {file.rpartition("/")[0] for file in alike}
            if len(where) * 2 >= len(folders):
                found[_with_numbers(kind, alike, place)] += alike
            else:
                rest += alike
    for file in rest:
        if file in added:
            found[f"*{glob_literal(added[file])}"].append(file)
        else:
            found[known_ends(stem_and_ending(file.rpartition("/")[2])[0])].append(file)
    return found


_NUMBER = "\0"  # stands for a run of digits


def _kind(file: str, place: Sequence[str]) -> str:
    """A stem as a glob: a * for what the folders of its case are called, \\0 for numbers."""
    *folders, name = file.split("/")
    stem = stem_and_ending(name)[0]
    own = [
        part for part, sign in zip(folders, place, strict=False) if "*" in sign and len(part) > 1
    ]
    text = stem
    for part in sorted(own, key=len, reverse=True):
        text = text.replace(part, "\1")
    pieces = []
    end = 0
    for _, start, stop, is_known in known_words(text):
        pieces.append(text[end:start])
        run = text[start:stop]
        pieces.append(run if is_known else re.sub(r"\d+", _NUMBER, run))
        end = stop
    pieces.append(text[end:])
    return glob_literal("".join(pieces)).replace("\1", "*")


def _with_numbers(kind: str, files: Sequence[str], place: Sequence[str]) -> str:
    """The glob of a kind: numbers stay where they are the same in all its files."""
    if _NUMBER not in kind:
        return collapsed(kind)
    expression = re.compile(
        "".join(
            r"(\d+)"
            if piece == _NUMBER
            else ".*"
            if piece == "*"
            else "."
            if piece == "?"
            else re.escape(piece)
            for piece in re.split(r"([\0*?])", kind)
        )
    )
    rows = []
    for file in files:
        found = expression.fullmatch(stem_and_ending(file.rpartition("/")[2])[0])
        rows.append(found.groups() if found else ())
    if not all(rows):
        return collapsed(kind.replace(_NUMBER, "*"))
    columns = list(zip(*rows, strict=True))
    is_fixed = len(rows) > 1 and all(len(set(column)) == 1 for column in columns)
    for column in columns:  # of a date or a number that varies nothing stays
        kind = kind.replace(_NUMBER, column[0] if is_fixed else "*", 1)
    return collapsed(kind)


def _group(place: tuple[str, ...], pattern: str, files: Sequence[str], common: int) -> Group:
    *folders, ending = place
    names = [file.split("/")[:-1] for file in files]
    parts = []
    for depth, sign in enumerate(folders):
        there = {parts_of[depth] for parts_of in names}
        parts.append(glob_literal(next(iter(there))) if len(there) == 1 else sign)
    own = folders[common:]
    said = [role for role in map(role_of, own) if role]
    role = role_of(pattern.replace("*", " "))
    if role != "label" and said:  # labels/img001 is a label
        role = said[-1]
    contrast = contrast_of(pattern.replace("*", " "))
    if contrast is None:
        contrast = next((c for c in map(contrast_of, reversed(own)) if c), None)
    part = next((found for found in map(part_of, own) if found), None)
    whole = "/".join([*parts, pattern + ending])
    return Group(
        whole,
        tuple(files),
        role,
        contrast,
        part,  # type: ignore[arg-type]
        tuple(variants_of(whole, files)),
    )


def variants_of(pattern: str, files: Sequence[str]) -> list[str]:
    """Other globs of the same files: what all their names begin and end with stays."""
    folder, _, name = pattern.rpartition("/")
    stem, ending = stem_and_ending(name)
    if "*" not in stem:
        return []
    stems = sorted({stem_and_ending(file.rpartition("/")[2])[0] for file in files})
    if len(stems) < 2:
        return []
    start = _common_start(stems)
    end = _common_start([one[len(start) :][::-1] for one in stems])[::-1]
    # half of a number is no common part
    start = (
        re.sub(r"\d+$", "", start) if any(s[len(start) :][:1].isdigit() for s in stems) else start
    )
    ends_in = [one[len(start) : len(one) - len(end)] for one in stems]
    end = re.sub(r"^\d+", "", end) if any(middle[-1:].isdigit() for middle in ends_in) else end
    if not start and not end:
        return []
    other = glob_literal(start) + "*" + glob_literal(end)
    return [] if other == stem else [f"{folder}/{other}{ending}" if folder else other + ending]


def _common_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)
    count = 0
    while count < min(len(low), len(high)) and low[count] == high[count]:
        count += 1
    return low[:count]


def with_all_endings(groups: Sequence[Group]) -> list[tuple[Group, tuple[Group, ...]]]:
    """Groups that differ in the ending alone (.png and .PNG, .nii and .nii.gz) as one, and their
    parts.

    None has a file that another one has under its own ending: those are a picture and its label.
    """
    found: list[tuple[Group, tuple[Group, ...]]] = []
    left = sorted(groups, key=lambda group: -len(group.files))
    while left:
        first, *left = left
        folder, stem, ending = _in_three(first)
        inside = glob_expression(folder)
        parts = [first]
        stems = {stem_and_ending(file)[0] for file in first.files}
        for other in left:
            of_other = {stem_and_ending(file)[0] for file in other.files}
            if (
                _in_three(other)[1] == stem
                and _in_three(other)[2] != ending
                and all(inside.fullmatch(file.rpartition("/")[0]) for file in other.files)
                and not stems & of_other
            ):
                parts.append(other)
                stems |= of_other
        if len(parts) < 2:
            continue
        left = [group for group in left if group not in parts]
        files = tuple(sorted(file for part in parts for file in part.files))
        name = stem + endings_glob({_in_three(part)[2] for part in parts})
        whole = f"{folder}/{name}" if folder else name
        variants = tuple(
            one.removesuffix(ending) + name[len(stem) :]
            for one in variants_of(first.pattern, files)
        )
        merged = replace(first, pattern=whole, files=files, variants=variants)
        found.append((merged, tuple(parts)))
    return found


def _in_three(group: Group) -> tuple[str, str, str]:
    """Of a group's glob the folder, the stem and the ending."""
    folder, _, name = group.pattern.rpartition("/")
    return folder, *glob_stem_and_ending(name)


def endings_glob(endings: set[str]) -> str:
    """A glob of several endings: .[Pp][Nn][Gg], .nii*, .jp*g."""
    if len(set(map(len, endings))) == 1:
        signs = [sorted(set(column)) for column in zip(*endings, strict=True)]
        return "".join(one[0] if len(one) == 1 else f"[{''.join(one)}]" for one in signs)
    start = _common_start(sorted(endings))
    end = _common_start([one[len(start) :][::-1] for one in sorted(endings)])[::-1]
    return f"{start}*{end}"


# ------------------------------------------------------------------------------------------- keys


def keys_of(pattern: str, files: Iterable[str], format: ImageFormat) -> dict[str, list[str]]:
    """Files by what the wildcards of a glob match, as pairing in site.yml has it."""
    return _keys(pattern, files, len(name_wildcards(pattern, format)))


def folder_keys_of(pattern: str, files: Iterable[str]) -> dict[str, list[str]]:
    """Files by what the wildcards of a glob's folders match."""
    return _keys(pattern, files, folder_wildcards(pattern))


def folder_wildcards(pattern: str) -> int:
    """How many wildcards the folders of a glob have."""
    return len(WILDCARD.findall(pattern.rpartition("/")[0] + "/"))


def _keys(pattern: str, files: Iterable[str], count: int) -> dict[str, list[str]]:
    expression = glob_expression(pattern)
    keys: dict[str, list[str]] = defaultdict(list)
    for file in files:
        found = expression.fullmatch(file)
        if found is None:
            continue
        end = len(file) - len(stem_and_ending(PurePosixPath(file).name)[1])
        spans = [found.span(number) for number in range(1, count + 1)]
        key = "/".join(file[start : min(stop, end)].strip("/") for start, stop in spans)
        keys[unicodedata.normalize("NFC", key)].append(file)
    return keys


def endings(files: Iterable[str]) -> Counter[str]:
    """How many files of each ending, in small letters."""
    found = (stem_and_ending(file)[1] or PurePosixPath(file).suffix for file in files)
    return Counter(
        "without ending" if ending[1:].isdigit() else ending.lower() or "without ending"
        for ending in found
    )
