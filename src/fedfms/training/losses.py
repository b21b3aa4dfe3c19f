"""Loss functions, logits in; they count exactly alike whatever the micro-batch."""

from __future__ import annotations

from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe

_DICE_SMOOTH = 1.0  # pixels; keeps the Dice loss of an empty mask finite and its gradient useful


def loss_per_class(logits: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    """Loss of each slice and class on its own, so that no value depends on the rest of the batch.

    "bce" is the binary cross-entropy, foreground pixels weighted by `recipe.positive_weight`, mean
    over pixels; with weight 2 it is the loss of FedFMS (arXiv 2403.05408). "dice_bce" adds the soft
    Dice loss `1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)` of V-Net (Milletari et al. 2016,
    arXiv 1606.04797, without its squares), sums over the pixels of one slice and class.

    Args:
        logits: (B, K, M, M), before the sigmoid; computed in fp32 whatever the type.
        target: (B, K, M, M), 0 or 1; or (B, K + 1, M, M), whose last plane is 1 where a pixel is
            void: it counts in no mean and no sum. Of a slice that is void throughout the
            cross-entropy is 0.

    Returns:
        (B, K) fp32, 0 or more.
    """
    logits, target = logits.float(), target.float()
    known: Tensor | None = None
    if target.shape[1] > logits.shape[1]:
        target, known = target[:, :-1], 1 - target[:, -1:]
    # made on the device: a copy to a GPU would wait for all that it has to do
    positive_weight = logits.new_full((), recipe.positive_weight)
    by_pixel = nn.functional.binary_cross_entropy_with_logits(
        logits, target, pos_weight=positive_weight, reduction="none"
    )
    if known is None:
        loss = by_pixel.mean(dim=(-2, -1))
    else:
        loss = (by_pixel * known).sum(dim=(-2, -1)) / known.sum(dim=(-2, -1)).clamp(min=1)
    if recipe.loss == "dice_bce":
        probabilities = logits.sigmoid()
        if known is not None:
            probabilities, target = probabilities * known, target * known
        loss = loss + _soft_dice_loss(probabilities, target)
    return loss


def _soft_dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """(B, K), each of one slice and class."""
    both = (probabilities * target).sum(dim=(-2, -1))
    sizes = probabilities.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1 - (2 * both + _DICE_SMOOTH) / (sizes + _DICE_SMOOTH)


def masked_sum(losses: Tensor, annotated: Tensor) -> Tensor:
    """Sum of the losses of those classes that were drawn; the others contribute nothing at all.

    The loss of a batch is this sum over `annotated.sum()` of the whole batch: the mean over all
    pairs of slice and annotated class. Micro-batches divide by that same number and simply add up.

    Args:
        losses: (B, K) from `loss_per_class`.
        annotated: (B, K), 1 where the site draws this class, else 0.

    Returns:
        a scalar.
    """
    return losses.where(annotated > 0, losses.new_zeros(())).sum()
