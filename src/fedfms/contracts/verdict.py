"""What the guard of a round found of one site's difference; a word of the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedfms.contracts.wire import Count, Name, Number

# norm: far longer than the round's others; direction: points against the others; weight: of more
# slices than one site may count for; replay: an answer of an earlier round
Finding = Literal["norm", "direction", "weight", "replay"]

Size = Annotated[Number, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One training site in one round, as the server measured it."""

    site: Name
    norm: Size  # L2 norm of the difference as it came
    usual_norm: Size  # what the round's others let expect of a site of so many slices
    cosine: Number | None  # to the mean of the others, in [-1, 1]; None of one that is alone
    slices: Count  # that the site says it trained on
    counted_slices: Count  # that it counts for in the average, where slices are what counts
    factor: Size  # of its difference in the average; 1 as it came, 0 left out
    # where the recipe's weigh_by counts something else: what the site says, what it counts for
    weight: Count | None = None
    counted_weight: Count | None = None
    findings: Annotated[tuple[Finding, ...], Field(max_length=4)] = ()

    @property
    def counts_for(self) -> int:
        """In the average, whatever is counted."""
        return self.counted_slices if self.counted_weight is None else self.counted_weight

    @property
    def times(self) -> float:
        """How many times the usual norm it has; 0 where there is nothing to compare."""
        return self.norm / self.usual_norm if self.usual_norm > 0 else 0.0
