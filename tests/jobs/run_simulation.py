"""Runs one simulation in a process of its own, for the tests that trace it or stop it.

Arguments: job, sites, results, workspace, then overrides. Prints a line for each event, the phase
first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedfms.flare.simulate import simulate
from fedfms.local.sites import find_sites

if __name__ == "__main__":
    job, sites, results, workspace = map(Path, sys.argv[1:5])
    try:
        simulate(
            job,
            find_sites(sites, None),
            overrides=sys.argv[5:],
            results=results,
            workspace=workspace,
            on_event=lambda event: print(event.phase, event.round, flush=True),
        )
    except KeyboardInterrupt:
        sys.exit(130)
