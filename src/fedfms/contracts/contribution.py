"""What a site says beside its tensors: counts, means and versions, never a case."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fedfms.errors import ContributionRefused

METRICS = ("dice", "iou", "hd95", "dice_slice", "iou_slice")
UNITS = ("mm", "px")
PHASES = ("prepare", "evaluate", "train", "exchange")
MAX_PICTURES = 32  # beside one contribution
MAX_PICTURE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One score of one class over a site's cases.

    dice, iou: per case at native resolution (3-D for volumes), in [0, 1]. hd95: in the
    contribution's `distance_unit`. dice_slice, iou_slice: per slice at native resolution.
    """

    class_name: str
    metric: str  # one of METRICS
    mean: float | None  # None: fewer cases than the site lets out, or none with a value
    std: float | None  # over cases (slices for *_slice), population standard deviation
    cases: int  # cases (or slices) with a value
    empty: int  # cases (or slices) without foreground in truth and prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A site's answer to one task, without the tensors."""

    site: str
    kind: Literal["train", "evaluate"]
    role: Literal["train", "holdout"]
    round: int  # from 0; for "evaluate" the number of rounds trained
    model: str  # which model the metrics are of: "round" (as received), "final", "best"
    recipe_sha256: str
    backbone_sha256: str
    package_version: str
    training_slices: int  # the averaging weight; 0 for a holdout
    training_cases: int
    evaluated_cases: int
    metrics: tuple[Metric, ...] = ()
    distance_unit: Literal["mm", "px"] = "px"  # of hd95; files without a voxel size count pixels
    loss: float | None = None  # mean over the round's steps
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, keys from PHASES
    # by phase: of the trainer process, or of its GPU where it has one
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0  # slices in memory at once, after out-of-memory halvings
    update_norm: float | None = None  # L2 norm of the difference as sent

    @property
    def mean_dice(self) -> float | None:
        """Mean over classes of the mean Dice over cases; None if no class has one."""
        values = [m.mean for m in self.metrics if m.metric == "dice" and m.mean is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types; the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        values["metrics"] = [dataclasses.asdict(metric) for metric in self.metrics]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Contribution:
        """Read what came over a wire; anything unexpected is refused by name.

        Raises:
            ContributionRefused: code malformed-report; an entry is unknown, missing, or not of its
                kind. No free text passes: every text is a short name, a version or a hash.
        """
        _check_entries(values, cls, _CONTRIBUTION, "the report")
        metrics = values.get("metrics", ())
        for metric in metrics:
            _check_entries(metric, Metric, _METRIC, "a metric")
        return cls(**{**values, "metrics": tuple(Metric(**metric) for metric in metrics)})


_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _one_of(*allowed: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in allowed


def _seconds(value: Any) -> bool:
    return _number(value) and value >= 0


def _by_phase(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(phase in PHASES and check(spent) for phase, spent in value.items())
    )


def _list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 1000


_METRIC: dict[str, Callable[[Any], bool]] = {
    "class_name": _text(_WORD),
    "metric": _one_of(*METRICS),
    "mean": _number_or_none,
    "std": _number_or_none,
    "cases": _count,
    "empty": _count,
}

_CONTRIBUTION: dict[str, Callable[[Any], bool]] = {
    "site": _text(_WORD),
    "kind": _one_of("train", "evaluate"),
    "role": _one_of("train", "holdout"),
    "round": _count,
    "model": _one_of("round", "final", "best"),
    "recipe_sha256": _text(_SHA256),
    "backbone_sha256": _text(_SHA256),
    "package_version": _text(_WORD),
    "training_slices": _count,
    "training_cases": _count,
    "evaluated_cases": _count,
    "metrics": _list,
    "distance_unit": _one_of(*UNITS),
    "loss": _number_or_none,
    "seconds": _by_phase(_seconds),
    "peak_memory_bytes": _by_phase(_count),
    "micro_batch": _count,
    "update_norm": _number_or_none,
}


def _check_entries(
    values: Any, cls: type, checks: dict[str, Callable[[Any], bool]], what: str
) -> None:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise _malformed(f"{what} is no JSON object")
    if strange := sorted(set(values) - set(checks)):
        raise _malformed(f"{what} has the unknown entry {strange[0][:64]!r}")
    required = {f.name for f in dataclasses.fields(cls) if _has_no_default(f)}
    if missing := sorted(required - set(values)):
        raise _malformed(f"{what} has no entry {missing[0]}")
    for key, value in values.items():
        if not checks[key](value):
            raise _malformed(f"{key} of {what} cannot be used")


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _malformed(what: str) -> ContributionRefused:
    return ContributionRefused(
        f"the site's report is malformed: {what}",
        "install the same version of fedfms at the site and the server",
        code="malformed-report",
    )
