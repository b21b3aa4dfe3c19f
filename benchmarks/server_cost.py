"""What a round costs the server, and FLARE's share of it: `python benchmarks/server_cost.py`.

    python benchmarks/server_cost.py [--rounds 4] [--sites 3]

FedMSA with the shapes of ViT-B in fp32, 42.4 MB each way, random weights, images of 64 pixels so
that sites compute little; real kits, processes and TLS on this machine. Of each round but the
first, in which sites build their networks: processor seconds of the server's process of the job by
megabyte that it sent or received, and the round's seconds without those of the slowest site's own
work (its report: preparing, exchange with its trainer, scoring, training). Prints JSON, and ends
with 1 where the median round takes more than 4 ms a MB or where FLARE's share is more than 2.5 s;
seconds count on idle cores only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "jobs"))

from federations import JOBS, STYLES, of_kind, read_records, write_sites
from fixed_cost import commit_of, processor

from fedfms.contracts.recipe import Recipe
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import Federation
from fedfms.local.sites import find_sites
from fedfms.models.build import build_model

MILLISECONDS, SECONDS = 4.0, 2.5  # at most: of CPU a MB; FLARE's share of a round
LOOK_SECONDS = 0.1
ROLES = {
    "runner_process": "server's job",
    "worker_process": "client's job",
    "server_train": "FLARE server",
    "client_train": "FLARE client",
    "fedfms.trainer": "trainer",
}


class Watch(threading.Thread):
    """Processor seconds and memory of each role, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, dict[str, float]]] = []  # time, CPU-s by role
        self.peak: dict[str, int] = {}  # bytes of one process, at most
        self.over = threading.Event()

    def run(self) -> None:
        """Until it is over."""
        roles: dict[int, str] = {}
        spent: dict[int, float] = {}
        while not self.over.wait(LOOK_SECONDS):
            for one in psutil.Process().children(recursive=True):
                try:
                    if one.pid not in roles:
                        words = " ".join(one.cmdline())
                        known = [role for key, role in ROLES.items() if key in words]
                        if not known:
                            continue
                        roles[one.pid] = known[0]
                    used, role = one.cpu_times(), roles[one.pid]
                    spent[one.pid] = used.user + used.system
                    memory = int(one.memory_info().rss)
                    self.peak[role] = max(self.peak.get(role, 0), memory)
                except psutil.Error:
                    continue
            by_role: dict[str, float] = {}
            for pid, seconds in spent.items():
                by_role[roles[pid]] = by_role.get(roles[pid], 0.0) + seconds
            self.seen.append((time.time(), by_role))

    def at(self, moment: float, role: str) -> float:
        """Processor seconds of a role until then."""
        return next((by.get(role, 0.0) for when, by in self.seen if when >= moment), 0.0)


def make_checkpoint(folder: Path) -> str:
    """Random weights in the layout of Meta's file; their SHA-256."""
    recipe = Recipe(
        method="fedsam", backbone="vit_b", backbone_sha256="0" * 64, classes=("lesion",), rounds=1
    )
    folder.mkdir(parents=True)
    path = folder / "sam_vit_b_01ec64.pth"
    torch.save(build_model(recipe, None).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(folder: Path, sites: int, rounds: int, settings: list[str]) -> dict[str, Any]:
    """One run; what it cost by round."""
    checkpoints = folder / "checkpoints"
    overrides = [
        *(f"rounds={rounds}", "local_epochs=1", "image_size=64", f"evaluate_every={rounds}"),
        *(f"min_clients={sites}", "backbone=vit_b", "transfer_precision=fp32"),
        *(f"backbone_sha256={make_checkpoint(checkpoints)}", *settings),
    ]
    found = find_sites(write_sites(folder / "sites", list(STYLES)[:sites]), None)
    job = prepare_job(JOBS / "fedmsa", folder / "job" / "fedmsa", overrides)
    federation = Federation(
        folder / "run",
        found,
        job.recipe,
        checkpoints,
        lambda event: print(time.strftime("%H:%M:%S"), event.phase, event.round, file=sys.stderr),
    )
    watch = Watch()
    watch.start()
    with federation.running() as coordinator:
        job_id = federation.submit(coordinator, job.folder)
        status = federation.wait_for_end(coordinator, job_id)
        watch.over.set()
        records = read_records(coordinator.download(job_id, folder / "fetched"))
    if not status.endswith("COMPLETED"):
        raise SystemExit(f"the run ended as {status}")
    starts = {r["round"]: moment(r) for r in of_kind(records, "round_started")}
    ends = {r["round"]: moment(r) for r in of_kind(records, "round_done")}
    rows = []
    for number in range(1, rounds):
        start, end = starts[number], ends[number]
        answers = [r for r in of_kind(records, "contribution") if r["round"] == number]
        moved = sum(r["bytes_up"] + r["bytes_down"] for r in answers) / 1e6
        own = max(sum(r["contribution"]["seconds"].values()) for r in answers)
        spent = {
            role: watch.at(end, role) - watch.at(start, role) for role in sorted({*ROLES.values()})
        }
        rows.append(
            {
                "MB moved": moved,
                "seconds": end - start,
                "of the slowest site": own,
                "FLARE's share, s": end - start - own,
                "ms of CPU a MB": 1e3 * spent["server's job"] / moved,
                "CPU-s": {role: round(seconds, 2) for role, seconds in spent.items()},
            }
        )
    names = [name for name in rows[0] if name != "CPU-s"]
    middle = {name: round(statistics.median(row[name] for row in rows), 2) for name in names}
    return {
        "round": middle,
        "rounds": [
            {name: round(v, 2) if isinstance(v, float) else v for name, v in row.items()}
            for row in rows
        ],
        "peak MB": {role: round(size / 1e6) for role, size in watch.peak.items()},
    }


def moment(record: dict[str, Any]) -> float:
    """When a record was written, in seconds."""
    return float(record["time"])


def main() -> int:
    """Measure, and compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sites", type=int, default=3, choices=range(1, len(STYLES) + 1))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--keep", type=Path, help="folder for logs and records")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="server-cost-"))
    try:
        before = os.getloadavg()[0]
        found = measure(folder, options.sites, options.rounds, options.set)
    finally:
        if options.keep is not None:
            shutil.copytree(folder / "run" / "logs", options.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    kept = {
        "CPU": found["round"]["ms of CPU a MB"] <= MILLISECONDS,
        "FLARE's share": found["round"]["FLARE's share, s"] <= SECONDS,
    }
    said = {
        "command": f"python benchmarks/server_cost.py {' '.join(sys.argv[1:])}".strip(),
        "machine": processor(),
        "load before": round(before, 1),
        "commit": commit_of("HEAD"),
        **found,
        "kept": kept,
    }
    print(json.dumps(said, indent=2))
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
