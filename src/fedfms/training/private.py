"""A step that no single patient shapes much: DP-SGD with the patient as the unit.

Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1, with all slices of a patient in the place of an
example (user-level, as McMahan et al. 2018, arXiv 1710.06963): in each step every patient takes
part with the same probability, drawn anew; what one of them adds is the sum of the gradients of all
its slices, scaled down to a largest L2 norm; noise goes on the sum. So two sites that differ by one
patient, whether it has one slice or fifty equal ones, make sums that are at most that norm apart.
What this costs in epsilon says exchange/account.py. Augmentation changes each slice by itself and
before its gradient, so the norm still bounds what a patient adds. Who is drawn and the noise come
from the operating system, not from the recipe's seed, which everybody knows: drawn patients must be
secret.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.data.slices import SliceDataset
from fedfms.exchange.noise import random_normal
from fedfms.training.augment import Variation, changed_item
from fedfms.training.device import is_out_of_memory
from fedfms.training.frozen import Frozen, FrozenSlices, together
from fedfms.training.gradients import accumulate_gradients, finite, smaller_step

log = logging.getLogger(__name__)


def items_by_patient(dataset: SliceDataset) -> list[list[int]]:
    """The items of a dataset, together for each patient, in the order of the patients' names."""
    items: dict[str, list[int]] = {}
    for item, (number, _) in enumerate(dataset.slices):
        items.setdefault(dataset.prepared[number].case.patient, []).append(item)
    return [items[patient] for patient in sorted(items)]


class PatientSteps:
    """Makes the gradients of a round's steps; counts the slices that it trained on."""

    def __init__(
        self,
        model: nn.Module,
        dataset: SliceDataset,
        recipe: Recipe,
        control: Control,
        micro_batch: int,
        frozen: Frozen | None = None,
        variation: Variation | None = None,
    ) -> None:
        assert recipe.patient_rate is not None and recipe.patient_clip_norm is not None
        self.micro_batch = micro_batch  # slices in memory at once, after out-of-memory halvings
        self.loss_sum = 0.0  # over all pairs of slice and annotated class
        self.pairs = 0.0
        self._model, self._dataset, self._recipe = model, dataset, recipe
        self._control = control
        self._frozen = frozen
        self._variation = variation
        self._step = -1  # of the round
        self._slices = None
        if frozen is not None:
            self._slices = FrozenSlices(dataset, frozen.kept, variation)
        self._patients = items_by_patient(dataset)
        self._rate: float = recipe.patient_rate
        self._norm: float = recipe.patient_clip_norm
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._draw = random.SystemRandom()

    def gradients(self) -> float:
        """Put the noised mean over the drawn patients into the parameters' gradients.

        The sum is divided by how many patients are drawn on average, which says nothing of who was:
        of nobody the noise alone is left.

        Returns:
            the mean loss over the drawn patients' pairs of slice and annotated class; 0 of nobody.
        """
        self._step += 1
        total = [torch.zeros_like(parameter) for parameter in self._trained]
        loss_sum = pairs = 0.0
        for items in self._patients:
            if self._rate < 1 and self._draw.random() >= self._rate:
                continue
            loss, counted = self._of_one(items)
            norm = finite(self._gradient_norm())
            scale = min(1.0, self._norm / norm) if norm > 0 else 1.0
            for summed, parameter in zip(total, self._trained, strict=True):
                if parameter.grad is not None:
                    summed.add_(parameter.grad, alpha=scale)
            loss_sum, pairs = loss_sum + loss, pairs + counted
        expected = self._rate * len(self._patients)
        spread = self._recipe.patient_noise * self._norm
        for summed, parameter in zip(total, self._trained, strict=True):
            if spread:
                summed.add_(random_normal(summed.shape).to(summed), alpha=spread)
            parameter.grad = summed.div_(expected)
        self.loss_sum, self.pairs = self.loss_sum + loss_sum, self.pairs + pairs
        return loss_sum / pairs if pairs else 0.0

    def _of_one(self, items: Sequence[int]) -> tuple[float, float]:
        """The summed gradient of a patient's slices, in the parameters; its loss and its pairs."""
        while True:
            self._empty()
            try:
                return self._summed(items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._empty()
            self.micro_batch = smaller_step(self._model, self.micro_batch)

    def _summed(self, items: Sequence[int]) -> tuple[float, float]:
        loss = pairs = 0.0
        for start in range(0, len(items), self.micro_batch):
            part = items[start : start + self.micro_batch]
            batch = self._batch(part)
            loss += accumulate_gradients(
                self._model, batch, self._recipe, self.micro_batch, self._control, over=1.0
            )
            pairs += float(batch["annotated"].sum())
        return loss, pairs

    def _batch(self, items: Sequence[int]) -> Mapping[str, Tensor]:
        turn = 0 if self._variation is None else self._variation.turn(self._step)
        if self._frozen is not None and self._slices is not None:
            return self._frozen.completed(together([self._slices[item, turn] for item in items]))
        batch: Mapping[str, Tensor] = default_collate([self._item(item, turn) for item in items])
        return batch

    def _item(self, item: int, turn: int) -> dict[str, Tensor]:
        if self._variation is None:
            return self._dataset[item]
        change = self._variation.change(item, turn)
        return changed_item(self._dataset.levels(item), change, self._recipe)

    def _empty(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _gradient_norm(self) -> float:
        found = [p.grad for p in self._trained if p.grad is not None]
        return float(nn.utils.get_total_norm(found).item()) if found else 0.0
