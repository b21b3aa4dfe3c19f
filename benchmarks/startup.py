"""How long the command takes to start, in processor seconds: python benchmarks/startup.py.

A machine that does other work counts more seconds for the same work, so each line is also a
multiple of what Python with typer and rich takes here, measured in turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

REPEATS = 7
REFERENCE = "import typer, rich.console, rich.table"
MEASURED = {
    "python, typer and rich": REFERENCE,
    "import fedfms.cli": "import fedfms.cli",
    "fedfms --help": "import sys; sys.argv[1:] = ['--help']; import fedfms.cli as c; c.main()",
}


def cpu_seconds(code: str) -> float:
    """User and system seconds of one Python process, its imports' byte code being there."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return spent() - before


def main() -> None:
    """Print the median of each."""
    for code in MEASURED.values():
        cpu_seconds(code)
    runs = [{name: cpu_seconds(code) for name, code in MEASURED.items()} for _ in range(REPEATS)]
    reference = statistics.median(run["python, typer and rich"] for run in runs)
    for name in MEASURED:
        seconds = statistics.median(run[name] for run in runs)
        print(f"{name:24} {seconds:6.3f} CPU-s  {seconds / reference:5.2f} x")


if __name__ == "__main__":
    main()
