"""What a site says beside its tensors: counts, means and versions, never a case."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fedfms.errors import ContributionRefused

METRICS = ("dice", "iou", "hd95", "dice_slice", "iou_slice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One score of one class over a site's cases.

    dice, iou: per case at native resolution (3-D for volumes), in [0, 1]. hd95: millimetres for
    volumes, pixels for pictures. dice_slice, iou_slice: per slice at native resolution.
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
    loss: float | None = None  # mean over the round's steps
    seconds: dict[str, float] = field(default_factory=dict)  # prepare, evaluate, train, exchange
    peak_memory_bytes: int = 0  # of the trainer process, or of its GPU where it has one
    micro_batch: int = 0  # slices in memory at once, after out-of-memory halvings
    update_norm: float | None = None  # L2 norm of the difference as sent

    @property
    def mean_dice(self) -> float | None:
        """Mean over classes of the mean Dice over cases; None if no class has one."""
        values = [m.mean for m in self.metrics if m.metric == "dice" and m.mean is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["metrics"] = [dataclasses.asdict(metric) for metric in self.metrics]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Contribution:
        """Read what came over a wire; anything unexpected is refused by name."""
        if not isinstance(values, dict):
            raise _malformed("it is no JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if _has_no_default(f)}
        if strange := sorted(set(values) - known):
            raise _malformed(f"unknown entry {strange[0]}")
        if missing := sorted(required - set(values)):
            raise _malformed(f"entry {missing[0]} is missing")
        try:
            metrics = tuple(Metric(**metric) for metric in values.get("metrics", ()))
        except TypeError as error:
            raise _malformed(f"a metric cannot be read: {error}") from None
        for metric in metrics:
            if metric.metric not in METRICS or not _finite_or_none(metric.mean, metric.std):
                raise _malformed(f"metric {metric.metric} has no usable value")
        for key in ("training_slices", "training_cases", "evaluated_cases", "round"):
            if not isinstance(values[key], int) or values[key] < 0:
                raise _malformed(f"{key} is no whole number of 0 or more")
        return cls(**{**values, "metrics": metrics})


def _finite_or_none(*values: Any) -> bool:
    return all(
        v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in values
    )


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _malformed(what: str) -> ContributionRefused:
    return ContributionRefused(
        f"the site's report is malformed: {what}",
        "install the same version of fedfms at the site and the server",
        code="malformed-report",
    )
