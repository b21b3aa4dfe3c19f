"""What a site does now: what it says while it works on a task, and what people see of it.

Nothing here is of a case: phases, counts, times, and the scores that the site let out before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedfms.contracts.decode import validate
from fedfms.contracts.wire import Count

# What a site is at, in the order in which a round goes on; a site goes back only where it is asked
# again. Texts for people: PHASE_WORDS.
SitePhase = Literal[
    "waits",  # connected; no task has reached it yet, or the run waits for other sites
    "download",  # the task is on its way: the model travels to it
    "start",  # its FLARE client has the task and waits for its trainer
    "prepare",  # the trainer reads and prepares images; done of total cases
    "evaluate",  # it scores the model that it received; done of total slices
    "train",  # done of total steps of this round
    "upload",  # the trainer is done: the answer travels to the server
    "answered",  # the server took its answer; it waits for the others
    "failed",  # its answer was an error or was refused; see `failure`
    "paused",  # its own people paused it; see `failure` for their reason, if there is one
    "gone",  # the server does not hear from it; `heard` says since when
]

# from worst to best: the order in which many sites are shown
WORST_FIRST: tuple[SitePhase, ...] = (
    *("failed", "gone", "paused", "start", "download", "waits"),
    *("prepare", "evaluate", "train", "upload", "answered"),
)

PHASE_WORDS: Mapping[SitePhase, str] = {
    "waits": "waits for its task",
    "download": "receives the model",
    "start": "waits for its trainer",
    "prepare": "prepares images",
    "evaluate": "evaluates",
    "train": "trains",
    "upload": "sends its answer",
    "answered": "has answered",
    "failed": "failed",
    "paused": "is paused",
    "gone": "is gone",
}

GpuState = Literal[
    "present",  # the trainer computes on a GPU, and it answers
    "lost",  # the trainer had a GPU or must have one, and it does not answer any more
    "none",  # the trainer computes on the processor
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProgress:
    """A site's FLARE client to the server, while a task runs there; a few each minute.

    It is lost where the line is bad, and nothing follows from it but what people see.
    """

    kind: Literal["train", "evaluate"]
    round: Count  # from 0; for "evaluate" the number of rounds trained
    phase: Literal["start", "prepare", "evaluate", "train", "upload"]
    done: Count = 0
    total: Count = 0  # 0 where it is not known
    gpu: GpuState | None = None  # None: not known (yet)

    @classmethod
    def from_dict(cls, values: Any) -> SiteProgress:
        """Read what came over a wire; entries of a later version are passed over.

        Raises:
            Misfits: an entry is missing or not of its kind.
        """
        return validate(cls, values, unknown="ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNow:
    """One site in a running job, as the server knows it; part of `flare.progress.Event`.

    All times are seconds since 1970-01-01 UTC by the server's clock: compare them with
    `Event.time`, not with a clock of here. Fields that are None are not known (yet).
    """

    name: str
    phase: SitePhase
    since: float | None = None  # when this phase began there
    done: Count = 0  # of total, in this phase: cases, slices or steps, see SitePhase
    total: Count = 0  # 0 where it is not known, or where the phase counts nothing
    told: float | None = None  # when it said how much is done; it has gone on since
    heard: float | None = None  # its last sign of life: heart beat, message or answer
    connected: bool = True  # whether the server has a connection to its FLARE client now
    # why its last answer could not be used or why it is gone: one public sentence, no name of a
    # file or a case. None as soon as it works on a task again
    failure: str | None = None
    role: Literal["train", "holdout"] | None = None
    # seconds of its last answered round by phase (download, prepare, evaluate, train, exchange,
    # upload), and `round`: from the task to the answer. Those that are known
    pace: Mapping[str, float] = field(default_factory=dict)
    dice: float | None = None  # last one let out, mean over its classes, in [0, 1]
    loss: float | None = None  # of its last round of training
    bytes_down: int | None = None  # of tensors, in the last round it answered
    bytes_up: int | None = None
    peak_memory: int | None = None  # bytes; of its trainer, or of its GPU, in that round
    gpu: GpuState | None = None
    missed: int = 0  # rounds of those that are over in which no answer of it was used

    @property
    def share(self) -> float | None:
        """How much of its phase is done, in [0, 1]; None where it is not counted."""
        return min(1.0, self.done / self.total) if self.total > 0 else None
