"""A trainer that takes its time, so that a round lasts as long on a fast machine as on a busy one.

`slow_trainer.py SITE CONFIG POLICY EXCHANGE WORK`; otherwise it is `python -m fedfms.trainer`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path

from fedfms.trainer.kept import Outcome
from fedfms.trainer.server import TrainerServer
from fedfms.trainer.tasks import SiteFolders, TaskRunner

SECONDS = 4.0  # before it begins to train


class SlowRunner(TaskRunner):
    """Waits before each round; it can be aborted meanwhile."""

    def run(self, task, received, control) -> Outcome:
        until = time.monotonic() + (SECONDS if task.kind == "train" else 0.0)
        while time.monotonic() < until:
            control.check()
            time.sleep(0.1)
        return super().run(task, received, control)


if __name__ == "__main__":
    name, config, policy, exchange, work = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    folders = SiteFolders(
        name=name,
        config=Path(config),
        policy=Path(policy),
        data_root=None,
        checkpoints=None,
        work=Path(work),
        order_from_seed=True,
    )
    asyncio.run(TrainerServer(SlowRunner(folders), Path(exchange)).run())
