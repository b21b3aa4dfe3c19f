"""What a piece of work costs: seconds and peak memory of each of its phases."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fedfms.training.device import make_ready

_PROCESS = Path("/proc/self")


class Meter:
    """Seconds and peak memory by phase; a phase that comes again adds its seconds to the first's.

    seconds: wall clock.
    peak_memory_bytes: highest while the phase ran, of all that torch allocated on the GPU, or,
        without one, of the resident memory of this process: its libraries count, other processes
        do not. Linux lets a process start the count again (`5` into clear_refs, proc(5)); where it
        may not, a phase has the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes: dict[str, int] = {}
        self._device = device

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure what happens inside; one phase at a time."""
        _count_peak_anew(self._device)
        started = time.perf_counter()
        yield
        spent, peak = time.perf_counter() - started, _peak_bytes(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.peak_memory_bytes[phase] = max(self.peak_memory_bytes.get(phase, 0), peak)


def _count_peak_anew(device: torch.device) -> None:
    if device.type == "cuda":
        make_ready(device)  # or torch has no statistics to begin anew
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
