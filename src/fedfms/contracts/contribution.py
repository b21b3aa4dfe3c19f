"""What a site says beside its tensors: counts, means and versions, never a case."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.wire import Count, Name, Number, Seconds, Sha256
from fedfms.errors import ContributionRefused

METRICS = ("dice", "iou", "hd95", "dice_slice", "iou_slice")
PHASES = ("prepare", "evaluate", "train", "exchange")
# why a site leaves a case out: a file cannot be read; an image without a label, or the other way
# round; nothing is in it, and something must be; image and label, or both and site.yml, do not fit
LEFT_OUT_REASONS = ("unreadable", "unlabelled", "empty", "unfit")
MAX_PICTURES = 32  # beside one contribution
MAX_PICTURE_BYTES = 2 * 1024 * 1024


ModelName = Literal["round", "final", "best"]
MetricName = Annotated[str, StringConstraints(pattern=f"^({'|'.join(METRICS)})$")]
Reason = Annotated[str, StringConstraints(pattern=f"^({'|'.join(LEFT_OUT_REASONS)})$")]
Phase = Annotated[str, StringConstraints(pattern=f"^({'|'.join(PHASES)})$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One score of one class over a site's cases.

    dice, iou: per case at native resolution (3-D for volumes), in [0, 1]. hd95: in the
    contribution's `distance_unit`. dice_slice, iou_slice: per slice at native resolution.
    """

    class_name: Name
    metric: MetricName
    mean: Number | None  # None: fewer cases than the site lets out, or none with a value
    std: Number | None  # over cases (slices for *_slice), population standard deviation
    cases: Count  # cases (or slices) with a value
    empty: Count  # cases (or slices) without foreground in truth and prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a canary says of a site's pace, in the place of everything about its images."""

    seconds: Seconds  # that the trainer worked on this canary
    seconds_per_step: Seconds | None  # of optimizer steps on full batches; None of a holdout
    seconds_per_round: Seconds  # of the run's, estimated: training, scores, and no transfer
    peak_memory_bytes: Count  # of the trainer process, or of its GPU where it has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A site's answer to one task, without the tensors."""

    site: Name
    kind: Literal["train", "evaluate"]
    role: Literal["train", "holdout"]
    round: Count  # from 0; for "evaluate" the number of rounds trained
    model: ModelName  # which model the metrics are of: "round" (as received), "final", "best"
    recipe_sha256: Sha256
    backbone_sha256: Sha256
    package_version: Name
    training_slices: Count  # the averaging weight; 0 for a holdout
    training_cases: Count
    evaluated_cases: Count
    metrics: Annotated[tuple[Metric, ...], Field(max_length=1000)] = ()
    distance_unit: Literal["mm", "px"] = "px"  # of hd95; files without a voxel size count pixels
    left_out: Count = 0  # cases that the site leaves out, of both sides of its split
    left_out_by_reason: dict[Reason, Count] = field(default_factory=dict)
    loss: Number | None = None  # mean over the round's steps
    seconds: dict[Phase, Seconds] = field(default_factory=dict)  # by phase
    # by phase: of the trainer process, or of its GPU where it has one
    peak_memory_bytes: dict[Phase, Count] = field(default_factory=dict)
    micro_batch: Count = 0  # slices in memory at once, after out-of-memory halvings
    update_norm: Number | None = None  # L2 norm of the difference as sent
    rehearsal: Rehearsal | None = None  # of a canary only

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
        try:
            return validate(cls, values)
        except Misfits as misfits:
            raise _malformed(misfits) from None


def _malformed(misfits: Misfits) -> ContributionRefused:
    what, *names = "the report", *(str(part) for part in misfits.loc)
    if names[:1] == ["metrics"] and len(names) > 2:
        what, names = "a metric", names[2:]
    said = {
        "unknown": f"{what} has the unknown entry {names[-1][:64]!r}" if names else "",
        "missing": f"{what} has no entry {names[-1]}" if names else "",
        "unusable": f"{names[0][:64]} of {what} cannot be used" if names else "",
    }[misfits.kind]
    return ContributionRefused(
        f"the site's report is malformed: {said or 'it is no JSON object'}",
        "install the same version of fedfms at the site and the server",
        code="malformed-report",
    )
