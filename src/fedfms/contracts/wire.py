"""Types of values that cross a wire: no free text passes, a text is a name, a code or a hash."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}$")]
_NAME = TypeAdapter(Name)
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

Count = Annotated[int, Field(ge=0, lt=2**53)]  # what every JSON reader keeps exactly
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=2**37, allow_inf_nan=False)]  # to the year 6325

MAX_NAMES = 1000  # in one list
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)]


def plain_name(value: Any) -> str | None:
    """The value if it is a Name, else None."""
    try:
        return _NAME.validate_python(value, strict=True)
    except ValidationError:
        return None
