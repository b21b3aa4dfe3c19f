"""A line that breaks in the middle of a model: the round is done, and next to nothing goes twice.

benchmarks/slow_line.py measures the same with the sizes of a real round.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from federations import JOBS, of_kind, read_records, write_sites
from slow_line import FederationBehindLines, Lines

from fedfms.flare.session import prepare_job
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAYLOAD = 780_000  # bytes, about: FedMSA on vit_demo


def test_a_reset_in_the_middle_of_a_model_costs_no_round_and_few_bytes(tmp_path: Path) -> None:
    sites = find_sites(write_sites(tmp_path / "sites", ("site-1",)), None)
    settings = ("rounds=1", "image_size=64", "local_epochs=1", "min_clients=1")
    job = prepare_job(JOBS / "fedmsa", tmp_path / "job" / "fedmsa", settings)
    lines = Lines(megabytes_per_second=0.1, delay_seconds=0.02)
    federation = FederationBehindLines(
        tmp_path / "run", sites, job.recipe, None, lambda event: None, lines=lines
    )
    cut: list[int] = []

    def disturb() -> None:
        while line.down - before < PAYLOAD // 2:
            time.sleep(0.02)
        cut.append(line.down - before)
        line.cut_for(3.0, "reset")

    with lines, federation.running() as coordinator:
        line = lines["site-1"]
        before = line.down
        job_id = federation.submit(coordinator, job.folder)
        began = time.monotonic()
        threading.Thread(target=disturb, daemon=True).start()
        assert federation.wait_for_end(coordinator, job_id) == "FINISHED:COMPLETED"
        seconds, down = time.monotonic() - began, line.down - before
        records = read_records(coordinator.download(job_id, tmp_path / "fetched"))
    assert cut and line.connections >= 4  # two of before the break, and two after it
    (done,) = of_kind(records, "round_done")
    assert done["sites"] == ["site-1"] and not done["missed"]
    (answer,) = of_kind(records, "contribution")
    # a model for the round, one for the evaluation, what was under way, and what FLARE says beside
    assert down < 3 * answer["bytes_down"] + 300_000
    assert seconds < 300  # FLARE's own values wait that long for one chunk alone
