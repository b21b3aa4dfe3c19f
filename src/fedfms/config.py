"""What is learnt (Recipe), where the data is (SiteConfig), and what may leave (Policy).

Every default of the product stands in this file, once. Files hold only what differs; an unknown
key is an error. The environment names machine facts (folders) and is read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedfms.errors import ConfigError
from fedfms.yaml_text import parse_yaml

Method = Literal["fedsam", "fedmsa"]
Backbone = Literal["vit_demo", "vit_b", "vit_l", "vit_h"]
ImageFormat = Literal["nifti", "dicom", "image", "npy"]


@dataclass(frozen=True, slots=True)
class BackboneFile:
    """A SAM backbone: its token size and the checkpoint that is meant by its name."""

    patch_size: int  # pixels a side of one encoder token
    file_name: str
    sha256: str


BACKBONES: dict[str, BackboneFile] = {
    # shipped with the package (fedfms/models/vit_demo.safetensors); tools/train_demo_backbone.py
    "vit_demo": BackboneFile(
        8,
        "vit_demo.safetensors",
        "eb24a2e61749714e43c8b8c2a2bef9ab5b9873d04ff69ff9c737165194d41ea0",
    ),
    # Meta's own files, as linked from the README of facebookresearch/segment-anything
    "vit_b": BackboneFile(
        16,
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": BackboneFile(
        16,
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": BackboneFile(
        16,
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}

JOB_RECIPE = Path("app/config/recipe.json")  # in a job folder

_CONTROLS = ("Cc", "Zl", "Zp")  # categories of characters that no glob or expression means
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


# ---------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the federation learns. The same at every site; `recipe.json` in a job."""

    method: Method
    backbone: Backbone
    backbone_sha256: str  # of the SAM checkpoint; every party proves that it holds this one
    classes: tuple[str, ...]  # in the order of the output channels
    rounds: int
    exclusive_classes: bool = False  # a pixel has the likeliest class only; False: may have several
    image_size: int = 1024  # pixels, square; SAM's own input size
    resize: Literal["pad", "stretch"] = "pad"  # pad: longest side, as SAM; stretch: as FedFMS
    normalize: bool = True  # SAM's pixel mean and standard deviation; False: [0, 1], as FedFMS
    local_epochs: int = 1  # passes over a site's training slices in one round
    batch_size: int = 4  # slices per optimizer step, whatever the site's micro-batch
    learning_rate: float = 1e-4  # Adam
    schedule: Literal["constant", "cosine"] = "constant"  # over all rounds
    warmup_steps: int = 0  # optimizer steps of linear warm-up in the first round
    clip_grad_norm: float | None = None  # largest L2 norm of the gradient of one step
    loss: Literal["bce", "dice_bce"] = "bce"
    positive_weight: float = 2.0  # of foreground pixels in BCE
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder's arithmetic
    optimizer_state: Literal["keep", "reset"] = "reset"  # Adam's moments between rounds
    transfer_precision: Literal["fp32", "fp16"] = "fp32"  # on the wire; averaging is always fp32
    holdout: tuple[str, ...] = ()  # sites that evaluate and never train
    max_update_norm: float | None = None  # the server refuses a difference with a larger L2 norm
    probability_threshold: float = 0.5  # from which a pixel is foreground
    evaluate_every: int = 1  # rounds; before training, then every so many; the final model always
    evaluate_first: int = 0  # rounds of training before the first evaluation
    seed: int = 0
    require_gpu: bool = False  # a site without CUDA refuses, rather than take days on a processor
    # what the checkpoint does not hold starts as the mean of so many draws, with these weights;
    # none: a single draw
    start_draws: tuple[float, ...] = ()
    # paper_compat: the last training site in this order gets the rest of the rounded weights; sites
    # that are not listed come after the others, by name
    site_order: tuple[str, ...] = ()
    paper_compat: bool = False  # FedFMS's own behaviour; docs/protocol.md lists what changes

    def __post_init__(self) -> None:
        check_types(self, "recipe.json")
        _require(
            re.fullmatch(r"[0-9a-f]{64}", self.backbone_sha256) is not None,
            f"backbone_sha256 is {self.backbone_sha256!r}",
            "write the SHA-256 of the SAM checkpoint, 64 hexadecimal digits (sha256sum FILE)",
        )
        _require(bool(self.classes), "classes is empty", "name at least one class in recipe.json")
        for name in self.classes:
            _require_name(name, "class")
        _require(
            len(set(self.classes)) == len(self.classes),
            f"classes names one class twice: {', '.join(self.classes)}",
            "name each class once in recipe.json",
        )
        _require(
            not self.exclusive_classes or len(self.classes) > 1,
            "exclusive_classes is true, and there is one class",
            "set exclusive_classes to false, or name the classes that exclude each other",
        )
        for key in ("rounds", "local_epochs", "batch_size", "evaluate_every"):
            value = getattr(self, key)
            _require(value >= 1, f"{key} is {value}", f"set {key} to 1 or more in recipe.json")
        _require(
            self.image_size >= self.patch_size and self.image_size % self.patch_size == 0,
            f"image_size is {self.image_size}",
            f"use a multiple of the backbone's patch size, {self.patch_size} pixels",
        )
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate is {self.learning_rate}",
            "set a positive number, such as 1e-4",
        )
        _require(
            math.isfinite(self.positive_weight) and self.positive_weight > 0,
            f"positive_weight is {self.positive_weight}",
            "set a positive number, such as 2.0",
        )
        _require(
            0.0 < self.probability_threshold < 1.0,
            f"probability_threshold is {self.probability_threshold}",
            "set a number between 0 and 1, such as 0.5",
        )
        _require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}", "set 0 or more")
        _require(self.seed >= 0, f"seed is {self.seed}", "set 0 or more")
        _require(
            self.evaluate_first >= 0,
            f"evaluate_first is {self.evaluate_first}",
            "set 0 (before training) or more rounds",
        )
        _require(
            all(math.isfinite(weight) and weight > 0 for weight in self.start_draws),
            f"start_draws is {', '.join(map(str, self.start_draws))}",
            "write a positive weight for each draw, such as 1, 1, 1, or leave it out",
        )
        for name in self.site_order:
            _require_name(name, "site")
        _require(
            len(set(self.site_order)) == len(self.site_order),
            f"site_order names one site twice: {', '.join(self.site_order)}",
            "name each site once in recipe.json",
        )
        for key in ("clip_grad_norm", "max_update_norm"):
            value = getattr(self, key)
            _require(
                value is None or (math.isfinite(value) and value > 0),
                f"{key} is {value}",
                "set a positive number, or null for no limit",
            )
        for name in self.holdout:
            _require_name(name, "holdout site")

    @property
    def patch_size(self) -> int:
        """Side of one encoder token in pixels."""
        return BACKBONES[self.backbone].patch_size

    @property
    def mask_size(self) -> int:
        """Side of the decoder's output in pixels: four per encoder token (256 at 1024 pixels)."""
        return self.image_size // self.patch_size * 4

    def evaluates(self, rounds_trained: int) -> bool:
        """Whether the model is scored after so many rounds of training, before it goes on.

        In a federation that is the model that they receive in the round of this number, counted
        from 0. The final model is scored after the last round whatever this says.
        """
        since = rounds_trained - self.evaluate_first
        return since >= 0 and since % self.evaluate_every == 0

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe.json") -> Recipe:
        """Build from JSON types; `source` says in an error where they stood."""
        return from_dict(cls, values, source)

    @classmethod
    def from_json(cls, path: Path) -> Recipe:
        """Read a `recipe.json`."""
        return cls.from_dict(_read_json(path), str(path))

    @classmethod
    def from_text(cls, text: str, source: str) -> Recipe:
        """Read the text of a `recipe.json`; `source` says in an error where it stood."""
        return cls.from_dict(_parse_json(text, source), source)

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def to_json(self) -> str:
        """The text of a `recipe.json` with all values."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 over all values in canonical JSON: equal exactly where the recipes are equal."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, overrides: typing.Sequence[str]) -> Recipe:
        """The recipe with `key=value` texts applied, as `--set rounds=20 --set classes=disc,cup`.

        See `with_values` for the backbone.
        """
        hints = typing.get_type_hints(Recipe)
        values: dict[str, Any] = {}
        for text in overrides:
            key, sign, value = text.partition("=")
            _require(bool(sign), f"--set {text} has no '='", "write --set NAME=VALUE")
            _require_known(key, hints, "--set")
            values[key] = _parse_override(key, value, hints[key])
        return self.with_values(values, "--set")

    def with_values(self, values: typing.Mapping[str, Any], source: str) -> Recipe:
        """The recipe with other values, as JSON types; `source` says in an error where they stood.

        Another backbone without its own `backbone_sha256` means the official checkpoint.
        """
        official = BACKBONES.get(str(values.get("backbone")))
        implied = {} if official is None else {"backbone_sha256": official.sha256}
        return Recipe.from_dict({**self.to_dict(), **implied, **values}, source)


def read_job_recipe(
    job: Path,
    instead: Path | None = None,
    overrides: typing.Sequence[str] = (),
    *,
    any_method: bool = False,
) -> Recipe:
    """The recipe of a job folder with `key=value` overrides.

    Args:
        job: job folder, such as jobs/fedmsa.
        instead: a recipe in the place of the job's own; the overrides are applied to it.
        overrides: see `Recipe.with_overrides`.
        any_method: whether the recipe may be of another method than the job's own, as for a job
            that only evaluates.

    Raises:
        ConfigError: a recipe or an override that cannot be used; code other-method.
    """
    own = Recipe.from_json(job / JOB_RECIPE)
    recipe = own if instead is None else Recipe.from_json(instead)
    recipe = recipe.with_overrides(overrides)
    if recipe.method != own.method and not any_method:
        where = f"{instead} is" if instead is not None else "--set asks for"
        raise ConfigError(
            f"{where} a recipe of {recipe.method}, and {job} is a job of {own.method}",
            f"name jobs/{recipe.method}, or a recipe of {own.method}",
            code="other-method",
        )
    return recipe


# ------------------------------------------------------------------------------------------ site


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
        check_types(self, "site.yml, intensity")
        used, other = ("low", "high"), ("center", "width")
        if self.rule == "window":
            used, other = other, used
        for name in other:
            _require(
                getattr(self, name) is None,
                f"intensity rule {self.rule!r} has no {name}, which stands in site.yml",
                f"remove {name}, or write the rule that it belongs to under intensity in site.yml, "
                f"such as rule: {'range' if self.rule == 'window' else 'window'}",
            )
        for name in used:
            value = getattr(self, name)
            _require(
                value is None or math.isfinite(value),
                f"intensity {name} is {value}",
                f"write a number for {name} under intensity in site.yml",
            )
        if self.rule == "window":
            _require(
                self.center is not None and self.width is not None and self.width > 0,
                "intensity rule 'window' needs center and width",
                "add for example center: 40 and width: 400 under intensity in site.yml",
            )
            return
        low, high = self.bounds
        _require(
            low < high,
            f"intensity low is {low} and high is {high}",
            "set low below high under intensity in site.yml",
        )
        if self.rule == "percentile":
            _require(
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
            values = [float(number) for number in numbers]
        except ValueError:
            values = [math.nan]
        _require(
            rule in ("percentile", "window", "range")
            and len(values) in (0, 2)
            and all(map(math.isfinite, values)),
            f"the intensity {text!r} cannot be read",
            "write percentile:0.5:99.5, window:CENTER:WIDTH or range:LOW:HIGH",
        )
        return from_dict(
            cls,
            {"rule": rule, **dict(zip(keys, values, strict=False)), "rounding": rounding},
            "the intensity",
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) with the defaults of the rule filled in; stored values, or percentiles."""
        if self.rule == "window":
            assert self.center is not None and self.width is not None  # __post_init__ checked it
            return self.center - self.width / 2, self.center + self.width / 2
        low, high = (0.5, 99.5) if self.rule == "percentile" else (0.0, 255.0)
        return (low if self.low is None else self.low, high if self.high is None else self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteConfig:
    """What a site's files mean and how its machine is used; `site.yml`, owned by the site.

    Globs are relative to `data_root`; what their wildcards match must be alike for an image and its
    label, which is how the two are paired, unless `pair_by` says otherwise.
    """

    data_root: Path  # the mounted folder; SITE_DATA in the environment goes before it
    format: ImageFormat
    images: str  # glob, such as images/*.nii.gz
    labels: str  # glob, such as labels/*.nii.gz
    classes: dict[str, tuple[int, ...]]  # class name -> label values that mean it
    # what is alike of an image and its label: what all wildcards match; what those of the folders
    # match; the patient; DICOM: the series that the label names. None: wildcards, but in DICOM the
    # reference where the two globs have different wildcards or are one
    pair_by: Literal["wildcards", "folder", "patient", "reference"] | None = None
    background: tuple[int, ...] = (0,)  # label values that mean none of the classes
    # DICOM: label value -> names of the segments or structures that get it; "*" is any other name.
    # None: the value is SegmentNumber or ROINumber.
    label_names: dict[int, tuple[str, ...]] | None = None
    # DICOM: what happens where segments of two label values meet; highest: the larger value stands
    overlap: Literal["refuse", "highest"] = "refuse"
    series: str | None = None  # DICOM: regular expression on SeriesDescription, chooses in a folder
    not_annotated: tuple[str, ...] = ()  # classes this site never drew: their loss is masked here
    # of the slices of a volume; stored (NIfTI): along the file's third axis, rows its first, as
    # FedFMS reads them, whatever the patient's position
    plane: Literal["axial", "coronal", "sagittal", "stored"] = "axial"
    channels: Literal["gray", "rgb", "neighbours"] = "gray"  # neighbours: slices i-1, i, i+1
    keep_empty_every: int = 1  # training: every n-th slice without foreground; 1 all, 0 none
    intensity: Intensity = field(default_factory=Intensity)
    patient: str | None = None  # regular expression on the file name; group 1 is the patient
    validation_fraction: float = 0.2  # of the patients
    validation_seed: int = 0
    cache: Path | None = None  # folder for prepared slices; none: prepared anew at each start
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int | None = None  # CPU threads of torch; none: torch decides
    workers: int = 0  # data loader processes
    # largest number of slices in memory at once; none: batch_size, but 1 above 512 pixels on a CPU
    micro_batch: int | None = None
    min_cases: int = 3  # a metric over fewer cases stays at the site
    stall_seconds: float = 3600.0  # without progress for so long, the trainer ends itself
    # who said where data_root is, for errors; no key of the file
    data_root_named_by: str = field(default="data_root in site.yml", metadata={"in_file": False})

    def __post_init__(self) -> None:
        check_types(self, "site.yml")
        for key in ("images", "labels", "patient", "series"):
            text = getattr(self, key) or ""
            _require(
                not any(unicodedata.category(character) in _CONTROLS for character in text),
                f"{key} in site.yml holds a control character: {text!r}",
                f"write {key} in single quotes, in which YAML takes a \\ as it is",
            )
        _require(
            len(self.classes) > 0,
            "classes in site.yml is empty",
            "map at least one class to its label values, for example nucleus: [255]",
        )
        owner: dict[int, str] = {}
        for name, values in self.classes.items():
            _require_name(name, "class")
            _require(
                len(values) > 0,
                f"class {name} in site.yml has no label values",
                f"give its values, as in {name}: [1], or list it under not_annotated",
            )
            outside = [value for value in values if not -32768 <= value <= 32767]
            _require(
                not outside,
                f"class {name} in site.yml has the label value {outside[0] if outside else ''}",
                "use label values from -32768 to 32767",
            )
            for value in values:
                owner[value] = name
        both = [value for value in self.background if value in owner]
        _require(
            not both,
            f"label value {both[0] if both else ''} is background and class at once",
            "list each label value under classes or under background in site.yml, not both",
        )
        twice = [name for name in self.not_annotated if name in self.classes]
        _require(
            not twice,
            f"class {twice[0] if twice else ''} has label values and is listed as not annotated",
            "keep it in one of the two places in site.yml",
        )
        for key in ("images", "labels"):
            pattern = getattr(self, key)
            _require(
                "*" in pattern and not pattern.startswith("/") and ".." not in Path(pattern).parts,
                f"{key} in site.yml is {pattern!r}",
                "write a glob relative to data_root, with a * that stands for the case's name",
            )
            _require(
                "[^" not in pattern,
                f"{key} in site.yml is {pattern!r}, in which [^ is no sign of a glob",
                "write [!ab] for a letter that is not a or b; a ^ itself may stand behind another",
            )
        _require(
            self.plane != "stored" or self.format != "dicom",
            "plane in site.yml is stored, and a DICOM series has no order of its own",
            "set plane: axial, coronal or sagittal",
        )
        _require(
            self.images != self.labels
            or (self.format == "dicom" and self.pair_by in (None, "reference")),
            f"images and labels in site.yml are the same glob, {self.images}",
            "point labels at the label files",
        )
        _require(
            self.pair_by != "reference" or self.format == "dicom",
            f"pair_by in site.yml is reference, and format: {self.format} has no references",
            "use pair_by: wildcards, folder or patient",
        )
        _require(
            self.pair_by != "patient" or self.patient is not None or self.format == "dicom",
            "pair_by in site.yml is patient, and there is no patient in it",
            "add patient: with a regular expression whose group 1 is the patient in the paths of "
            "images and labels",
        )
        _require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction is {self.validation_fraction}",
            "set a number between 0 and 1, such as 0.2",
        )
        for key in ("workers", "keep_empty_every", "validation_seed"):
            value = getattr(self, key)
            _require(value >= 0, f"{key} is {value}", f"set {key} to 0 or more in site.yml")
        for key in ("threads", "micro_batch", "min_cases"):
            value = getattr(self, key)
            _require(
                value is None or value >= 1,
                f"{key} is {value}",
                f"set {key} to 1 or more in site.yml",
            )
        _require(
            self.stall_seconds > 0, f"stall_seconds is {self.stall_seconds}", "set seconds above 0"
        )
        self._check_dicom_keys()
        if self.patient is not None:
            try:
                groups = re.compile(self.patient).groups
            except re.error as error:
                raise ConfigError(
                    f"patient in site.yml is no regular expression: {error}",
                    "write one with one group around the patient's part of the file name",
                ) from None
            _require(
                groups == 1,
                f"patient in site.yml has {groups} groups",
                "put exactly one pair of parentheses around the patient's part of the file name",
            )
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device is {self.device!r}",
            "use auto, cpu, cuda, or cuda:N in site.yml",
        )

    @property
    def distance_unit(self) -> Literal["mm", "px"]:
        """Unit of distances in this site's images; files without a voxel size count pixels."""
        return "mm" if self.format in ("nifti", "dicom") else "px"

    def _check_dicom_keys(self) -> None:
        """What only DICOM has: names of segments and of series."""
        if self.series is not None:
            try:
                re.compile(self.series)
            except re.error as error:
                raise ConfigError(
                    f"series in site.yml is no regular expression: {error}",
                    "write a part of the SeriesDescription, such as series: t2_tse_tra",
                ) from None
        if self.label_names is None:
            return
        _require(
            self.format == "dicom",
            f"site.yml has label_names, and format: {self.format} has no names in its labels",
            "remove label_names, or set format: dicom",
        )
        known = {value for values in self.classes.values() for value in values}
        owner: dict[str, int] = {}
        for value, names in self.label_names.items():
            _require(
                value in known or value in self.background,
                f"label_names in site.yml gives the value {value}, which has no class",
                "list the value under its class, or under background, in site.yml",
            )
            for name in names:
                other = owner.setdefault(name.strip().casefold(), value)
                _require(
                    other == value,
                    f"label_names in site.yml gives {name!r} the values {other} and {value}",
                    "list each name once; capitals and small letters are alike",
                )

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
            values["data_root"] = str(_folder(data_root, Path()))
        _require(
            "data_root" in values,
            f"{path} does not say where the data is",
            "name the folder with --data, set SITE_DATA to it, or add data_root to site.yml",
        )
        for key in ("data_root", "cache"):
            if values.get(key) is not None or (key == "data_root" and data_root is None):
                values[key] = str(_written_folder(values[key], path.parent, f"{path}, {key}"))
        if isinstance(values.get("classes"), dict):
            values["classes"] = {
                name: _label_values(given, f"{path}, classes, {name}")
                for name, given in values["classes"].items()
            }
        if "background" in values:
            values["background"] = _label_values(values["background"], f"{path}, background")
        site = _build(cls, values, path)
        if data_root is None:
            return site
        return dataclasses.replace(site, data_root_named_by=named_by)


def _folder(name: str | Path, start: Path) -> Path:
    """An absolute folder; ~ is a home, and other names are relative to `start`."""
    try:
        return (start / Path(name).expanduser()).resolve()
    except RuntimeError:  # no such user
        return (start / name).resolve()


def _written_folder(given: Any, start: Path, where: str) -> Path:
    """A folder as it stands in a file.

    Raises:
        ConfigError: it is no text, is empty, or no file system has such a name.
    """
    fix = "write the folder's path, in single quotes if it holds a \\, # or :"
    _require(isinstance(given, str) and given.strip() != "", f"{where} is {_short(given)}", fix)
    has_control = any(unicodedata.category(character) in _CONTROLS for character in given)
    _require(not has_control, f"{where} holds a control character: {given!r}", fix)
    try:
        return _folder(given, start)
    except ValueError:  # what has no bytes in any name
        raise ConfigError(f"{where} is {given!r}, which no folder is called", fix) from None


_INTS = tuple[int, ...]


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
            _require(
                low <= high,
                f"{where} is {one!r}",
                "write numbers, a range from the smaller to the larger such as 1-167, or nonzero "
                "for all values but 0",
            )
            numbers += range(low, high + 1)
    has_ranges = any(isinstance(one, str) for one in given)
    # what is no number (true is 1 to a dict) stays for the check of types
    return list(dict.fromkeys(numbers)) if has_ranges and _fits(tuple(numbers), _INTS) else numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What may leave a site; `policy/privacy.json`, owned by the site. The last word."""

    methods: tuple[Method, ...] = ("fedsam", "fedmsa")  # the jobs that may run here
    max_rounds: int = 1000
    clip_norm: float | None = None  # largest L2 norm of a whole difference; longer ones are scaled
    noise_std: float = 0.0  # Gaussian noise on each value, as a share of clip_norm
    min_cases: int = 3  # a metric over fewer cases stays; the larger of this and site.yml's counts
    pictures: bool = False  # prediction overlays of validation cases in the report

    def __post_init__(self) -> None:
        check_types(self, "privacy.json")
        _require(
            len(self.methods) > 0, "methods in privacy.json is empty", "list fedsam, fedmsa or both"
        )
        for key in ("max_rounds", "min_cases"):
            value = getattr(self, key)
            _require(value >= 1, f"{key} in privacy.json is {value}", f"set {key} to 1 or more")
        _require(
            self.clip_norm is None or (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            f"clip_norm in privacy.json is {self.clip_norm}",
            "set a positive number, or null for no clipping",
        )
        _require(
            math.isfinite(self.noise_std) and self.noise_std >= 0,
            f"noise_std in privacy.json is {self.noise_std}",
            "set 0 or more",
        )
        _require(
            self.noise_std == 0 or self.clip_norm is not None,
            "privacy.json asks for noise without a clip_norm",
            "set clip_norm: noise_std is a share of it",
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Policy:
        """Read `privacy.json` in the site's policy folder; a missing file closes the door."""
        path = folder / "privacy.json"
        return _build(cls, _read_json(path), path)


# ----------------------------------------------------------------------------------- environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of the machine, from the environment; read once."""

    site_name: str | None = None  # SITE_NAME: who this site believes it is
    site_data: Path | None  # SITE_DATA: the mounted imaging volume (trainer only)
    exchange: Path | None  # FEDFMS_EXCHANGE: the folder that trainer and FLARE client share
    checkpoints: Path | None  # FEDFMS_CHECKPOINTS: folder of SAM checkpoints
    log_level: str | None = None  # FEDFMS_LOG_LEVEL: of what FLARE logs in a container; info
    require_gpu: bool = False  # FEDFMS_REQUIRE_GPU: the trainer was started with the GPU overlay
    watch: Path | None = None  # FEDFMS_WATCH: which files this process may open (fedfms.watch)

    @classmethod
    def from_environment(cls) -> Machine:
        """Read what is set; an empty variable counts as not set."""

        def folder(name: str) -> Path | None:
            value = os.environ.get(name)
            return Path(value).absolute() if value else None  # relative to where the person stands

        return cls(
            site_name=os.environ.get("SITE_NAME") or None,
            site_data=folder("SITE_DATA"),
            exchange=folder("FEDFMS_EXCHANGE"),
            checkpoints=folder("FEDFMS_CHECKPOINTS"),
            log_level=os.environ.get("FEDFMS_LOG_LEVEL") or None,
            require_gpu=os.environ.get("FEDFMS_REQUIRE_GPU", "") not in ("", "0"),
            watch=folder("FEDFMS_WATCH"),
        )


# ---------------------------------------------------------------------------- reading and checks

T = TypeVar("T")


def _require(condition: bool, problem: str, fix: str) -> None:
    if not condition:
        raise ConfigError(problem, fix)


def _build(cls: type[T], values: dict[str, Any], path: Path) -> T:
    """As `from_dict`; every error names this very file, since each site has one of that name."""
    try:
        return from_dict(cls, values, str(path))
    except ConfigError as error:
        if str(path) in error.problem:
            raise
        said = error.problem
        named = said[len(path.name) :] if said.startswith(path.name) else f": {said}"
        raise ConfigError(f"{path}{named}", error.fix, code=error.code) from None


def _require_name(name: str, what: str) -> None:
    _require(
        _NAME.fullmatch(name) is not None,
        f"{what} name {name!r} cannot be used",
        "use letters, digits, - and _, at most 63 of them",
    )


def _require_known(key: str, known: typing.Iterable[str], source: str) -> None:
    known = sorted(known)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        fix = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        raise ConfigError(f"{source}: unknown key {key!r}", fix)


def read_text(path: Path) -> str:
    """A text file that a person wrote; the mark that some editors put before it is left out.

    Raises:
        ConfigError: it is not there, or cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", "check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text (at byte {error.start})",
            "save it again as UTF-8 in your editor",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "let this user read it"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(read_text(path), str(path))


def _parse_json(text: str, source: str) -> dict[str, Any]:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        twice = [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]
        if twice:
            lines = [
                str(number)
                for number, line in enumerate(text.splitlines(), start=1)
                if re.search(rf"{re.escape(json.dumps(twice[0]))}\s*:", line)
            ]
            at = f" (lines {' and '.join(lines)})" if len(lines) > 1 else ""
            raise ConfigError(
                f"{source}: the key {twice[0]} stands twice{at}",
                "leave one of them; the second would silently replace the first",
            )
        return values

    try:
        values = json.loads(text, object_pairs_hook=each_once)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is no JSON: {error}", "correct the file at that place"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no JSON object", "write { … } with its keys")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: there is no such file, or it is no YAML with keys.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys", "write one 'key: value' a line")
    return values


def require_known(cls: type, values: dict[str, Any], source: str) -> None:
    """Refuse a key that is none of this config dataclass.

    Raises:
        ConfigError: naming the key, and the one that was meant or all that there are.
    """
    for key in values:
        _require_known(str(key), _fields_in_file(cls), source)


def _fields_in_file(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}


def from_dict(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Build a config dataclass from plain JSON or YAML values; lists become tuples."""
    hints = typing.get_type_hints(cls)
    fields = _fields_in_file(cls)
    require_known(cls, values, source)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        arguments[key] = _convert(value, hints[key], f"{source}, {key}")
    missing = [
        name
        for name, f in fields.items()
        if name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"{source} has no {', '.join(missing)}", "add what is missing")
    return cls(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        _require(
            isinstance(value, list | tuple), f"{where} is {_short(value)}", "write a list, [ … ]"
        )
        return tuple(_convert(item, args[0], where) for item in value)
    if origin is dict:
        _require(
            isinstance(value, dict), f"{where} is {_short(value)}", "write 'name: value' lines"
        )
        if args[0] is int:  # JSON and YAML give whole numbers as they are, checked by _fits
            return {key: _convert(item, args[1], f"{where}, {key}") for key, item in value.items()}
        return {str(key): _convert(item, args[1], f"{where}, {key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        _require(
            isinstance(value, dict), f"{where} is {_short(value)}", "write 'name: value' lines"
        )
        return from_dict(typing.cast(type, hint), value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as text
            return float(value)
        except ValueError:
            return value
    return value


def _parse_override(key: str, text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if hint is str or (typing.get_origin(hint) is Literal):
        return text
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        raise ConfigError(
            f"--set {key}={text}: the value is no number, true, false or null",
            f"look at {key} in the job's recipe.json for an example",
        ) from None


def check_types(config: Any, source: str) -> None:
    """Refuse a config dataclass with a value that is not of its field's type; for __post_init__.

    Raises:
        ConfigError: naming the field and what it takes.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(
                f"{source}: {name} is {_short(value)}",
                f"use {_describe(hint)}" + _quotes(value, hint, source),
            )


def _short(value: Any) -> str:
    """A value as it is written, of a long one (a range of label values) the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


def _quotes(value: Any, hint: Any, source: str) -> str:
    """A word for those to whom YAML gave something else than the text that they wrote."""
    takes_text = hint is str or str in typing.get_args(hint)
    if source.endswith(".json"):
        return ""
    values = value if isinstance(value, tuple) else (value,)
    if not takes_text or all(one is None or isinstance(one, str | dict) for one in values):
        return ""
    return "; YAML takes words such as no, off, 12 or 2024-01-31 for something else: use quotes"


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return f"'name: value' lines: {_describe(args[0])}, then {_describe(args[1])}"
    if hint is type(None):
        return "null"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
    }
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")
