"""What a site keeps of a run, so that a round that is asked for again is answered alike.

FLARE may ask twice: the server's process or the site's FLARE client ended before an answer arrived.
In the site's private folder, by run:

    WORK/runs/JOB/
        answer-train/ …      the last answer of each kind, as it passed the door
        learnt-0003/ …       what learns here and does not travel, after round 3; of two rounds

An answer is given again to the same request under the same configuration and policy. It is not
computed twice: noise that was added is not drawn anew, and nothing more leaves than before. A
round that has to be computed again begins where it began the first time, with the optimizer's
moments (`optimizer_state: keep`) and the tensors that stay as the round before left them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfms.bounded import read_json
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.messages import Task
from fedfms.errors import CheckpointError, FedfmsError
from fedfms.exchange.tensors import fingerprint, load_tensors, save_tensors
from fedfms.files import is_as_sealed, seal, whole_folder

log = logging.getLogger(__name__)

RUNS = "runs"
KEPT_ROUNDS = 2
KEPT_RUNS = 4  # of this site; older ones are removed when a run is new here

_KEY, _CONTRIBUTION, _TENSORS = "key", "contribution.json", "tensors.safetensors"
_STAYING, _OPTIMIZER, _REQUEST = "staying.safetensors", "optimizer.pt", "request"
_UNSENT = "unsent.safetensors"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What leaves the site of one task; it has passed the door."""

    contribution: Contribution
    tensors: dict[str, Tensor]
    pictures: list[bytes]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a round left that does not travel."""

    round: int
    staying: dict[str, Tensor]
    optimizer: dict[str, Any] | None  # its state_dict; None where it does not outlive the round
    request: str = ""  # which request it is of: trainer/history.py
    unsent: dict[str, Tensor] = field(default_factory=dict)  # what eight bits took; see `pass_door`


def request_key(task: Task, received: Mapping[str, Tensor], *files: Path) -> str:
    """Which request it is: equal for two that have to be answered alike.

    Args:
        received: the model that came.
        files: of the site, on which an answer depends.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(task), sort_keys=True).encode())
    digest.update(fingerprint(received).encode())
    for file in files:
        with contextlib.suppress(OSError):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class KeptRun:
    """One run's folder at the site."""

    def __init__(self, work: Path, job: str) -> None:
        self._runs = work / RUNS
        self._folder = self._runs / job

    def begin(self) -> None:
        """A run that is new to this process: make room for it."""
        with contextlib.suppress(OSError):
            self._runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            others = [path for path in self._runs.iterdir() if path != self._folder]
            others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for old in others[KEPT_RUNS - 1 :]:
                shutil.rmtree(old, ignore_errors=True)

    def forget(self) -> None:
        """Remove all of it.

        Raises:
            OSError: it could not be removed.
        """
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def answer(self, task: Task, key: str) -> Outcome | None:
        """The answer that was given to the same request, if it was the last of its kind."""
        folder = self._answer_folder(task)
        try:
            if (folder / _KEY).read_text() != key:
                return None
            said = read_json(folder / _CONTRIBUTION)
            tensors = folder / _TENSORS
            return Outcome(
                Contribution.from_dict(said),
                load_tensors(tensors) if tensors.exists() else {},
                [path.read_bytes() for path in sorted(folder.glob("*.png"))],
            )
        except (OSError, ValueError, FedfmsError):
            return None

    def keep_answer(self, task: Task, key: str, outcome: Outcome) -> None:
        """Keep an answer in the place of the last of its kind."""
        with self._telling(), whole_folder(self._answer_folder(task), replace=True) as folder:
            (folder / _CONTRIBUTION).write_text(json.dumps(outcome.contribution.to_dict()))
            if outcome.tensors:
                save_tensors(folder / _TENSORS, outcome.tensors, None)  # with its checksum
            for number, picture in enumerate(outcome.pictures):
                (folder / f"{number:02d}.png").write_bytes(picture)
            (folder / _KEY).write_text(key)

    def learnt_before(self, round_number: int) -> Learnt | None:
        """What the last round before this one left; None before the first.

        Raises:
            CheckpointError: code damaged-model, once: it is not what was written. The next round
                then goes on from what the round before it left.
        """
        for folder in self._learnt():
            if (number := int(folder.name[7:])) < round_number:
                if not is_as_sealed(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    raise CheckpointError(
                        f"what this site kept of round {number} in {self._folder} is damaged",
                        "look at that disk; the next round goes on from what is whole",
                        code="damaged-model",
                    )
                staying, optimizer = folder / _STAYING, folder / _OPTIMIZER
                request, unsent = folder / _REQUEST, folder / _UNSENT
                return Learnt(
                    number,
                    load_tensors(staying) if staying.exists() else {},
                    torch.load(optimizer, map_location="cpu", weights_only=True)
                    if optimizer.exists()
                    else None,
                    request.read_text() if request.exists() else "unknown",
                    load_tensors(unsent) if unsent.exists() else {},
                )
        return None

    def keep_learnt(self, learnt: Learnt) -> None:
        """Keep what a round left, and of earlier ones the last."""
        if not learnt.staying and learnt.optimizer is None and not learnt.unsent:
            return
        place = self._folder / f"learnt-{learnt.round:04d}"
        with self._telling(), whole_folder(place, replace=True) as folder:
            if learnt.staying:
                save_tensors(folder / _STAYING, learnt.staying, "fp32")
            if learnt.unsent:
                save_tensors(folder / _UNSENT, learnt.unsent, "fp32")
            if learnt.optimizer is not None:
                data = io.BytesIO()  # torch calls a full disk a RuntimeError
                torch.save(learnt.optimizer, data)
                (folder / _OPTIMIZER).write_bytes(data.getbuffer())
            (folder / _REQUEST).write_text(learnt.request)
            seal(folder)
        # later rounds are of a run that was put back to an earlier one, from the server's archive
        later = [path for path in self._learnt() if int(path.name[7:]) > learnt.round]
        for old in [*later, *self._learnt()[len(later) + KEPT_ROUNDS :]]:
            shutil.rmtree(old, ignore_errors=True)

    def _learnt(self) -> list[Path]:
        """Folders of rounds, the latest first."""
        found = self._folder.glob("learnt-[0-9]*")
        return sorted(found, key=lambda path: int(path.name[7:]), reverse=True)

    def _answer_folder(self, task: Task) -> Path:
        kind = "train" if task.kind == "train" else f"evaluate-{task.model}"
        return self._folder / f"answer-{kind}"

    @contextlib.contextmanager
    def _telling(self) -> Any:
        """A full disk here does not keep an answer from leaving."""
        try:
            yield
        except OSError as error:
            log.warning(
                "this round could not be kept (%s): if it is asked for again, it is computed again",
                error.strerror,
            )
