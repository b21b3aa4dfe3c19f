"""What the FLARE components of one job share: its files, the words on the wire, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fedfms.contracts.contribution import Contribution, ModelName
from fedfms.contracts.recipe import Recipe
from fedfms.records.layout import MODEL, RECIPE
from fedfms.records.scores import over_classes

if TYPE_CHECKING:
    from torch import Tensor

START_MODEL_FILE = MODEL  # beside the recipe: the model to start from, or to evaluate
PROGRESS_GROUP = "fedfms"  # of FLARE's statistics, where a coordinator asks how far a job is
RESULT_FOLDER = "fedfms"  # in the server's run folder: what becomes the result of the job
PROGRESS_GROUP = "fedfms"  # of FLARE's statistics, where a coordinator asks how far a job is

TRAIN_TASK, EVALUATE_TASK = "train", "validate"  # FLARE's own names
SERVER_MODELS: dict[str, ModelName] = {"SRV_final": "final", "SRV_best": "best"}  # FLARE's prefix

# keys of a DXO's meta and data, and of a Shareable's headers
CONTRIBUTION, PICTURES, ROUNDS_TRAINED = "fedfms_contribution", "pictures", "fedfms_rounds"
REASON = "fedfms_reason"  # header of an error reply: why, in public words

LARGEST_REASON = 300  # characters


def config_folder(fl_ctx: FLContext) -> Path:
    """The job's app/config as it was deployed here."""
    workspace = fl_ctx.get_engine().get_workspace()
    return Path(workspace.get_app_config_dir(fl_ctx.get_job_id()))


def result_folder(fl_ctx: FLContext) -> Path:
    """Where the server keeps what becomes the job's result; made if it is not there."""
    workspace = fl_ctx.get_engine().get_workspace()
    folder = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / RESULT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_recipe(fl_ctx: FLContext) -> Recipe:
    """The job's recipe.

    Raises:
        ConfigError: the job has none, or one that cannot be used.
    """
    return Recipe.from_json(config_folder(fl_ctx) / RECIPE)


def training_dxo(tensors: Mapping[str, Tensor], contribution: Contribution) -> DXO:
    """A site's difference and report, with the weight and the metric that FLARE looks at.

    Of a holdout there is no tensor, no weight and no such metric.
    """
    meta: dict[str, Any] = {
        CONTRIBUTION: contribution.to_dict(),
        MetaKey.NUM_STEPS_CURRENT_ROUND: float(contribution.training_slices),
    }
    dice = over_classes(contribution.metrics, "dice")
    if contribution.role == "train" and dice is not None:
        meta[MetaKey.INITIAL_METRICS] = {"val_dice": dice}
    return DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta)


def reason_of(reply: Shareable) -> str:
    """Why a site sent an error instead of an answer, or FLARE's own code for it.

    The text comes from another machine: one line of printable characters, cut short.
    """
    said = reply.get_header(REASON)
    text = said if isinstance(said, str) and said.strip() else str(reply.get_return_code())
    return re.sub(r"[^\x20-\x7e]+", " ", text).strip()[:LARGEST_REASON]
