"""Rounds over slow and broken lines: `python benchmarks/slow_line.py NAME...`.

Real kits, processes and TLS; each site's FLARE client and job process go through a line of a given
rate and delay that counts bytes, and that is cut in the middle of the model where a scenario says
so. SAM has random weights of ViT-B's shapes, and images of 64 pixels, so that the machine computes
little and the line decides. One row of results/reliability.md a scenario; ends with 1 where a
limit is not kept. Without a name: which there are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "jobs"))

from federations import JOBS, STYLES, of_kind, read_records, write_sites
from slow_line import Cut, FederationBehindLines, Lines

import fedfms.flare.simulate
from fedfms.contracts.recipe import Recipe
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import SERVER
from fedfms.local.sites import find_sites
from fedfms.models.build import build_model
from fedfms.records.layout import RECORDS

SITE = "site-1"  # the one that is counted, and cut
ONCE = 1.15  # times the payload, at most
# as the containers have it
TIMES = {"HEART_BEAT_SECONDS": 10, "SILENCE_SECONDS": 120, "GRACE_SECONDS": 30}


@dataclass(frozen=True)
class Scenario:
    """What travels over which line."""

    method: str = "fedmsa"
    precision: str = "fp32"
    rate: float | None = 1.0  # MB/s each way
    delay: float = 0.2  # seconds one way
    told: float | None = None  # FEDFMS_LINK_MB_PER_SECOND of server and site
    cut: Cut | None = None
    cut_seconds: float = 30.0
    direction: str = "down"  # in which the model is cut
    after: float = 0.5  # of the model, when it is cut
    backbone: str = "vit_b"
    rounds: int = 1
    sites: int = 1
    every: int = 0  # rounds of which each is cut at its start; 0: once, in the middle of a model
    limit: float = ONCE  # of the bytes; a break may send again what was under way
    seconds: float = 3600.0  # at most


SCENARIOS = {
    "demo": Scenario(backbone="vit_demo", rate=1.0, limit=3.0),
    "fedmsa": Scenario(),
    "fedsam": Scenario("fedsam", "fp16"),
    "fedmsa-slow": Scenario(precision="fp16", rate=0.1, told=0.1),
    **{
        f"{how}-{direction}": Scenario(cut=how, direction=direction, limit=1.3, seconds=1200.0)
        for how in ("silent", "reset", "forgotten")
        for direction in ("down", "up")
    },
    "cuts": Scenario(
        rate=0.6, delay=0.05, cut="forgotten", cut_seconds=300.0, rounds=6, sites=3, every=3
    ),
}


def make_checkpoint(scenario: Scenario, folder: Path) -> str:
    """Random weights in the layout of Meta's file; their SHA-256."""
    recipe = Recipe(
        method="fedsam", backbone="vit_b", backbone_sha256="0" * 64, classes=("lesion",), rounds=1
    )
    folder.mkdir(parents=True)
    path = folder / "sam_vit_b_01ec64.pth"
    torch.save(build_model(recipe, None).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Measured:
    """One scenario with one site, one round and the evaluation."""

    def __init__(self, name: str, scenario: Scenario, folder: Path) -> None:
        self.name, self.scenario, self.folder = name, scenario, folder
        self.lines = Lines(megabytes_per_second=scenario.rate, delay_seconds=scenario.delay)
        self.cut_at: list[tuple[float, float]] = []
        self.cut_rounds_done: list[int] = []
        self.kept = Path()
        self.over = threading.Event()

    def run(self) -> dict[str, Any]:
        """Do it all; what the row says."""
        one = self.scenario
        overrides = [f"rounds={one.rounds}", "local_epochs=1", "image_size=64"]
        overrides += [f"min_clients={min(one.sites, 2)}", f"evaluate_every={one.rounds}"]
        overrides.append(f"transfer_precision={one.precision}")
        checkpoints = None
        if one.backbone != "vit_demo":
            checkpoints = self.folder / "checkpoints"
            sha256 = make_checkpoint(one, checkpoints)
            overrides += [f"backbone={one.backbone}", f"backbone_sha256={sha256}"]
        if one.told is not None:
            os.environ["FEDFMS_LINK_MB_PER_SECOND"] = f"{one.told}"
        else:
            os.environ.pop("FEDFMS_LINK_MB_PER_SECOND", None)
        sites = find_sites(write_sites(self.folder / "sites", list(STYLES)[: one.sites]), None)
        job = prepare_job(JOBS / one.method, self.folder / "job" / one.method, overrides)
        federation = FederationBehindLines(
            self.folder / "run",
            sites,
            job.recipe,
            checkpoints,
            lambda event: self.say(event.text) if event.text else None,
            lines=self.lines,
        )
        with self.lines, federation.running() as coordinator:
            line = self.lines[SITE]
            self.say("everybody is there")
            before = line.up, line.down
            began = time.monotonic()
            job_id = federation.submit(coordinator, job.folder)
            self.say("the job runs")
            helpers = [threading.Thread(target=self.tell_bytes, daemon=True)]
            if one.cut is not None:
                work = self.cut_rounds if one.every else self.disturb
                helpers.append(threading.Thread(target=work, daemon=True))
                self.kept = federation.kit(SERVER) / RUNS / job_id
            for helper in helpers:
                helper.start()
            limit = threading.Timer(one.seconds, signal.raise_signal, (signal.SIGINT,))
            limit.daemon = True
            limit.start()
            try:
                status = federation.wait_for_end(coordinator, job_id)
            except KeyboardInterrupt:
                status = f"not within {one.seconds:.0f} s"
            limit.cancel()
            seconds = time.monotonic() - began
            up, down = line.up - before[0], line.down - before[1]
            self.over.set()
            records = []
            if "FINISHED" in status:
                line.megabytes_per_second, line.delay_seconds = None, 0.0
                results = coordinator.download(job_id, self.folder / "fetched")
                records = read_records(results)
        answers = [
            r for r in of_kind(records, "contribution") if r["accepted"] and r["site"] == SITE
        ]
        evaluated = [r for r in of_kind(records, "evaluation") if r["site"] == SITE]
        row: dict[str, Any] = {
            "scenario": self.name,
            "status": status,
            "seconds": round(seconds),
            "down MB": down / 1e6,
            "up MB": up / 1e6,
            "connections": line.connections,
        }
        if answers:
            payload = answers[0]["bytes_up"]
            row["payload MB"] = payload / 1e6
            row["rounds s"] = round_seconds(records)
            row["down x"] = down / (answers[0]["bytes_down"] * (len(answers) + len(evaluated)))
            row["up x"] = up / (payload * len(answers))
        row["cut at (down, up) MB"] = self.cut_at
        row["kept"] = bool(answers) and max(row["down x"], row["up x"]) <= one.limit
        if one.every:
            there = {r["round"] for r in answers}
            others = [n for n in range(one.rounds) if n not in self.cut_rounds_done]
            row["rounds cut"] = self.cut_rounds_done
            row["rounds with the site"] = sorted(there)
            row["kept"] = status.endswith("COMPLETED") and 2 * len(there & {*others}) >= len(others)
        row["rounds"] = f"{len(of_kind(records, 'round_done'))} of {one.rounds}"
        row["missed"] = [r["missed"] for r in of_kind(records, "round_done") if r["missed"]]
        row["notes"] = [f"{r['kind']}: {r['text']}" for r in of_kind(records, "note")]
        return row

    def disturb(self) -> None:
        """Cut the line once, in the middle of the first model that goes in the direction."""
        line, one = self.lines[SITE], self.scenario
        start = getattr(line, one.direction)
        size = 42.4e6 if one.backbone == "vit_b" else 1e6
        while getattr(line, one.direction) - start < one.after * size:
            if self.over.wait(0.02):
                return
        self.cut()

    def cut_rounds(self) -> None:
        """Cut the line a while after the start of every third round, for longer than a round."""
        one = self.scenario
        while not self.over.wait(0.5):
            started = [r["round"] for r in self.read_kept("round_started")]
            now = started[-1] if started else 0
            if now % one.every < one.every - 1 or now in self.cut_rounds_done:
                continue
            if not self.over.wait(20.0):
                self.cut_rounds_done.append(now)
                self.cut()

    def read_kept(self, kind: str) -> list[dict[str, Any]]:
        """Records of the run so far."""
        return of_kind(read_records(self.kept), kind) if (self.kept / RECORDS).is_file() else []

    def cut(self) -> None:
        """Cut the line for as long as the scenario says."""
        line, one = self.lines[SITE], self.scenario
        assert one.cut is not None
        self.cut_at.append((round(line.down / 1e6, 1), round(line.up / 1e6, 1)))
        self.say(f"cut ({one.cut}) for {one.cut_seconds:.0f} s")
        line.cut_for(one.cut_seconds, one.cut)
        self.say("healed")

    def tell_bytes(self) -> None:
        """Say each ten seconds how much went over the line."""
        while not self.over.wait(10.0):
            self.say("")

    def say(self, text: str) -> None:
        """Say it to who watches, with the time and the bytes so far."""
        line = self.lines.get(SITE)
        counted = f"{line.down / 1e6:7.1f} down {line.up / 1e6:7.1f} up" if line else ""
        print(
            f"{time.strftime('%H:%M:%S')} {self.name} {counted} {text}", file=sys.stderr, flush=True
        )


def round_seconds(records: list[dict[str, Any]]) -> list[int]:
    """How long each round took, from its start to its end."""
    starts = {r["round"]: r["time"] for r in reversed(of_kind(records, "round_started"))}
    return [round(r["time"] - starts[r["round"]]) for r in of_kind(records, "round_done")]


def main() -> int:
    """Run the scenarios one after the other; 1 if one of them did not keep its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--keep", type=Path, help="folder for logs")
    options = parser.parse_args()
    for constant, value in TIMES.items():
        setattr(fedfms.flare.simulate, constant, value)
    failed = False
    for name in options.names:
        folder = Path(tempfile.mkdtemp(prefix=f"line-{name}-"))
        try:
            row = Measured(name, SCENARIOS[name], folder).run()
            print(
                " | ".join(
                    f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()
                ),
                flush=True,
            )
            failed = failed or not row["kept"]
        finally:
            if options.keep is not None:
                shutil.copytree(folder / "run" / "logs", options.keep / name, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    if not options.names:
        print("\n".join(SCENARIOS))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
