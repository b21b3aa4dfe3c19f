"""A receipt: what left a site in one answer, when, made of what, and who had asked for it.

The trainer makes one for each answer that passed its door, signs it with a key of its own, and
writes it into the site's log before the answer is handed out. Each holds the hash of the one before
it at this site, so that none can be taken out or put in later. The site's FLARE client countersigns
with the key of its certificate, by which the server knows the site. Hashes of receipts and
signatures are over one form of it, `canonical`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fedfms.bounded import decode_json
from fedfms.contracts.contribution import MAX_PICTURES, Contribution, ModelName
from fedfms.contracts.decode import validate
from fedfms.contracts.wire import Count, Name, Number, Seconds, Sha256

FIRST = "0" * 64  # `previous` of a site's first receipt
# signed with what is signed, so that no signature fits anything else
TRAINERS, CLIENTS = b"fedfms receipt\n", b"fedfms receipt, countersigned\n"
REMOVALS = b"fedfms receipts removed\n"
ENDS = b"fedfms receipts end\n"

MOST_KEYS = 100  # of one trainer; a new one is made where its volume is lost

Image = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:/+-]{0,255}$")]
TrainerKey = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]  # Ed25519, public
TrainerSignature = Annotated[str, StringConstraints(pattern="^[0-9a-f]{128}$")]  # Ed25519
CertificateSignature = Annotated[str, StringConstraints(pattern="^([0-9a-f]{2}){64,1024}$")]
Certificate = Annotated[
    str, StringConstraints(pattern="^-----BEGIN CERTIFICATE-----\n", max_length=16384)
]


def canonical(values: Mapping[str, Any]) -> bytes:
    """The one form in which JSON values are hashed and signed.

    Keys in order, no spaces, ASCII; floats as Python writes them, the shortest that reads back
    alike.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def report_sha256(report: Contribution) -> str:
    """SHA-256 of a site's report in its canonical form, the same at site and server."""
    values = Contribution.from_dict(report.to_dict()).to_dict()  # 1 and 1.0 are one number
    return hashlib.sha256(canonical(values)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What left in one answer; build it by `from_dict`."""

    format: Literal[1] = 1
    number: Count  # of this site's receipts, from 0
    previous: Sha256  # of the one before, or FIRST
    time: Seconds  # since 1970-01-01 UTC, by the site's clock
    site: Name
    # who asked, as the server says
    job: Name  # FLARE's id of the job, which is the run's
    job_name: Name | None = None
    submitter: Name | None = None
    # for what
    kind: Literal["train", "evaluate"]
    role: Literal["train", "holdout"]
    round: Count  # from 0; for "evaluate" the number of rounds trained
    rounds: Count  # of the recipe
    model: ModelName
    canary: bool = False  # then all numbers that left are 0
    # what it was made of
    recipe_sha256: Sha256
    backbone_sha256: Sha256
    policy_sha256: Sha256  # of the site's privacy.json as it was when the task began
    package_version: Name
    image: Image | None = None  # digest of the trainer's container image, where it is known
    model_in_sha256: Sha256  # fingerprint of the tensors that came (exchange/tensors.py)
    # what left
    report_sha256: Sha256
    tensors_sha256: Sha256 | None = None  # fingerprint of the difference; None: there was none
    norm: Number | None = None  # L2 norm of all its values together
    values: Count = 0  # numbers in it
    payload_bytes: Count = 0  # of them
    pictures: Annotated[tuple[Sha256, ...], Field(max_length=MAX_PICTURES)] = ()
    same_as: Sha256 | None = None  # hash of the receipt of the same answer, given before

    @property
    def canonical(self) -> bytes:
        """What is hashed and signed."""
        return canonical(dataclasses.asdict(self))

    @property
    def sha256(self) -> str:
        """The hash by which the next receipt names this one."""
        return hashlib.sha256(self.canonical).hexdigest()

    @classmethod
    def from_dict(cls, values: Any) -> Receipt:
        """Read what came over a wire or from a disk.

        Raises:
            Misfits: an entry is unknown, missing, or not of its kind.
        """
        return validate(cls, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedReceipt:
    """A receipt as the trainer gives it and logs it."""

    receipt: Receipt
    key: TrainerKey
    signature: TrainerSignature  # over TRAINERS and the receipt's canonical form

    @property
    def canonical(self) -> bytes:
        """What the FLARE client countersigns, and a line of the site's log."""
        return canonical(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Any) -> SignedReceipt:
        """See `Receipt.from_dict`."""
        return validate(cls, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Countersigned:
    """A receipt as it goes to the server beside the answer, and as records keep it."""

    signed: SignedReceipt
    certificate: Certificate  # of the site's FLARE client, PEM
    signature: CertificateSignature  # over CLIENTS and the signed receipt's canonical form

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        values = dataclasses.asdict(self)
        return dict(decode_json(json.dumps(values), "the receipt"))

    @classmethod
    def from_dict(cls, values: Any) -> Countersigned:
        """See `Receipt.from_dict`."""
        return validate(cls, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """The first line of a site's log of which old days were removed; the chain goes on after it."""

    until: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")]  # first day kept, UTC
    time: Seconds  # of the removal
    number: Count  # of the first receipt after it
    previous: Sha256  # of the last that was removed
    key: TrainerKey
    signature: TrainerSignature = "0" * 128  # over REMOVALS and `canonical`

    @property
    def canonical(self) -> bytes:
        """What is signed: all but the signature."""
        values = dataclasses.asdict(self)
        del values["signature"]
        return canonical({"removed": values})


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How far a site's log goes, in a file beside it: what is cut off its end is missed by this."""

    number: Count  # of the receipt that comes next
    previous: Sha256  # of the last one, or FIRST
    since: Count = 0  # the first receipt that was written while there was such a file
    keys: Annotated[tuple[TrainerKey, ...], Field(max_length=MOST_KEYS)]  # of receipts, in order
    key: TrainerKey  # the last of them
    signature: TrainerSignature = "0" * 128  # over ENDS and `canonical`

    @property
    def canonical(self) -> bytes:
        """What is signed: all but the signature."""
        values = dataclasses.asdict(self)
        del values["signature"]
        return canonical({"end": values})

    @classmethod
    def from_dict(cls, values: Any) -> End:
        """See `Receipt.from_dict`."""
        return validate(cls, values)
