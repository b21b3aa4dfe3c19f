"""What a site was asked for and what left it, for its own people: a line each, and a page of them.

    WORK/what-left.jsonl     a line for each task that came, and for what became of it; on a full
                             disk the lines wait, and are written with the next one
    WORK/site-page.html      the same to be read, made anew after each line

Counts, means that passed the door, codes: no name of a file, a case or a patient. Written by the
trainer, in its private folder; nothing here decides or delays what leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from torch import Tensor

from fedfms.contracts.codes import CODES
from fedfms.contracts.contribution import Metric
from fedfms.contracts.messages import Task
from fedfms.errors import DoorClosed, FedfmsError
from fedfms.exchange.tensors import payload_bytes
from fedfms.files import append_whole, write_whole
from fedfms.trainer.kept import Outcome

log = logging.getLogger(__name__)

LEDGER, PAGE = "what-left.jsonl", "site-page.html"
MAX_BYTES = 8_000_000  # of the ledger; then its older half goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A task that came, or what became of it."""

    time: float  # seconds since 1970-01-01 UTC
    event: Literal["asked", "left", "refused", "failed", "stopped"]
    job: str
    job_name: str | None = None
    submitter: str | None = None  # as the server says
    kind: Literal["train", "evaluate"]
    round: int  # from 0; of an evaluation the rounds trained
    rounds: int  # of the recipe
    model: str
    method: str
    recipe_sha256: str
    holdout: bool = False
    canary: bool = False  # then all numbers that left are 0
    # of what left
    seconds: float | None = None  # from the task to the answer
    tensors: int = 0
    values: int = 0  # numbers in them
    bytes: int = 0
    precision: str = ""
    training_cases: int = 0  # 0 where the report says none
    training_slices: int = 0
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()
    pictures: int = 0
    # of what did not
    code: str = ""  # of fedfms.contracts.codes, or the class of an exception

    @property
    def told(self) -> tuple[Metric, ...]:
        """Scores that left with their value."""
        return tuple(metric for metric in self.metrics if metric.mean is not None)

    @property
    def withheld(self) -> int:
        """Scores of which only the name left: of too few cases, or without a value."""
        return len(self.metrics) - len(self.told)

    @property
    def why(self) -> str:
        """What the code means."""
        return CODES.get(self.code, self.code)


_ENTRY = TypeAdapter(Entry)


class Ledger:
    """Keeps the lines, and has the page made anew.

    Args:
        work: the site's private folder.
        render: makes the page of all entries, the oldest first.
    """

    def __init__(self, work: Path, render: Any) -> None:
        self._path = work / LEDGER
        self._page = work / PAGE
        self._render = render
        self._began: dict[str, float] = {}  # job -> when its task came
        self._held = b""  # lines that wait for room on the disk

    def asked(self, task: Task, holdout: bool) -> None:
        """A task came."""
        self._began = {task.job: time.time()}
        self._add(_entry(task, "asked", holdout))

    def left(self, task: Task, holdout: bool, outcome: Outcome) -> None:
        """An answer passed the door and lies in the shared folder."""
        said = outcome.contribution
        self._add(
            dataclasses.replace(
                _entry(task, "left", holdout),
                **_tensors(outcome.tensors),
                seconds=time.time() - self._began.get(task.job, time.time()),
                training_cases=said.training_cases,
                training_slices=said.training_slices,
                loss=said.loss,
                metrics=said.metrics,
                pictures=len(outcome.pictures),
            )
        )

    def not_left(self, task: Task, holdout: bool, error: BaseException) -> None:
        """Nothing left but the public part of an error."""
        event: Literal["refused", "failed", "stopped"] = "failed"
        code = type(error).__name__
        if isinstance(error, FedfmsError):
            code = error.code
            event = "refused" if isinstance(error, DoorClosed) else event
            event = "stopped" if code == "aborted" else event
        self._add(dataclasses.replace(_entry(task, event, holdout), code=code))

    def _add(self, entry: Entry) -> None:
        """Whatever goes wrong here, the answer leaves or stays as it would."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_size > MAX_BYTES:
                    lines = self._path.read_bytes().splitlines(keepends=True)
                    write_whole(self._path, b"".join(lines[len(lines) // 2 :]))
            self._held += json.dumps(_ENTRY.dump_python(entry, mode="json")).encode() + b"\n"
            append_whole(self._path, self._held)
            self._held = b""
            write_whole(self._page, self._render(read_ledger(self._path.parent)))
        except Exception as error:
            log.warning("the site's page could not be written: %s", type(error).__name__)


def read_ledger(work: Path) -> list[Entry]:
    """All entries, the oldest first; a line that cannot be read is passed over."""
    found = []
    with contextlib.suppress(OSError):
        for line in (work / LEDGER).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(_ENTRY.validate_json(line))
    return found


def _entry(task: Task, event: Any, holdout: bool) -> Entry:
    return Entry(
        time=time.time(),
        event=event,
        job=task.job,
        job_name=task.job_name,
        submitter=task.submitter,
        kind=task.kind,
        round=task.round,
        rounds=task.recipe.rounds_to_run,
        model=task.model,
        method=task.recipe.method,
        recipe_sha256=task.recipe.sha256,
        holdout=holdout,
        canary=task.recipe.canary,
    )


def _tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kinds: Sequence[str] = sorted(
        {str(one.dtype).removeprefix("torch.") for one in tensors.values()}
    )
    return {
        "tensors": len(tensors),
        "values": sum(one.numel() for one in tensors.values()),
        "bytes": payload_bytes(tensors),
        "precision": ", ".join(kinds),
    }
