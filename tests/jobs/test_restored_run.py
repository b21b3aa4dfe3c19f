"""A server that is lost in the middle of a run comes back from its archive, in another folder."""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federations import (
    JOBS,
    STYLES,
    of_kind,
    processes_below,
    read_records,
    wait_until,
    write_sites,
)

from fedfms.errors import FederationError
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# the archive is older than what sites have done since: what they kept is of later rounds
SETTINGS = ("rounds=6", "image_size=64", "local_epochs=12", "optimizer_state=reset")


def fedfms(*arguments: object) -> str:
    command = [Path(sys.executable).with_name("fedfms"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_goes_on_from_an_archive_in_another_folder(tmp_path: Path) -> None:
    sites = find_sites(write_sites(tmp_path / "sites", STYLES), None)
    first = prepare_job(JOBS / "fedmsa", tmp_path / "first" / "fedmsa", SETTINGS)
    federation = Federation(tmp_path / "run", sites, first.recipe, None, lambda event: None)
    archive, elsewhere = tmp_path / "server.tar", tmp_path / "elsewhere"
    with federation.running() as coordinator:
        job_id = federation.submit(coordinator, first.folder)
        assert federation.wait_for_end(coordinator, job_id) == "FINISHED:COMPLETED"
        with connect(federation.kit(ADMIN)) as session:
            undisturbed = session.download(job_id, tmp_path / "undisturbed")

        job = prepare_job(JOBS / "fedmsa", tmp_path / "second" / "fedmsa", SETTINGS)
        job_id = federation.submit(coordinator, job.folder)
        kit = federation.kit(SERVER)

        def last_round(folder: Path) -> int:
            federation._look()
            rounds = (folder / RUNS / job_id).glob("round-*")
            return max((int(path.name[6:]) for path in rounds), default=0)

        wait_until(lambda: last_round(kit) >= 2, 150, "two rounds")
        said = fedfms("backup", archive, "--workspace", kit, "--kit", kit)
        assert "2 jobs, 1 runs that are not over" in said and "mode 600" in said
        assert stat.S_IMODE(archive.stat().st_mode) == 0o600
        assert not list(tmp_path.glob("*.part"))
        # the run goes on writing its own, each for a moment
        wait_until(lambda: not list(kit.rglob("*.part")), 30, "nothing half written is left")
        wait_until(lambda: last_round(kit) >= 4, 150, "two more rounds")

        server = federation._flare[0]
        for process in processes_below(tmp_path):
            command = " ".join(process.cmdline())
            if "server.server_train" in command or "server.runner_process" in command:
                process.kill()
        lost_at = time.monotonic()
        storage = kit.parents[2] / "storage"
        shutil.rmtree(storage)
        shutil.rmtree(kit / RUNS)

        fedfms("restore", archive, "--workspace", elsewhere, "--kit", elsewhere)
        shutil.rmtree(kit)
        resources = elsewhere / "local" / "resources.json"
        text = resources.read_text()
        assert str(storage) in text
        resources.write_text(text.replace(str(storage), str(elsewhere / "storage")))
        assert server.process is not None
        server.process.wait(20)
        server.folder = elsewhere
        server.arguments = [one.replace(str(kit), str(elsewhere)) for one in server.arguments]
        wait_until(lambda: last_round(elsewhere) >= 3, 150, "the run goes on")
        print(f"goes on after {time.monotonic() - lost_at:.0f} s")

        def is_finished() -> bool:
            federation._look()
            try:  # an attempt takes 5 s at most, and a busy machine may need more than one
                coordinator.reconnect()
                return coordinator.state(job_id).is_finished
            except FederationError:
                return False

        wait_until(is_finished, 200, "the end")
        assert coordinator.state(job_id).status == "FINISHED:COMPLETED"
        with connect(federation.kit(ADMIN)) as session:
            fetched = session.download(job_id, tmp_path / "fetched")
    records = read_records(fetched)
    assert [r["round"] for r in of_kind(records, "round_done")] == list(range(6))
    assert [r["round"] for r in of_kind(records, "resumed")] == [2]
    for name in ("global_model.safetensors", "best_model.safetensors"):
        one, other = ((folder / name).read_bytes() for folder in (undisturbed, fetched))
        assert hashlib.sha256(one).hexdigest() == hashlib.sha256(other).hexdigest(), name
