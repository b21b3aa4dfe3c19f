"""Random faults while a federation of processes trains: `make chaos SEEDS="1 2 3"`.

Each seed is a schedule: at random moments something is killed (`kill -9`: the server, a FLARE
client, a job process, a trainer) or stopped for a while, at least one server and one FLARE client
among them. What a container engine would start again is started again. A schedule has passed when
the run came to its end with all rounds, every file in its results is whole, and no process is left.
One line a seed on standard output, as a row of results/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "jobs"))

from federations import JOBS, STYLES, processes_below, read_records, write_sites

from fedfms.exchange.tensors import load_tensors
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation
from fedfms.local.sites import find_sites

SITES = tuple(STYLES)
FAULTS = ("server", "job at the server", "client", "job process", "trainer")
PAUSES = ("pause client", "pause trainer")
GAP_SECONDS = (15.0, 40.0)  # between two faults; a server needs up to 30 s
PAUSE_SECONDS = (5.0, 40.0)
LATEST_SECONDS = 1500.0  # after the last fault, for the run to end


@dataclass
class Schedule:
    """What is done when; a function of the seed and of the length alone."""

    seed: int
    seconds: float
    faults: list[tuple[float, str, str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        at = draw.uniform(10.0, 25.0)
        kinds = []
        while at < self.seconds:
            kind = draw.choice(FAULTS + PAUSES)
            self.faults.append((at, kind, draw.choice(SITES), draw.uniform(*PAUSE_SECONDS)))
            kinds.append(kind)
            at += draw.uniform(*GAP_SECONDS)
        for number, kind in enumerate(("server", "client")):  # one of each at least
            if kind not in kinds:
                at, _, site, pause = self.faults[number]
                self.faults[number] = (at, kind, site, pause)


class Disturbed:
    """One federation, one run, one schedule."""

    def __init__(self, folder: Path, schedule: Schedule, rounds: int) -> None:
        self.folder, self.schedule = folder, schedule
        self.done: list[str] = []
        self.overrides = (
            *(f"rounds={rounds}", "image_size=64", "local_epochs=30"),
            *("optimizer_state=keep", "evaluate_every=4"),
        )

    def run(self) -> dict[str, object]:
        """Do it all; what the row says."""
        sites = find_sites(write_sites(self.folder / "sites", STYLES), None)
        job = prepare_job(JOBS / "fedmsa", self.folder / "job" / "fedmsa", self.overrides)
        federation = Federation(self.folder / "run", sites, job.recipe, None, lambda event: None)
        began = time.monotonic()
        with federation.running() as coordinator:
            job_id = federation.submit(coordinator, job.folder)
            disturber = threading.Thread(target=self._disturb, daemon=True)
            disturber.start()
            limit = threading.Timer(
                self.schedule.seconds + LATEST_SECONDS, signal.raise_signal, (signal.SIGINT,)
            )
            limit.daemon = True
            limit.start()
            try:
                status = federation.wait_for_end(coordinator, job_id)
            except KeyboardInterrupt:
                status = "did not end"
            limit.cancel()
            rounds: list[int] = []
            whole = False
            with contextlib.suppress(Exception), connect(federation.kit(ADMIN)) as session:
                results = session.download(job_id, self.folder / "fetched")
                records = read_records(results)
                rounds = [r["round"] for r in records if r["record"] == "round_done"]
                whole = all(load_tensors(path) for path in results.glob("*.safetensors"))
                answers = {
                    (r["round"], r["site"])
                    for r in records
                    if r["record"] == "contribution" and r["accepted"]
                }
                self.missed = len(rounds) * len(SITES) - len(answers)
            left_on_disk = sorted(p.name for p in (federation.kit(SERVER) / RUNS).glob("*"))
        left = [process.pid for process in processes_below(self.folder)]
        parts = [str(path) for path in self.folder.rglob("*.part")]
        passed = (
            status == "FINISHED:COMPLETED"
            and rounds == list(range(job.recipe.rounds))
            and whole
            and not left
        )
        return {
            "seed": self.schedule.seed,
            "passed": passed,
            "status": status,
            "rounds": f"{len(rounds)} of {job.recipe.rounds}",
            "answers missed": getattr(self, "missed", None),
            "seconds": round(time.monotonic() - began),
            "faults": ", ".join(self.done),
            "left": [*left, *parts, *left_on_disk],
        }

    def _disturb(self) -> None:
        began = time.monotonic()
        for at, kind, site, pause in self.schedule.faults:
            time.sleep(max(0.0, began + at - time.monotonic()))
            if not self._processes("server.server_train") and kind != "client":
                continue  # the server is starting: nothing to disturb
            hit = self._do(kind, site, pause)
            if hit:
                where = "" if "server" in kind else f" {site}"
                self.done.append(f"{round(time.monotonic() - began)} s {kind}{where}")

    def _do(self, kind: str, site: str, pause: float) -> bool:
        trainer, client, job = "fedfms.trainer", "client.client_train", "client.worker_process"
        match kind:
            case "server":
                hit = self._processes("server.server_train", "server.runner_process")
            case "job at the server":
                hit = self._processes("server.runner_process")
            case "client":
                hit = self._processes(client, job, site=site)
            case "job process":
                hit = self._processes(job, site=site)
            case "trainer":
                hit = self._processes(trainer, site=site)
            case _:
                word = trainer if kind.endswith("trainer") else client
                hit = self._processes(word, job if word == client else word, site=site)
                self._each(hit, signal.SIGSTOP)
                time.sleep(pause)
                self._each(hit, signal.SIGCONT)
                return bool(hit)
        self._each(hit, signal.SIGKILL)
        return bool(hit)

    def _processes(self, *words: str, site: str = "") -> list[psutil.Process]:
        found = []
        for process in processes_below(self.folder):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if site in command and any(word in command for word in words):
                    found.append(process)
        return found

    @staticmethod
    def _each(processes: list[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


def main() -> int:
    """Run the schedules one after the other; 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=240.0, help="length of a schedule")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--keep", type=Path, help="folder for all files of schedules that failed")
    options = parser.parse_args()
    failed = False
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        row = Disturbed(folder, Schedule(seed, options.seconds), options.rounds).run()
        print(json.dumps(row), flush=True)
        if not row["passed"] and options.keep is not None:
            shutil.copytree(folder, options.keep / folder.name, symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)
        failed = failed or not row["passed"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
