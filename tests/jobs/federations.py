"""Small federations for the tests of jobs: a few phantoms a site, two or three rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from fedfms.flare.session import Coordinator, connect, prepare_job
from fedfms.flare.simulate import ADMIN, Federation
from fedfms.local.processes import MARK
from fedfms.local.synthetic import write_phantom_site

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = REPOSITORY / "jobs"
# Cases of two slices, three in ten of them for validation: 10 and 4 training slices in site-1 and
# site-2. Their shares are no finite binary numbers, and rounded to two decimals they are others.
STYLES = {"site-1": ("bright", 7), "site-2": ("noisy", 3), "site-3": ("inverted", 5)}


# of sites that have a few phantoms: scores leave from the first case on, and rounds may be short
POLICY = {
    "min_cases": 1,
    "min_cases_for_spread": 1,
    "pictures": True,
    "min_batch_size": 1,
    "min_steps": 1,
    "min_training_patients": 1,
    "max_local_epochs": 5000,
    "max_learning_rate": 1.0,
}


@dataclass
class Run:
    """A federation that runs, and the jobs of one test file."""

    root: Path
    federation: Federation
    coordinator: Coordinator
    settings: tuple[str, ...]  # of its jobs

    def submit(self, name: str) -> str:
        """jobs/fedmsa with the settings; FLARE's id."""
        job = prepare_job(JOBS / "fedmsa", self.root / name / "fedmsa", self.settings)
        return self.federation.submit(self.coordinator, job.folder)

    def wait_for_end(self, job_id: str) -> Path:
        """What a completed job left, fetched."""
        assert self.federation.wait_for_end(self.coordinator, job_id) == "FINISHED:COMPLETED"
        with connect(self.federation.kit(ADMIN)) as session:
            return session.download(job_id, self.root / "fetched")


def write_sites(folder: Path, names: Iterable[str]) -> Path:
    """Site folders whose metrics leave from the first case on, with unequal numbers of images."""
    for number, name in enumerate(names):
        style, cases = STYLES[name]
        site = folder / name
        write_phantom_site(site, style, cases=cases, slices=2, seed=number)
        settings = yaml.safe_load((site / "site.yml").read_text())
        (site / "site.yml").write_text(yaml.safe_dump({**settings, "min_cases": 1}))
        (site / "policy" / "privacy.json").write_text(json.dumps(POLICY))
    return folder


def read_records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["record"] == kind]


def processes_below(folder: Path) -> list[psutil.Process]:
    """Processes of a simulation that has its workspace in this folder, zombies not counted."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = MARK in process.environ()
            about = f"{process.cwd()} {' '.join(process.cmdline())}"
            if marked and str(folder) in about and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
