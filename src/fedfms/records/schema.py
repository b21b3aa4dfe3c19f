"""The lines of records.jsonl: one JSON object each, in the order in which things happened.

    job            what runs, and the sites it was given to
    round_started  a round begins
    contribution   a site's answer to a round, or what kept it from being used
    judged         what the guard found when it compared a round's answers
    round_done     whose answers were used, and why others' were not
    evaluation     a site's scores of a finished model, or why there are none
    resumed        the server's process ended; what it had not finished is done again
    note           what happened to a site or to the run meanwhile
    job_done       how it ended

They hold what sites let out and nothing else. A field that is new gets a default here, and old
files are read as before; what changes the meaning of a field changes FORMAT.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    TypeAdapter,
)

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.verdict import Verdict
from fedfms.errors import ContributionRefused

FORMAT = 1  # of records.jsonl, in its record of the job


class Unreadable:
    """Stands for a contribution of another format than this version's."""


def _contribution(value: Any) -> Contribution | Unreadable | None:
    if value is None or isinstance(value, Contribution):
        return value
    try:
        return Contribution.from_dict(value)
    except ContributionRefused:
        return Unreadable()


def _plain(value: Contribution | Unreadable | None) -> dict[str, Any] | None:
    return value.to_dict() if isinstance(value, Contribution) else None


Count = Annotated[StrictInt, Field(ge=0)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Said = Annotated[
    Contribution | Unreadable | None, PlainValidator(_contribution), PlainSerializer(_plain)
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    record: str
    time: Seconds | None = None  # since 1970-01-01 UTC, when it was written


class JobRecord(_Record):
    """What runs where."""

    record: Literal["job"] = "job"
    format: int = FORMAT
    job_id: str | None = None  # FLARE's
    name: str | None = None
    started: Seconds | None = None
    fedfms_version: str | None = None  # of the server
    fedfms_revision: str | None = None  # commit that its package was made of, where it is known
    image: str | None = None  # digest of its container image, where it is known
    nvflare_version: str | None = None  # None: without FLARE
    recipe_sha256: str | None = None
    sites: tuple[str, ...] = ()
    answers_kept: StrictBool = False  # whether the server keeps answers, for fedfms verify


class RoundStarted(_Record):
    """The global model goes out."""

    record: Literal["round_started"] = "round_started"
    round: Count


class _Answer(_Record):
    contribution: Said = None
    receipt: dict[str, Any] | None = None  # contracts.receipt.Countersigned, as it came

    @property
    def said(self) -> Contribution | None:
        """The site's report, if there is one that can be read."""
        return self.contribution if isinstance(self.contribution, Contribution) else None

    @property
    def is_unreadable(self) -> bool:
        """Whether there is a report that cannot be read."""
        return isinstance(self.contribution, Unreadable)


class ContributionRecord(_Answer):
    """A site's answer to a round."""

    record: Literal["contribution"] = "contribution"
    round: Count
    site: str
    accepted: StrictBool
    reason: str | None = None  # why not accepted
    bytes_down: Count | None = None  # of tensors
    bytes_up: Count | None = None


class Judged(_Record):
    """What the guard of a round measured and found, of each training site that answered."""

    record: Literal["judged"] = "judged"
    round: Count
    acts: StrictBool  # whether the average follows it; else it is only recorded
    sites: tuple[Verdict, ...] = ()


class RoundDone(_Record):
    """A round is over."""

    record: Literal["round_done"] = "round_done"
    round: Count
    sites: tuple[str, ...] = ()  # whose answers were accepted
    missed: dict[str, str] = {}  # site: reason


class EvaluationRecord(_Answer):
    """A site's scores of a finished model."""

    record: Literal["evaluation"] = "evaluation"
    site: str
    model: str  # final, best
    reason: str | None = None  # why there is none
    pictures: tuple[str, ...] = ()  # relative to the file's folder


class Resumed(_Record):
    """A new process of the job at the server goes on; earlier lines of these rounds do not count.

    Evaluations of before do not count either.
    """

    record: Literal["resumed"] = "resumed"
    round: Count  # that is open; as many as there are rounds: the evaluation


NoteKind = Literal[
    "site_died",
    "site_back",
    "site_gone",
    "site_paused",  # and the run goes on without it at once
    "data_changed",
    "stopped_early",  # further rounds gave no better model
    "guarded",  # the guard of a round found something of the site
    "waits",
    "goes_on",
    "stopped",
    "ends",
]


class Note(_Record):
    """Something that a person who watches wants to know."""

    record: Literal["note"] = "note"
    kind: NoteKind
    site: str | None = None
    text: str  # a sentence


class JobDone(_Record):
    """How the job ended."""

    record: Literal["job_done"] = "job_done"
    status: Literal["completed", "aborted", "failed"]
    reason: str | None = None


Record = (
    JobRecord
    | RoundStarted
    | ContributionRecord
    | Judged
    | RoundDone
    | EvaluationRecord
    | Resumed
    | Note
    | JobDone
)

RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="record")])
