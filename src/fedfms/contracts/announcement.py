"""What a site announces: what it can do, by its site.yml and policy as they are now.

The trainer fills it in (trainer/announce.py) and answers a ping with it, the site's FLARE client
hands it on, and the coordinator reads it. A new field is declared here and filled in there. A
reader passes over fields that it does not know, as of a newer site, and takes the defaults of those
that an older site does not tell.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fedfms.bounded import decode_json
from fedfms.contracts.decode import validate
from fedfms.contracts.now import GpuState
from fedfms.contracts.policy import Bounds
from fedfms.contracts.receipt import TrainerKey
from fedfms.contracts.site import Reading
from fedfms.contracts.wire import MAX_NAMES, Code, Count, Name, Names, Seconds, Word

PAUSED = "paused"  # fault of a site that takes no task for now
Device = Literal["cpu", "cuda"]
Millimetres = Annotated[float, Field(gt=0, lt=1e4)]
Rule = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}(:-?[0-9.e+-]{1,20}){2}$")]


@dataclass(frozen=True, slots=True)
class Slicing:
    """How a site makes pictures of its images: what sites should agree on and no recipe says."""

    plane: Word | None  # axial, coronal, sagittal; None where the files are pictures, not volumes
    channels: Word  # gray, rgb, neighbours
    intensity: Rule  # the rule and its numbers, as `Intensity.from_text` reads them
    # mm between slices, rows and columns: the median over some cases, of two digits. None: too few
    # cases to tell, not known yet, or files without a voxel size
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | None = None
    contrasts: Names = ()  # that its cases have, a job names those that it learns from
    fills_contrasts: bool = False  # one that is missing is filled in there (missing_contrast)

    @classmethod
    def of(cls, site: Reading, spacing_mm: tuple[float, float, float] | None = None) -> Slicing:
        """What a site.yml says."""
        rule = site.intensity
        numbers = (rule.center, rule.width) if rule.rule == "window" else rule.bounds
        return cls(
            plane=None if site.format == "image" else site.plane,  # pictures lie in no plane
            channels=site.channels,
            intensity=":".join([rule.rule, *(f"{number:g}" for number in numbers)]),
            spacing_mm=spacing_mm,
            contrasts=tuple(site.contrasts),
            fills_contrasts=site.missing_contrast != "refuse",
        )


Noise = Annotated[float, Field(ge=0, le=1e9)]


@dataclass(frozen=True, slots=True)
class NoisedSums:
    """Sums with noise that left, alike; the fields of `fedfms.exchange.account.Noised`."""

    noise: Noise
    rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, slots=True)
class PrivacySpent:
    """What a site's training has cost, where noise left or is demanded (trainer/budget.py)."""

    unit: Literal["patient", "site"]
    epsilon: Annotated[float, Field(ge=0, le=1e3)] | None  # None: infinite
    limit: Annotated[float, Field(gt=0, le=1e6)] | None  # None: the policy sets none
    delta: Annotated[float, Field(gt=0, lt=1)]
    # what it is the epsilon of, so that who asks for a run sees what it would be after it; None:
    # of too many kinds, or not told
    let_out: Annotated[tuple[NoisedSums, ...], Field(max_length=50)] | None = None
    round_noise: Noise = 0.0  # of a round by a recipe that has none itself


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a site says of itself; where a file of it cannot be used, that and no more."""

    site: Name
    version: Name | Literal[""] = ""  # of fedfms in its trainer; empty where nothing is known
    busy: bool = False  # with a task
    fault: Code | None = None  # code of what keeps it from taking part
    classes: Names = ()  # that the site annotates
    not_annotated: Names = ()  # that it knows and never drew
    methods: Names = ()  # that its policy allows, whether or not the reader knows them
    max_rounds: Count = 0  # that its policy allows
    device: Device | None = None  # what torch computes on there
    slicing: Slicing | None = None  # None: not told, as by a trainer of an older version
    # classes that have a label value in common there
    overlapping: Annotated[tuple[tuple[Name, Name], ...], Field(max_length=MAX_NAMES)] = ()
    # until when the site's certificate is valid, in seconds since 1970-01-01 UTC; its FLARE client
    # adds it. None: not told, as by a kit of an older version
    certificate_ends: Seconds | None = None
    gpu: GpuState | None = None  # whether its GPU is there now; None: not told
    bounds: Bounds | None = None  # what its policy allows of a recipe; None: not told
    # about how many slices it trains on, in one digit; 0: not known, or too few cases to tell
    about_slices: Count = 0
    few_patients: bool = False  # too few to train on by its policy; it may score all the same
    # where its policy limits what training may cost its patients, or noise left; empty: neither, or
    # not told
    privacy: Annotated[tuple[PrivacySpent, ...], Field(max_length=2)] = ()
    require_secure_sum: bool = False  # its policy lets nothing be trained without
    trainer_key: TrainerKey | None = None  # public, of the key that signs its receipts

    @property
    def ready(self) -> bool:
        """Whether a task can begin there."""
        return self.fault is None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, `ready` included."""
        values = {**dataclasses.asdict(self), "ready": self.ready}
        return dict(decode_json(json.dumps(values), "the announcement"))

    @classmethod
    def from_dict(cls, values: Any) -> Announcement:
        """Read what came over a wire.

        Raises:
            Misfits: a field that is known is missing or not of its type.
        """
        return validate(cls, values, unknown="ignore")
