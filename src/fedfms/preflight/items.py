"""A list of checks, each with one line of outcome; a check whose ground is missing is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fedfms.errors import FedfmsError

log = logging.getLogger(__name__)

Status = Literal["PASS", "FAIL", "WARN", "SKIP"]


@dataclass(frozen=True, slots=True)
class Item:
    """The outcome of one check.

    FAIL means that this site cannot take part as it is; WARN that it can, and that somebody should
    look; SKIP that it could not be looked at here.
    """

    code: str  # which check; stable, for scripts
    status: Status
    text: str
    fix: str = ""
    reason: str = ""  # code of the error that failed it


class Worry(Exception):
    """What a check raises for WARN."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.text, self.fix = text, fix


class NotHere(Exception):
    """What a check raises for SKIP: this container cannot see it, or it is not asked for."""


Look = Callable[[], "str | list[Item]"]


class Checklist:
    """Runs checks one after another and keeps their outcomes."""

    def __init__(self, on_item: Callable[[Item], None] | None = None) -> None:
        self.items: list[Item] = []
        self._on_item = on_item

    def check(self, code: str, look: Look, needs: Sequence[str] = ()) -> None:
        """Run one check.

        Args:
            code: its name.
            look: returns what is well, for PASS, or the lines of its findings; raises FedfmsError
                for FAIL, Worry, or NotHere.
            needs: names of checks without which this one says nothing.
        """
        for item in self._outcome(code, look, [need for need in needs if not self._holds(need)]):
            self.items.append(item)
            if self._on_item is not None:
                self._on_item(item)

    def _holds(self, code: str) -> bool:
        found = [item for item in self.items if item.code == code]
        return bool(found) and all(item.status in ("PASS", "WARN") for item in found)

    def _outcome(self, code: str, look: Look, missing: Sequence[str]) -> Iterator[Item]:
        if missing:
            yield Item(code, "SKIP", f"not looked at before {' and '.join(missing)} passed")
            return
        try:
            found = look()
        except FedfmsError as error:
            yield Item(code, "FAIL", error.problem, error.fix, error.code)
        except Worry as worry:
            yield Item(code, "WARN", worry.text, worry.fix)
        except NotHere as why:
            yield Item(code, "SKIP", str(why))
        except Exception as error:  # a check must not end the others, nor show a traceback
            log.info("check %s", code, exc_info=True)  # which --verbose shows
            yield Item(
                code,
                "FAIL",
                f"could not be checked: {type(error).__name__}: {error}",
                "run fedfms --verbose check-site and send the coordinator what it says",
                "unexpected",
            )
        else:
            if isinstance(found, str):
                yield Item(code, "PASS", found)
            else:
                yield from found
