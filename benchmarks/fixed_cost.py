"""What a run costs beside training and scoring, by cause: `python benchmarks/fixed_cost.py`.

    python benchmarks/fixed_cost.py [--before 033c05b] [--pairs 3]

The demo with one round, as `make demo` runs it: four sites of phantoms of which one is a holdout,
real kits, processes and TLS. An earlier commit and the working tree take turns, each with the same
libraries and sites. Each Python process of a run counts its own seconds: of its processor in
imports (each thread's own), in training and in scoring; what is left of its total is its work.
Imports that happen to fall into training or scoring count as imports. Prints JSON: medians, a row
for each cause, and the seconds that somebody waits by phase; ends with 1 where the fixed cost is
not at least 40 % less than before.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
LESS = 0.4  # of the fixed cost before, at least
LOOK_SECONDS = 0.05  # between two looks at the processes
OVERRIDES = ("--set", "holdout=site-4", "--set", "rounds=1")
# a word of its command line -> what a process is
ROLES = {
    "fedfms.trainer": "trainer",
    "client_train": "FLARE client",
    "server_train": "FLARE server",
    "runner_process": "server's job",
    "worker_process": "client's job",
    "fedfms.local.processes": "watchdog",
    "simulate": "command",
}

# Runs in each process of the federation before anything else does.
PROBE = """
import importlib._bootstrap as bootstrap, json, os, sys, threading, time

_file = os.environ.get("FEDFMS_PROBE")
_load, _here, _imports = bootstrap._find_and_load, threading.local(), [0.0]


def _note(kind, name, seconds):
    line = json.dumps([os.getpid(), kind, name, round(seconds, 5)]) + "\\n"
    with open(_file, "a") as out:
        out.write(line)


def _counted(kind, function):
    def call(*args, **kwargs):
        before, imports = time.process_time(), _imports[0]
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.process_time() - before - (_imports[0] - imports)
            _note(kind, function.__name__, spent)
    return call


def _find_and_load(name, import_):
    if getattr(_here, "inside", False):
        return _load(name, import_)
    _here.inside, before = True, time.thread_time()
    try:
        return _load(name, import_)
    finally:
        spent, _here.inside = time.thread_time() - before, False
        _imports[0] += spent
        if spent > 0.002:
            _note("import", name, spent)
        if "fedfms.trainer.tasks" in sys.modules and not hasattr(_here, "tasks"):
            tasks, _here.tasks = sys.modules["fedfms.trainer.tasks"], True
            if hasattr(tasks, "TaskRunner") and not hasattr(tasks, "_probed"):
                tasks._probed = True
                tasks.train_round = _counted("train", tasks.train_round)
                tasks.evaluate = _counted("score", tasks.evaluate)


if _file:
    bootstrap._find_and_load = _find_and_load
"""


def lay_out(folder: Path, commit: str | None) -> Path:
    """A Python of its own for a commit, or for the working tree; its libraries are this one's."""
    tree = folder / "tree"
    folder.mkdir()
    if commit is None:
        tree.symlink_to(ROOT)
    else:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE, check=True
        )
        tree = folder / "tree"
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(tree, filter="data")
    venv = folder / "venv"
    packages = venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (venv / "pyvenv.cfg").write_text(
        f"home = {Path(sys.executable).resolve().parent}\ninclude-system-site-packages = false\n"
    )
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "a.pth").write_text(f"{tree / 'src'}\n")
    (packages / "b.pth").write_text("\n".join(libraries) + "\n")
    (packages / "sitecustomize.py").write_text(PROBE)
    for path in libraries:  # the entry points of what is installed
        for one in Path(path).glob("fedfms*.dist-info"):
            (packages / one.name).symlink_to(one)
    return venv / "bin" / "python"


def run(python: Path, sites: Path, folder: Path) -> dict[str, Any]:
    """One run: seconds by role and cause, and what somebody waits in each phase."""
    folder.mkdir(parents=True)
    notes = folder / "notes"
    command = [
        *(str(python), "-c", "import fedfms.cli as cli; cli.main()", "simulate"),
        *("jobs/fedmsa", "--sites", str(sites), *OVERRIDES),
        *("--workspace", str(folder / "workspace"), "--json"),
    ]
    environment = {**os.environ, "FEDFMS_PROBE": str(notes)}
    environment.pop("PYTHONPATH", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    log = folder / "events"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, cwd=python.parents[2] / "tree", env=environment
        )
    seen: dict[int, tuple[str, float]] = {}
    phases: list[tuple[float, str]] = [(0.0, "command starts")]
    read = 0
    while process.poll() is None:
        look(process.pid, seen)
        text = log.read_text()
        for line in text[read:].splitlines():
            phases.append((time.monotonic() - began, name_of(line)))
        read = len(text)
        time.sleep(LOOK_SECONDS)
    wall = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"the run failed: {log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    causes: dict[str, float] = collections.defaultdict(float)
    by_process: dict[int, float] = collections.defaultdict(float)
    modules: dict[str, float] = collections.defaultdict(float)
    for line in notes.read_text().splitlines():
        pid, kind, name, seconds = json.loads(line)
        role = seen.get(pid, ("others", 0.0))[0]
        by_process[pid] += seconds
        causes[kind if kind != "import" else f"imports, {role}"] += seconds
        if kind == "import":
            modules[f"{role}: {name}"] += seconds
    for pid, (role, seconds) in seen.items():
        causes[f"work, {role}"] += seconds - by_process[pid]
    causes["ends of processes"] = total - sum(seconds for _, seconds in seen.values())
    waits: dict[str, float] = collections.defaultdict(float)
    for (start, name), (end, _) in zip(phases, [*phases[1:], (wall, "")], strict=True):
        waits[name] += end - start
    shutil.rmtree(folder)
    learning = causes.pop("train") + causes.pop("score")
    return {
        "fixed CPU-s": total - learning,
        "training and scoring CPU-s": learning,
        "wall s": wall,
        "causes CPU-s": dict(causes),
        "phases s": dict(waits),
        "imports CPU-s": {name: s for name, s in modules.items() if s > 0.3},
    }


def look(pid: int, seen: dict[int, tuple[str, float]]) -> None:
    """Note what each process of the run has spent so far."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return
    for one in processes:
        try:
            used = one.cpu_times()
            role = seen[one.pid][0] if one.pid in seen else "others"
            if role == "others":
                words = " ".join(one.cmdline())
                role = next((name for key, name in ROLES.items() if key in words), "others")
            seen[one.pid] = role, used.user + used.system
        except psutil.Error:
            continue


def name_of(line: str) -> str:
    """The phase that an event of the run is of."""
    event = json.loads(line).get("event") if line.startswith("{") else None
    if event is None:
        return "results"
    return str(event["phase"])


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure, also of those by name."""
    middle: dict[str, Any] = {}
    for name, value in rows[0].items():
        if isinstance(value, dict):
            names = sorted({key for row in rows for key in row[name]})
            inner = {
                key: statistics.median(row[name].get(key, 0.0) for row in rows) for key in names
            }
            middle[name] = {key: round(inner[key], 2) for key in names}
        else:
            middle[name] = round(statistics.median(row[name] for row in rows), 2)
    return middle


def commit_of(name: str) -> str:
    """The short hash."""
    said = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", name],
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.strip()


def processor() -> str:
    """This machine in words."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} x {found[1] if found else platform.machine()}"


def main() -> int:
    """Take turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="033c05b", help="the commit; - for none")
    parser.add_argument("--after", default="", help="another one; without it the working tree")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pythons = {"after": lay_out(folder / "after", options.after or None)}
        if options.before != "-":
            pythons = {"before": lay_out(folder / "before", options.before), **pythons}
        synth = "import fedfms.cli as cli; cli.main()", "synth", str(folder / "sites")
        subprocess.run([str(pythons["after"]), "-c", *synth], stdout=subprocess.DEVNULL, check=True)
        rows: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
        for number in range(options.pairs):
            for side, python in pythons.items():
                row = run(python, folder / "sites", folder / f"run-{side}-{number}")
                rows[side].append(row)
                print(
                    f"{side} {number}: {row['fixed CPU-s']:.1f} CPU-s fixed, "
                    f"{row['training and scoring CPU-s']:.1f} of training and scoring, "
                    f"{row['wall s']:.1f} s, load {os.getloadavg()[0]:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
    said: dict[str, Any] = {
        "command": f"python benchmarks/fixed_cost.py --before {options.before} "
        f"--pairs {options.pairs}",
        "machine": processor(),
        "commit": commit_of(options.after or "HEAD"),
        **{side: median(found) for side, found in rows.items()},
    }
    kept = True
    if "before" in rows:
        pairs = zip(rows["before"], rows["after"], strict=True)
        shares = sorted(after["fixed CPU-s"] / before["fixed CPU-s"] for before, after in pairs)
        said["before_commit"] = commit_of(options.before)
        said["fixed, after/before"] = [round(share, 3) for share in shares]
        kept = statistics.median(shares) <= 1 - LESS
        said["kept"] = kept
    print(json.dumps(said, indent=2))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
