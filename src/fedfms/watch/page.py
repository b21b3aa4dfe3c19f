"""The pages as HTML: whole, and the part of them that changes, for the script on the page."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from fedfms.pages.parts import environment
from fedfms.watch.known import Known
from fedfms.watch.serve import Answer
from fedfms.watch.view import general_notices, list_runs, view_run

RELOAD_SECONDS = 10  # where there is no JavaScript
KEPT_SECONDS = 1.0  # a page is made at most so often, whoever asks
_PATH = re.compile(r"/(?:run/(?P<run>[0-9a-fA-F-]{1,36})/)?(?P<part>now)?")


class Pages:
    """Answers paths: / is the list of runs, or the one run; /run/ID/ one of them; now its part.

    Args:
        known: gives what is known now.
    """

    def __init__(self, known: Callable[[], Known]) -> None:
        self._known = known
        self._lock = threading.Lock()  # templates and drawings are made by one thread at a time
        self._made: dict[str, tuple[float, Answer | None]] = {}

    def __call__(self, path: str) -> Answer | None:
        """The page at a path; None where there is none."""
        if _PATH.fullmatch(path) is None:
            return None
        with self._lock:
            at, answer = self._made.get(path, (0.0, None))
            if time.monotonic() - at > KEPT_SECONDS:
                answer = make(path, self._known(), time.time())
                if len(self._made) > 100:
                    self._made.clear()
                self._made[path] = time.monotonic(), answer
            return answer


def make(path: str, known: Known, now: float) -> Answer | None:
    """The page at a path.

    Args:
        now: seconds since 1970-01-01 UTC, by the clock that `known` goes by.
    """
    asked = _PATH.fullmatch(path)
    if asked is None:
        return None
    found: Any = None
    if asked["run"] is not None:
        runs = [run for run in known.runs if run.state.job_id.startswith(asked["run"].lower())]
        found = runs[0] if len(runs) == 1 else None
        if found is None:
            return None
    elif known.one and known.runs:
        found = known.runs[0]
    if found is not None:
        view = view_run(found, known, now)
        values: dict[str, Any] = {"run": view, "notices": view.notices, "title": _title(view)}
    else:
        notices = general_notices(known, now)
        values = {"run": None, "notices": notices, "title": "Runs", "known": known}
    values |= {
        "runs": list_runs(known),
        "listed": asked["run"] is not None,  # there is a list to go back to
        "reload": RELOAD_SECONDS,
        "script": Markup(_script()),  # a file of ours
    }
    whole = asked["part"] is None
    text = _templates().get_template("watch.html.j2" if whole else "now.html.j2").render(values)
    return Answer(text, _policy())


def _title(run: Any) -> str:
    rounds = next((one.value for one in run.tiles if one.share is not None), "")
    return " · ".join(filter(None, (rounds, run.name or run.id[:8], run.state)))


@functools.cache
def _templates() -> Any:
    return environment("fedfms.watch", "fedfms.pages")


@functools.cache
def _script() -> str:
    return (files("fedfms.watch") / "templates" / "watch.js").read_text(encoding="utf-8")


@functools.cache
def _policy() -> str:
    """Nothing from elsewhere; the one script is known by its hash."""
    digest = hashlib.sha256(_script().encode()).digest()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        f"script-src 'sha256-{base64.b64encode(digest).decode()}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
