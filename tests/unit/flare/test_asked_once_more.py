"""A trainer that ended is asked once more; where none comes again, its end is what is told."""

from __future__ import annotations

import pytest
from nvflare.apis.fl_context import FLContext

from fedfms.errors import TrainerError
from fedfms.flare.executor import SiteExecutor


def ended(code: str) -> TrainerError:
    return TrainerError("it is over", "look in its log", code=code)


def asked(*codes: str) -> tuple[str, int]:
    """The code that is told of a trainer with these ends, and how often it was asked."""
    ends = [ended(code) for code in codes]

    def ask() -> None:
        raise ends.pop(0)

    with pytest.raises(TrainerError) as caught:
        SiteExecutor()._ask(ask, "train", FLContext())
    return caught.value.code, len(codes) - len(ends)


@pytest.mark.parametrize(
    ("codes", "told", "times"),
    [
        (("trainer-died", "no-trainer"), "trainer-died", 2),
        (("trainer-stopped", "no-trainer"), "trainer-stopped", 2),
        (("trainer-died", "trainer-hung"), "trainer-hung", 2),
        (("trainer-died", "trainer-died"), "trainer-died", 2),
        (("no-trainer", "trainer-died"), "no-trainer", 1),
        (("nonsense", "trainer-died"), "nonsense", 1),
    ],
)
def test_the_end_that_says_why_is_told(codes: tuple[str, ...], told: str, times: int) -> None:
    assert asked(*codes) == (told, times)
