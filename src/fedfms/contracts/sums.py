"""Words of a secure sum between the server and a site's trainer; the FLARE client passes them on.

A round of sums has four steps, in each of which the server asks the trainers (exchange/secure_sum):
their keys, their sealed shares for one another, to take what the others sealed for them, and, when
the answers are there, what takes the masks off their sum.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fedfms.bounded import decode_json
from fedfms.contracts.decode import validate
from fedfms.contracts.receipt import TrainerKey, TrainerSignature, canonical
from fedfms.contracts.wire import Count, Name

LEAST_SITES = 3  # of two, each would know what the other one sent
MOST_SITES = 100  # what one line of the trainer's socket holds
KEYS = b"fedfms keys of a secure sum\n"  # signed before what is signed

Key = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]  # X25519, public
Share = Annotated[str, StringConstraints(pattern="^[0-9a-f]{132}$")]  # of a secret, 66 bytes
Sealed = Annotated[str, StringConstraints(pattern="^[0-9a-f]{296}$")]  # two shares and a tag


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundKeys:
    """One trainer's keys of one round, made for it alone."""

    site: Name
    job: Name
    round: Count
    sealing: Key  # of what the others send it through the server
    masking: Key  # of the masks that it has in common with each other
    trainer: TrainerKey  # its own, which signs; peers pin it
    signature: TrainerSignature = "0" * 128  # over KEYS and `canonical`

    @property
    def canonical(self) -> bytes:
        """What is signed, after KEYS: all but the signature."""
        values = dataclasses.asdict(self)
        del values["signature"]
        return canonical(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShares:
    """A share of each of one trainer's two secrets, which its receiver alone can read."""

    sender: Name
    receiver: Name
    data: Sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A share of one secret of a site: of its own mask if its answer arrived, else of its key."""

    site: Name
    share: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsAsk:
    """Server to trainer: the next step of a round's sum."""

    step: Literal["keys", "shares", "take", "unmask"]
    job: Name
    round: Count
    keys: Annotated[tuple[RoundKeys, ...], Field(max_length=MOST_SITES)] = ()  # of all, for shares
    sealed: Annotated[tuple[SealedShares, ...], Field(max_length=MOST_SITES)] = ()  # for this site
    arrived: Annotated[tuple[Name, ...], Field(max_length=MOST_SITES)] = ()  # whose answers are in

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Any) -> SumsAsk:
        """Read what came over a wire.

        Raises:
            Misfits: an entry is unknown, missing, or not of its kind.
        """
        return validate(cls, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsAnswer:
    """Trainer to server: what the step asked for."""

    keys: RoundKeys | None = None
    sealed: Annotated[tuple[SealedShares, ...], Field(max_length=MOST_SITES)] = ()
    pieces: Annotated[tuple[Piece, ...], Field(max_length=MOST_SITES)] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Any) -> SumsAnswer:
        """See `SumsAsk.from_dict`."""
        return validate(cls, values)


def _plain(message: SumsAsk | SumsAnswer) -> dict[str, Any]:
    return dict(decode_json(json.dumps(dataclasses.asdict(message)), "the message"))
