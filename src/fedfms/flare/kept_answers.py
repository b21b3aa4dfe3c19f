"""Accepted answers that a server keeps, so that a run's averages can be computed again.

Kept where the operator says so (FEDFMS_KEEP_ANSWERS), of a run as a whole or not at all:

    WORKSPACE/answers/JOB/
        start_model.safetensors     what the first round began with, fp32
        round-0000/SITE.safetensors what each training site answered, as it came

A round's folder is there whole or not at all. It is no part of the job's result, which FLARE copies
into its store and sends to whoever fetches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from torch import Tensor

from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import Recipe
from fedfms.exchange.tensors import Precision, save_tensors
from fedfms.files import whole_folder
from fedfms.flare.room import patiently
from fedfms.records.layout import START_MODEL, answers_folder, kept_answer


def keeps_answers(recipe: Recipe) -> bool:
    """Whether a run that begins here keeps its answers: of sums and of a canary there are none."""
    return Machine.from_environment().keep_answers and not (recipe.canary or recipe.sums_only)


def answers_of(fl_ctx: FLContext) -> Path:
    """Where the answers of a job's process are kept."""
    workspace = fl_ctx.get_engine().get_workspace()
    return answers_folder(Path(workspace.get_root_dir()), str(fl_ctx.get_job_id()))


def are_kept(folder: Path) -> bool:
    """Whether the run keeps its answers: it goes on as it began, whatever is set now."""
    return (folder / START_MODEL).is_file()


def keep_patiently(
    component: FLComponent,
    fl_ctx: FLContext,
    folder: Path,
    keep: Callable[[], None],
    lost: str,
) -> None:
    """Keep something of a run's answers; waits where the disk is full.

    Where the disk fails otherwise the run goes on without, since it needs none of it.

    Args:
        component: that says so in the run's records and in the server's log.
        folder: that is on the disk.
        keep: leaves nothing behind where it raises.
        lost: what cannot be done without it.
    """
    try:
        patiently(component, fl_ctx, folder, keep)
    except OSError as error:
        component.log_error(fl_ctx, f"{lost}: {error.strerror or error}", fire_event=False)


def begin_to_keep_answers(folder: Path, model: Mapping[str, Tensor]) -> None:
    """Keep the model of the first round.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    save_tensors(folder / START_MODEL, model, "fp32")


def keep_answers(
    folder: Path,
    number: int,
    differences: Mapping[str, Mapping[str, Tensor]],
    precision: Precision,
) -> None:
    """Keep a round, one site after the other; an earlier try of the same round gives way.

    Args:
        number: of the round, from 0.
        differences: by site; none of a holdout.
        precision: in which they came, so that the bytes are those of the sites' receipts.

    Raises:
        OSError: the disk is full or cannot be written; nothing of the round is left there.
    """
    with whole_folder((folder / kept_answer(number, "")).parent, replace=True) as into:
        for site, tensors in differences.items():
            if tensors:
                path = into / Path(kept_answer(number, site)).name
                save_tensors(path, {name: tensors[name] for name in tensors}, precision)
