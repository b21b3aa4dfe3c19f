"""Which FLARE the touches were read in, and how a touch says that it met another one."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import nvflare

from fedfms.errors import FedfmsError

log = logging.getLogger(__name__)

# versions with which all tests of the assumptions ran
TESTED = ("2.9.0", "2.9.1rc5")

P = ParamSpec("P")
R = TypeVar("R")


class FlareChanged(FedfmsError):
    """The FLARE that is installed is not as the touch of it assumes."""

    default_code = "flare-changed"


@dataclass(frozen=True, slots=True)
class Assumption:
    """One thing of FLARE that is no public API and that we build on."""

    what: str  # a sentence
    holds: Callable[[], object]  # False, or any error: it does not hold

    def is_true(self) -> bool:
        """Whether the FLARE that is installed is so."""
        try:
            return bool(self.holds())
        except Exception:  # whatever an unknown version does
            return False


def rests_on(*assumptions: Assumption) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function look at its assumptions before it does anything.

    The function then raises FlareChanged where one does not hold.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for assumption in assumptions:
                if not assumption.is_true():
                    raise changed([assumption])
            return function(*args, **kwargs)

        return checked

    return decorate


def changed(broken: Sequence[Assumption]) -> FlareChanged:
    """The error for assumptions that do not hold."""
    return FlareChanged(
        f"NVFLARE {nvflare.__version__} is not as fedfms needs it: it does not hold that "
        + "; that ".join(one.what for one in broken),
        f"install a version that fedfms was tested with: pip install nvflare=={TESTED[0]}",
    )


def broken_assumptions(*modules: str) -> list[Assumption]:
    """The assumptions of modules beside this one that do not hold.

    Args:
        modules: such as "process"; only these are imported.
    """
    broken = []
    for name in modules:
        module = importlib.import_module(f"{__package__}.{name}")
        values = [value for value in vars(module).values() if isinstance(value, Assumption)]
        broken += [assumption for assumption in values if not assumption.is_true()]
    return broken


def check(*modules: str) -> None:
    """Look at all assumptions of a process that starts; a word in its log on an untested FLARE.

    Args:
        modules: the touches of that process.

    Raises:
        FlareChanged: names every assumption that does not hold.
    """
    if nvflare.__version__ not in TESTED:
        log.warning(
            "NVFLARE %s was not tested with this version of fedfms (tested: %s)",
            nvflare.__version__,
            ", ".join(TESTED),
        )
    if broken := broken_assumptions(*modules):
        raise changed(broken)


def uses(function: Any, *names: str) -> bool:
    """Whether a function's code looks these names up: globals, attributes, methods."""
    code = function.__code__
    inner = [one for one in code.co_consts if hasattr(one, "co_names")]
    known = {*code.co_names, *(name for one in inner for name in one.co_names)}
    return set(names) <= known


def takes(function: Any, *names: str) -> bool:
    """Whether a function's positional parameters are these, in this order; `self` left out."""
    code = function.__code__
    given = [name for name in code.co_varnames[: code.co_argcount] if name != "self"]
    return given == list(names)
