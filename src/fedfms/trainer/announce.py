"""What a trainer says of its site when asked: from site.yml and policy, and never a file's name."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable

from fedfms import __version__
from fedfms.config import SiteConfig
from fedfms.errors import FedfmsError, SiteDataError
from fedfms.exchange.door import read_policy
from fedfms.trainer.messages import Device, Pong, public_code
from fedfms.trainer.tasks import SiteFolders
from fedfms.training.device import torch_device

READ_SECONDS = 0.7  # for both files; who asks waits a second or more
SLOW_FILES = "site-files-slow"  # code: they cannot be read in that time, as on a dead share


def describe(folders: SiteFolders, busy: bool) -> Pong:
    """What the site can do now; whatever is wrong is told as the code of its error."""
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
        return Pong(folders.name, __version__, busy, public_code(error.code))
    except Exception:
        return Pong(folders.name, __version__, busy, "unexpected")
    return Pong(
        site=folders.name,
        version=__version__,
        busy=busy,
        classes=tuple(site.classes),
        not_annotated=site.not_annotated,
        methods=policy.methods,
        max_rounds=policy.max_rounds,
        device=device,
    )


class Announcer:
    """Answers pings beside the task that runs.

    The files are read in a thread of their own: to read from a dead network share blocks for ever,
    and the trainer must go on with its signs of life. There is never more than one such thread.
    """

    def __init__(self, folders: SiteFolders) -> None:
        self._folders = folders
        self._reading: asyncio.Future[Pong] | None = None

    async def pong(self, busy: Callable[[], bool]) -> Pong:
        """The answer to a ping, within READ_SECONDS."""
        if self._reading is None or self._reading.done():
            self._reading = self._read()
        try:
            pong = await asyncio.wait_for(asyncio.shield(self._reading), READ_SECONDS)
            return dataclasses.replace(pong, busy=busy())
        except asyncio.TimeoutError:
            return Pong(self._folders.name, __version__, busy(), SLOW_FILES)

    def _read(self) -> asyncio.Future[Pong]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Pong] = loop.create_future()

        def deliver(pong: Pong) -> None:
            if not answer.done():
                answer.set_result(pong)

        def read() -> None:
            pong = describe(self._folders, False)
            with contextlib.suppress(RuntimeError):  # the trainer has stopped in the meantime
                loop.call_soon_threadsafe(deliver, pong)

        # a daemon: it must not keep the process from ending
        threading.Thread(target=read, name="announce", daemon=True).start()
        return answer
