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
from statistics import median

from fedfms import __version__
from fedfms.contracts.announcement import Announcement, Device, Slicing
from fedfms.contracts.machine import Machine
from fedfms.contracts.messages import public_code
from fedfms.contracts.now import GpuState
from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.contracts.wire import MAX_NAMES
from fedfms.data.content import read_bytes
from fedfms.data.formats import read_image
from fedfms.data.manifest import find_cases
from fedfms.errors import FedfmsError, SiteDataError
from fedfms.exchange.door import read_policy
from fedfms.trainer.own_key import public_key
from fedfms.trainer.tasks import SiteFolders
from fedfms.training.device import torch_device
from fedfms.training.gpu_there import why_lost

log = logging.getLogger(__name__)

READ_SECONDS = 0.7  # for both files; who asks waits a second or more
SLOW_FILES = "site-files-slow"  # code: they cannot be read in that time, as on a dead share
NO_GPU = "no-gpu"  # code: the site asks for a GPU and there is none
GPU_SECONDS = 30.0  # for an answer of its driver
LOOK_SECONDS = 5.0  # between two looks at it
CASES_MEASURED = 5  # or min_cases where that is more: of so many the spacing is looked at

Spacing = tuple[float, float, float]  # mm between slices, rows and columns


def describe(
    folders: SiteFolders, spacing_of: Callable[[SiteConfig, Policy], Spacing | None]
) -> Announcement:
    """What the site can do now; whatever is wrong is told as the code of its error.

    Args:
        folders: the site's.
        spacing_of: gives the spacing to tell, see `measure_spacing`.
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
    return Announcement(
        site=folders.name,
        version=__version__,
        classes=tuple(site.classes),
        not_annotated=site.not_annotated,
        methods=policy.methods,
        max_rounds=policy.max_rounds,
        device=device,
        slicing=Slicing.of(site, spacing_of(site, policy)),
        overlapping=tuple(
            (one, other)
            for one, other in itertools.combinations(site.classes, 2)
            if set(site.classes[one]) & set(site.classes[other])
        )[:MAX_NAMES],
    )


def measure_spacing(
    site: SiteConfig, smallest: int, may_go_on: Callable[[], bool] = lambda: True
) -> Spacing | None:
    """The median spacing of some of a site's cases, each number rounded to two digits.

    Args:
        site: whose images are read as training reads them; what cannot be read is passed over.
        smallest: fewer cases than this say nothing.
        may_go_on: asked before each case.

    Returns:
        mm between slices, rows and columns of the site's plane. None: too few cases, or files that
        have no voxel size.

    Raises:
        SiteDataError: there are no cases.
    """
    if site.distance_unit != "mm":
        return None
    cases = find_cases(site)
    count = max(smallest, CASES_MEASURED)
    found: list[Spacing] = []
    for case in cases[:: max(1, len(cases) // count)][:count]:
        if not may_go_on():
            return None
        with contextlib.suppress(FedfmsError):
            found.append(read_image(case.image, read_bytes(case.image, site), site).spacing)
    if len(found) < smallest:
        return None
    slices, rows, columns = (float(f"{median(axis):.2g}") for axis in zip(*found, strict=True))
    return slices, rows, columns


class Announcer:
    """Answers pings beside the task that runs.

    The files are read in a thread of their own: to read from a dead network share blocks for ever,
    and the trainer must go on with its signs of life. There is never more than one such thread.
    Another such thread looks at the spacing of the images, once, while no task runs; until then it
    is not told.
    """

    def __init__(self, folders: SiteFolders) -> None:
        self._folders = folders
        self._reading: asyncio.Future[Announcement] | None = None
        self._busy: Callable[[], bool] = lambda: False
        # settings and what was measured for them: site, smallest, spacing
        self._measured: tuple[SiteConfig, int, Spacing | None] | None = None
        self._measuring = False
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
            pong = describe(self._folders, self._spacing)
            with contextlib.suppress(RuntimeError):  # the trainer has stopped in the meantime
                loop.call_soon_threadsafe(deliver, pong)

        # a daemon: it must not keep the process from ending
        threading.Thread(target=read, name="announce", daemon=True).start()
        return answer

    def _spacing(self, site: SiteConfig, policy: Policy) -> Spacing | None:
        """What was measured for these settings; starts to measure where nothing was yet."""
        smallest = max(site.min_cases, policy.min_cases)
        known = self._measured
        if known is not None and known[:2] == (site, smallest):
            return known[2]
        if not self._measuring and not self._busy():
            self._measuring = True
            arguments = (site, smallest)
            threading.Thread(
                target=self._measure, args=arguments, name="spacing", daemon=True
            ).start()
        return None

    def _measure(self, site: SiteConfig, smallest: int) -> None:
        spacing: Spacing | None = None
        try:
            spacing = measure_spacing(site, smallest, lambda: not self._busy())
        except Exception as error:  # whatever a file does to its reader, the task will say it
            log.debug("no spacing to tell: %s", type(error).__name__)
        finally:
            if spacing is not None or not self._busy():  # a task came between: again later
                self._measured = site, smallest, spacing
            self._measuring = False


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
