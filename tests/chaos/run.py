"""Random faults while a federation of processes trains: `make chaos SEEDS="1 2 3"`.

A seed is a schedule of at least four minutes (schedules.py): processes are killed (`kill -9`: the
server, a FLARE client, a job process, a trainer) or stopped for a while, a site's line is cut, a
disk is full; at least one server and one FLARE client are killed while sites train. What a
container engine would start again is started again. A schedule has passed when all of it was done,
the run came to its end with all rounds, every file is whole, and nothing is left: no process, no
mount, no unfinished file. One line a schedule on standard output, as a row of
results/reliability.md, with what each fault cost. `fixed` instead of a seed is the short schedule
of every change.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "jobs"))

from disks import Disk, may_mount, mounts_below
from federations import JOBS, STYLES, processes_below, write_sites
from outcome import counted, damaged_files, effects, read_lines, round_seconds, training
from schedules import FIXED, KILLS, Fault, drawn
from slow_line import Cut, FederationBehindLines, Lines

from fedfms.files import PART
from fedfms.flare.follow import read_end
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import Coordinator, connect, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER
from fedfms.local.processes import Supervised
from fedfms.local.sites import Site, find_sites
from fedfms.records.layout import GLOBAL_MODEL, RECORDS
from fedfms.report.write import write_results

SITES = tuple(STYLES)
TRAINER = Path(__file__).resolve().parent / "slow_trainer.py"
LATEST_SECONDS = 1500.0  # after the last fault, for the run to end
LONGEST_SECONDS = 300.0  # a round that waits longer waits for a site that cannot answer
TRAINS_SECONDS = 60.0  # that a kill waits for a moment at which sites train

_JOB = "client.worker_process"
_PROCESSES = {  # a word of the command line
    "server": ("server.server_train", "server.runner_process"),
    "job at the server": ("server.runner_process",),
    "client": ("client.client_train", _JOB),
    "job process": (_JOB,),
    "trainer": (TRAINER.name,),
    "everything": ("server.server_train", "server.runner", "client.client", _JOB, TRAINER.name),
}


class Place(FederationBehindLines):
    """A federation in which each site's line can be cut, and folders can be full."""

    disks: dict[str, Disk]
    has_disks: bool

    def _start_server(self, kit: Path) -> Supervised:
        if self.has_disks:
            self.disks["server"] = Disk(kit)
            storage = kit / "storage"  # in a container it is on the same volume
            storage.mkdir()
            (self.run / "kits" / "storage").symlink_to(storage)
        return super()._start_server(kit)

    def _start_site(self, site: Site, kit: Path) -> None:
        if self.has_disks:
            self.disks[f"client {site.name}"] = Disk(kit)
            self.disks[f"trainer {site.name}"] = Disk(self.run / "sites" / site.name)
            self.disks[f"exchange {site.name}"] = Disk(self.run / "exchange" / site.name)
        super()._start_site(site, kit)

    def trainer_command(self, site: Site, exchange: Path) -> list[str]:
        """That of tests/chaos/slow_trainer.py."""
        places = (site.folder / "site.yml", site.folder / "policy", exchange)
        work = self.run / "sites" / site.name
        return [sys.executable, str(TRAINER), site.name, *map(str, (*places, work))]


@dataclass(slots=True)
class Done:
    """A fault that was done."""

    fault: Fault
    time: float  # since 1970-01-01 UTC
    hit: int  # processes
    trains: bool  # whether who was hit had a round to answer
    up: float | None = None  # when what was killed was started again


class Disturbed:
    """One federation, one run, one schedule."""

    def __init__(self, folder: Path, faults: Sequence[Fault], rounds: int, has_disks: bool) -> None:
        self.folder, self.faults = folder, faults
        self.done: list[Done] = []
        self.skipped: list[Fault] = []
        self.has_disks = has_disks
        self.ended = threading.Event()
        self.broken = ""  # of the disturber itself
        self.overrides = (
            *(f"rounds={rounds}", "image_size=64", "local_epochs=6"),
            *("optimizer_state=keep", "evaluate_every=4"),
        )

    def run(self, keep: Path | None) -> dict[str, object]:
        """Do it all; what the row says.

        Args:
            keep: for all files of a schedule that did not pass.
        """
        sites = find_sites(write_sites(self.folder / "sites", STYLES), None)
        job = prepare_job(JOBS / "fedmsa", self.folder / "job" / "fedmsa", self.overrides)
        self.lines = Lines()
        run = self.folder / "run"
        self.federation = Place(run, sites, job.recipe, None, lambda event: None, lines=self.lines)
        self.federation.disks, self.federation.has_disks = {}, self.has_disks
        self.results = self.folder / "results"
        began = time.monotonic()
        status = "did not start"
        try:
            with self.lines, self.federation.running() as coordinator:
                status = self._disturbed(coordinator, job.folder)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                for disk in self.federation.disks.values():
                    disk.close()
                raise
            status = "".join(traceback.format_exception_only(error)).strip()
        left = [str(process.pid) for process in processes_below(self.folder)]
        left += [str(path) for path in self.folder.rglob(f"*{PART}")]
        damaged = damaged_files(self.folder / "run")
        records = read_lines(self.results / RECORDS)
        ended = records[-1]["time"] if records else 0.0
        rounds, answers = counted(records)
        in_time = [one for one in self.done if one.time < ended]  # else the run was too short
        killed = {one.fault.kind for one in in_time if one.trains and one.hit}
        passed = (
            status == "FINISHED:COMPLETED"
            and rounds == list(range(job.recipe.rounds))
            and (self.results / GLOBAL_MODEL).is_file()
            and max(round_seconds(records)) < LONGEST_SECONDS
            and not (left or damaged or self.broken)
            and len(in_time) + len(self.skipped) == len(self.faults)
            and killed
            >= {fault.kind for fault in self.faults if fault.kind in ("server", "client")}
        )
        if not passed and keep is not None:
            _copy(self.folder, keep / self.folder.name)
        for disk in self.federation.disks.values():
            disk.close()
        left += mounts_below(self.folder)
        return {
            "passed": passed and not left,
            "status": status,
            "rounds": f"{len(rounds)} of {job.recipe.rounds}",
            "answers missed": len(rounds) * len(SITES) - len(answers),
            "seconds of rounds": round_seconds(records),
            "seconds": round(time.monotonic() - began),
            "faults": [f"{round(one.fault.at)} s {one.fault}" for one in in_time],
            "too late": [str(one.fault) for one in self.done if one not in in_time],
            "skipped": [str(fault) for fault in self.skipped],
            "left": left,
            "damaged": damaged,
            "broken": self.broken,
            "effects": effects(records, in_time),
        }

    def _disturbed(self, coordinator: Coordinator, job: Path) -> str:
        job_id = self.federation.submit(coordinator, job)
        self.records = self.federation.kit(SERVER) / RUNS / job_id / RECORDS
        disturber = threading.Thread(target=self._disturb, daemon=True)
        disturber.start()
        seconds = self.faults[-1].at + LATEST_SECONDS
        limit = threading.Timer(seconds, signal.raise_signal, (signal.SIGUSR1,))
        limit.daemon = True
        signal.signal(signal.SIGUSR1, _too_late)
        limit.start()
        try:
            status = self.federation.wait_for_end(coordinator, job_id)
        finally:
            self.ended.set()
            limit.cancel()
        disturber.join(max(fault.seconds for fault in self.faults) + TRAINS_SECONDS)
        with connect(self.federation.kit(ADMIN)) as session:
            downloaded = session.download(job_id, self.folder / "fetched")
        write_results(downloaded, self.results)
        end = read_end(downloaded, status)
        return status if end.completed else f"{status}: {end.problem}"

    # ------------------------------------------------------------------------------- faults

    def _disturb(self) -> None:
        began, lasting = time.monotonic(), []
        try:
            for fault in self.faults:
                if self.ended.wait(max(0.0, began + fault.at - time.monotonic())):
                    break  # too soon: it does not pass
                if fault.kind.startswith("full") and not self.has_disks:
                    self.skipped.append(fault)
                    print(f"skipped: {fault}", file=sys.stderr)
                    continue
                trains = self._wait_for_training(fault)
                if self.ended.is_set():
                    break
                one = threading.Thread(target=self._try, args=(fault, trains), daemon=True)
                one.start()
                lasting.append(one)
            for one in lasting:
                one.join()
        except Exception:
            self.broken += traceback.format_exc()

    def _wait_for_training(self, fault: Fault) -> bool:
        """Let a kill find what it kills, in a round that who is hit has to answer yet."""
        until = time.monotonic() + TRAINS_SECONDS
        while True:
            trains = training(read_lines(self.records), fault.site or None)
            is_kill = fault.kind in KILLS
            if not is_kill or time.monotonic() > until or self.ended.is_set():
                return trains
            if trains and self._processes(fault.kind, fault.site):
                return True
            time.sleep(0.1)

    def _try(self, fault: Fault, trains: bool) -> None:
        try:
            self._do(fault, trains)
        except Exception:
            self.broken += traceback.format_exc()

    def _do(self, fault: Fault, trains: bool) -> None:
        now = time.time()
        sort, _, where = fault.kind.partition(" ")
        if sort == "full":
            one = Done(fault, now, 1, trains)
            self.done.append(one)
            self.federation.disks[f"{where} {fault.site}".strip()].fill(fault.seconds)
            one.up = time.time()
            return
        if sort == "cut":
            one = Done(fault, now, 1, trains)
            self.done.append(one)
            self.lines[fault.site].cut_for(fault.seconds, cast(Cut, where))
            one.up = time.time()
            return
        if sort == "pause":
            hit = self._processes(where, fault.site)
            one = Done(fault, now, len(hit), trains)
            self.done.append(one)
            _send(hit, signal.SIGSTOP)
            time.sleep(fault.seconds)
            _send(hit, signal.SIGCONT)
            one.up = time.time()
            return
        kind = fault.kind.removesuffix(" told to stop").removesuffix(" away")
        hit = self._processes(kind, fault.site)
        one = Done(fault, now, len(hit), trains)
        self.done.append(one)
        name = "the server" if kind == "server" else f"{fault.site}'s FLARE client"
        kept = [p for p in self.federation._flare if p.name == name and sort != "job"]
        if fault.kind.endswith(" away"):
            for process in kept:
                process.restarts = False
        if fault.kind.endswith(" told to stop"):
            _send([process for process in hit if process.ppid() == os.getpid()], signal.SIGTERM)
        else:
            _send(hit, signal.SIGKILL)
        if fault.kind.endswith(" away"):
            time.sleep(fault.seconds)
            for process in kept:
                process.restarts = True
        one.up = self._up_again(kind, fault.site, max(now, time.time() - 0.1))

    def _up_again(self, kind: str, site: str, after: float) -> float | None:
        """When a process of this kind was started again that died; looked for for a minute."""
        until = time.monotonic() + TRAINS_SECONDS
        while time.monotonic() < until:
            for process in self._processes(kind, site, first=True):
                with contextlib.suppress(psutil.Error):
                    if process.create_time() > after:
                        return float(process.create_time())
            time.sleep(0.2)
        return None

    def _processes(self, kind: str, site: str, first: bool = False) -> list[psutil.Process]:
        words = _PROCESSES[kind][:1] if first else _PROCESSES[kind]
        found = []
        for process in processes_below(self.folder):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if site in command and any(word in command for word in words):
                    found.append(process)
        return found


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _too_late(*_: object) -> None:
    raise TimeoutError(f"the run did not end within {LATEST_SECONDS:.0f} s of its last fault")


def _copy(folder: Path, place: Path) -> None:
    def special(path: str, names: list[str]) -> list[str]:
        modes = {name: Path(path, name).lstat().st_mode for name in names}
        return [n for n, m in modes.items() if not (stat.S_ISREG(m) or stat.S_ISDIR(m))]

    shutil.copytree(folder, place, symlinks=True, ignore=special)


def main() -> int:
    """Run the schedules one after the other; 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", help=f"numbers, or of {', '.join(FIXED)}")
    parser.add_argument("--seconds", type=float, default=240.0, help="until the last fault begins")
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--keep", type=Path, help="folder for all files of schedules that failed")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # one in the background has none else
        signal.signal(number, signal.default_int_handler)
    has_disks = may_mount()
    if not has_disks:
        print("no right to mount: SKIPPED every full disk", file=sys.stderr)
    failed = False
    for seed in options.seeds:
        if seed in FIXED:
            rounds, faults = FIXED[seed]
        else:
            rounds, faults = options.rounds, drawn(int(seed), options.seconds, SITES)
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        row = Disturbed(folder, faults, rounds, has_disks).run(options.keep)
        print(json.dumps({"seed": seed, **row}), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        failed = failed or not row["passed"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
