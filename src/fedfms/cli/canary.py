"""A canary before a run, as a coordinator sees it: who passed at which pace, or why not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from fedfms.cli.common import WholeWords, out
from fedfms.errors import ConfigError

if TYPE_CHECKING:
    from fedfms.flare.canary import Findings
    from fedfms.flare.lint import PreparedJob
    from fedfms.flare.session import Coordinator


def run_canary(
    coordinator: Coordinator,
    job: PreparedJob,
    sites: Sequence[str],
    announced: Sequence[tuple[str, ConfigError]],
    scratch: Path,
    say: Callable[[str], None],
    as_json: bool,
) -> Findings:
    """Rehearse a job at the sites that announce nothing against it, and show what was found.

    Args:
        announced: what is wrong before anything is tried: site and problem.

    Raises:
        FederationError: code canary-failed; names every trouble of every site with its fix.
    """
    from fedfms.flare.canary import Findings, Trouble, refusal, rehearse

    faulty = {site for site, _ in announced}
    to_try = [site for site in sites if site not in faulty]
    found = Findings((), (), 0.0)
    if to_try:
        say(f"canary: one round on two cases each at {', '.join(to_try)}; zeros leave")
        found = rehearse(coordinator, job, to_try, scratch, say)
    if not as_json:
        show(found)
    told = [Trouble(site, one.code, one.problem, one.fix) for site, one in announced]
    if troubles := (*told, *found.troubles):
        if as_json:
            values = values_of(dataclasses.replace(found, troubles=troubles))
            out.print_json(json.dumps({"canary": values}))
        raise refusal(troubles, sites)
    return found


def values_of(found: Findings) -> dict[str, Any]:
    """For scripts."""
    return {
        "seconds": round(found.seconds, 1),
        "sites": {
            pace.site: {
                "seconds_per_step": pace.said.seconds_per_step,
                "seconds_per_round": round(pace.seconds_per_round, 3),
                "transfer_seconds": round(pace.transfer_seconds, 3),
                "peak_memory_bytes": pace.said.peak_memory_bytes,
                "micro_batch": pace.micro_batch,
            }
            for pace in found.paces
        },
        "troubles": [
            {"site": one.site, "code": one.code, "problem": one.problem, "fix": one.fix}
            for one in found.troubles
        ],
    }


def show(found: Findings) -> None:
    """What sites need, as a table and one line."""
    slowest = found.slowest
    if slowest is None:
        return
    out.print(WholeWords(_table(found)))
    whose = f", slowest {slowest.site}" if len(found.paces) > 1 else ""
    out.print(f"a round will take about {_time(slowest.seconds_per_round)}{whose}")
    out.print(
        "  the first one longer: it reads all cases; the canary, which read two a site, took "
        f"{_time(found.seconds)}"
    )


def _table(found: Findings) -> Table:
    from fedfms.data.memory import size_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="canary")
    for name in ("site", "a step", "a round", "of it transfer", "peak memory", "at once"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for pace in found.paces:
        step = pace.said.seconds_per_step
        table.add_row(
            pace.site,
            "–" if step is None else _time(step),
            _time(pace.seconds_per_round),
            _time(pace.transfer_seconds),
            size_text(pace.said.peak_memory_bytes),
            f"{pace.micro_batch} slices" if pace.micro_batch else "–",
        )
    return table


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
