"""How well a run says how long it lasts yet: python benchmarks/time_left.py [EVENTS].

EVENTS is what `fedfms submit --watch --json` or `fedfms simulate --json` printed of a run that came
to its end. Without it, three synthetic sites train for nine rounds of half a minute here.

Of each event after the first round, the middle of the range is compared with the seconds that truly
were left, until the server wrote down the end of the job. It ends with 1 where the median error is
above 20 %, or where the run was shorter than eight rounds of 20 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from fedfms.local.synthetic import write_phantom_site

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.20  # median error
ROUNDS, ROUND_SECONDS = 8, 20.0  # at least
SITES = {"site-1": ("bright", 70), "site-2": ("noisy", 30), "site-3": ("inverted", 50)}
SETTINGS = ("rounds=9", "image_size=64", "local_epochs=32")


def simulated(folder: Path) -> Iterator[str]:
    """Lines of JSON of a run on this machine."""
    for number, (name, (style, cases)) in enumerate(SITES.items()):
        write_phantom_site(folder / "sites" / name, style, cases=cases, slices=2, seed=number)
    command = [sys.executable, "-c", "from fedfms.cli import main; main()", "simulate"]
    command += [str(ROOT / "jobs/fedmsa"), "--sites", str(folder / "sites"), "--json"]
    command += ["--workspace", str(folder / "run"), "--results", str(folder / "results")]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise SystemExit("the run did not come to its end")


def events_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The events in lines of JSON."""
    values = [json.loads(line) for line in lines if line.startswith("{")]
    return [value["event"] for value in values if "event" in value]


def figures(events: list[dict[str, Any]]) -> dict[str, Any]:
    """How far each event was from the truth."""
    told = [one for one in events if one["time"] is not None]
    end = next(one["time"] for one in told if one["phase"] == "done")
    training = [one for one in told if one["phase"] == "train" and one["round"] is not None]
    began = {one["round"]: one["began"] for one in training}
    starts = [at for _, at in sorted(began.items())]
    after = [
        one["began"] for one in told if one["phase"] == "evaluate" and one["began"] is not None
    ]
    lasted = [b - a for a, b in zip(starts, [*starts[1:], *after[:1]], strict=True)]
    rows = [(end - one["time"], *one["left"]) for one in told if one["left"] and one["finished"]]
    rows = [row for row in rows if row[0] > 0]
    errors = [abs((low + high) / 2 - true) / true for true, low, high in rows]
    quarters = [rows[part * len(rows) // 4 : (part + 1) * len(rows) // 4] for part in range(4)]
    return {
        "rounds": len(lasted),
        "shortest_round_seconds": round(min(lasted), 1),
        "median_round_seconds": round(median(lasted), 1),
        "events": len(rows),
        "median_error": round(median(errors), 3),
        "ninety_percent_below": round(sorted(errors)[int(0.9 * len(errors))], 3),
        "inside_the_range": round(sum(low <= t <= high for t, low, high in rows) / len(rows), 3),
        "width_seconds_by_quarter": [
            round(median(high - low for _, low, high in quarter)) for quarter in quarters
        ],
    }


def main() -> int:
    """Print the figures as JSON."""
    if sys.argv[1:]:
        events = events_of(Path(sys.argv[1]).read_text().splitlines())
    else:
        with tempfile.TemporaryDirectory(prefix="time-left-") as folder:
            events = events_of(simulated(Path(folder)))
    found = figures(events)
    print(json.dumps(found, indent=2))
    long_enough = found["rounds"] >= ROUNDS and found["shortest_round_seconds"] >= ROUND_SECONDS
    return 0 if long_enough and found["median_error"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
