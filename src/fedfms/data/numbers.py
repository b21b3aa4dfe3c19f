"""What was read of a site in numbers: of each case, of all together, and as lines for a person.

A wrong mask, a forgotten half of the files or another unit is seen here at a glance where no rule
could call it an error. The numbers are for the person at the site and stay there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.formats import Stored
from fedfms.data.manifest import Case
from fedfms.data.memory import (
    READING_BYTES,
    READING_BYTES_OF_8_BIT_COLOURS,
    READING_BYTES_OF_COLOURS,
    DiskNeed,
    MemoryNeed,
    allowed_bytes,
)
from fedfms.data.slices import are_kept, bytes_of_slice

_SAMPLES = 8192  # pixels of a case that say how far its values spread, and whether it has colours
_MANY_VALUES = 1024  # for which a count of every possible value in every slice would be large
_SLICES_LOOKED_AT = 8  # of a case, for the size of objects: to look at all would take longer


@dataclass(frozen=True, slots=True)
class MaskGrid:
    """The grid on which a job learns masks.

    image_size: pixels a side of the network's input.
    mask_size: pixels a side of its mask.
    stretch: both sides of a picture cover all of it; else the longer one does.
    """

    image_size: int = 1024  # SAM's own, for a job that is not known
    mask_size: int = 256
    stretch: bool = False

    @classmethod
    def of(cls, recipe: Recipe | None) -> MaskGrid:
        """A recipe's grid; SAM's own without one."""
        if recipe is None:
            return cls()
        return cls(recipe.image_size, recipe.mask_size, recipe.resize == "stretch")

    def mask_pixel(
        self, size: tuple[int, int], spacing: tuple[float, float]
    ) -> tuple[float, float]:
        """Rows and columns of a picture of this size that one mask pixel covers."""
        if self.stretch:
            return size[0] / self.mask_size, size[1] / self.mask_size
        side = max(size[0] * spacing[0], size[1] * spacing[1]) / self.mask_size
        return side / spacing[0], side / spacing[1]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn of one class in one case.

    pixels: (D,) of each slice.
    objects: outlines looked at, in up to 8 slices of the case; none where a mask pixel covers no
        more than a pixel of the picture.
    too_small: those of them that are smaller than one mask pixel.
    on_border: share of the pixels at the edge of the picture, [0, 1], in the slices that have it.
    """

    pixels: NDArray[np.int64]
    objects: int
    too_small: int
    on_border: float


@dataclass(frozen=True, slots=True)
class CaseNumbers:
    """One case in numbers.

    shape: slices, rows and columns.
    spacing: between slices, rows and columns; mm for volumes with a geometry, else 1.
    finest: coarser side of a pixel in the plane where it is finest, mm, and that plane's name; None
        without a geometry, and for a single slice, which is cut as it was taken.
    stored: smallest and largest value of the image as stored.
    spread: between the 1st and the 99th percentile of the stored values.
    values: label values that occur.
    is_colourless: of an image with three channels: they are equal wherever looked at.
    present: of contrasts, which of them there are; None where there are none.
    """

    case: Case
    shape: tuple[int, int, int]
    channels: int
    is_volume: bool
    spacing: tuple[float, float, float]
    finest: tuple[float, str] | None
    stored: tuple[float, float]
    spread: float
    values: tuple[int, ...]
    drawn: Mapping[str, Drawn]  # class -> what is drawn of it
    kinds: tuple[str, str]  # of image and label; "" where the reader gives none
    is_colourless: bool
    present: tuple[bool, ...] | None = None

    def share(self, name: str) -> float:
        """Mean share of a class in the slices that have it, [0, 1]; 0 where none has."""
        pixels = self.drawn[name].pixels
        has = pixels[pixels > 0]
        return float(has.mean() / (self.shape[1] * self.shape[2])) if has.size else 0.0


def numbers_of(
    case: Case, image: Stored, label: Stored, site: SiteConfig, grid: MaskGrid
) -> CaseNumbers:
    """The numbers of a case whose image and label were read and fit together."""
    values = image.values
    channels = values.shape[3] if values.ndim == 4 else 1
    pixels_of = values.reshape(-1, channels)
    sample = pixels_of[:: max(1, len(pixels_of) // _SAMPLES)]
    low, high = np.percentile(sample, (1, 99))
    occurring, counts = _count(label.values)
    rows, columns = grid.mask_pixel(label.values.shape[1:], image.spacing[1:])
    drawn = {}
    for name, wanted in site.classes.items():
        pixels = counts[:, np.isin(occurring, wanted)].sum(axis=1)
        has = np.flatnonzero(pixels)
        drawn[name] = Drawn(
            pixels,
            *_objects(label.values, has, wanted, rows * columns),
            _on_border(label.values, has, wanted),
        )
    return CaseNumbers(
        case=case,
        shape=label.values.shape,
        channels=channels,
        is_volume=image.is_volume,
        spacing=image.spacing,
        finest=_finest(image),
        stored=(float(values.min()), float(values.max())),
        spread=float(high - low),
        values=tuple(map(int, occurring)),
        drawn=drawn,
        present=image.present,
        kinds=(image.kind, label.kind),
        is_colourless=channels == 3
        and image.present is None
        and bool((sample[:, :1] == sample).all()),
    )


def _count(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values (V,) that occur in labels (D, H, W), and how many pixels (D, V) have each."""
    first = int(labels.min())
    occurring = np.arange(first, int(labels.max()) + 1)
    if len(occurring) > _MANY_VALUES:  # most likely no label but a grey picture
        occurring, numbered = np.unique(labels, return_inverse=True)
        first, labels = 0, numbered.reshape(labels.shape)
    counts = np.array(
        [
            np.bincount(picture.ravel().astype(np.intp) - first, minlength=len(occurring))
            for picture in labels
        ]
    )
    has = np.flatnonzero(counts.any(axis=0))
    return occurring[has], counts[:, has]


def _objects(
    labels: NDArray[np.int16], has: NDArray[np.intp], wanted: Sequence[int], mask_pixel: float
) -> tuple[int, int]:
    """Outlines of a class in up to 8 of the slices that have it, and those below a mask pixel."""
    if mask_pixel <= 1:
        return 0, 0
    some = has[np.linspace(0, len(has) - 1, min(len(has), _SLICES_LOOKED_AT)).astype(int)]
    objects = small = 0
    for index in some:
        outlines, count = ndimage.label(np.isin(labels[index], wanted))
        objects += count
        small += int((np.bincount(outlines.ravel())[1:] < mask_pixel).sum())
    return objects, small


def _on_border(labels: NDArray[np.int16], has: NDArray[np.intp], wanted: Sequence[int]) -> float:
    if not has.size:
        return 0.0
    edges = [labels[has, 0], labels[has, -1], labels[has, :, 0], labels[has, :, -1]]
    return float(np.isin(np.concatenate([edge.ravel() for edge in edges]), wanted).mean())


def _finest(image: Stored) -> tuple[float, str] | None:
    if image.cut is None or 1 in image.cut.shape:
        return None
    x, y, z = np.linalg.norm(image.cut.affine[:3, :3], axis=0)
    planes = {"axial": (x, y), "coronal": (x, z), "sagittal": (y, z)}
    name = min(planes, key=lambda plane: max(planes[plane]))
    return float(max(planes[name])), name


# ------------------------------------------------------------------------------------- together


@dataclass(frozen=True, slots=True)
class Split:
    """A number on each side of the split."""

    train: int
    validation: int

    @property
    def total(self) -> int:
        """Both sides."""
        return self.train + self.validation


@dataclass(frozen=True, slots=True)
class ClassNumbers:
    """One class over all cases that were read.

    slices: that have it.
    share: least, mean and most of it in a slice that has it, [0, 1]; None where none has.
    """

    cases: Split
    slices: int
    share: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class DataSummary:
    """A site's data in numbers; ranges are (smallest, largest), None where nothing was read.

    cases, patients: that the globs found, with image and label.
    read: cases that could be read; all that follows is of these.
    slices_of_a_case, rows, columns: pixels.
    voxel: mm between slices, rows and columns of the chosen plane; None without a geometry.
    stored_values: of the images, before any intensity rule.
    image_kinds, label_kinds: what the files were, and how many.
    not_taken: ending, such as .PNG -> files in the same folders that no glob takes.
    below: files of the format in folders right below those, into which no glob looks.
    memory: what the data needs in the trainer.
    disk: what the trainer keeps of it.
    contrasts: name -> cases that have it; empty where a case has one image.
    unlabelled: images without a label, which are no cases by site.yml.
    left_for_test: cases that the site's own lists leave for a test.
    """

    cases: Split
    patients: Split
    read: int
    is_volumes: bool
    slices: Split
    slices_of_a_case: tuple[int, int] | None
    rows: tuple[int, int] | None
    columns: tuple[int, int] | None
    voxel: tuple[tuple[float, float], tuple[float, float], tuple[float, float]] | None
    stored_values: tuple[float, float] | None
    label_values: tuple[int, ...]
    classes: Mapping[str, ClassNumbers]
    image_kinds: Mapping[str, int]
    label_kinds: Mapping[str, int]
    not_taken: Mapping[str, int]
    below: int
    memory: MemoryNeed
    disk: DiskNeed
    contrasts: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    left_for_test: int = 0

    def as_json(self) -> dict[str, Any]:
        """The same as JSON types; memory and disk in bytes."""
        return asdict(self)

    def line(self) -> str:
        """The most telling of it, without the name of a file or of a patient."""
        cases = count_of(self.cases.total, "case")
        if self.read < self.cases.total:
            cases = f"{self.read} of {cases} could be read"
        parts = [
            f"{cases}; {count_of(self.patients.total, 'patient')}, {self.patients.train} to train "
            f"and {self.patients.validation} to validate",
            count_of(self.slices.total, "slice"),
        ]
        for name, numbers in self.classes.items():
            share = f" ({percent(numbers.share[1])} of a slice)" if numbers.share else ""
            parts.append(f"{name} in {count_of(numbers.cases.total, 'case')}{share}")
        return "; ".join(parts)

    def rows_for_print(self) -> list[tuple[str, str]]:
        """Name and text of each line of the table, but for the classes."""
        lines = [("cases", "none")]
        if self.cases.total:
            lines = [("cases", _split(self.cases)), ("patients", _split(self.patients))]
        if self.read < self.cases.total:
            rest = "; the lines below are of these" if self.read else ""
            lines.append(("read", f"{self.read} of the cases{rest}"))
        if self.read:
            lines += self._of_pictures()
        if self.contrasts:
            some = [
                f"{name} in {count_of(count, 'case')}" for name, count in self.contrasts.items()
            ]
            lines.append(("contrasts", ", ".join(some)))
        if self.left_for_test:
            lines.append(("for a test", f"{count_of(self.left_for_test, 'case')}, by split"))
        if self.unlabelled:
            lines.append(
                ("unlabelled", f"{count_of(self.unlabelled, 'image')}, which are no cases")
            )
        for name, kinds in (("images", self.image_kinds), ("labels", self.label_kinds)):
            known = [f"{count} {kind}" for kind, count in kinds.items() if kind]
            if known:
                lines.append((name, "; ".join(known)))
        if self.not_taken:
            some = [f"{count} {ending}" for ending, count in self.not_taken.items()]
            lines.append(("not taken", f"{', '.join(some)} in the same folders, by no glob"))
        if self.below:
            lines.append(
                ("not looked at", f"{count_of(self.below, 'file')} in folders below, by no glob")
            )
        if self.read:
            lines.append(("memory", self.memory.text()))
            lines.append(("disk", self.disk.text()))
        return lines

    def _of_pictures(self) -> list[tuple[str, str]]:
        assert self.rows and self.columns and self.slices_of_a_case and self.stored_values
        lines = [("size", f"{_range(self.rows)} rows x {_range(self.columns)} columns")]
        if self.is_volumes:
            slices = f"{_split(self.slices)}; {_range(self.slices_of_a_case)} a volume"
            lines.insert(0, ("slices", slices))
        if self.voxel is not None:
            apart, rows, columns = map(_range, self.voxel)
            lines.append(("voxels", f"{rows} x {columns} mm (rows x columns), {apart} mm apart"))
        values = ", ".join(map(str, self.label_values[:12]))
        if len(self.label_values) > 12:
            values = f"{len(self.label_values)}, from {_range(_ends(self.label_values))}"
        return [
            *lines,
            ("stored values", _range(self.stored_values)),
            ("label values", values),
        ]


def summarize_numbers(
    cases: Sequence[Case],
    read: Sequence[CaseNumbers],
    site: SiteConfig,
    not_taken: Mapping[str, int],
    below: int,
    disk: DiskNeed,
    *,
    unlabelled: int = 0,
    left_for_test: int = 0,
) -> DataSummary:
    """All cases of a site together.

    Args:
        cases: that the globs found.
        read: numbers of those that could be read.
        site: the site's configuration.
        not_taken, below, unlabelled, left_for_test: see `DataSummary`.
        disk: what the trainer keeps of them.
    """
    patients = {case.patient: case for case in cases}  # a patient is on one side
    shapes = [numbers.shape for numbers in read]
    with_geometry = [numbers.spacing for numbers in read] if site.distance_unit == "mm" else []
    return DataSummary(
        cases=_split_of(cases),
        patients=_split_of(patients.values()),
        read=len(read),
        is_volumes=any(numbers.is_volume for numbers in read),
        slices=Split(
            *(
                sum(n.shape[0] for n in read if n.case.split == side)
                for side in ("train", "validation")
            )
        ),
        slices_of_a_case=_ends(shape[0] for shape in shapes),
        rows=_ends(shape[1] for shape in shapes),
        columns=_ends(shape[2] for shape in shapes),
        voxel=tuple(_ends(sizes) for sizes in zip(*with_geometry, strict=True))
        if with_geometry
        else None,
        stored_values=_ends(value for numbers in read for value in numbers.stored),
        label_values=tuple(sorted({value for numbers in read for value in numbers.values})),
        classes={name: _of_class(name, read) for name in site.classes},
        image_kinds=dict(Counter(numbers.kinds[0] for numbers in read).most_common()),
        label_kinds=dict(Counter(numbers.kinds[1] for numbers in read).most_common()),
        not_taken=dict(not_taken),
        below=below,
        memory=_memory_of(read),
        disk=disk,
        contrasts={
            name: sum(bool(n.present and n.present[number]) for n in read)
            for number, name in enumerate(site.contrasts)
        },
        unlabelled=unlabelled,
        left_for_test=left_for_test,
    )


def _of_class(name: str, read: Sequence[CaseNumbers]) -> ClassNumbers:
    having = [numbers for numbers in read if numbers.drawn[name].pixels.any()]
    shares = [
        numbers.drawn[name].pixels / (numbers.shape[1] * numbers.shape[2]) for numbers in having
    ]
    share = np.concatenate([shares_of[shares_of > 0] for shares_of in shares]) if having else None
    return ClassNumbers(
        cases=_split_of(numbers.case for numbers in having),
        slices=0 if share is None else len(share),
        share=None
        if share is None
        else (float(share.min()), float(share.mean()), float(share.max())),
    )


def _split_of(cases: Iterable[Case]) -> Split:
    sides = Counter(case.split for case in cases)
    return Split(sides["train"], sides["validation"])


def _ends(values: Iterable[Any]) -> Any:
    found = list(values)
    return (min(found), max(found)) if found else None


# ------------------------------------------------------------------------------- memory and disk


def _memory_of(read: Sequence[CaseNumbers]) -> MemoryNeed:
    """What the trainer needs while it reads these cases, all cases of the site, one by one."""
    reading = [int(np.prod(n.shape)) * _bytes_to_read(n) for n in read]
    return MemoryNeed(reading=max(reading, default=0), allowed=allowed_bytes())


def _bytes_to_read(numbers: CaseNumbers) -> int:
    """For each pixel of a case while it is read; of each further contrast a float and a level."""
    if numbers.present is not None:
        return READING_BYTES + 5 * (numbers.channels - 1)
    if numbers.channels != 3:
        return READING_BYTES
    of_8_bits = numbers.kinds[0].endswith(", 8 bit")
    return READING_BYTES_OF_8_BIT_COLOURS if of_8_bits else READING_BYTES_OF_COLOURS


def disk_of(
    read: Sequence[CaseNumbers], site: SiteConfig, grid: MaskGrid, classes: Sequence[str]
) -> DiskNeed:
    """What the trainer keeps of these cases on its disk (data/cache.py, data/slices.py).

    Args:
        read: all cases of the site.
        site: the site's configuration.
        grid: on which the job learns.
        classes: of the job.
    """
    cases = 0
    for numbers in read:
        fits_a_byte = 0 <= min(numbers.values) <= max(numbers.values) <= 255
        cases += int(np.prod(numbers.shape)) * (numbers.channels + (1 if fits_a_byte else 2))
    training = [n for n in read if n.case.split == "train"]
    return DiskNeed(cases=cases, slices=_kept_slices(training, site, grid, classes))


def _kept_slices(
    training: Sequence[CaseNumbers], site: SiteConfig, grid: MaskGrid, classes: Sequence[str]
) -> int:
    channels = len(site.contrasts) or (1 if site.channels == "gray" else 3)
    every = site.keep_empty_every
    slices = empty = 0
    for numbers in training:
        drawn = [numbers.drawn[name].pixels for name in classes if name in numbers.drawn]
        filled = int(np.any(drawn, axis=0).sum()) if drawn else 0
        before, empty = empty, empty + numbers.shape[0] - filled
        slices += filled + (-(-empty // every) + -before // every if every else 0)
    size = sum(
        bytes_of_slice(channels, len(classes) + bool(site.void), grid.image_size, grid.mask_size)
    )
    return slices * size if are_kept(slices, size) else 0


# ----------------------------------------------------------------------------------------- words


def percent(share: float) -> str:
    """A share as a person reads it: 6.2 %; what is not nothing is never 0 %, nor 100 %."""
    value = 100 * share
    if share in (0, 1):
        return f"{value:.0f} %"
    if value < 0.01:
        return "<0.01 %"
    if value >= 99.95:
        return "99.9 %"
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def count_of(number: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _split(split: Split) -> str:
    return f"{split.total}: {split.train} to train, {split.validation} to validate"


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for value in ends)
    return low if low == high else f"{low} to {high}"
