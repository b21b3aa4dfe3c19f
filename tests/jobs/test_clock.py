"""A clock that is set in the middle of a run, at the server and at a site, changes nothing.

Only Python's own clock is moved, in those processes: the machine's is not ours.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from federations import JOBS, STYLES, of_kind, read_records, wait_until, write_sites

from fedfms.flare.run_state import RUNS
from fedfms.flare.session import connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("rounds=5", "image_size=64", "local_epochs=6", "optimizer_state=keep")
YEAR, HOUR = 365 * 86400, 3600

# a module that every Python process imports when it starts, where it is on its path
MOVED = """
import os, sys, time
_time, _file = time.time, os.environ["MOVED_CLOCK"]

def moved():
    try:
        with open(_file) as file:
            lines = file.read().split()
    except OSError:
        return _time()
    words = " ".join(sys.argv) + os.getcwd()
    hours = [float(by) for who, by in (line.split("=") for line in lines) if who in words]
    return _time() + sum(hours)

time.time = moved
"""


def test_clocks_that_jump_change_no_model_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(MOVED)
    clocks = tmp_path / "clocks"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("MOVED_CLOCK", str(clocks))
    sites = find_sites(write_sites(tmp_path / "sites", STYLES), None)
    first = prepare_job(JOBS / "fedmsa", tmp_path / "first" / "fedmsa", SETTINGS)
    federation = Federation(tmp_path / "run", sites, first.recipe, None, lambda event: None)
    with federation.running() as coordinator:

        def end(job_id: str, name: str) -> Path:
            assert federation.wait_for_end(coordinator, job_id) == "FINISHED:COMPLETED"
            with connect(federation.kit(ADMIN)) as session:
                return session.download(job_id, tmp_path / name)

        undisturbed = end(federation.submit(coordinator, first.folder), "undisturbed")
        job = prepare_job(JOBS / "fedmsa", tmp_path / "second" / "fedmsa", SETTINGS)
        job_id = federation.submit(coordinator, job.folder)
        folder = federation.kit(SERVER) / RUNS / job_id
        jumps = (f"localhost={YEAR}", f"site-2={-2 * HOUR}", f"localhost={-YEAR - HOUR}")
        said: list[str] = []
        for number, jump in enumerate(jumps, start=1):

            def is_so_far(number: int = number) -> bool:
                federation._look()
                return any(int(p.name[6:]) >= number for p in folder.glob("round-*"))

            wait_until(is_so_far, 150, f"{number} rounds")
            said.append(jump)
            clocks.write_text("\n".join(said))
        disturbed = end(job_id, "disturbed")
    for name in ("global_model.safetensors", "best_model.safetensors"):
        one, other = ((place / name).read_bytes() for place in (undisturbed, disturbed))
        assert hashlib.sha256(one).hexdigest() == hashlib.sha256(other).hexdigest(), name
    records = read_records(disturbed)
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(5))
    times = [record["time"] for record in records]
    assert times == sorted(times) and times[-1] - times[0] < 600
