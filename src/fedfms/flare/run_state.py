"""What a run has reached, kept at the server outside FLARE's folder of the job.

FLARE empties a job's folder when it deploys the job again, and removes it when the job's process
ends. So after each round everything that the rounds to come follow from is kept in

    WORKSPACE/runs/JOB/
        records.jsonl, recipe.json, pictures/   the same files as in the job's folder (hard links)
        round-0003/                             after 3 rounds; the last two of these
            state.json                          below, with the SHA-256 of the files beside it
            global_model.safetensors            the model that goes out next
            best_model.safetensors              where one was selected
            strategy.safetensors                where the strategy keeps something
        waiting/                                answers of the round that is open

A round's folder is there whole or not at all. A job's process that starts finds it, puts the files
back, and goes on with the round that was open. Components of the job take part by the event
`KEEP_STATE`, in which each adds what it needs, and read it back at the start of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.apis.fl_context import FLContext
from pydantic import TypeAdapter

from fedfms.bounded import read_json
from fedfms.errors import FederationError
from fedfms.files import file_sha256, link_whole, whole_folder
from fedfms.flare.job import read_recipe, result_folder
from fedfms.records import layout

if TYPE_CHECKING:
    from torch import Tensor  # the server's main process reads this module, and needs no torch

log = logging.getLogger(__name__)

KEEP_STATE = "fedfms.keep_state"  # event of a job's process, after ROUND_DONE was recorded
# event of a job's process: when the server heard of each site last, {name: seconds since 1970}
HEARD = "fedfms.heard"
NOTED = "fedfms.noted"  # event of a job's process, with a Note from the server's main process
JUDGED = "fedfms.judged"  # event of a job's process, with a Judged, when a round was summed up
RUNS = "runs"  # folder of the server's workspace
FORMAT = 1
KEPT_ROUNDS = 2  # the one before the last, too: for a disk that damaged the last

# bytes of a state: the guard remembers each difference of a run, 50 bytes each
_LARGEST_STATE = 64 << 20
_STATE, _STRATEGY = "state.json", "strategy.safetensors"
_KEEPING, _RESTORED = "fedfms_keeping", "fedfms_restored"  # of an FLContext


@dataclass(slots=True)
class RunState:
    """What is known after a number of rounds, beside the models."""

    rounds_done: int
    recipe_sha256: str
    format: int = FORMAT
    best_rounds: int | None = None  # rounds that the best model so far was trained
    # what the selector knows: exchange.selection.Reached as JSON types
    reached: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)  # what the guard of a round remembers
    sha256: dict[str, str] = field(default_factory=dict)  # of each file beside state.json


@dataclass(slots=True)
class Keeping:
    """What KEEP_STATE gathers."""

    state: RunState
    strategy: dict[str, Tensor] = field(default_factory=dict)  # its state_dict


_DECODE = TypeAdapter(RunState)


def runs_folder(workspace: Path, job_id: str) -> Path:
    """Where a run is kept."""
    return workspace / RUNS / job_id


def kept_folder(fl_ctx: FLContext) -> Path:
    """Where the run of a job's process is kept."""
    workspace = fl_ctx.get_engine().get_workspace()
    return runs_folder(Path(workspace.get_root_dir()), fl_ctx.get_job_id())


# ------------------------------------------------------------------------------- after a round


def start_keeping(fl_ctx: FLContext, rounds_done: int) -> Keeping:
    """What KEEP_STATE is about; the job's components add theirs."""
    keeping = Keeping(RunState(rounds_done, read_recipe(fl_ctx).sha256))
    fl_ctx.set_prop(_KEEPING, keeping, private=True, sticky=False)
    return keeping


def to_keep(fl_ctx: FLContext) -> Keeping:
    """What KEEP_STATE is about."""
    keeping: Keeping = fl_ctx.get_prop(_KEEPING)
    return keeping


def begin_to_keep(kept: Path, results: Path) -> bool:
    """Have the records of a run where they outlive its job's process, from the first line on.

    Returns:
        whether there are records of an earlier process, which `results` then holds too.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    kept.mkdir(parents=True, exist_ok=True)
    if (kept / layout.RECORDS).exists():
        link_whole(kept / layout.RECORDS, results / layout.RECORDS)
        _end_last_line(results / layout.RECORDS)
        return True
    (results / layout.RECORDS).touch()
    link_whole(results / layout.RECORDS, kept / layout.RECORDS)
    return False


def keep(kept: Path, results: Path, keeping: Keeping) -> None:
    """Keep what there is in the job's result folder, with its state.

    Args:
        kept: where the run is kept.
        results: the job's result folder.

    Raises:
        OSError: the disk is full or cannot be written; what was kept before is there still.
    """
    state = keeping.state
    kept.mkdir(parents=True, exist_ok=True)
    _share(results, kept)
    with whole_folder(_round_folder(kept, state.rounds_done), replace=True) as folder:
        for name in (layout.GLOBAL_MODEL, layout.BEST_MODEL):
            if (results / name).is_file() and (
                name != layout.BEST_MODEL or state.best_rounds is not None
            ):
                link_whole(results / name, folder / name)
        if keeping.strategy:
            from fedfms.exchange.tensors import save_tensors

            save_tensors(folder / _STRATEGY, keeping.strategy, None)
        state.sha256 = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        values = dataclasses.asdict(state)
        (folder / _STATE).write_text(json.dumps(values, indent=2, allow_nan=False))
    for old in _rounds(kept)[KEPT_ROUNDS:]:
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------ when it starts


@dataclass(frozen=True, slots=True)
class Restored:
    """What a job's process found of the run."""

    state: RunState
    folder: Path  # of the round

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of the files beside the state; none where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        from fedfms.exchange.tensors import load_tensors

        return load_tensors(path)

    def strategy(self) -> dict[str, Tensor]:
        """What the strategy had kept."""
        return self.tensors(_STRATEGY)


def restored(fl_ctx: FLContext) -> Restored | None:
    """What an earlier process of this job had reached, or None for a job that begins.

    The first call puts records, models and pictures back into the job's result folder.

    Raises:
        FederationError: code damaged-run; nothing of what was kept can be used.
    """
    known: tuple[Restored | None] | None = fl_ctx.get_prop(_RESTORED)
    if known is None:
        kept, results = kept_folder(fl_ctx), result_folder(fl_ctx)
        known = (restore(kept, results, read_recipe(fl_ctx).sha256),)
        fl_ctx.set_prop(_RESTORED, known, private=True, sticky=True)
    return known[0]


def restore(kept: Path, results: Path, recipe_sha256: str) -> Restored | None:
    """Put back what was kept of a run; see `restored`."""
    rounds = _rounds(kept)
    if not rounds:
        return None
    for folder in rounds:
        state = _read_state(folder, recipe_sha256)
        if state is None:
            log.error("what was kept of the run after %s is damaged", folder.name)
            continue
        for name in (layout.GLOBAL_MODEL, layout.BEST_MODEL):
            if (folder / name).is_file():
                link_whole(folder / name, results / name)
        _share(kept, results)
        _end_last_line(results / layout.RECORDS)
        return Restored(state, folder)
    raise FederationError(
        f"what was kept of this run in {kept} is damaged or of another recipe, and it cannot go on",
        "look at that disk; submit the job again, with --model where a model of it was fetched",
        code="damaged-run",
    )


def _read_state(folder: Path, recipe_sha256: str) -> RunState | None:
    """The state of a round whose files are as they were written; else None."""
    try:
        values: dict[str, Any] = read_json(folder / _STATE, _LARGEST_STATE)
        state = _DECODE.validate_python(values)
        whole = all(file_sha256(folder / name) == sha for name, sha in state.sha256.items())
    except (OSError, ValueError):
        return None
    is_ours = (state.format, state.recipe_sha256) == (FORMAT, recipe_sha256)
    return state if whole and is_ours and layout.GLOBAL_MODEL in state.sha256 else None


def _round_folder(kept: Path, rounds_done: int) -> Path:
    return kept / f"round-{rounds_done:04d}"


def _rounds(kept: Path) -> list[Path]:
    """Folders of rounds, the latest first."""
    return sorted(kept.glob("round-[0-9]*"), key=lambda path: int(path.name[6:]), reverse=True)


def rounds_kept(kept: Path) -> int:
    """How many rounds the run had done when it was last kept."""
    rounds = _rounds(kept)
    return int(rounds[0].name[6:]) if rounds else 0


def kept_recipe(kept: Path) -> str | None:
    """The hash of the recipe that the last round that was kept was made with."""
    for folder in _rounds(kept):
        with contextlib.suppress(OSError, ValueError):
            return _DECODE.validate_python(read_json(folder / _STATE, _LARGEST_STATE)).recipe_sha256
    return None


def _share(source: Path, target: Path) -> None:
    """What a run has once, in two folders: records, recipe and pictures."""
    pictures = [f"{layout.PICTURES}/{path.name}" for path in (source / layout.PICTURES).glob("*")]
    for name in (layout.RECORDS, layout.RECIPE, *sorted(pictures)):
        (target / name).parent.mkdir(exist_ok=True)
        link_whole(source / name, target / name)


def _end_last_line(path: Path) -> None:
    """Cut off what a killed process had begun to write."""
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
