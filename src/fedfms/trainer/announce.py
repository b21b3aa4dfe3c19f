"""What a trainer says of its site when asked: from site.yml and policy, and never a file's name.

Of the images it says how far apart their voxels are, roughly and of several cases together.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from fedfms import __version__
from fedfms.contracts.announcement import (
    Announcement,
    Device,
    NoisedSums,
    PrivacySpent,
    Slicing,
)
from fedfms.contracts.machine import Machine
from fedfms.contracts.messages import public_code
from fedfms.contracts.now import GpuState
from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.contracts.wire import MAX_NAMES
from fedfms.data.content import read_bytes
from fedfms.data.formats import read_image
from fedfms.data.manifest import find_whole_cases, training_patients
from fedfms.errors import FedfmsError, SiteDataError
from fedfms.exchange.bounds import read_policy
from fedfms.trainer.budget import Budget, costs_of_policy
from fedfms.trainer.own_key import public_key
from fedfms.trainer.tasks import SiteFolders
from fedfms.training.device import torch_device
from fedfms.training.gpu_there import why_lost

log = logging.getLogger(__name__)

MOST_KINDS = 50  # of noise that left: more are not told
READ_SECONDS = 0.7  # for both files; who asks waits a second or more
SLOW_FILES = "site-files-slow"  # code: they cannot be read in that time, as on a dead share
NO_GPU = "no-gpu"  # code: the site asks for a GPU and there is none
GPU_SECONDS = 30.0  # for an answer of its driver
LOOK_SECONDS = 5.0  # between two looks at it
CASES_MEASURED = 5  # or min_cases where that is more: of so many the spacing is looked at

Spacing = tuple[float, float, float]  # mm between slices, rows and columns


@dataclass(frozen=True, slots=True)
class Measured:
    """What some of a site's images say, roughly and of several cases together."""

    spacing: Spacing | None = None  # None: files that have no voxel size, or too few cases
    about_slices: int = 0  # to train on, in one digit; 0: too few cases
    few_patients: bool = False  # fewer to train on than the policy asks for


def describe(
    folders: SiteFolders,
    measured: Callable[[SiteConfig, Policy], Measured],
    privacy_of: Callable[[Policy], tuple[PrivacySpent, ...]] = lambda policy: (),
) -> Announcement:
    """What the site can do now; whatever is wrong is told as the code of its error.

    Args:
        folders: the site's.
        measured: gives what its images say, see `measure`.
        privacy_of: gives what training has cost, where that is told.
    """
    try:
        site = SiteConfig.from_yaml(folders.config, folders.data_root)
        policy = read_policy(folders.policy)
        device: Device = "cuda" if torch_device(site).type == "cuda" else "cpu"
        if not site.data_root.is_dir():
            raise SiteDataError(
                f"there is no folder {site.data_root} ({site.data_root_named_by})",
                "name the folder with your images there",
                code="no-data-root",
            )
    except FedfmsError as error:
        return Announcement(folders.name, __version__, fault=public_code(error.code))
    except Exception:
        return Announcement(folders.name, __version__, fault="unexpected")
    images = measured(site, policy)
    return Announcement(
        site=folders.name,
        version=__version__,
        classes=tuple(site.classes),
        not_annotated=site.not_annotated,
        methods=policy.methods,
        max_rounds=policy.max_rounds,
        device=device,
        slicing=Slicing.of(site, images.spacing),
        bounds=policy.bounds,
        about_slices=images.about_slices,
        few_patients=images.few_patients,
        privacy=privacy_of(policy),
        require_secure_sum=policy.require_secure_sum,
        overlapping=tuple(
            (one, other)
            for one, other in itertools.combinations(site.classes, 2)
            if set(site.classes[one]) & set(site.classes[other])
        )[:MAX_NAMES],
    )


def measure(
    site: SiteConfig,
    smallest: int,
    may_go_on: Callable[[], bool] = lambda: True,
    *,
    least_patients: int = 0,
) -> Measured:
    """The median spacing of some of a site's cases, and about how many slices it trains on.

    Each number of the spacing is rounded to two digits, that of slices to one: the median of these
    cases times the number of cases to train on.

    Args:
        site: whose images are read as training reads them; what cannot be read is passed over.
        smallest: fewer cases than this say nothing.
        may_go_on: asked before each case.
        least_patients: with fewer to train on the policy lets nothing be trained.

    Returns:
        the spacing in mm between slices, rows and columns of the site's plane. Nothing of too few
        cases.

    Raises:
        SiteDataError: there are no cases.
    """
    cases, _ = find_whole_cases(site)
    few = training_patients(cases) < least_patients
    count = max(smallest, CASES_MEASURED)
    found: list[Spacing] = []
    depths: list[int] = []
    for case in cases[:: max(1, len(cases) // count)][:count]:
        if not may_go_on():
            return Measured()
        with contextlib.suppress(FedfmsError):
            image = read_image(case.image, read_bytes(case.image, site), site)
            found.append(image.spacing)
            depths.append(len(image.values))
    if len(found) < smallest:
        return Measured(few_patients=few)
    training = sum(case.split == "train" for case in cases)
    about = int(float(f"{median(depths) * training:.0e}"))
    if site.distance_unit != "mm":
        return Measured(None, about, few)
    slices, rows, columns = (float(f"{median(axis):.2g}") for axis in zip(*found, strict=True))
    return Measured((slices, rows, columns), about, few)


class Announcer:
    """Answers pings beside the task that runs.

    The files are read in a thread of their own: to read from a dead network share blocks for ever,
    and the trainer must go on with its signs of life. There is never more than one such thread.
    Another such thread looks at some of the images, once, while no task runs; until then their
    spacing and number are not told.
    """

    def __init__(self, folders: SiteFolders) -> None:
        self._folders = folders
        self._reading: asyncio.Future[Announcement] | None = None
        self._busy: Callable[[], bool] = lambda: False
        # what was measured, and for which settings: site, smallest, least_patients
        self._measured: tuple[tuple[SiteConfig, int, int], Measured] | None = None
        self._measuring = False
        # policy and state of the account, and what they come to
        self._account: tuple[object, tuple[PrivacySpent, ...]] | None = None
        self._accounting = False
        self._gpu = GpuWatch()

    async def pong(self, busy: Callable[[], bool]) -> Announcement:
        """The answer to a ping, within READ_SECONDS."""
        self._busy = busy
        if self._reading is None or self._reading.done():
            self._reading = self._read()
        try:
            pong = await asyncio.wait_for(asyncio.shield(self._reading), READ_SECONDS)
            key = public_key(self._folders.work)
            return dataclasses.replace(
                pong, busy=busy(), gpu=self._gpu.state(pong), trainer_key=key
            )
        except asyncio.TimeoutError:
            return Announcement(self._folders.name, __version__, busy(), SLOW_FILES)

    def gpu_failed(self) -> None:
        """A task ended since its GPU failed."""
        self._gpu.failed = True

    def _read(self) -> asyncio.Future[Announcement]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Announcement] = loop.create_future()

        def deliver(pong: Announcement) -> None:
            if not answer.done():
                answer.set_result(pong)

        def read() -> None:
            pong = describe(self._folders, self._of_images, self._privacy)
            with contextlib.suppress(RuntimeError):  # the trainer has stopped in the meantime
                loop.call_soon_threadsafe(deliver, pong)

        # a daemon: it must not keep the process from ending
        threading.Thread(target=read, name="announce", daemon=True).start()
        return answer

    def _of_images(self, site: SiteConfig, policy: Policy) -> Measured:
        """What was measured for these settings; starts to measure where nothing was yet."""
        settings = site, max(site.min_cases, policy.min_cases), policy.min_training_patients
        known = self._measured
        if known is not None and known[0] == settings:
            return known[1]
        if not self._measuring and not self._busy():
            self._measuring = True
            threading.Thread(
                target=self._measure, args=settings, name="images", daemon=True
            ).start()
        return Measured()

    def _privacy(self, policy: Policy) -> tuple[PrivacySpent, ...]:
        """What training has cost; to compute it takes seconds, and until then nothing is told."""
        budget = Budget(self._folders.work)
        if not policy.limits_epsilon and budget.state() == (0, 0):
            return ()
        key = (policy, budget.state())
        known = self._account
        if known is not None and known[0] == key:
            return known[1]
        if not self._accounting:
            self._accounting = True

            def compute() -> None:
                try:
                    self._account = key, _spent(budget, policy)
                except FedfmsError as error:
                    log.error("%s", error)
                finally:
                    self._accounting = False

            threading.Thread(target=compute, name="account", daemon=True).start()
        return ()

    def _measure(self, site: SiteConfig, smallest: int, least: int) -> None:
        found = Measured()
        try:
            found = measure(site, smallest, lambda: not self._busy(), least_patients=least)
        except Exception as error:  # whatever a file does to its reader, the task will say it
            log.debug("nothing to tell of images: %s", type(error).__name__)
        finally:
            if found != Measured() or not self._busy():  # a task came between: again later
                self._measured = (site, smallest, least), found
            self._measuring = False


def _spent(budget: Budget, policy: Policy) -> tuple[PrivacySpent, ...]:
    return tuple(
        PrivacySpent(
            one.unit,
            None if math.isinf(one.epsilon) else math.ceil(one.epsilon * 100) / 100,
            one.budget,
            one.delta,
            tuple(NoisedSums(part.noise, part.rate, part.steps) for part in one.let_out)
            if len(one.let_out) <= MOST_KINDS
            else None,
            costs_of_policy(policy)[one.unit].noise,
        )
        for one in budget.spent(policy)
        if one.is_told
    )


class GpuWatch:
    """Whether the GPU of this process is there; the driver is asked beside everything else.

    A driver in trouble may never answer: who asks gets what was known last, and a question that
    stays open counts as an answer after GPU_SECONDS.
    """

    def __init__(self) -> None:
        self.failed = False  # a task met a GPU that does not compute any more
        self._expected = Machine.from_environment().require_gpu
        self._asked: float | None = None  # since when a question is open
        self._answered = -math.inf
        self._lost = False

    def state(self, told: Announcement) -> GpuState | None:
        """The state to announce, with what the site's files ask for now."""
        if told.device == "cuda":
            self._expected = True
        if told.device is None and told.fault != NO_GPU:
            return None  # files that cannot be read say nothing of a device
        if not self._expected:
            return "none"
        self._look()
        hangs = self._asked is not None and time.monotonic() - self._asked > GPU_SECONDS
        if self.failed or self._lost or hangs or told.device != "cuda":
            return "lost"
        return "present"

    def _look(self) -> None:
        if self._asked is None and time.monotonic() - self._answered > LOOK_SECONDS:
            self._asked = time.monotonic()
            threading.Thread(target=self._ask, name="gpu", daemon=True).start()

    def _ask(self) -> None:
        reason = why_lost()
        if reason is not None and not self._lost:
            log.error("the GPU is lost: %s", reason)
        self._lost, self._answered, self._asked = reason is not None, time.monotonic(), None
