"""Runs one parser over many inputs and counts: what it took, and what it said of the rest."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from targets import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory_peak import forget_peak, peak

SLOW_SECONDS = 10.0  # of one input: it hangs, for a person


@dataclass
class Tally:
    """What came of one parser's inputs."""

    target: str
    inputs: int = 0
    accepted: int = 0
    cpu: float = 0.0  # seconds, of the parser alone
    slowest: float = 0.0  # seconds, of one input
    slowest_bytes: int = 0
    memory: int = 0  # bytes that the process's peak grew by, since the seeds were read
    codes: dict[str, int] = field(default_factory=dict)  # of the errors that were meant
    unexpected: dict[str, int] = field(default_factory=dict)  # exception and place -> how often
    coverage: list[tuple[int, int]] = field(default_factory=list)  # (inputs, places reached)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dict(self.__dict__)


class Feeder:
    """Feeds one parser.

    Args:
        target: the parser.
        kept: folder for an input of each unexpected exception, and the slowest one.
    """

    def __init__(self, target: Target, kept: Path | None = None) -> None:
        self.target, self.kept = target, kept
        self.tally = Tally(target.name)
        self._before = 0

    def read_seeds(self) -> None:
        """All seeds once; what the first call of a parser loads does not count as its memory."""
        for seed in self.target.seeds:
            self.test(seed)
        self._before = forget_peak()
        self.tally.memory = 0

    def test(self, data: bytes) -> None:
        """One input."""
        tally = self.tally
        began = time.process_time()
        try:
            accepted = self.target.parse(data) is not None
        except self.target.errors as error:
            accepted = False
            code = getattr(error, "code", type(error).__name__)
            tally.codes[code] = tally.codes.get(code, 0) + 1
        except Exception as error:
            accepted = False
            self._surprise(error, data)
        took = time.process_time() - began
        tally.inputs += 1
        tally.accepted += accepted
        tally.cpu += took
        if took > tally.slowest:
            tally.slowest, tally.slowest_bytes = took, len(data)
            self._keep("slowest", data)
        if took > SLOW_SECONDS:
            self._count(f"{took:.0f} s for one input", data)
        if tally.inputs % 64 == 0:
            tally.memory = peak() - self._before

    def _surprise(self, error: Exception, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/fedfms" in f.filename] or list(frames)
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        self._count(f"{type(error).__name__} at {place}: {str(error)[:80]}", data)

    def _count(self, what: str, data: bytes) -> None:
        seen = self.tally.unexpected
        if what not in seen and len(seen) < 50:
            self._keep(hashlib.sha256(what.encode()).hexdigest()[:12], data)
            seen[what] = 0
        if what in seen:
            seen[what] += 1

    def _keep(self, name: str, data: bytes) -> None:
        if self.kept is not None:
            self.kept.mkdir(parents=True, exist_ok=True)
            (self.kept / f"{self.target.name.replace(' ', '-')}.{name}").write_bytes(data)


def changed_seeds(target: Target, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` inputs that follow from the seeds and a number, and from nothing else."""
    chance = random.Random(seed * 1_000_003 + zlib.crc32(target.name.encode()))
    kept = list(target.seeds)
    for _ in range(count):
        first = kept if chance.random() < 0.3 else target.seeds
        data = target.mutate(chance, chance.choice(first), target.seeds)
        if chance.random() < 0.05 and len(data) < 1 << 16:
            kept.append(data)  # changes of changes
            del kept[200 + len(target.seeds) :]
        yield data


def table(tallies: list[dict[str, Any]]) -> str:
    """The rows of results/fuzzing.md."""
    lines = [
        "| parser | inputs | accepted | CPU-s | slowest | memory | new coverage in the last third "
        "| other exceptions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in tallies:
        surprises = "; ".join(f"{what} ({n})" for what, n in one["unexpected"].items())
        lines.append(
            f"| {one['target']} | {one['inputs']:,} | {one['accepted']:,} | {one['cpu']:.0f} | "
            f"{one['slowest'] * 1000:.0f} ms | +{one['memory'] / 2**20:.0f} MB | "
            f"{_new_coverage(one)} | {surprises or 'none'} |"
        )
    return "\n".join(lines) + "\n"


def _new_coverage(tally: dict[str, Any]) -> str:
    """Features of libFuzzer that the last third of the inputs reached first."""
    curve = tally["coverage"]
    if len(curve) < 2:
        return "not measured"
    before = max((at for at in curve if at[0] <= tally["inputs"] * 2 / 3), default=curve[0])
    return f"+{curve[-1][1] - before[1]} of {curve[-1][1]}"


def save(path: Path, tally: Tally) -> None:
    """Keep a tally, whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(tally.to_dict()))
    part.replace(path)
