"""The slices of prepared cases as a network trains on them."""

from __future__ import annotations

import bisect
import math
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.cache import StoredCase, temporary_folder
from fedfms.data.classes import annotated_in, planes_of_labels
from fedfms.data.prepared import Prepared
from fedfms.errors import SiteDataError
from fedfms.geometry import (
    Frame,
    Part,
    Pictured,
    Tile,
    channels_of,
    mask_target,
    native_slice,
    normalised,
    resized_slice,
    tiles,
)

SLICES_ON_DISK = 2 * 1024**3  # bytes; a set whose resized slices need less is resized once


# picture, rows and columns that it covers, target, annotated: see `SliceDataset.levels`
Levels = tuple[Tensor, tuple[int, int], Tensor, Tensor]


class SliceDataset(Dataset[dict[str, Tensor]]):
    """The slices of prepared cases for training, in the order of the cases, or parts of them.

    With the recipe's `tile` each slice is parts that cover it, and what is said of slices here is
    said of these.

    Of slices without foreground of any of the recipe's classes every `keep_empty_every`-th is
    kept, counted over the whole site, or with `patient_rate` over each patient. An item is a dict
    of float32 tensors: "image" (3, S, S) or (contrasts, S, S) normalised, "target" (K, M, M) of 0
    and 1, or of (K + 1, M, M) with void pixels last, "annotated" (K,) of 0 and 1.

    Args:
        prepared: the cases to train on; the caller chooses them by `case.split`.
        site: the site's configuration.
        recipe: the recipe.
        with_void: have the plane of void pixels also at a site that has none: for a pool of sites
            of which another one has.

    Raises:
        SiteDataError: a class of the recipe is unknown here ("unknown-class"), or no slice is
            left ("no-training-slices").
    """

    def __init__(
        self,
        prepared: Sequence[Prepared],
        site: SiteConfig,
        recipe: Recipe,
        *,
        with_void: bool = False,
    ) -> None:
        self.prepared = list(prepared)
        self._has_void = with_void or bool(site.void)
        self.site = site
        self.recipe = recipe
        # of each case, the same in every process that has a copy of this
        self.names = [
            one.record.digest if isinstance(one, StoredCase) else one.case.key
            for one in self.prepared
        ]
        self._annotated = [
            annotated_in(one.case.key, site, recipe).float() for one in self.prepared
        ]
        # where a patient's part is bounded, who else is there must not choose among its slices
        by_patient = recipe.patient_rate is not None
        values = {value for name in recipe.classes for value in site.classes.get(name, ())}
        self.slices: list[tuple[int, int]] = []  # (case, slice) of each item
        self._tiles: list[Tile | None] = []  # of each item, where slices are in parts
        # patients of whom a slice shows one of the recipe's classes
        self.showing: set[str] = set()
        empty: Counter[str] = Counter()
        for number, case in enumerate(self.prepared):
            counted = case.case.patient if by_patient else ""
            for index, tile, has_foreground in _parts_with(case, values, recipe):
                if has_foreground:
                    self.showing.add(case.case.patient)
                else:
                    empty[counted] += 1
                    every = site.keep_empty_every
                    if every == 0 or (empty[counted] - 1) % every != 0:
                        continue
                self.slices.append((number, index))
                self._tiles.append(tile)
        if not self.slices:
            raise SiteDataError(
                "the training cases have no slice with one of the job's classes",
                "check the label values under classes in site.yml, and keep_empty_every",
                code="no-training-slices",
            )
        first = self.prepared[0]
        folder = first.folder if isinstance(first, StoredCase) else temporary_folder()
        channels = channels_of(site, recipe)
        masks = self._planes
        self._kept = KeptSlices.of(len(self.slices), channels, recipe, folder, masks)
        self._kept_targets = KeptSlices.of(len(self.slices), 0, recipe, folder, masks)

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def patients(self) -> set[str]:
        """Whose slices these are; of a patient without any there is nothing to train on."""
        return {self.prepared[number].case.patient for number, _ in self.slices}

    @property
    def kept_files(self) -> list[int]:
        """Numbers of the open files that `share_kept` of a copy takes; none, or two."""
        if self._kept is None or self._kept_targets is None:
            return []
        return [self._kept.fileno(), self._kept_targets.fileno()]

    def share_kept(self, files: Sequence[int]) -> None:
        """Read and write the slices that another process keeps of this same dataset.

        Args:
            files: what `kept_files` is there, as numbers of this process, which are taken over.
        """
        channels = channels_of(self.site, self.recipe)
        self._kept, self._kept_targets = (
            KeptSlices(
                len(self.slices),
                count,
                self.recipe,
                os.fdopen(file, "r+b", 0),
                self._planes,
            )
            for count, file in zip((channels, 0), files, strict=True)
        )

    @property
    def classes_drawn(self) -> float:
        """How many of the recipe's classes this site annotates, in a slice at most.

        In each of its slices, unless `not_annotated_in` says otherwise.
        """
        return max((float(one.sum()) for one in self._annotated), default=0.0)

    def picture(self, item: int) -> tuple[Pictured, int]:
        """The case that an item is a slice of, or the part of it, and which slice."""
        number, index = self.slices[item]
        tile = self._tiles[item]
        case = self.prepared[number]
        return (case if tile is None else Part(case, tile)), index

    def drawn(self, item: int) -> dict[str, Tensor]:
        """The item without its "image", which is not made."""
        number, _ = self.slices[item]
        frame = Frame.of(self.picture(item)[0])
        kept = self._kept_targets.get(item, frame) if self._kept_targets is not None else None
        if kept is None:
            masks = self._masks(item)
            kept = torch.empty(0, dtype=torch.uint8), mask_target(masks, frame, self.recipe)
            if self._kept_targets is not None:
                self._kept_targets.put(item, *kept)
        return {"target": kept[1].float(), "annotated": self._annotated[number].clone()}

    @property
    def _planes(self) -> int:
        return len(self.recipe.classes) + self._has_void

    def _masks(self, item: int) -> Tensor:
        """(K, H, W) of a slice, or (K + 1, H, W) with void pixels last; bool."""
        number, index = self.slices[item]
        labels, tile = self.prepared[number].labels[index], self._tiles[item]
        if tile is not None:
            labels = labels[tile.rows, tile.columns]
        return planes_of_labels(labels, self.site, self.recipe, with_void=self._has_void)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        picture, _, target, annotated = self.levels(item)
        return {
            "image": normalised(picture, self.recipe),
            "target": target.float(),
            "annotated": annotated.clone(),
        }

    def levels(self, item: int, *, native: bool = False) -> Levels:
        """A slice before it is a network's input: 8-bit levels.

        Args:
            item: as of the dataset.
            native: at the size that the picture has; else resized, as it is kept.

        Returns:
            the picture (1, 3 or contrasts, h, w) uint8; rows and columns of the input that it
            covers; the target (K, M, M) bool, with a last plane of void pixels (K + 1, M, M) where
            the site has such; annotated (K,) float32 of 0 and 1.
        """
        number, _ = self.slices[item]
        case, index = self.picture(item)
        frame = Frame.of(case)
        store = self._kept_targets if native else self._kept
        kept = store.get(item, frame) if store is not None else None
        if kept is None:
            masks = self._masks(item)
            target = mask_target(masks, frame, self.recipe)
            picture = torch.empty(0, dtype=torch.uint8)
            if not native:
                picture = resized_slice(case, index, self.site, self.recipe)
            kept = picture, target
            if store is not None:
                store.put(item, *kept)
        picture, target = kept
        if native:
            picture = native_slice(case, index, self.site, self.recipe)
        return picture, frame.input_size(self.recipe), target, self._annotated[number]


Slices = SliceDataset | ConcatDataset[dict[str, Tensor]] | Subset[dict[str, Tensor]]


def located(dataset: Any, item: int) -> tuple[SliceDataset, int]:
    """The `SliceDataset` that an item of this one comes from, and its number there."""
    while not isinstance(dataset, SliceDataset):
        if isinstance(dataset, Subset):
            dataset, item = dataset.dataset, dataset.indices[item]
        else:
            assert isinstance(dataset, ConcatDataset)
            part = bisect.bisect_right(dataset.cumulative_sizes, item)
            item -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    return dataset, item


class KeptSlices:
    """Slices as they were resized once, in a file without a name, for this process and its workers.

    Worker processes are forked anew for each round; what they write here stays. A slice that could
    not be written, on a full disk say, is resized again.
    """

    def __init__(
        self, slices: int, channels: int, recipe: Recipe, file: BinaryIO, planes: int
    ) -> None:
        self._recipe = recipe
        self._channels = channels
        self._planes = planes
        self._pictures, self._masks = bytes_of_slice(
            channels, planes, recipe.image_size, recipe.mask_size
        )
        self._file = file
        weakref.finalize(self, self._file.close)
        os.truncate(self._file.fileno(), slices * self._slot)  # a hole: no room is taken yet

    @classmethod
    def of(
        cls, slices: int, channels: int, recipe: Recipe, folder: Path, planes: int
    ) -> KeptSlices | None:
        """A file for so many slices; None if that is too much, or for the disk of `folder`."""
        size = sum(bytes_of_slice(channels, planes, recipe.image_size, recipe.mask_size))
        try:
            has_room = 4 * slices * size <= shutil.disk_usage(folder).free
            if are_kept(slices, size) and has_room:
                return cls(slices, channels, recipe, tempfile.TemporaryFile(dir=folder), planes)
        except OSError:  # the folder cannot be written
            pass
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A process that is started and not forked has no such file, unless it is given it."""
        return type(None), ()

    @property
    def _slot(self) -> int:
        return self._pictures + self._masks + 1  # a last byte of 1 says that the slice is there

    def fileno(self) -> int:
        """Of its file."""
        return self._file.fileno()

    def get(self, item: int, frame: Frame) -> tuple[Tensor, Tensor] | None:
        """The picture (C, h, w) uint8 and the target (K, M, M) bool, if they are there."""
        data = os.pread(self._file.fileno(), self._slot, item * self._slot)
        if len(data) < self._slot or data[-1] != 1:
            return None
        rows, columns = frame.input_size(self._recipe)
        shape = (self._channels, rows, columns)
        picture = np.frombuffer(data, np.uint8, math.prod(shape)).reshape(shape)
        side, count = self._recipe.mask_size, self._planes
        bits = np.frombuffer(data, np.uint8, self._masks, self._pictures)
        target = np.unpackbits(bits, count=count * side * side).reshape(count, side, side)
        return torch.from_numpy(picture.copy()), torch.from_numpy(target.view(np.bool_))

    def put(self, item: int, picture: Tensor, target: Tensor) -> None:
        """Keep a slice; its last byte is written when all else is."""
        start = item * self._slot
        masks = np.packbits(target.numpy()).tobytes()
        file = self._file.fileno()
        for data, place in (
            (picture.contiguous().numpy().tobytes(), start),
            (masks, start + self._pictures),
            (b"\1", start + self._slot - 1),
        ):
            try:
                if os.pwrite(file, data, place) < len(data):
                    return
            except OSError:  # no room: it is resized again
                return


def bytes_of_slice(channels: int, classes: int, image_size: int, mask_size: int) -> tuple[int, int]:
    """Of a resized slice at most: those of its picture, and of its masks as bits."""
    return channels * image_size**2, -(-classes * mask_size**2 // 8)


def are_kept(slices: int, size: int) -> bool:
    """Whether a `SliceDataset` of so many slices of `size` bytes resizes each of them once."""
    return slices * size <= SLICES_ON_DISK


def _parts_with(
    case: Prepared, values: set[int], recipe: Recipe
) -> Iterator[tuple[int, Tile | None, bool]]:
    """Of each slice or part of one: which, and whether one of the values occurs."""
    found = _slices_with(case, values)
    if recipe.tile is None:
        yield from ((index, None, has_foreground) for index, has_foreground in enumerate(found))
        return
    labels, wanted = case.labels, sorted(values)
    for index, has_foreground in enumerate(found):
        for tile in tiles(labels.shape[1], labels.shape[2], recipe.tile):
            part = labels[index, tile.rows, tile.columns]
            yield index, tile, has_foreground and bool(np.isin(part, wanted).any())


def _slices_with(case: Prepared, values: set[int]) -> list[bool]:
    """Of each slice, whether one of the values occurs."""
    if isinstance(case, StoredCase):
        return [not values.isdisjoint(found) for found in case.slice_values()]
    wanted = sorted(values)
    return [bool(np.isin(picture, wanted).any()) for picture in case.labels]
