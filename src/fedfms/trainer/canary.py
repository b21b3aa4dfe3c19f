"""What is small in a canary: two cases, three optimizer steps, and what they say of a real round.

A recipe that says `canary` goes the way of any other: policy, reading, checkpoint, scores,
training, door. Three things differ. It works on few cases, repeated so that a step has the size
that it will have; the network sees made-up pictures and masks of their size, since whether its
output is finite, and how long scores take, is an answer about the pictures that it sees, and nobody
counts canaries; and zeros leave (exchange/door.py). Nothing of it is kept at the site but prepared
cases, which the run needs too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from fedfms.contracts.contribution import Rehearsal
from fedfms.contracts.policy import Bounds
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import CacheFolder, StoredCase
from fedfms.data.features import FeatureFolder
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import Case, training_patients
from fedfms.data.memory import allowed_bytes, size_text
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import Labels, PreparedCase
from fedfms.data.slices import SliceDataset
from fedfms.errors import SiteDataError, TrainingError
from fedfms.exchange.bounds import too_few_steps
from fedfms.models.segmenter import Segmenter
from fedfms.training.device import slices_at_once, torch_device
from fedfms.training.frozen import kept_meanwhile
from fedfms.training.loop import RoundResult, train_round
from fedfms.training.meter import Meter

log = logging.getLogger(__name__)

# what oneDNN and Python say where no memory is left for their own needs
_REFUSED = re.compile(r"could not (create|execute) a (primitive|memory)|can't start new thread")
# of the memory that is left, what a canary may take on a processor
SHARE_OF_MEMORY = 0.8
SURELY = 4  # times by which cases may have fewer slices than a middling one
DARK, BRIGHT = 64, 192  # grey levels of a made-up picture
TIMED_STEPS = 2  # after one that is not: the first of a process is slower


class MadeUp(StoredCase):
    """In the place of a case what has its size, and nothing of its picture and its mask.

    Each slice is dark but for a bright box in the middle, which is the mask; its columns are shared
    among the label values.

    Args:
        case: whose header counts, so that as many slices are trained on.
        values: of the classes.
    """

    def __init__(self, case: StoredCase, values: Sequence[int]) -> None:
        record = case.record.model_copy(update={"digest": f"made up {case.record.digest}"})
        super().__init__(case.case, record, case._shelf, case._name)
        self._real, self._values = case, tuple(values)

    @classmethod
    def of(cls, case: StoredCase, site: SiteConfig, recipe: Recipe) -> MadeUp:
        """With a value of each of the recipe's classes that the site annotates."""
        found = [min(site.classes[name]) for name in recipe.classes if site.classes.get(name)]
        return cls(case, list(dict.fromkeys(found)))

    @property
    def images(self) -> NDArray[np.uint8]:
        """As of a `StoredCase`."""
        picture = np.full(self.record.shape[1:], DARK, np.uint8)
        picture[self._box] = BRIGHT
        return np.broadcast_to(picture, self.record.shape)

    @property
    def labels(self) -> Labels:
        """As of a `StoredCase`."""
        shape = self.record.shape[:3]
        mask = np.zeros(shape[1:], self.record.label_type)
        box = mask[self._box]
        for part, value in zip(
            np.array_split(box, max(1, len(self._values)), axis=1), self._values, strict=False
        ):
            part[:] = value
        return np.broadcast_to(mask, shape)

    @property
    def _box(self) -> tuple[slice, slice]:
        """The middle of rows and columns, a pixel at least."""
        rows, columns = (slice(n // 4, n // 4 + -(-n // 2)) for n in self.record.shape[1:3])
        return rows, columns

    def __reduce__(self) -> Any:
        if isinstance(self._shelf, CacheFolder):
            return MadeUp, (self._real, self._values)
        arrays = np.array(self.images), np.array(self.labels)
        return PreparedCase, (self.case, *arrays, self.spacing, self.is_volume, self.palette)


@dataclass(frozen=True, slots=True)
class FewCases:
    """The two cases of a canary, and how many the site's rounds have."""

    middling: StoredCase  # to train on what has its size, and by which rounds are estimated
    largest: StoredCase  # to score what has its size
    training_cases: int  # 0 at a holdout, which scores the middling one too
    training_patients: int
    scored_cases: int
    all_show: bool  # whether each case that was looked at shows a class of the job

    @property
    def scored(self) -> list[StoredCase]:
        """What is scored."""
        return [self.largest] if self.training_cases else [self.middling, self.largest]

    def about_slices(self, site: SiteConfig, recipe: Recipe) -> int:
        """How many slices a round trains on, if all cases have as many as the middling one."""
        return len(SliceDataset([self.middling], site, recipe)) * self.training_cases

    def surely_has_steps(self, bounds: Bounds, site: SiteConfig, recipe: Recipe) -> bool:
        """Whether a round has enough steps also if there are far fewer slices than that."""
        slices = self.about_slices(site, recipe) // SURELY
        return too_few_steps(bounds, recipe, slices) is None


def few_cases(
    cases: Sequence[Case],
    site: SiteConfig,
    recipe: Recipe,
    control: Control,
    *,
    is_holdout: bool,
    left_out: LeftOut,
    folder: Path,
) -> FewCases:
    """Prepare a middling case to train on and the largest one to score, by the size of its file.

    The middling one says how long a round takes, the largest how much memory a score. Where none of
    them shows a class of the job, others are read as well until one does, at last all of them: so
    the site's labels are judged as the run will judge them.

    Args:
        left_out: takes those that cannot be used; others are read in their place.

    Raises:
        SiteDataError: as `prepare_cases`.
    """
    sizes = {case.key: _size(case) for case in cases}
    by_size = sorted(cases, key=lambda case: (sizes[case.key], case.key))
    pool = [case for case in by_size if is_holdout or case.split == "train"]
    to_score = [case for case in by_size if is_holdout or case.split == "validation"]
    middle = (len(pool) - 1) / 2
    in_turn = [pool[i] for i in sorted(range(len(pool)), key=lambda i: abs(i - middle))]
    wanted = {value for name in recipe.classes for value in site.classes.get(name, ())}
    count, largest, unpaired = 1, len(to_score) - 1, [*left_out.found]
    while True:
        is_last = count >= len(in_turn)
        chosen = list(dict.fromkeys([*in_turn[:count], to_score[largest]]))
        left_out.found = [*unpaired]
        try:
            prepared = prepare_cases(chosen, site, control, folder=folder, left_out=left_out)
        except SiteDataError as error:
            if error.code != "empty-masks" or is_last:
                raise
            prepared = []
        read = {case.case.key: case for case in prepared}
        if prepared and to_score[largest].key not in read and largest > 0:
            largest -= 1
            continue
        tried = [read[case.key] for case in in_turn[:count] if case.key in read]
        showing = [case for case in tried if _shows(case, wanted)]
        if (showing or is_last) and tried and to_score[largest].key in read:
            return FewCases(
                middling=(showing or tried)[0],
                largest=read[to_score[largest].key],
                training_cases=0 if is_holdout else len(pool),
                training_patients=0 if is_holdout else training_patients(pool),
                scored_cases=len(to_score),
                all_show=len(showing) == len(tried),
            )
        if is_last:  # not one of them can be used
            raise left_out.found[-1].error
        count = min(2 * count, len(in_turn))


def few_steps(
    model: Segmenter,
    few: FewCases,
    site: SiteConfig,
    recipe: Recipe,
    control: Control,
    micro_batch: int | None = None,
    *,
    folder: Path,
) -> tuple[RoundResult, float, int]:
    """Train on full batches of the size of the case's slices; the model is to be thrown away.

    Args:
        micro_batch: as the run will begin with; None: the site's own.
        folder: of the site for features; what the frozen part of the model makes is kept there
            meanwhile, so that the steps that are timed are as those of a run from its second pass
            over the slices on.

    Returns:
        how the last steps went, seconds a step, and the optimizer steps of a round of the run.

    Raises:
        TrainingError: as `train_round`; "out-of-memory" also where a smaller micro-batch than the
            site's would fit: on a processor the run would find out by being killed.
    """
    dataset = SliceDataset([MadeUp.of(few.middling, site, recipe)], site, recipe)
    slices = few.about_slices(site, recipe)
    batch = min(recipe.batch_size, slices)
    one_pass = dataclasses.replace(
        recipe,
        local_epochs=1,
        # a step of patients does as much for as many slices
        patient_rate=None,
        patient_clip_norm=None,
        patient_noise=0.0,
    )

    def steps(
        count: int, before: RoundResult | None, features: FeatureFolder | None
    ) -> RoundResult:
        return train_round(
            model,
            Subset(dataset, [i % len(dataset) for i in range(count * batch)]),
            dataclasses.replace(one_pass, batch_size=batch),
            site,
            round_number=0,
            optimizer=before.optimizer if before else None,
            control=control,
            micro_batch=before.micro_batch if before else micro_batch,
            features=features,
        )

    device = torch_device(site)
    with kept_meanwhile(model, site, device, folder) as features:
        first = steps(1 if features is None else TIMED_STEPS, None, features)
        result = steps(TIMED_STEPS, first, features)
    wanted = min(batch, micro_batch or slices_at_once(recipe, site, device))
    if device.type == "cpu" and result.micro_batch < wanted:
        raise TrainingError(
            f"memory is enough for {result.micro_batch} of {wanted} slices at once",
            f"set micro_batch: {result.micro_batch} in site.yml, or give the trainer more memory",
            code="out-of-memory",
        )
    rounds_steps = recipe.local_epochs * math.ceil(slices / recipe.batch_size)
    return result, result.seconds / TIMED_STEPS, rounds_steps


def rehearsal(
    few: FewCases, recipe: Recipe, meter: Meter, seconds_per_step: float | None, steps: int
) -> Rehearsal:
    """What the canary took, and what a round of the run will take by that."""
    scored = sum(case.record.shape[0] for case in few.scored)
    a_slice = meter.seconds.get("evaluate", 0.0) / max(1, scored)
    to_score = few.scored_cases * few.middling.record.shape[0] / recipe.evaluate_every
    return Rehearsal(
        seconds=sum(meter.seconds.values()),
        seconds_per_step=seconds_per_step,
        seconds_per_round=steps * (seconds_per_step or 0.0)
        + to_score * a_slice
        + meter.seconds.get("exchange", 0.0),
        peak_memory_bytes=max(meter.peak_memory_bytes.values(), default=0),
    )


@contextlib.contextmanager
def memory_refused(device: torch.device) -> Iterator[None]:
    """On a processor, have memory refused that this container does not have.

    The kernel gives memory that is not there and kills who uses it, without a word. Inside, this
    process may have no more than most of what is left now, and hears of it as an error. Not all:
    what it was given before and has not touched yet is taken from the same.

    Raises:
        TrainingError: code out-of-memory, where a library has other words for it.
    """
    if device.type != "cpu":
        yield
        return
    used = psutil.Process().memory_info()
    left = min(allowed_bytes() - (used.rss - used.shared), psutil.virtual_memory().available)
    room = int(left * SHARE_OF_MEMORY)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = used.data + max(0, room)
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    log.info("a canary may take %s more memory", size_text(max(0, room)))
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    except RuntimeError as error:
        if _REFUSED.search(str(error)) is None:
            raise
        raise TrainingError(
            f"memory ran out: {str(error).splitlines()[0]}",
            "give the trainer more memory, or set micro_batch: 1 in site.yml",
            code="out-of-memory",
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _shows(case: StoredCase, values: set[int]) -> bool:
    return any(not values.isdisjoint(found) for found in case.slice_values())


def _size(case: Case) -> int:
    """Bytes of an image's files; of series, the number of their files."""
    try:
        return sum(
            sum(1 for _ in path.iterdir()) if path.is_dir() else path.stat().st_size
            for path in case.image_files
        )
    except OSError:  # reading it says why
        return 0
