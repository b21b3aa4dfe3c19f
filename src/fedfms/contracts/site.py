"""Where a site's data is and how it is read: `site.yml`."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedfms.bounded import number
from fedfms.contracts.decode import (
    AnyPath,
    from_dict,
    read_yaml,
    require,
    require_name,
    short,
)
from fedfms.contracts.recipe import MOST_CONTRASTS
from fedfms.errors import ConfigError, Undecodable

P = typing.TypeVar("P", "Folder", "Reading", "Labels", "Compute", "Setup")
ImageFormat = Literal["nifti", "dicom", "image", "npy"]

MOST_KEPT = 12  # classes that may overlap, each in files of its own
LEAVE_OUT = 0.05  # share of its cases without which a job goes on, where site.yml says nothing
_CONTROLS = ("Cc", "Zl", "Zp")  # categories of characters that no glob or expression means


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """How stored values become grey levels 0 to 255, over a whole case.

    percentile: `low` and `high` are percentiles (0 to 100) of the case's own values.
    window: `center` and `width`, as in computed tomography (Hounsfield units).
    range: `low` and `high` are stored values; for 8-bit pictures 0 and 255.
    """

    rule: Literal["percentile", "window", "range"] = "percentile"
    low: float | None = None  # percentile: 0.5 where not given; range: 0
    high: float | None = None  # percentile: 99.5; range: 255
    center: float | None = None
    width: float | None = None
    rounding: Literal["nearest", "truncate"] = "nearest"  # truncate: downwards, as FedFMS

    def __post_init__(self) -> None:
        used, other = ("low", "high"), ("center", "width")
        if self.rule == "window":
            used, other = other, used
        for name in other:
            require(
                getattr(self, name) is None,
                f"intensity rule {self.rule!r} has no {name}",
                f"remove {name}, or write the rule that it belongs to under intensity, "
                f"such as rule: {'range' if self.rule == 'window' else 'window'}",
            )
        for name in used:
            value = getattr(self, name)
            require(
                value is None or math.isfinite(value),
                f"intensity {name} is {value}",
                f"write a number for {name}",
            )
        if self.rule == "window":
            require(
                self.center is not None and self.width is not None and self.width > 0,
                "intensity rule 'window' needs center and width",
                "add for example center: 40 and width: 400 under intensity",
            )
            return
        low, high = self.bounds
        require(
            low < high,
            f"intensity low is {low} and high is {high}",
            "set low below high",
        )
        if self.rule == "percentile":
            require(
                low >= 0 and high <= 100,
                f"intensity percentiles are {low} and {high}",
                "use percentiles between 0 and 100",
            )

    @classmethod
    def from_text(cls, text: str) -> Intensity:
        """A rule and its two numbers as a command line gives them, such as window:40:400.

        Behind them may stand :truncate.
        """
        rule, *numbers = text.split(":")
        rounding = numbers.pop() if numbers[-1:] == ["truncate"] else "nearest"
        keys = ("center", "width") if rule == "window" else ("low", "high")
        try:
            values = [number(one, "the intensity") for one in numbers]
        except Undecodable:
            values = [math.nan]
        require(
            rule in ("percentile", "window", "range")
            and len(values) in (0, 2)
            and all(map(math.isfinite, values)),
            f"the intensity {text!r} cannot be read",
            "write percentile:0.5:99.5, window:CENTER:WIDTH or range:LOW:HIGH",
        )
        return from_dict(
            cls,
            {"rule": rule, **dict(zip(keys, values, strict=False)), "rounding": rounding},
            f"the intensity {text!r}",
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) with the defaults of the rule filled in; stored values, or percentiles."""
        if self.rule == "window":
            assert self.center is not None and self.width is not None  # __post_init__ checked it
            return self.center - self.width / 2, self.center + self.width / 2
        low, high = (0.5, 99.5) if self.rule == "percentile" else (0.0, 255.0)
        return (low if self.low is None else self.low, high if self.high is None else self.high)


def _refuse_controls(config: Any, keys: Sequence[str]) -> None:
    for key in keys:
        text = getattr(config, key) or ""
        require(
            not any(unicodedata.category(character) in _CONTROLS for character in text),
            f"{key} holds a control character: {text!r}",
            f"write {key} in single quotes, in which YAML takes a \\ as it is",
        )


def _require_glob(key: str, pattern: str) -> None:
    require(
        "*" in pattern and not pattern.startswith("/") and ".." not in Path(pattern).parts,
        f"{key} is {pattern!r}",
        "write a glob relative to data_root, with a * that stands for the case's name",
    )
    require(
        "[^" not in pattern,
        f"{key} is {pattern!r}, in which [^ is no sign of a glob",
        "write [!ab] for a letter that is not a or b; a ^ itself may stand behind another",
    )


def _require_at_least(config: Any, least: int, keys: Sequence[str]) -> None:
    for key in keys:
        value = getattr(config, key)
        require(
            value is None or value >= least, f"{key} is {value}", f"set {key} to {least} or more"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSplit:
    """A site's own lists of who validates and who is left for a test.

    A name is a patient, or a case as `fedfms check-data` calls it, or a glob of such; a file names
    each one plainly. A patient of whom one case is on a side is there as a whole. Where there is
    only a list for the test, validation_fraction deals the others.
    """

    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()  # neither trained nor scored
    # below data_root: .csv with the columns patient or case, and split or fold; or a .json as
    # nnU-Net's splits_final.json
    file: str | None = None
    fold: int | None = None  # of the file, which validates; from 0

    def __post_init__(self) -> None:
        require(
            (self.file is None) != (not self.validation and not self.test),
            "split names a file and lists too"
            if self.file is not None
            else "split has neither validation, test nor file",
            "write lists under validation and test, or the file that holds them under file",
        )
        require(
            self.fold is None or (self.file is not None and self.fold >= 0),
            f"split has the fold {self.fold}",
            "write the number of a fold of the file, from 0",
        )
        require(
            self.file is None
            or (
                self.file.lower().endswith((".csv", ".json"))
                and not self.file.startswith("/")
                and ".." not in Path(self.file).parts
            ),
            f"split has the file {self.file!r}",
            "name a .csv or .json below data_root, relative to it",
        )


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a site's cases are, which are alike, and which validate.

    Globs are relative to `data_root`; what their wildcards match must be alike for an image and its
    label, which is how the two are paired, unless `pair_by` says otherwise.
    """

    data_root: AnyPath  # the mounted folder; SITE_DATA in the environment goes before it
    format: ImageFormat
    images: str  # glob, such as images/*.nii.gz
    labels: str  # glob, such as labels/*.nii.gz
    # what is alike of an image and its label: what all wildcards match; what those of the folders
    # match; the patient; DICOM: the series that the label names. None: wildcards, but in DICOM the
    # reference where the two globs have different wildcards or are one
    pair_by: Literal["wildcards", "folder", "patient", "reference"] | None = None
    patient: str | None = None  # regular expression on the file name; group 1 is the patient
    # an image without a label: an error, or no case
    unlabelled: Literal["refuse", "pass_over"] = "refuse"
    split: OwnSplit | None = None  # None: by validation_fraction and validation_seed
    validation_fraction: float = 0.2  # of the patients
    validation_seed: int = 0
    # share of the cases that may be left out since they cannot be used; None: nothing for
    # check-data, LEAVE_OUT for a job
    leave_out: float | None = None
    # who said where data_root is, for errors; no key of the file
    data_root_named_by: str = field(default="data_root in site.yml", metadata={"in_file": False})

    def __post_init__(self) -> None:
        _refuse_controls(self, ("images", "labels", "patient"))
        for key in ("images", "labels"):
            _require_glob(key, getattr(self, key))
        require(
            self.images != self.labels
            or (self.format == "dicom" and self.pair_by in (None, "reference")),
            f"images and labels are the same glob, {self.images}",
            "point labels at the label files",
        )
        require(
            self.pair_by != "reference" or self.format == "dicom",
            f"pair_by is reference, and format: {self.format} has no references",
            "use pair_by: wildcards, folder or patient",
        )
        require(
            self.pair_by != "patient" or self.patient is not None or self.format == "dicom",
            "pair_by is patient, and there is no patient in it",
            "add patient: with a regular expression whose group 1 is the patient in the paths of "
            "images and labels",
        )
        require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction is {self.validation_fraction}",
            "set a number between 0 and 1, such as 0.2",
        )
        require(
            self.leave_out is None or 0.0 <= self.leave_out <= 0.5,
            f"leave_out is {self.leave_out}",
            "set a share of the cases from 0 to 0.5, such as 0.05, or 5 %",
        )
        _require_at_least(self, 0, ("validation_seed",))
        if self.patient is not None:
            try:
                groups = re.compile(self.patient).groups
            except re.error as error:
                raise ConfigError(
                    f"patient is no regular expression: {error}",
                    "write one with one group around the patient's part of the file name",
                ) from None
            require(
                groups == 1,
                f"patient has {groups} groups",
                "put exactly one pair of parentheses around the patient's part of the file name",
            )

    @property
    def leaves_out(self) -> float:
        """Share of the cases that a job may go on without."""
        return LEAVE_OUT if self.leave_out is None else self.leave_out


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the file of an image becomes slices of grey levels or colours."""

    format: ImageFormat
    series: str | None = None  # DICOM: regular expression on SeriesDescription, chooses in a folder
    # of the slices of a volume; stored (NIfTI): along the file's third axis, rows its first, as
    # FedFMS reads them, whatever the patient's position
    plane: Literal["axial", "coronal", "sagittal", "stored"] = "axial"
    channels: Literal["gray", "rgb", "neighbours"] = "gray"  # neighbours: slices i-1, i, i+1
    # name -> glob of images of it, which takes the place of `images`: several images of one case,
    # on one grid. A job takes those that its recipe names
    contrasts: dict[str, str] = field(default_factory=dict)
    # a contrast that a case lacks: an error; or black; or the mean of those that are there
    missing_contrast: Literal["refuse", "black", "mean"] = "refuse"
    intensity: Intensity = field(default_factory=Intensity)

    def __post_init__(self) -> None:
        _refuse_controls(self, ("series",))
        self._check_contrasts()
        require(
            self.plane != "stored" or self.format != "dicom",
            "plane is stored, and a DICOM series has no order of its own",
            "set plane: axial, coronal or sagittal",
        )
        if self.series is not None:
            try:
                re.compile(self.series)
            except re.error as error:
                raise ConfigError(
                    f"series is no regular expression: {error}",
                    "write a part of the SeriesDescription, such as series: t2_tse_tra",
                ) from None

    def _check_contrasts(self) -> None:
        for name, pattern in self.contrasts.items():
            require_name(name, "contrast")
            _require_glob(f"contrasts, {name}", pattern)
        twice = [p for p in self.contrasts.values() if list(self.contrasts.values()).count(p) > 1]
        require(
            not twice,
            f"two contrasts have the glob {twice[0] if twice else ''}",
            "write for each contrast a glob that takes its own images",
        )
        require(
            len(self.contrasts) <= MOST_CONTRASTS,
            f"there are {len(self.contrasts)} contrasts",
            f"name at most {MOST_CONTRASTS}",
        )
        require(
            not self.contrasts or self.channels == "gray",
            f"channels is {self.channels}, and contrasts names several images of a case",
            "leave channels out: each contrast is one grey channel",
        )
        require(
            bool(self.contrasts) or self.missing_contrast == "refuse",
            f"missing_contrast is {self.missing_contrast}, and there are no contrasts",
            "name the images of each contrast under contrasts, or leave missing_contrast out",
        )

    @property
    def distance_unit(self) -> Literal["mm", "px"]:
        """Unit of distances in this site's images; files without a voxel size count pixels."""
        return "mm" if self.format in ("nifti", "dicom") else "px"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the values of label files mean, and which slices without any of them train."""

    classes: dict[str, tuple[int, ...]]  # class name -> label values that mean it
    # class name -> glob of files in which it alone is drawn, all that is not 0; takes the place of
    # `labels` and, in site.yml, of `classes`, see `values_of_files`
    label_files: dict[str, str] = field(default_factory=dict)
    background: tuple[int, ...] = (0,)  # label values that mean none of the classes
    # DICOM: label value -> names of the segments or structures that get it; "*" is any other name.
    # None: the value is SegmentNumber or ROINumber.
    label_names: dict[int, tuple[str, ...]] | None = None
    # DICOM, label_files: what happens where segments of two label values, or two classes, meet;
    # highest: the larger value stands, of files the later one; keep (files): the pixel has both
    overlap: Literal["refuse", "highest", "keep"] = "refuse"
    # label values whose pixels teach nothing and are not scored; of label_files those in any file
    void: tuple[int, ...] = ()
    # class -> globs on the names of cases (what the wildcards match) in which nobody drew it
    not_annotated_in: dict[str, tuple[str, ...]] | None = None
    may_be_empty: bool = True  # a label file without any class is a case without a finding
    not_annotated: tuple[str, ...] = ()  # classes this site never drew: their loss is masked here
    keep_empty_every: int = 1  # training: every n-th slice without foreground; 1 all, 0 none

    def __post_init__(self) -> None:
        require(
            len(self.classes) > 0,
            "classes is empty",
            "map at least one class to its label values, for example nucleus: [255]",
        )
        self._check_files()
        for name, values in self.classes.items():
            require_name(name, "class")
            require(
                len(values) > 0,
                f"class {name} has no label values",
                f"give its values, as in {name}: [1], or list it under not_annotated",
            )
            outside = [value for value in values if not -32768 <= value <= 32767]
            require(
                not outside,
                f"class {name} has the label value {outside[0] if outside else ''}",
                "use label values from -32768 to 32767",
            )
        of_classes = {value for values in self.classes.values() for value in values}
        for value in self.background:
            require(
                value not in of_classes,
                f"label value {value} is background and class at once",
                "list each label value under classes or under background, not both",
            )
        # under label_files the values of `void` are those of the files, and those of classes none
        taken = {*self.background} if self.label_files else {*self.background, *of_classes}
        for value in self.void:
            require(
                value not in taken,
                f"label value {value} is void, and class or background at once",
                "list each label value in one of the three places",
            )
        for name, globs in (self.not_annotated_in or {}).items():
            require(
                name in self.classes,
                f"not_annotated_in names {name}, which is no class here",
                "list cases under a class that has label values; a class that nobody ever drew "
                "belongs under not_annotated",
            )
            require(
                len(globs) > 0,
                f"not_annotated_in names no case for {name}",
                "write names of cases or globs, such as ['p017*']",
            )
        for name in self.not_annotated:
            require(
                name not in self.classes,
                f"class {name} has label values and is listed as not annotated",
                "keep it in one of the two places",
            )
        _require_at_least(self, 0, ("keep_empty_every",))
        owner: dict[str, int] = {}  # of names of segments, which only DICOM has
        for value, names in (self.label_names or {}).items():
            require(
                value in of_classes or value in self.background or value in self.void,
                f"label_names gives the value {value}, which has no class",
                "list the value under its class, or under background",
            )
            for name in names:
                other = owner.setdefault(name.strip().casefold(), value)
                require(
                    other == value,
                    f"label_names gives {name!r} the values {other} and {value}",
                    "list each name once; capitals and small letters are alike",
                )

    @property
    def void_values(self) -> frozenset[int]:
        """`void` as it is in prepared labels: of label_files one value, beyond those of classes."""
        if not self.void or not self.label_files:
            return frozenset(self.void)
        return frozenset({1 + max(value for values in self.classes.values() for value in values)})

    def _check_files(self) -> None:
        for name, pattern in self.label_files.items():
            _require_glob(f"label_files, {name}", pattern)
        require(
            self.overlap != "keep" or bool(self.label_files),
            "overlap is keep, and there are no label_files",
            "set refuse or highest",
        )
        if not self.label_files:
            return
        require(
            self.overlap != "keep" or len(self.label_files) <= MOST_KEPT,
            f"overlap is keep, and label_files has {len(self.label_files)} classes",
            f"name at most {MOST_KEPT} of them, or set overlap: highest",
        )
        require(
            self.classes == values_of_files(self.label_files, self.overlap),
            "classes and label_files are both given",
            "leave classes out: label_files names the classes",
        )
        require(
            self.label_names is None and self.background == (0,),
            "label_files is given beside label_names or background",
            "leave them out: in a file of label_files 0 is background and all else its class",
        )


def values_of_files(names: Iterable[str], overlap: str) -> dict[str, tuple[int, ...]]:
    """The label values of classes that have a file each: 1, 2, 3 … in their order.

    Where classes may overlap (keep) the first has bit 0 of a value, the second bit 1 and so on, so
    that each value stands for a set of classes.
    """
    listed = list(names)
    if overlap != "keep":
        return {name: (number,) for number, name in enumerate(listed, start=1)}
    every = range(1, 2 ** min(len(listed), MOST_KEPT))
    return {
        name: tuple(value for value in every if value >> bit & 1) for bit, name in enumerate(listed)
    }


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a site computes on, and with how much of it."""

    cache: AnyPath | None = None  # folder for prepared slices; none: prepared anew at each start
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int | None = None  # CPU threads of torch; none: torch decides
    workers: int | None = None  # data loader processes; none: by device and CPUs
    # processes that train together, each on a GPU of its own; none: every GPU with device auto
    ranks: int | None = None
    # largest number of slices in memory at once; none: batch_size, but 1 above 512 pixels on a CPU.
    # The memory plan takes fewer where they do not fit
    micro_batch: int | None = None
    # GiB of the private folder for what an encoder's frozen part made of slices; 0: none is kept
    features_gib: int = 20
    stall_seconds: float = 3600.0  # without progress for so long, the trainer ends itself

    def __post_init__(self) -> None:
        _require_at_least(self, 0, ("workers", "features_gib"))
        _require_at_least(self, 1, ("threads", "ranks", "micro_batch"))
        require(
            self.stall_seconds > 0, f"stall_seconds is {self.stall_seconds}", "set seconds above 0"
        )
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device is {self.device!r}",
            "use auto, cpu, cuda, or cuda:N",
        )


@dataclass(frozen=True, kw_only=True)
class Setup(Compute, Reading):
    """What a trained model needs of a place: how images are read, and what computes."""

    def __post_init__(self) -> None:
        Reading.__post_init__(self)
        Compute.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class SiteConfig(Setup, Labels, Folder):
    """A site's `site.yml`, owned by the site: one flat file, and one object that is all its parts.

    What needs a part asks for the part: a `Reading`, and not a site.
    """

    min_cases: int = 3  # a metric over fewer cases stays at the site

    def __post_init__(self) -> None:
        for part in (Labels, Folder, Setup):
            part.__post_init__(self)
        _require_at_least(self, 1, ("min_cases",))
        several = bool(self.contrasts or self.label_files)
        require(
            not several or self.pair_by != "reference",
            "pair_by is reference, which pairs one series with one label",
            "with contrasts or label_files use pair_by: wildcards, folder or patient",
        )
        for key, globs in (("images", self.contrasts), ("labels", self.label_files)):
            require(
                not globs or getattr(self, key) == next(iter(globs.values())),
                f"{key} and {'contrasts' if globs is self.contrasts else 'label_files'} are given",
                f"leave {key} out: the other names a glob for each",
            )
        require(
            self.label_names is None or self.format == "dicom",
            f"label_names is given, and format: {self.format} has no names in its labels",
            "remove label_names, or set format: dicom",
        )

    def part(self, kind: type[P]) -> P:
        """One of the parts alone, such as `Reading`."""
        names = [f.name for f in dataclasses.fields(typing.cast(Any, kind))]
        return kind(**{name: getattr(self, name) for name in names})

    @classmethod
    def from_yaml(
        cls, path: Path, data_root: Path | None = None, named_by: str = "--data or SITE_DATA"
    ) -> SiteConfig:
        """Read `site.yml`; relative folders in it are relative to the file.

        Args:
            path: the file.
            data_root: goes before the file's own `data_root` (the environment's SITE_DATA, or a
                command's --data), relative to the working directory; without either the file has
                to name it.
            named_by: who said `data_root`, for errors.
        """
        values = read_yaml(path)
        if data_root is not None:
            values["data_root"] = _folder(data_root, Path())
        require(
            "data_root" in values,
            f"{path} does not say where the data is",
            "name the folder with --data, set SITE_DATA to it, or add data_root to site.yml",
        )
        if data_root is None:
            values["data_root"] = _written_folder(values["data_root"], path, "data_root")
        if values.get("cache") is not None:
            values["cache"] = _written_folder(values["cache"], path, "cache")
        for key, several in (("images", "contrasts"), ("labels", "label_files")):
            globs = values.get(several)
            if isinstance(globs, dict) and globs:
                require(
                    key not in values,
                    f"{path}: {key} and {several} are both given",
                    f"leave {key} out: {several} names a glob for each",
                )
                values[key] = next(iter(globs.values()))
        if isinstance(values.get("label_files"), dict) and values["label_files"]:
            require(
                "classes" not in values,
                f"{path}: classes and label_files are both given",
                "leave classes out: label_files names the classes",
            )
            overlap = values.get("overlap", "refuse")
            values["classes"] = values_of_files(map(str, values["label_files"]), overlap)
        if isinstance(values.get("classes"), dict):
            values["classes"] = {
                name: _label_values(given, f"{path}: classes, {name}")
                for name, given in values["classes"].items()
            }
        for key in ("background", "void"):
            if key in values:
                values[key] = _label_values(values[key], f"{path}: {key}")
        values["leave_out"] = _share(values.get("leave_out"))
        site = from_dict(cls, values, str(path))
        if data_root is None:
            return site
        return dataclasses.replace(site, data_root_named_by=named_by)


def _folder(name: str | Path, start: Path) -> Path:
    """An absolute folder; ~ is a home, and other names are relative to `start`."""
    try:
        return (start / Path(name).expanduser()).resolve()
    except RuntimeError:  # no such user
        return (start / name).resolve()


def _written_folder(given: Any, file: Path, key: str) -> Path:
    """A folder as it stands in a file.

    Raises:
        ConfigError: it is no text, is empty, or no file system has such a name.
    """
    where = f"{file}: {key}"
    fix = "write the folder's path, in single quotes if it holds a \\, # or :"
    require(isinstance(given, str) and given.strip() != "", f"{where} is {short(given)}", fix)
    has_control = any(unicodedata.category(character) in _CONTROLS for character in given)
    require(not has_control, f"{where} holds a control character: {given!r}", fix)
    try:
        return _folder(given, file.parent)
    except ValueError:  # what has no bytes in any name
        raise ConfigError(f"{where} is {given!r}, which no folder is called", fix) from None


def _share(given: Any) -> Any:
    """`5 %` as the share that it is; all else as it is."""
    if isinstance(given, str) and given.strip().endswith("%"):
        try:
            return number(given.strip().removesuffix("%").strip(), "leave_out") / 100
        except Undecodable:
            return given
    return given


def _label_values(given: Any, where: str) -> Any:
    """Ranges such as 1-167, and nonzero, as the numbers that they mean; all else as it is."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        return given
    numbers: list[Any] = []
    for one in given:
        if not isinstance(one, str):
            numbers.append(one)
        elif one == "nonzero":
            numbers += [*range(-32768, 0), *range(1, 32768)]
        else:
            found = re.fullmatch(r"\s*(-?\d{1,5})\s*(?:-|\.\.)\s*(-?\d{1,5})\s*", one)
            low, high = map(int, found.groups()) if found else (1, 0)
            require(
                low <= high,
                f"{where} is {one!r}",
                "write numbers, a range from the smaller to the larger such as 1-167, or nonzero "
                "for all values but 0",
            )
            numbers += range(low, high + 1)
    has_ranges = any(isinstance(one, str) for one in given)
    # what is no number (true is 1 to a dict) stays for the check of types
    only_numbers = all(type(one) is int for one in numbers)
    return list(dict.fromkeys(numbers)) if has_ranges and only_numbers else numbers
