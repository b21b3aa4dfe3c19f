"""A model and prepared cases to scores per case, and scores to means that may leave."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor, nn

from fedfms.contracts.contribution import METRICS, Metric
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Setup, SiteConfig
from fedfms.control import Control
from fedfms.data.classes import annotated_in, class_masks, void_of_labels
from fedfms.data.features import FeatureFolder
from fedfms.data.prepared import Prepared
from fedfms.data.slices import SliceDataset
from fedfms.errors import TrainingError
from fedfms.geometry import (
    Frame,
    Pictured,
    Region,
    input_of,
    native_logits,
    native_slice,
    pieces,
    resized_slice,
    whole_of,
)
from fedfms.models.build import hold_frozen
from fedfms.training.device import (
    failures_explained,
    halved,
    is_out_of_memory,
    ready_device,
    set_products,
    slices_at_once,
)
from fedfms.training.frozen import Frozen
from fedfms.training.interrupt import in_turn, interruptible
from fedfms.training.metrics import PAPER_THRESHOLDS, Mask, count, dice, hd95, iou, paper_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SliceScore:
    """Scores of one class in one slice; NaN where the slice is empty, unless `paper_compat`."""

    dice: float
    iou: float
    empty: bool  # no foreground in truth and prediction
    drawn: bool  # foreground in truth


@dataclass(frozen=True, slots=True)
class CaseScore:
    """Scores of one class in one case, at native size, volumes in 3-D.

    They stay at the site: `key` may come from a file name. `summarize` makes what may leave.
    """

    key: str  # of the case
    class_name: str
    dice: float  # [0, 1]; NaN where empty
    iou: float  # [0, 1]; NaN where empty
    hd95: float  # mm for volumes, pixels for pictures; NaN where empty (training.metrics)
    empty: bool  # no foreground in truth and prediction
    slices: tuple[SliceScore, ...]  # native size; `paper_compat`: as the paper scores slices
    drawn: bool  # foreground in truth
    found: bool  # foreground in the prediction


def evaluate(
    model: nn.Module,
    cases: Sequence[Prepared],
    recipe: Recipe,
    site: SiteConfig,
    control: Control,
    features: FeatureFolder | None = None,
) -> list[CaseScore]:
    """Score the model on each case and each class that this site annotates in it.

    Void pixels are scored as background in truth and prediction alike.

    What is scored are the masks that `foreground` gives, which predict writes. Under `paper_compat`
    the slices' scores are the paper's instead, at mask size, over the slices that
    `keep_empty_every` keeps, as FedFMS prepares its test data; the cases' scores are the same
    either way.

    Args:
        model: images (B, 3, S, S) to logits (B, K, M, M); left in evaluation mode, on the device.
        control: asked inside every batch; told ("evaluate", slices done, slices).
        features: as in `train_round`.

    Returns:
        case by case, classes in the recipe's order.

    Raises:
        TaskAborted: `control.abort()` was called.
        TrainingError: "out-of-memory" with a single slice in memory; "non-finite-logits"; what
            `failures_explained` makes of a failing GPU.
    """
    paper = SliceDataset(cases, site, recipe) if recipe.paper_compat and cases else None
    scores: list[CaseScore] = []
    slices = [piece for case in cases for piece in pieces(case, recipe)]
    stream = predict(model, slices, recipe, site, control, features)

    def scores_of(number: int, case: Prepared, logits: list[Tensor]) -> list[CaseScore]:
        predicted = foreground(logits, case, recipe)
        truth = class_masks(case, site, recipe).numpy()
        drawn = annotated_in(case.case.key, site, recipe).tolist()
        if site.void:
            predicted &= ~void_of_labels(case.labels, site)
        by_paper = _paper_slices(logits, paper, number) if paper is not None else None
        return [
            score_case(case, name, predicted[i], truth[i], by_paper[i] if by_paper else None)
            for i, name in enumerate(recipe.classes)
            if drawn[i]
        ]

    def work() -> Iterator[Callable[[], list[CaseScore]]]:
        for number, case in enumerate(cases):
            logits = list(islice(stream, len(pieces(case, recipe))))
            yield partial(scores_of, number, case, logits)

    # beside a GPU's next forward pass; a processor has nothing to spare
    beside = ready_device(site).type == "cuda"
    for of_a_case in in_turn(work(), control, beside=beside):
        scores += of_a_case
    values = [score.dice for score in scores if not score.empty]
    log.info(
        "scored %d cases: mean Dice %.3f, %d empty",
        len(cases),
        float(np.mean(values)) if values else float("nan"),
        len(scores) - len(values),
    )
    return scores


def score_case(
    case: Prepared,
    class_name: str,
    predicted: Mask,
    truth: Mask,
    slices: tuple[SliceScore, ...] | None = None,
) -> CaseScore:
    """Scores of one class from its masks at native size, (D, H, W) each; `slices` if known."""
    by_slice = count(predicted, truth)
    whole = by_slice.whole()
    if slices is None:
        columns = (dice(by_slice), iou(by_slice), by_slice.empty, by_slice.true > 0)
        slices = tuple(
            SliceScore(*row) for row in zip(*(column.tolist() for column in columns), strict=True)
        )
    return CaseScore(
        key=case.case.key,
        class_name=class_name,
        dice=float(dice(whole)[0]),
        iou=float(iou(whole)[0]),
        hd95=hd95(predicted, truth, case.spacing),
        empty=bool(whole.empty[0]),
        slices=slices,
        drawn=bool(truth.any()),
        found=bool(predicted.any()),
    )


def predict(
    model: nn.Module,
    slices: Sequence[tuple[Pictured, int]],
    recipe: Recipe,
    site: Setup,
    control: Control,
    features: FeatureFolder | None = None,
) -> Iterator[Tensor]:
    """Logits of each slice (case, index) or part of one in turn, (K, M, M) fp32 on the processor.

    A case begins a batch of its own. What else is in a batch moves the last digits of a logit (in
    bf16 the third), and with them pixels at the threshold: so the masks of a case are the same
    among a site's cases, where they are scored, and alone, where they are written. A frozen part of
    the network sees one slice at a time for the same reason, whether or not `features` are kept.

    Raises:
        as `evaluate`.
    """
    device = ready_device(site)
    with failures_explained():
        model.to(device).eval()
        hold_frozen(model)
        set_products(recipe, device)
    frozen = Frozen.of(model, features)
    limit = slices_at_once(recipe, site, device)
    done = 0
    control.report("evaluate", done, len(slices))
    while done < len(slices):
        _, some = next(groupby(slices[done : done + limit], key=lambda one: id(whole_of(one[0]))))
        batch = list(some)
        if frozen is None:
            logits = _forward(model, partial(_inputs, batch, site, recipe, device), control)
        else:
            with failures_explained(), interruptible(model, control):
                given = torch.stack([frozen.of_case(case, i, site, recipe) for case, i in batch])
            logits = _forward(model, partial(given.to, device), control, from_prefix=True)
        if logits is None:
            limit = halved(limit, "while scoring a single slice", "scoring")
            continue
        done += len(batch)
        control.report("evaluate", done, len(slices))
        yield from logits


def probabilities(
    logits: Iterator[Tensor], case: Pictured, recipe: Recipe, slices: int
) -> Iterator[tuple[Region, Tensor]]:
    """Logits (K, M, M) of each of a case's `pieces` to probabilities at native size.

    Args:
        slices: of how many slices.

    Yields:
        where among these, and (slices, K, rows, W) float32 in [0, 1]; each pixel once.
    """
    for where, part in native_logits(logits, case, recipe, slices):
        yield where, torch.sigmoid(part)


def masks_of(probability: Tensor, recipe: Recipe) -> Tensor:
    """Probabilities (D, K, H, W) at native size to masks of that shape, bool.

    A pixel is foreground of a class from `recipe.probability_threshold` on; of classes that exclude
    each other only of the likeliest, and of equally likely ones of the recipe's first.
    """
    found = probability >= recipe.probability_threshold
    if recipe.exclusive_classes:
        likeliest = probability.argmax(dim=1, keepdim=True)
        found &= torch.zeros_like(found).scatter_(1, likeliest, value=True)
    return found


def foreground(
    logits: Iterable[Tensor], case: Pictured, recipe: Recipe, slices: int | None = None
) -> Mask:
    """Logits (K, M, M) of each of a case's `pieces` to its masks, (K, D, H, W) bool.

    Args:
        slices: of how many slices, D; None: of all.
    """
    count = len(case.images) if slices is None else slices
    masks: Mask = np.empty((len(recipe.classes), count, *case.images.shape[1:3]), bool)
    for (which, rows), part in probabilities(iter(logits), case, recipe, count):
        masks[:, which, rows] = masks_of(part, recipe).transpose(0, 1).numpy()
    return masks


def as_if_nothing(score: CaseScore) -> CaseScore:
    """The score of a case that does not show the class, had nothing been found in it."""
    return dataclasses.replace(
        score, dice=math.nan, iou=math.nan, hd95=math.nan, empty=True, found=False
    )


def slices_as_if_nothing(score: CaseScore, recipe: Recipe) -> CaseScore:
    """The score, had nothing been found in its slices that do not show the class."""
    value = 1.0 if recipe.paper_compat else math.nan
    nothing = SliceScore(value, value, empty=True, drawn=False)
    return dataclasses.replace(
        score, slices=tuple(one if one.drawn else nothing for one in score.slices)
    )


def summarize(
    scores: Sequence[CaseScore], min_cases: int, patient_of: Mapping[str, str] | None = None
) -> tuple[Metric, ...]:
    """Mean and spread of each class and metric, as far as enough cases stand behind them.

    Cases count alike, whatever their size, and so do slices. A mean is withheld (None) where fewer
    than `min_cases` cases, or patients, have a value; for the scores of slices too: a hundred
    slices of one patient still are one patient.

    Args:
        patient_of: whose a case is, by its key; None: each is of a patient of its own.

    Returns:
        for each class in order of appearance: dice, iou, hd95, dice_slice, iou_slice; `std` is the
        population standard deviation.
    """
    metrics: list[Metric] = []
    for name in dict.fromkeys(score.class_name for score in scores):
        rows = [score for score in scores if score.class_name == name]
        for metric in METRICS:
            score, _, by_slice = metric.partition("_")
            scored = [row.slices if by_slice else (row,) for row in rows]
            values = [[getattr(one, score) for one in case] for case in scored]
            known = [value for case in values for value in case if not math.isnan(value)]
            with_value = {
                row.key if patient_of is None else patient_of[row.key]
                for row, case in zip(rows, values, strict=True)
                if not all(map(math.isnan, case))
            }
            shown = len(with_value) >= max(min_cases, 1)
            metrics.append(
                Metric(
                    class_name=name,
                    metric=metric,
                    mean=float(np.mean(known)) if shown else None,
                    std=float(np.std(known)) if shown else None,
                    cases=len(known),
                    empty=sum(one.empty for case in scored for one in case),
                )
            )
    return tuple(metrics)


def _inputs(
    slices: Sequence[tuple[Pictured, int]], site: Setup, recipe: Recipe, device: torch.device
) -> Tensor:
    """(B, 3, S, S) of slices of one case, or parts of them, which are of one size, on the device.

    To a GPU they go at native size.
    """
    if device.type == "cpu":
        levels = torch.stack([resized_slice(case, i, site, recipe) for case, i in slices])
    else:
        levels = torch.stack([native_slice(case, i, site, recipe) for case, i in slices])
        levels = levels.to(device)
    covered = Frame.of(slices[0][0]).input_size(recipe)
    return input_of(list(levels), [covered] * len(slices), recipe, device)


def _forward(
    model: nn.Module,
    given: Callable[[], Tensor],
    control: Control,
    *,
    from_prefix: bool = False,
) -> Tensor | None:
    """Logits in fp32 on the processor; None where memory ran out."""
    also = {"from_prefix": True} if from_prefix else {}
    try:
        with torch.inference_mode(), interruptible(model, control):
            logits: Tensor = model(given(), **also).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            with failures_explained():
                raise
        return None
    if not bool(logits.isfinite().all()):
        raise TrainingError(
            "the model's output is not finite",
            "lower learning_rate in recipe.json, or set clip_grad_norm to 1.0, and train again",
            code="non-finite-logits",
        )
    return logits


def _paper_slices(
    logits: Sequence[Tensor], dataset: SliceDataset, number: int
) -> list[tuple[SliceScore, ...]]:
    """For each class the paper's scores of the slices of case `number` that the dataset keeps."""
    by_class: list[list[SliceScore]] = [[] for _ in range(len(logits[0]))]
    for item, (owner, index) in enumerate(dataset.slices):
        if owner != number:
            continue
        target = dataset[item]["target"]
        if target.shape[0] > len(logits[0]):  # void pixels, which the paper has none of
            target = target[:-1]
        dices, ious = paper_scores(logits[index][None], target[None])
        for position, scores in enumerate(by_class):
            drawn = bool(target[position].any())
            found = bool((logits[index][position] > min(PAPER_THRESHOLDS)).any())
            values = float(dices[0, position]), float(ious[0, position])
            scores.append(SliceScore(*values, not drawn and not found, drawn))
    return [tuple(scores) for scores in by_class]
