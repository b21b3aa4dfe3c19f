"""What metrics.py has seen, in the words of Prometheus, and the port where it asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedfms import __version__
from fedfms.flare.metrics import Seen


class Source(Protocol):
    """Has what was seen last."""

    seen: Seen


def serve(source: Source, host: str, port: int) -> Any:
    """Answer scrapes in threads of their own.

    Returns:
        the HTTP server and its thread.

    Raises:
        OSError: the address cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(source))
    return start_http_server(port, addr=host, registry=registry)


class RunCollector(Collector):
    """What was seen last, as Prometheus wants it."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Any]:
        """All families; those of runs are empty while none runs."""
        seen = self._source.seen
        yield _gauge("fedfms_info", "Version of fedfms at the server", {"version": __version__}, 1)
        yield _gauge("fedfms_seen_seconds", "When these values were seen, Unix time", {}, seen.at)
        yield _gauge("fedfms_connected_sites", "Sites that are connected", {}, seen.connected)
        yield _gauge("fedfms_runs", "Runs that go on", {}, len(seen.runs))
        yield _gauge(
            "fedfms_disk_free_bytes", "Free space of the server's workspace", {}, seen.disk_free
        )
        yield _gauge("fedfms_disk_bytes", "Size of that disk", {}, seen.disk)
        yield from _runs(seen)
        yield from _sites(seen)


def _runs(seen: Seen) -> Iterator[Any]:
    rounds = _family("fedfms_run_rounds", "Rounds of the recipe", "run")
    done = _family("fedfms_run_rounds_done", "Rounds that are over", "run")
    answered = _family("fedfms_run_answered_sites", "Sites that have answered this round", "run")
    waits = _family("fedfms_run_waits", "1 while the run waits for sites", "run")
    left = _family("fedfms_run_left_seconds", "Time left, from and to", "run", "bound")
    dice = _family("fedfms_run_dice", "Mean validation Dice of the last scored model", "run")
    restarts = CounterMetricFamily(
        "fedfms_run_restarts",
        "Job processes that ended and were started again",
        labels=("run", "of"),
    )
    for run in seen.runs:
        event, labels = run.event, (run.job_id,)
        rounds.add_metric(labels, event.rounds)
        done.add_metric(labels, len(event.finished))
        answered.add_metric(labels, len(event.answered))
        waits.add_metric(labels, float(event.waits is not None))
        for bound, value in zip(("from", "to"), event.left or (), strict=False):
            left.add_metric((*labels, bound), value)
        scored = [one.dice for one in event.finished if one.dice is not None]
        if scored:
            dice.add_metric(labels, scored[-1])
        for of, number in run.restarts.items():
            restarts.add_metric((*labels, of), number)
    yield from (rounds, done, answered, waits, left, dice, restarts)


def _sites(seen: Seen) -> Iterator[Any]:
    of = ("run", "site")
    silent = _family("fedfms_site_silent_seconds", "Since its last sign of life", *of)
    connected = _family("fedfms_site_connected", "1 while it is connected", *of)
    phase = _family("fedfms_site_phase", "1 for the phase that it is in", *of, "phase")
    progress = _family("fedfms_site_progress_ratio", "How much of its phase is done", *of)
    pace = _family("fedfms_site_phase_seconds", "Of its last answered round", *of, "phase")
    dice = _family("fedfms_site_dice", "Last Dice that it let out", *of)
    loss = _family("fedfms_site_loss", "Training loss of its last round", *of)
    missed = _family("fedfms_site_missed_rounds", "Rounds without an answer of it", *of)
    memory = _family("fedfms_site_peak_memory_bytes", "Of its last round", *of)
    gpu = _family("fedfms_site_gpu", "1 for what it computes on", *of, "state")
    moved = CounterMetricFamily(
        "fedfms_site_moved_bytes",
        "Tensors to it (down) and from it (up)",
        labels=(*of, "direction"),
    )
    for run in seen.runs:
        for site in run.event.now:
            labels = (run.job_id, site.name)
            if site.heard is not None and run.event.time is not None:
                silent.add_metric(labels, max(0.0, run.event.time - site.heard))
            connected.add_metric(labels, float(site.connected))
            phase.add_metric((*labels, site.phase), 1.0)
            for family, value in (
                (progress, site.share),
                (dice, site.dice),
                (loss, site.loss),
                (memory, site.peak_memory),
                (missed, site.missed),
            ):
                if value is not None:
                    family.add_metric(labels, value)
            for name, seconds in site.pace.items():
                pace.add_metric((*labels, name), seconds)
            if site.gpu is not None:
                gpu.add_metric((*labels, site.gpu), 1.0)
        down: dict[str, int] = {}
        up: dict[str, int] = {}
        for (_, name), answer in run.history.answers.items():
            down[name] = down.get(name, 0) + (answer.bytes_down or 0)
            up[name] = up.get(name, 0) + (answer.bytes_up or 0)
        for direction, sums in (("down", down), ("up", up)):
            for name, total in sums.items():
                moved.add_metric((run.job_id, name, direction), total)
    yield from (silent, connected, phase, progress, pace, dice, loss, missed, memory, gpu, moved)


def _family(name: str, says: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, says, labels=labels)


def _gauge(name: str, says: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = _family(name, says, *labels)
    family.add_metric(tuple(labels.values()), value)
    return family
