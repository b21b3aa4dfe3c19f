"""What the server tells Prometheus of its runs and their sites. Off unless its environment asks.

A thread looks now and then, as a coordinator does, at what each running job's process tells; a
scrape gets what was seen last. Nothing here waits on a run or makes one wait: whatever fails is a
line in the log, and the run goes on.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from fedfms.contracts.machine import Machine
from fedfms.flare.internals import rejoin
from fedfms.flare.internals.server import job_statistics
from fedfms.flare.job import PROGRESS_GROUP, RESULT_FOLDER
from fedfms.flare.progress import Event
from fedfms.records.history import History
from fedfms.records.layout import RECORDS
from fedfms.records.read import RecordReader
from fedfms.records.schema import Note, Resumed

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0  # between two looks; Prometheus asks each 15 s or less often


@dataclass(frozen=True, slots=True)
class SeenRun:
    """A job that runs, as it was last seen."""

    job_id: str
    event: Event
    history: History
    restarts: dict[str, int]  # of the server's process of the job; of sites' job processes


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at one time."""

    at: float  # time.time()
    runs: Sequence[SeenRun] = ()
    connected: int = 0  # sites
    disk_free: int = 0  # bytes, of the workspace
    disk: int = 0


class Metrics(FLComponent):  # type: ignore[misc]
    """Serves them where FEDFMS_METRICS_PORT is set; in the component list of a server's kit."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin as soon as the server runs."""
        if event_type != EventType.SYSTEM_START:
            return
        try:
            here = Machine.from_environment()
            if here.metrics_port is None:
                return
            workspace = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
            from fedfms.flare.prometheus import serve  # a server without that library starts, too

            watch = Watch(fl_ctx.get_engine(), workspace)
            serve(watch, here.metrics_host, here.metrics_port)
            watch.start()
            log.info("metrics at http://%s:%d/metrics", here.metrics_host, here.metrics_port)
        except Exception as error:  # a server without metrics is better than none
            log.error("there are no metrics: %s", error)


class Watch:
    """Looks at what runs, in a thread of its own."""

    def __init__(self, engine: Any, workspace: Path) -> None:
        self._engine = engine
        self._workspace = workspace
        self._readers: dict[str, RecordReader] = {}
        self.seen = Seen(time.time())

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def _run(self) -> None:
        told = ""
        while True:
            try:
                self.seen = self.look()
                told = ""
            except Exception as error:
                if (said := f"{type(error).__name__}: {error}") != told:
                    log.warning("metrics are as old as they are: %s", said)
                told = said
            time.sleep(LOOK_SECONDS)

    def look(self) -> Seen:
        """What there is now."""
        ids = [job.job_id for job in rejoin.running_jobs(self._engine)]
        self._readers = {job_id: self._reader(job_id) for job_id in ids}
        disk = shutil.disk_usage(self._workspace)
        return Seen(
            at=time.time(),
            runs=[run for job_id in ids if (run := self._look_at(job_id)) is not None],
            connected=len(rejoin.connected_sites(self._engine)),
            disk_free=disk.free,
            disk=disk.total,
        )

    def _reader(self, job_id: str) -> RecordReader:
        known = self._readers.get(job_id)
        return known or RecordReader(self._workspace / job_id / RESULT_FOLDER / RECORDS)

    def _look_at(self, job_id: str) -> SeenRun | None:
        told = job_statistics(self._engine, job_id).get(PROGRESS_GROUP) or {}
        try:
            event = Event.from_dict(told)
        except (ValueError, TypeError):  # its process begins, or ends
            return None
        reader = self._readers[job_id]
        reader.read_new()
        return SeenRun(
            job_id,
            event,
            History(reader.records, {}),
            {
                "server": sum(isinstance(one, Resumed) for one in reader.records),
                "site": sum(
                    isinstance(one, Note) and one.kind == "site_died" for one in reader.records
                ),
            },
        )
