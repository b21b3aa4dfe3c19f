"""INPUT and OUTPUT of `fedfms predict` to a list of images, each with the files it will give.

Nothing is read but names and, of DICOM, a header for each folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import ImageFormat
from fedfms.data.content import EXTENSIONS, JUNK, is_plain_file, may_enter
from fedfms.data.manifest import glob_expression
from fedfms.data.pairs import WILDCARD
from fedfms.errors import ConfigError

_DICOM_ENDING = ".dcm"
_DICOM_ENDINGS = {_DICOM_ENDING, ".dicom", ".ima"}  # of files that say that they are DICOM


@dataclass(frozen=True, slots=True)
class Item:
    """One image and where its masks go."""

    name: str  # below INPUT, as a person would call it
    source: Path  # a file, or the folder of a DICOM series; pictures in DICOM are files
    format: ImageFormat
    labels: Path | None  # the label map, None where classes may overlap; in DICOM the segmentation
    probabilities: tuple[Path, ...]  # one for each class, in DICOM one for all; may be empty
    separate: tuple[Path, ...]  # one mask for each class; may be empty
    # of a model of several contrasts its files in the recipe's order, None where one is missing;
    # source is the first of them
    contrasts: tuple[Path | None, ...] = ()

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All files that this image gives."""
        labels = () if self.labels is None else (self.labels,)
        return (*labels, *self.probabilities, *self.separate)


def find_items(
    source: Path,
    output: Path,
    recipe: Recipe,
    *,
    probabilities: bool = False,
    separate: bool = False,
    contrasts: Mapping[str, str] | None = None,
) -> list[Item]:
    """The images of INPUT in the order of their names.

    A folder is searched with all folders below it, but not in OUTPUT; hidden and linked folders are
    left out. A folder with DICOM slices is one image, a picture in DICOM is one by itself. One
    image goes to the file OUTPUT, if OUTPUT has the right ending; otherwise OUTPUT is a folder in
    which the names of INPUT are kept.

    Args:
        source: a NIfTI or NPY file, a picture, the folder of a DICOM series, a DICOM file that is
            an image by itself, or a folder of such.
        output: a file or folder; need not be there.
        recipe: of the model. Several classes that may overlap have no label map but a mask each,
            but in DICOM, whose segmentation keeps them apart.
        probabilities: a probability map for each class too.
        separate: a mask for each class too.
        contrasts: where the recipe names contrasts, the glob of each below INPUT, as in site.yml;
            None: names that end in _0000, _0001 … in the recipe's order, as of nnU-Net.

    Raises:
        ConfigError: "no-input", "nothing-to-predict", "outputs-collide", "output-is-input".
        SiteDataError: "unreadable-folder".
    """
    if not source.exists():
        raise ConfigError(f"there is no {source}", "check INPUT", code="no-input")
    found = list(_images(source, output))
    of_case: dict[Path, tuple[Path | None, ...]] = {}
    if recipe.contrasts:
        of_case = _cases(source, [path for path, _ in found], recipe, contrasts or {})
        found = [(path, kind) for path, kind in found if path in of_case]
    if not found and recipe.contrasts:
        raise ConfigError(
            f"{source} holds no case of {', '.join(recipe.contrasts)}",
            "give --site a site.yml with the globs of its contrasts, relative to INPUT, or name "
            "the files CASE_0000, CASE_0001 … in the order of the model's contrasts",
            code="nothing-to-predict",
        )
    if not found:
        raise ConfigError(
            f"{source} holds no NIfTI volume, picture, NPY array or DICOM series",
            "name a .nii or .nii.gz file, a PNG, JPEG, TIFF or NPY, the folder of a DICOM series, "
            "or a folder of such",
            code="nothing-to-predict",
        )
    classes = recipe.classes
    may_overlap = len(classes) > 1 and not recipe.exclusive_classes
    is_alone = len(found) == 1 and found[0][0] == source
    items = []
    for path, kind in found:
        name = source.name if path == source else path.relative_to(source).as_posix()
        stem, ending = _stem_and_ending(name, kind)
        if is_alone and output.name.lower().endswith(ending) and not output.is_dir():
            folder, stem = output.parent, output.name[: -len(ending)]
        else:
            folder = output
        has_map = kind == "dicom" or not may_overlap
        apart = classes if separate or not has_map else ()
        items.append(
            Item(
                name,
                path,
                kind,
                folder / f"{stem}{ending}" if has_map else None,
                _probability_files(folder, stem, kind, ending, classes) if probabilities else (),
                tuple(folder / f"{stem}_{name}{ending}" for name in apart),
                of_case.get(path, ()),
            )
        )
    _require_new_places(items)
    return items


def _cases(
    source: Path, files: Sequence[Path], recipe: Recipe, globs: Mapping[str, str]
) -> dict[Path, tuple[Path | None, ...]]:
    """By its first file a case's files of the recipe's contrasts, None where one is missing.

    Files are of one case where what the wildcards of the globs match is alike, or, where the globs
    have different ones, what those of the folders match.
    """
    wanted = (
        {name: globs.get(name) for name in recipe.contrasts}
        if globs
        else {name: f"**/*_{number:04d}.*" for number, name in enumerate(recipe.contrasts)}
    )
    known = [pattern for pattern in wanted.values() if pattern is not None]
    kinds: tuple[ImageFormat, ...] = ("nifti", "image", "npy")
    counts = {len(WILDCARD.findall(pattern)) for pattern in known}
    cases: dict[tuple[str, ...], dict[str, Path]] = {}
    for path in files:
        below = path.relative_to(source if source.is_dir() else source.parent).as_posix()
        for name, pattern in wanted.items():
            found = glob_expression(pattern).fullmatch(below) if pattern is not None else None
            if found is None or pattern is None:
                continue
            groups = found.groups()
            if not globs:
                groups = groups[:2]  # not what stands for the ending
            elif len(counts) > 1:
                groups = groups[: len(WILDCARD.findall(pattern.rpartition("/")[0] + "/"))]
            else:
                ending = next((e for k in kinds for e in EXTENSIONS[k] if below.endswith(e)), "")
                groups = tuple(group.removesuffix(ending) for group in groups)
            cases.setdefault(groups, {}).setdefault(name, path)
    return {
        next(iter(case[name] for name in recipe.contrasts if name in case)): tuple(
            case.get(name) for name in recipe.contrasts
        )
        for case in cases.values()
    }


def passed_over(source: Path, output: Path, items: Sequence[Item]) -> list[Path]:
    """Files of INPUT that are nothing that is read here, in the order of their names.

    What lies beside the slices of a series is not counted, nor hidden files and OUTPUT.
    """
    if source.is_file():
        return []
    series = {
        path
        for item in items
        if item.format == "dicom"
        for path in (item.source, *item.contrasts)
        if path is not None
    }
    found: list[Path] = []
    for folder, names in _folders(source, output, closed=[]):
        if folder not in series:
            found.extend(folder / name for name in names if _is_other_file(folder / name))
    return sorted(path for path in found if path not in series)


def _images(source: Path, output: Path) -> Iterator[tuple[Path, ImageFormat]]:
    if source.is_file():
        kind = _kind(source)
        if kind is None and _is_dicom(source):
            if not _images_alone(source):
                raise ConfigError(
                    f"{source} is one slice in DICOM",
                    "name the folder of its series",
                    code="nothing-to-predict",
                )
            kind = "dicom"
        if kind is not None:
            yield source, kind
        return
    closed: list[Path] = []
    for folder, names in _folders(source, output, closed):
        files = sorted(folder / name for name in names if is_plain_file(folder / name))
        kinds = [_kind(path) for path in files]
        if None in kinds and _holds_images(folder):
            for path in _images_alone(folder) or [folder]:
                yield path, "dicom"
        for path, kind in zip(files, kinds, strict=True):
            if kind is not None:
                yield path, kind
    for folder in closed:  # as an image whose reader says why not
        yield folder, "dicom"


def _folders(source: Path, output: Path, closed: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """The folders of INPUT with the names of their files; what cannot be read goes to `closed`."""
    outside = output.resolve()
    for place, subfolders, names in os.walk(
        source, onerror=lambda error: closed.append(Path(error.filename))
    ):
        folder = Path(place)
        if not may_enter(folder):
            closed.append(folder)
            subfolders.clear()
            continue
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and name.lower() not in JUNK
            and (folder / name).resolve() != outside
        )
        yield folder, names


def _kind(path: Path) -> ImageFormat | None:
    name = path.name.lower()
    kinds: tuple[ImageFormat, ...] = ("nifti", "image", "npy")
    return next((kind for kind in kinds if name.endswith(EXTENSIONS[kind])), None)


def _is_dicom(path: Path) -> bool:
    """Whether a file is one by its first bytes, or may be one and cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return True


def _holds_images(folder: Path) -> bool:
    """Whether to read a folder as a series; also where its reader will say what is wrong."""
    files = [path for path in folder.iterdir() if _is_other_file(path)]
    dicom = [path for path in files if _is_dicom(path)]
    only_named_so = {path.suffix.lower() for path in files if path not in dicom} & _DICOM_ENDINGS
    if only_named_so or not dicom:
        return bool(only_named_so)  # before pydicom is imported
    from fedfms.data.dicom.series import holds_images

    return holds_images(folder)


def _images_alone(path: Path) -> list[Path]:
    """The DICOM files of a folder where each is an image by itself, or such a file; else none."""
    from fedfms.data.dicom.series import images_alone  # pydicom takes a second to import

    return images_alone(path)


def _is_other_file(path: Path) -> bool:
    return is_plain_file(path) and path.is_file() and _kind(path) is None


def _stem_and_ending(name: str, kind: ImageFormat) -> tuple[str, str]:
    """Of the label map: NIfTI and NPY stay so, pictures become PNG, a series one DICOM file."""
    if kind == "dicom":
        file = next((e for e in _DICOM_ENDINGS if name.lower().endswith(e)), "")
        return name[: len(name) - len(file)], _DICOM_ENDING
    endings = sorted(EXTENSIONS[kind], key=len, reverse=True)
    ending = next(ending for ending in endings if name.lower().endswith(ending))
    stem = name[: -len(ending)]
    return stem, ".png" if kind == "image" else ending


def _probability_files(
    folder: Path, stem: str, kind: ImageFormat, ending: str, classes: Sequence[str]
) -> tuple[Path, ...]:
    if kind == "dicom":
        return (folder / f"{stem}_probabilities{ending}",)
    ending = ".tif" if kind == "image" else ending
    return tuple(folder / f"{stem}_probability_{name}{ending}" for name in classes)


def _require_new_places(items: Sequence[Item]) -> None:
    """No two images write one file, and none writes what was given."""
    sources = {
        path.resolve(): item
        for item in items
        for path in (item.source, *item.contrasts)
        if path is not None
    }
    owners: dict[Path, Item] = {}
    for item in items:
        for path in item.outputs:
            place = path.resolve()
            other = owners.setdefault(place, item)
            if other is not item:
                raise ConfigError(
                    f"{other.name} and {item.name} would both be written to {path}",
                    "give one of them another name, or predict them into two folders",
                    code="outputs-collide",
                )
            lies_in = sources.get(place.parent)
            if place in sources or (lies_in is not None and lies_in.format == "dicom"):
                raise ConfigError(
                    f"the mask of {item.name} would be written to {path}, over or among the images",
                    "name another OUTPUT; images are never changed",
                    code="output-is-input",
                )
