"""Sums of which nobody sees a part: exact, also where sites drop out, and nothing else is there."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.errors import FederationError
from fedfms.exchange.averaging import FixedSum
from fedfms.exchange.secure_sum import ServerRound, SiteRound
from fedfms.exchange.signatures import TrainerSigner, new_key

JOB = "job-1"


class Site:
    """A trainer's side of the protocol, without its files."""

    def __init__(self, name: str, seed: int, values: int = 5000) -> None:
        self.name, self.signer = name, TrainerSigner(new_key())
        self.round = SiteRound.begin(name, JOB, 3)
        numbers = torch.Generator().manual_seed(seed)
        self.difference = {
            "head.bias": torch.randn(7, generator=numbers) * 1e-3,
            "head.weight": torch.randn(values // 10, 10, generator=numbers) * 1e-2,
        }
        self.weight = 10 + 7 * seed
        self.peers: dict[str, str] = {}

    def answer(self, ask: SumsAsk) -> SumsAnswer:
        ask = SumsAsk.from_dict(ask.to_dict())  # as it crosses the wire
        if ask.step == "keys":
            return SumsAnswer(keys=self.round.own_keys(self.signer.public, self.signer.sign))
        if ask.step == "shares":
            self.round = self.round.seal(ask.keys, self.peers)
            return SumsAnswer(sealed=self.round.sealed)
        if ask.step == "take":
            self.round = self.round.take(ask.sealed)
            return SumsAnswer()
        self.round, pieces = self.round.unmask(ask.arrived)
        return SumsAnswer(pieces=pieces)

    def masked(self) -> dict[str, Tensor]:
        return self.round.masked(self.difference, self.weight)


def some_sites(number: int) -> dict[str, Site]:
    sites = {f"site-{index:02d}": Site(f"site-{index:02d}", index) for index in range(number)}
    for site in sites.values():
        site.peers = {name: other.signer.public for name, other in sites.items() if name != site}
    return sites


def settle(sites: Mapping[str, Site], server: ServerRound, silent: str = "") -> None:
    """The steps before a round; `silent` gives keys and no shares."""
    keys = server.ask_keys()
    shares = server.ask_shares({name: site.answer(keys) for name, site in sites.items()})
    given = {name: site.answer(shares) for name, site in sites.items() if name != silent}
    for name, ask in server.ask_take(given).items():
        sites[name].answer(ask)


def mean_of(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    plain = FixedSum()
    for site in sites.values():
        plain.add(site.difference, site.weight)
    return plain.mean()


@pytest.mark.parametrize("number", [3, 4, 10])
@pytest.mark.parametrize("lost", ["nobody", "after-keys", "after-shares", "after-its-answer"])
def test_the_sum_has_the_bits_of_the_plain_one_whoever_drops_out(number: int, lost: str) -> None:
    sites = some_sites(number)
    server = ServerRound(JOB, 3)
    gone = sorted(sites)[1]
    if number == 3 and lost == "after-keys":
        with pytest.raises(FederationError) as raised:  # two are no sum
            settle(sites, server, silent=gone)
        assert raised.value.code == "few-for-a-sum"
        return
    settle(sites, server, silent=gone if lost == "after-keys" else "")
    arrived = {
        name: site
        for name, site in sites.items()
        if name != gone or lost in ("nobody", "after-its-answer")
    }
    for site in arrived.values():
        server.add(site.masked())
    ask = server.ask_unmask(arrived)
    answers = {
        name: site.answer(ask)
        for name, site in arrived.items()
        if name != gone or lost != "after-its-answer"
    }
    total = sum(site.weight for site in arrived.values())
    found = server.unmask(arrived, total, answers).mean()
    expected = mean_of(arrived)
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name])
