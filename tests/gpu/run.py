"""`make test-gpu`: what fedfms does on this machine's GPU, as one table in seven minutes.

python tests/gpu/run.py [--device cuda] [--only NAME,...] [--seconds 420] [--output FILE]

Each check is a process of its own (tests/gpu/checks.py), so that each starts CUDA anew. Those
that time nothing run side by side, then the others alone. It needs nothing but Python; what a
check needs and this machine lacks is named in the table and is no failure.

Exit codes: 0 everything that could run here is right, 1 something is wrong, 3 there is no GPU here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

MODEL = ("torch", "numpy", "yaml", "safetensors", "segment_anything")
TRAINING = (*MODEL, "nibabel", "scipy", "PIL", "tifffile", "pydicom", "psutil")
COMMANDS = (*TRAINING, "typer", "rich")

# name: (what it says in the table, modules it needs, most seconds, needs a real GPU)
CHECKS: dict[str, tuple[str, tuple[str, ...], int, bool]] = {
    "devices": ("auto, cuda and cuda:0 from a fresh process", ("torch", "yaml"), 60, False),
    "model-fedmsa": ("GPU against CPU, forward and gradient, FedMSA", MODEL, 90, False),
    "model-fedsam": ("GPU against CPU, forward and gradient, FedSAM", MODEL, 90, False),
    "train-fedmsa": ("a round twice with one seed, fp32 and bf16, FedMSA", TRAINING, 90, False),
    "train-fedsam": ("a round twice with one seed, fp32 and bf16, FedSAM", TRAINING, 90, False),
    "kernels": (
        "our attention against the folded form, and milliseconds of both",
        (*MODEL, "triton"),
        90,
        False,
    ),
    "graph": ("a recorded gradient against the plain one, and of a step", MODEL, 90, True),
    "loader": ("levels to input on the GPU, against the processor", TRAINING, 60, False),
    "memory": ("memory runs out: smaller steps, then one sentence", TRAINING, 90, True),
    "predict": ("evaluate and predict give the same masks", TRAINING, 60, False),
    "restart": ("trainer: phases, and killed between two rounds", TRAINING, 90, False),
    "pause": (
        "a pause in the middle of a round, and when the memory is free",
        (*TRAINING, "nvflare"),
        90,
        True,
    ),
    "require": ("require_gpu, with the GPU and with it hidden", TRAINING, 120, True),
    "commands": ("fedfms train-local", COMMANDS, 120, False),
    "federation": (
        "three sites on one GPU, and FLARE's share of a round",
        (*COMMANDS, "nvflare", "jinja2"),
        150,
        False,
    ),
}
# time nothing, so that they run side by side (memory counts its own process's share)
UNTIMED = ("devices", "model-fedmsa", "model-fedsam", "memory", "require", "commands")
_NO_GPU = "no-gpu: "  # begins the answer of a Python that sees none


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu: try the checks themselves, small")
    parser.add_argument("--only", default="", help="names of checks, with commas")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything together")
    parser.add_argument("--output", type=Path, help="write the table here too")
    given = parser.parse_args()
    chosen = [name for name in given.only.split(",") if name] or list(CHECKS)
    if unknown := sorted(set(chosen) - set(CHECKS)):
        sys.exit(f"no check is called {unknown[0]}; there are {', '.join(CHECKS)}")

    machine = describe_machine(given.device)
    if machine.startswith(_NO_GPU):
        reason = machine.removeprefix(_NO_GPU)
        print(f"test-gpu: there is no GPU that torch can use here, so nothing was tested: {reason}")
        return 3
    end = time.monotonic() + given.seconds
    side_by_side = max(1, min(3, (os.cpu_count() or 1) // 4))
    with tempfile.TemporaryDirectory(prefix="fedfms-test-gpu-") as folder:
        python = make_python(Path(folder))

        def check(name: str) -> tuple[str, str, float]:
            return run_check(name, given.device, end, python)

        with ThreadPoolExecutor(side_by_side) as pool:
            untimed = [name for name in chosen if name in UNTIMED]
            found = dict(zip(untimed, pool.map(check, untimed), strict=True))
        found |= {name: check(name) for name in chosen if name not in UNTIMED}
    rows = [(name, *found[name]) for name in chosen]
    table = as_table(machine, rows)
    print(table)
    if given.output is not None:
        given.output.write_text(table + "\n")
    return 1 if any(result == "WRONG" for _, result, _, _ in rows) else 0


def describe_machine(device: str) -> str:
    """One line on this machine for the head of the table, or why there is no GPU."""
    code = (
        "import sys\n"
        "try:\n import torch\n"
        f"except ImportError as error: print({_NO_GPU!r} + str(error)); sys.exit()\n"
        "say = f'Python {sys.version.split()[0]}, torch {torch.__version__}'\n"
        f"if {device!r} == 'cpu': print('no GPU (--device cpu), ' + say); sys.exit()\n"
        "try: torch.cuda.init()\n"
        "except (RuntimeError, AssertionError) as error:\n"
        f" print({_NO_GPU!r} + str(error).splitlines()[0]); sys.exit()\n"
        "one = torch.cuda.get_device_properties(0)\n"
        "print(f'{torch.cuda.device_count()} x {one.name}, {one.total_memory / 2**30:.0f} GiB, '\n"
        "      f'capability {one.major}.{one.minor}, ' + say)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return _NO_GPU + (lines[-1] if lines else f"exit code {done.returncode}")
    said = done.stdout.strip()
    if said.startswith(_NO_GPU):
        return said
    return f"{said}, {os.cpu_count()} CPU cores, {platform.system()}"


def make_python(folder: Path) -> Path:
    """A Python that finds what this one finds, for every process that a check starts.

    A federation's processes get no PYTHONPATH, and there a machine without internet may have its
    packages.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    found = [path for path in sys.path if path and Path(path).is_dir() and Path(path) != HERE]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in found]
    lines.insert(0, f"import sys; sys.path.insert(0, {str(REPOSITORY / 'src')!r})\n")
    (packages / "fedfms-test-gpu.pth").write_text("".join(lines))
    return folder / "bin/python"


def run_check(name: str, device: str, end: float, python: Path) -> tuple[str, str, float]:
    """(result, what was found, seconds); the result is right, WRONG, or why it did not run."""
    _, needs, most, real = CHECKS[name]
    if missing := [module for module in needs if importlib.util.find_spec(module) is None]:
        return "not run", f"missing here: {', '.join(missing)}", 0.0
    if real and device == "cpu":
        return "not run", "only on a GPU", 0.0
    limit = min(most, end - time.monotonic())
    if limit < 5:
        return "not run", "no time left", 0.0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONUNBUFFERED"] = "1"
    print(f"test-gpu: {name} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [str(python), str(HERE / "checks.py"), name, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends what it has started
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return "WRONG", f"not done after {limit:.0f} s", limit
    spent = time.monotonic() - started
    if process.returncode == 0:
        return "right", json.loads(out.splitlines()[-1])["found"], spent
    lines = [line for line in err.strip().splitlines() if line.strip()]
    sys.stderr.write(err)
    return "WRONG", lines[-1] if lines else f"exit code {process.returncode}", spent


def as_table(machine: str, rows: list[tuple[str, str, str, float]]) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    ran = [row for row in rows if row[1] != "not run"]
    lines = [
        f"{machine}; fedfms at {commit or 'an unknown commit'}; {time.strftime('%Y-%m-%d')}",
        "",
        "| check | what | result | found | seconds |",
        "|---|---|---|---|---:|",
    ]
    for name, result, found, seconds in rows:
        text = found.replace("|", "/")
        lines.append(f"| {name} | {CHECKS[name][0]} | {result} | {text} | {seconds:.0f} |")
    wrong = sum(row[1] == "WRONG" for row in rows)
    lines += ["", f"{len(ran)} of {len(rows)} checks ran, {wrong} of them wrong."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
