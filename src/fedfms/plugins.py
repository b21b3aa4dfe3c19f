"""Parts that another distribution brings, found by entry point; loaded when one is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fedfms import __version__
from fedfms.errors import ConfigError

T = TypeVar("T")


def installed(group: str, own: Mapping[str, type[T]]) -> tuple[str, ...]:
    """Names of all parts there are, sorted; none of them is loaded."""
    return tuple(sorted({*own, *(point.name for point in entry_points(group=group))}))


def find_part(
    kind: type[T], group: str, own: Mapping[str, type[T]], what: str, name: str
) -> type[T]:
    """The class of a part, our own or another distribution's.

    Args:
        kind: the class that every part is of; a part's `name` is the name that it was found by.
        group: of entry points, such as "fedfms.methods".
        own: those of this package; no other distribution takes the place of one.
        what: is asked for, for the error: "method".
        name: of the part.

    Raises:
        ConfigError: unknown-part, naming what is installed; ambiguous-part, two of one name; or
            broken-part, naming the distribution that brings it. Others are not touched.
    """
    if name in own:
        return own[name]
    points = [*entry_points(group=group, name=name)]
    if not points:
        known = installed(group, own)
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"there is no {what} {name!r} here; installed: {', '.join(known)}",
            (f"did you mean {close[0]}? Otherwise " if close else "")
            + f"install the package that brings {name} at the server and every site",
            code="unknown-part",
        )
    if len(points) > 1:
        raise ConfigError(
            f"the {what} {name} is brought by {' and '.join(sorted(map(_origin, points)))}",
            "uninstall all of them but one",
            code="ambiguous-part",
        )
    part, problem = _load(points[0], kind)
    if part is None:
        raise ConfigError(
            f"the {what} {name} of {_origin(points[0])} cannot be used: {problem}",
            f"install a version of that package that fits fedfms {__version__}",
            code="broken-part",
        )
    return part


def _load(point: EntryPoint, kind: type[T]) -> tuple[type[T] | None, str]:
    """The class behind an entry point, or why there is none."""
    try:
        part: Any = point.load()
    except Exception as error:  # whatever another's code does when it is imported
        said = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {said}" if said else type(error).__name__
    if not isinstance(part, type) or not issubclass(part, kind):
        return None, f"{point.value} is no class of {kind.__module__}.{kind.__qualname__}"
    if getattr(part, "name", None) != point.name:
        return None, f"{point.value} calls itself {getattr(part, 'name', None)!r}"
    return part, ""


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
