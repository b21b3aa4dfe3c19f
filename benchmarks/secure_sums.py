"""What a secure sum costs a site and the server: processor seconds, bytes, and how exact it is.

    python benchmarks/secure_sums.py --values 10600000 --sites 3 10 --bits 64 32 --slices 50 1000

One process, one thread, all sites in it, each with a difference of its own: normal numbers of the
standard deviation `--size`. Weights lie evenly between the two numbers of slices. A site's figure
is all that it does in a round: keys, shares, masks, unmasking; the worst of all sites is told. The
server's is that of a round in which one site drops out after it gave its shares. The error is the
L2 norm of what the mean is off that in fp64, by the norm of the latter; that of fp16 is of a plain
sum whose parts are fp16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.exchange.averaging import FixedSum
from fedfms.exchange.secure_sum import ServerRound, SiteRound
from fedfms.exchange.signatures import TrainerSigner, new_key
from fedfms.exchange.tensors import payload_bytes

JOB = "benchmark"
T = TypeVar("T")


class Clock:
    """Processor seconds of one party."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, action: Callable[..., T], *arguments: Any) -> T:
        """What the action gives; its seconds are added."""
        began = time.process_time()
        given = action(*arguments)
        self.seconds += time.process_time() - began
        return given


class Site:
    """A trainer's side, with its clock."""

    def __init__(self, name: str) -> None:
        self.name, self.clock, self.bytes = name, Clock(), 0
        self.signer = TrainerSigner(new_key())
        self.round = SiteRound.begin(name, JOB, 0)
        self.peers: dict[str, str] = {}

    def answer(self, ask: SumsAsk) -> SumsAnswer:
        """As the trainer does."""
        answer = self.clock(self._answer, ask)
        self.bytes += len(json.dumps(ask.to_dict())) + len(json.dumps(answer.to_dict()))
        return answer

    def _answer(self, ask: SumsAsk) -> SumsAnswer:
        if ask.step == "keys":
            return SumsAnswer(keys=self.round.own_keys(self.signer.public, self.signer.sign))
        self.round, answer = self.round.answer(ask, lambda: self.peers)
        return answer


def a_round(values: int, number: int, bits: int, slices: Sequence[int], size: float) -> str:
    """One round, as a row of the table."""
    sites = {f"site-{index:02d}": Site(f"site-{index:02d}") for index in range(number)}
    for site in sites.values():
        site.peers = {name: other.signer.public for name, other in sites.items()}
    server, clock = ServerRound(JOB, 0), Clock()
    ask = server.ask_keys()
    keys = {name: site.answer(ask) for name, site in sites.items()}
    ask = clock(server.ask_shares, keys)
    shares = {name: site.answer(ask) for name, site in sites.items()}
    for name, one in clock(server.ask_take, shares).items():
        sites[name].answer(one)
    arrived = sorted(sites)[1:]
    numbers = torch.Generator().manual_seed(0)
    plain, plain_clock, sent = FixedSum(), Clock(), 0
    weights = torch.linspace(*slices, len(arrived)).round().int().tolist()
    exact, halved = torch.zeros(2, values, dtype=torch.float64)
    for weight, name in zip(weights, arrived, strict=True):
        difference = {"w": torch.randn(values, generator=numbers) * size}
        exact.add_(difference["w"].double(), alpha=weight)
        halved.add_(difference["w"].half().double(), alpha=weight)
        site = sites[name]
        site.round, masked = site.clock(site.round.masked, difference, weight, bits)
        sent = payload_bytes(masked)
        clock(server.add, masked)
        plain_clock(plain.add, difference, weight)
    ask = server.ask_unmask(arrived)
    answers = {name: sites[name].answer(ask) for name in arrived}
    total = sum(weights)
    mean = clock(server.unmask, arrived, total, answers).mean()["w"]
    equal = "yes" if torch.equal(mean, plain.mean()["w"]) else "no"
    exact /= total
    error, of_half = (_error(one, exact) for one in (mean.double(), halved / total))
    most = max(sites[name].clock.seconds for name in arrived)
    beside = max(site.bytes for site in sites.values())
    return (
        f"| {number} | {bits} | {slices[0]}–{slices[1]} | {most:.2f} | {clock.seconds:.2f} | "
        f"{plain_clock.seconds:.2f} | {sent / 1e6:.1f} | {beside / 1e3:.1f} | {error:.1e} | "
        f"{of_half:.1e} | {equal} |"
    )


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=10_600_000)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 32], choices=[64, 32])
    parser.add_argument("--slices", type=int, nargs=2, default=[50, 1000])
    parser.add_argument("--size", type=float, default=1e-4)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        "| sites | bits | slices a site | CPU-s a site | CPU-s server | CPU-s server, plain "
        "| MB up | kB beside | error | error of fp16 | equal |"
    )
    print("|" + "---|" * 11)
    for bits in given.bits:
        for number in given.sites:
            row = a_round(given.values, number, bits, given.slices, given.size)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
