"""The frozen part of a network at work: once a slice, as far as what it makes can be kept.

It runs on one slice at a time, kept or not: what else is in a batch moves the last digits. So a
slice's features are the same bits whenever they are computed and wherever they come from, and a
round gives the same numbers with all of them on the disk, some or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute, Reading
from fedfms.data.features import FeatureFolder, features_meanwhile, slice_name
from fedfms.data.memory import GIB
from fedfms.data.slices import Slices, located
from fedfms.geometry import Frame, Pictured, network_input
from fedfms.models.segmenter import Segmenter
from fedfms.training.augment import Variation, changed_item, changed_targets
from fedfms.training.loader import as_worker

FEATURES_VERSION = 1  # raise it when the same network would compute other features


class OneSlice(NamedTuple):
    """A slice on its way into a batch, of which one of the two is there."""

    name: str | None  # under which its features may be kept
    image: Tensor | None  # (3, S, S)
    features: Tensor | None


class Frozen:
    """A network's frozen part with what is kept of it.

    Args:
        model: whose `frozen_blocks` are a number, on the device that computes.
        kept: of this network; None: nothing is kept.
    """

    def __init__(self, model: Segmenter, kept: FeatureFolder | None) -> None:
        self._model = model
        self.kept = kept

    @classmethod
    def of(cls, model: nn.Module, kept: FeatureFolder | None) -> Frozen | None:
        """None for a network that has no frozen part to be split off."""
        if isinstance(model, Segmenter) and model.frozen_blocks is not None:
            return cls(model, kept)
        return None

    def features(self, one: OneSlice) -> Tensor:
        """Of one slice, (…) on the processor; they are kept if they were not."""
        if one.features is not None:
            return one.features
        assert one.image is not None
        device = next(self._model.parameters()).device
        # not inference_mode, whose tensors no training may use
        with torch.no_grad():
            found = self._model.prefix(one.image[None].to(device))[0].cpu()
        if self.kept is not None and one.name is not None:
            self.kept.put(one.name, found)
        return found

    def completed(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `together` made, with "features" (B, …) in the place of "slices"."""
        slices = batch.pop("slices")
        return {**batch, "features": torch.stack([self.features(one) for one in slices])}

    def batches(
        self,
        dataset: Slices,
        order: Sampler[list[int]],
        compute: Compute,
        variation: Variation | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one round as of a `Loader`, with "features" in the place of "image".

        Args:
            order: which slices make each batch.
            compute: for its workers; none: none, since features that are kept cost no preparing.
            variation: what becomes of the slices of each step; None: they are as they are.
        """
        for batch in DataLoader(
            FrozenSlices(dataset, self.kept, variation),
            batch_sampler=order if variation is None else variation.turns(order),
            collate_fn=together,
            num_workers=compute.workers or 0,
            worker_init_fn=partial(as_worker, os.getpid()),
            generator=torch.Generator(),  # as in a `Loader`
        ):
            yield self.completed(batch)

    def of_case(self, case: Pictured, index: int, reading: Reading, recipe: Recipe) -> Tensor:
        """Of a slice of a case."""
        name = slice_name(case, index, reading)
        if (
            name is not None
            and self.kept is not None
            and (found := self.kept.get(name)) is not None
        ):
            return found
        return self.features(OneSlice(name, network_input(case, index, reading, recipe), None))


class FrozenSlices(Dataset[dict[str, Any]]):
    """A dataset of which a slice whose features are kept needs no picture.

    An item has "target" and "annotated" as in a `SliceDataset`, and "slice", a `OneSlice`. With a
    variation it is asked for with its turn, and kept for each under a name of its own.
    """

    def __init__(
        self, dataset: Slices, kept: FeatureFolder | None, variation: Variation | None = None
    ) -> None:
        self._dataset, self._kept, self._variation = dataset, kept, variation

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, asked: int | tuple[int, int]) -> dict[str, Any]:
        item, turn = asked if isinstance(asked, tuple) else (asked, 0)
        dataset, place = located(self._dataset, item)
        picture, index = dataset.picture(place)
        name, change = slice_name(picture, index, dataset.site), None
        if self._variation is not None:
            change = self._variation.change(item, turn)
            name = None if name is None else f"{name}-{self._variation.name(item, turn)}"
        features = self._kept.get(name) if self._kept is not None and name is not None else None
        if features is not None:
            drawn = dataset.drawn(place)
            if change is not None:
                covered = Frame.of(picture).input_size(dataset.recipe)
                target = drawn["target"][None].bool()
                target = changed_targets(target, [covered], [change], dataset.recipe)
                drawn["target"] = target[0].float()
            return {**drawn, "slice": OneSlice(name, None, features)}
        if change is None:
            made = dataset[place]
        else:
            made = changed_item(dataset.levels(place), change, dataset.recipe)
        one = OneSlice(name, made.pop("image"), None)
        return {**made, "slice": one}


def together(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of `FrozenSlices` as a batch: "target", "annotated", and "slices" as a list."""
    slices = [item.pop("slice") for item in items]
    return {**default_collate(list(items)), "slices": slices}


def space_of(model: Segmenter, device: torch.device) -> str:
    """SHA-256 of all that decides the features of a picture: network, sizes, precision, machine.

    Machine and threads too: they decide in which order a library adds.
    """
    recipe = model.recipe
    on_gpu = device.type == "cuda"
    decides = {
        "version": FEATURES_VERSION,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device)
        if on_gpu
        else [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "products": torch.get_float32_matmul_precision(),
        "method": recipe.method,
        "backbone": recipe.backbone,
        "backbone_sha256": recipe.backbone_sha256,
        "blocks": model.frozen_blocks,
        "image_size": recipe.image_size,
        "resize": recipe.resize,
        "normalize": recipe.normalize,
        "paper_compat": recipe.paper_compat,
        "precision": recipe.precision,
        **({"contrasts": recipe.contrasts} if recipe.contrasts else {}),
        **({"tile": recipe.tile} if recipe.tile is not None else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def kept_meanwhile(
    model: nn.Module, compute: Compute, device: torch.device, folder: Path
) -> contextlib.AbstractContextManager[FeatureFolder | None]:
    """A place for a network's features that is gone afterwards; None where none are to be kept.

    Args:
        folder: in which it lies.
    """
    if not isinstance(model, Segmenter) or model.frozen_blocks is None or not compute.features_gib:
        return contextlib.nullcontext()
    return features_meanwhile(folder, space_of(model, device), compute.features_gib * GIB)
