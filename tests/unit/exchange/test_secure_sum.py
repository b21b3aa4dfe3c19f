"""Sums of which nobody sees a part: exact, also where sites drop out, and nothing else is there."""

from __future__ import annotations

import dataclasses
import gc
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedfms.contracts.sums import KEYS, RoundKeys, SumsAnswer, SumsAsk
from fedfms.errors import DoorClosed, FederationError
from fedfms.exchange.averaging import SCALE, SCALE_32, FixedSum, weighted_units_32
from fedfms.exchange.masks import add_mask, join, split
from fedfms.exchange.secure_sum import ServerRound, SiteRound, threshold
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
        self.round, answer = self.round.answer(ask, lambda: self.peers)
        return answer

    def masked(self, bits: int = 64) -> dict[str, Tensor]:
        self.round, masked = self.round.masked(self.difference, self.weight, bits)
        return masked


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


def mean_of(sites: Mapping[str, Site], bits: int = 64) -> dict[str, Tensor]:
    """The plain average, in the same fixed point; of 32 bits by numpy alone."""
    if bits == 64:
        plain = FixedSum()
        for site in sites.values():
            plain.add(site.difference, site.weight)
        return plain.mean()
    mean = {}
    for name in ("head.bias", "head.weight"):
        units = sum(
            np.rint(site.difference[name].numpy().astype(np.float64) * (site.weight * 2**17))
            for site in sites.values()
        )
        total = sum(site.weight for site in sites.values())
        mean[name] = torch.from_numpy((units / (2**17 * total)).astype(np.float32))
    return mean


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("number", [3, 4, 10])
@pytest.mark.parametrize("lost", ["nobody", "after-keys", "after-shares", "after-its-answer"])
def test_the_sum_has_the_bits_of_the_plain_one_whoever_drops_out(
    number: int, lost: str, bits: int
) -> None:
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
        masked = site.masked(bits)
        assert {one.element_size() for one in masked.values()} == {bits // 8}
        server.add(masked)
    ask = server.ask_unmask(arrived)
    answers = {
        name: site.answer(ask)
        for name, site in arrived.items()
        if name != gone or lost != "after-its-answer"
    }
    total = sum(site.weight for site in arrived.values())
    found = server.unmask(arrived, total, answers).mean()
    expected = mean_of(arrived, bits)
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize(("number", "bits"), [(4, 64), (3, 64), (5, 32)])
def test_an_answer_that_was_added_can_be_left_out_before_anything_is_unmasked(
    number: int, bits: int
) -> None:
    sites, server = some_sites(number), ServerRound(JOB, 3)
    settle(sites, server)
    answers = {name: site.masked(bits) for name, site in sites.items()}
    for answer in answers.values():
        server.add(answer)
    out = sorted(sites)[1]
    server.leave_out(answers[out])
    rest = {name: site for name, site in sites.items() if name != out}
    ask = server.ask_unmask(rest)
    given = {name: site.answer(ask) for name, site in rest.items()}
    total = sum(site.weight for site in rest.values())
    found = server.unmask(rest, total, given).mean()
    expected = mean_of(rest, bits)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("number", [3, 10, 100])
def test_a_sum_in_32_bits_is_as_large_as_can_be_and_never_wraps(number: int) -> None:
    """Every site at its limit, and one unit more is refused."""
    largest = (2**31 - 1) // number
    one = torch.tensor([largest, -largest], dtype=torch.float64)
    for weight in (1, 250):
        units = weighted_units_32({"w": one / (SCALE_32 * weight)}, weight, number)["w"]
        assert units.tolist() == [largest, -largest]
        assert sum(units.tolist()[0] for _ in range(number)) < 2**31
        with pytest.raises(OverflowError, match=f"times {weight} slices and {number} sites"):
            weighted_units_32({"w": (one - 1) / (SCALE_32 * weight)}, weight, number)
    with pytest.raises(ValueError, match="not finite"):
        weighted_units_32({"w": torch.tensor([float("nan")])}, 1, number)


def test_a_mean_in_32_bits_is_off_by_less_than_a_unit_of_all_slices() -> None:
    sites = some_sites(10)
    exact, coarse = mean_of(sites), mean_of(sites, 32)
    total = sum(site.weight for site in sites.values())
    for name in exact:
        assert 0 < float((exact[name] - coarse[name]).abs().max()) < 10 / 2 / 2**17 / total + 1e-9


# ---------------------------------------------------------------------- what the server can see


def all_held(*objects: object) -> Iterator[bytes]:
    """The bytes of every number and text that an object leads to, whatever it is made of."""
    seen: set[int] = set()
    waiting = list(objects)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one.detach().contiguous().numpy().tobytes()
        elif isinstance(one, str):
            yield one.encode()
            if len(one) % 2 == 0 and all(letter in "0123456789abcdef" for letter in one):
                yield bytes.fromhex(one)
        elif isinstance(one, bytes | bytearray):
            yield bytes(one)
        waiting += gc.get_referents(one)


def forms_of(site: Site) -> Iterator[bytes]:
    """Each 32 values of a difference as bytes, in every form in which they could lie somewhere.

    Whatever 64 values in a row there are, they hold 32 of these in a row.
    """
    values = site.difference["head.weight"].reshape(-1).numpy()
    units = np.rint(values.astype(np.float64) * SCALE).astype(np.int64)
    for array in (
        *(values.astype(f"{order}f{size}") for order in "<>" for size in (2, 4, 8)),
        *(some.astype(f"{order}i8") for order in "<>" for some in (units, units * site.weight)),
        *(
            np.rint(values.astype(np.float64) * scale).astype(f"{order}i4")
            for order in "<>"
            for scale in (1e6, 2**24, SCALE_32, SCALE_32 * site.weight)
        ),
    ):
        for start in range(0, len(array) - 31, 32):
            yield array[start : start + 32].tobytes()


def found_in(site: Site, haystack: bytes) -> bool:
    return any(form in haystack for form in forms_of(site))


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("number", [3, 10])
def test_nothing_that_the_server_was_told_holds_values_of_one_site(number: int, bits: int) -> None:
    sites = some_sites(number)
    server = ServerRound(JOB, 3)
    told: list[object] = []  # everything that ever came
    keys = server.ask_keys()
    of_keys = {name: site.answer(keys) for name, site in sites.items()}
    shares = server.ask_shares(of_keys)
    of_shares = {name: site.answer(shares) for name, site in sites.items()}
    asks = server.ask_take(of_shares)
    for name, ask in asks.items():
        sites[name].answer(ask)
    lost = sorted(sites)[-1]
    arrived = {name: site for name, site in sites.items() if name != lost}
    for site in arrived.values():
        masked = site.masked(bits)
        told.append({name: one.clone() for name, one in masked.items()})
        server.add(masked)
    ask = server.ask_unmask(arrived)
    of_unmask = {name: site.answer(ask) for name, site in arrived.items()}
    before = b"\n".join(all_held(server))
    total = sum(site.weight for site in arrived.values())
    summed = server.unmask(arrived, total, of_unmask)
    told += [of_keys, of_shares, asks, of_unmask, server, summed, summed.mean()]
    haystack = b"\n".join([before, *all_held(*told)])
    assert len(haystack) > (number - 1) * bits // 8 * 5000  # the answers are in it
    assert [name for name, site in sites.items() if found_in(site, haystack)] == []


def test_the_same_search_finds_them_where_answers_are_not_masked() -> None:
    sites = some_sites(3)
    for change in (
        lambda one: one,
        lambda one: one.half(),
        lambda one: torch.from_numpy(one.numpy().byteswap()),
    ):
        plain = {
            name: {"w": change(site.difference["head.weight"])} for name, site in sites.items()
        }
        haystack = b"\n".join(all_held(plain))
        assert all(found_in(site, haystack) for site in sites.values())
    one = sites["site-01"]
    units = weighted_units_32(one.difference, one.weight, 3)
    assert found_in(one, b"\n".join(all_held(units)))
    summed = FixedSum()
    summed.add(one.difference, one.weight)
    assert found_in(one, b"\n".join(all_held(summed)))


@pytest.mark.parametrize("bits", [64, 32])
def test_what_leaves_is_evenly_spread_over_all_integers(bits: int) -> None:
    """Of 5,000 values that all lie near 0 no bit says anything, nor does the same round again."""
    sites = some_sites(3)
    settle(sites, ServerRound(JOB, 3))
    site = sites["site-00"]
    masked = site.masked(bits)["head.weight"].reshape(-1)
    again = site.masked(bits)["head.weight"].reshape(-1)
    assert torch.equal(masked, again)  # no second mask for one round
    spread = np.unpackbits(masked.numpy().view(np.uint8)).reshape(-1, bits)
    assert (np.abs(spread.mean(axis=0) - 0.5) < 0.05).all()


# ------------------------------------------------------------------------ a server that lies


def code_of(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises((DoorClosed, FederationError)) as raised:
        action(*arguments)
    return raised.value.code


def by_site(ask: SumsAsk) -> dict[str, RoundKeys]:
    return {one.site: one for one in ask.keys}


def unmask(arrived: list[str]) -> SumsAsk:
    return SumsAsk(step="unmask", job=JOB, round=3, arrived=tuple(arrived))


def test_a_site_unmasks_one_set_of_answers_and_no_other() -> None:
    sites = some_sites(4)
    settle(sites, ServerRound(JOB, 3))
    site, names = sites["site-00"], sorted(sites)
    first = site.answer(unmask(names))
    assert site.answer(unmask(names)) == first  # said again is said alike
    assert code_of(site.answer, unmask(names[:3])) == "other-sum"
    assert site.answer(unmask(names)) == first
    assert [piece.site for piece in first.pieces] == names


def test_a_site_whose_answer_is_not_in_the_sum_unmasks_nothing() -> None:
    sites = some_sites(4)
    settle(sites, ServerRound(JOB, 3))
    others = sorted(sites)[1:]
    assert code_of(sites["site-00"].answer, unmask(others)) == "other-sum"
    assert sites["site-01"].answer(unmask(others)).pieces


def test_sites_that_are_shown_different_lists_of_keys_take_no_shares_of_each_other() -> None:
    """Else each counts by the threshold of its own list, and together they unmask a single site."""
    sites = some_sites(4)
    names = sorted(sites)
    ask = SumsAsk(step="keys", job=JOB, round=3)
    keys = {name: site.answer(ask).keys for name, site in sites.items()}
    unseen = dict(zip(names, reversed(names), strict=True))  # for each another one
    shown = {name: [one for one in names if one != unseen[name]] for name in names}
    sealed = {}
    for name, site in sites.items():
        of_these = tuple(key for one in shown[name] if (key := keys[one]) is not None)
        for one in site.answer(dataclasses.replace(ask, step="shares", keys=of_these)).sealed:
            sealed[one.sender, one.receiver] = one
    for name, site in sites.items():
        for_it = tuple(sealed[one, name] for one in shown[name] if one != name)
        take = dataclasses.replace(ask, step="take", sealed=for_it)
        assert code_of(site.answer, take) == "bad-shares"


def test_one_trainer_under_two_names_is_one_site() -> None:
    sites = some_sites(3)
    sites["site-02"].signer = sites["site-01"].signer
    for site in sites.values():  # as somebody's peers.json may say
        site.peers["site-02"] = site.peers["site-01"]
    ask = SumsAsk(step="keys", job=JOB, round=3)
    keys = tuple(key for site in sites.values() if (key := site.answer(ask).keys) is not None)
    shares = dataclasses.replace(ask, step="shares", keys=keys)
    assert code_of(sites["site-00"].answer, shares) == "other-peer"


def test_one_mask_hides_one_difference() -> None:
    """Of two that a server asks for in one round, by another model, the mask would fall out."""
    sites = some_sites(3)
    settle(sites, ServerRound(JOB, 3))
    site = sites["site-00"]
    site.masked()
    site.difference = {name: one * 2 for name, one in site.difference.items()}
    assert code_of(site.masked) == "summed-before"
    assert code_of(site.masked, 32) == "summed-before"
    site.difference = {name: one / 2 for name, one in site.difference.items()}
    site.weight += 1
    assert code_of(site.masked) == "summed-before"


@pytest.mark.parametrize("which", ["sealing", "masking"])
def test_a_key_that_makes_every_secret_nothing_keeps_its_site_out_and_ends_no_round(
    which: str,
) -> None:
    """A site can sign such a key; the server leaves it out, and a site takes no sum with it."""
    sites = some_sites(4)
    server = ServerRound(JOB, 3)
    keys = server.ask_keys()
    given = {name: site.answer(keys) for name, site in sites.items()}
    bad = given["site-03"].keys
    assert bad is not None
    bad = dataclasses.replace(bad, **{which: "00" * 32})
    signature = sites["site-03"].signer.sign(KEYS + bad.canonical)
    bad = dataclasses.replace(bad, signature=signature)
    asked = server.ask_shares({**given, "site-03": SumsAnswer(keys=bad)})
    assert [one.site for one in asked.keys] == ["site-00", "site-01", "site-02"]
    all_four = dataclasses.replace(asked, keys=(*asked.keys, bad))
    assert code_of(sites["site-00"].answer, all_four) == "other-peer"
    assert sites["site-00"].answer(asked).sealed


def test_of_fewer_than_the_threshold_nothing_is_unmasked() -> None:
    sites = some_sites(10)
    server = ServerRound(JOB, 3)
    settle(sites, server)
    assert threshold(10) == 7
    names = sorted(sites)
    assert code_of(sites["site-00"].answer, unmask(names[:6])) == "few-for-a-sum"
    for site in sites.values():
        server.add(site.masked())
    answers = {name: sites[name].answer(unmask(names)) for name in names[:6]}
    assert code_of(server.unmask, names, 1, answers) == "few-for-a-sum"


def test_of_shares_of_fewer_than_the_threshold_no_sum_is_settled() -> None:
    sites = some_sites(7)
    server = ServerRound(JOB, 3)
    keys = server.ask_keys()
    shares = server.ask_shares({name: site.answer(keys) for name, site in sites.items()})
    ask = server.ask_take({name: site.answer(shares) for name, site in sites.items()})["site-00"]
    assert threshold(7) == 5
    assert code_of(sites["site-00"].answer, dataclasses.replace(ask, sealed=ask.sealed[:3])) == (
        "few-for-a-sum"
    )
    assert code_of(sites["site-00"].masked) == "no-sum"
    sites["site-00"].answer(dataclasses.replace(ask, sealed=ask.sealed[:4]))
    assert len(sites["site-00"].round.members) == 5


@pytest.mark.parametrize("sites", [4, 5, 6, 7, 8, 9, 10, 20, 100])
def test_a_lying_server_needs_more_than_a_third_of_the_sites(sites: int) -> None:
    """Of a site it needs both secrets, and an honest site gives a share of one of them."""
    colluding = 2 * threshold(sites) - sites - 1  # the most that are not enough
    honest = sites - colluding
    assert honest + 2 * colluding < 2 * threshold(sites)
    assert colluding >= sites / 3 - 1 and (colluding >= 2 or sites < 5)


def test_a_made_up_site_and_a_key_of_somebody_else_are_refused() -> None:
    sites = some_sites(4)
    server = ServerRound(JOB, 3)
    asked = server.ask_keys()
    given = {name: site.answer(asked) for name, site in sites.items()}
    honest = server.ask_shares(given)
    site = sites["site-00"]

    stranger = Site("site-99", 9)
    more = {**given, "site-99": stranger.answer(asked)}
    assert code_of(site.answer, ServerRound(JOB, 3).ask_shares(more)) == "unknown-peer"

    other = Site("site-01", 1)  # the coordinator's own, in the name of an honest one
    false = {**given, "site-01": other.answer(asked)}
    assert code_of(site.answer, ServerRound(JOB, 3).ask_shares(false)) == "other-peer"

    keys = given["site-01"].keys
    assert keys is not None
    swapped = SiteRound.begin("site-01", JOB, 3).own_keys(keys.trainer, lambda _: keys.signature)
    passed_on = tuple({**by_site(honest), "site-01": swapped}.values())
    assert code_of(site.answer, dataclasses.replace(honest, keys=passed_on)) == "other-peer"

    few = {name: given[name] for name in ("site-00", "site-01")}
    assert code_of(ServerRound(JOB, 3).ask_shares, few) == "few-for-a-sum"
    two = SumsAsk(step="shares", job=JOB, round=3, keys=tuple(one.keys for one in few.values()))
    assert code_of(site.answer, two) == "few-for-a-sum"

    earlier = Site("site-01", 1)
    earlier.signer, earlier.round = sites["site-01"].signer, SiteRound.begin("site-01", JOB, 2)
    old = SumsAnswer(keys=earlier.round.own_keys(earlier.signer.public, earlier.signer.sign))
    mixed = tuple({**given, "site-01": old}[name].keys for name in sorted(given))
    replayed = SumsAsk(step="shares", job=JOB, round=3, keys=mixed)
    assert code_of(site.answer, replayed) == "other-sum"

    assert site.answer(honest).sealed
    rest = SumsAsk(step="shares", job=JOB, round=3, keys=honest.keys[:3])
    assert code_of(site.answer, rest) == "other-sum"


@pytest.mark.parametrize("number", [4, 10])
def test_a_site_whose_keys_or_shares_cannot_be_used_is_left_out_and_the_others_go_on(
    number: int,
) -> None:
    """One site ends no sum by what it says before the round: keys of no secret, a signature that
    does not fit, shares in the name of others, or of a site that nobody has heard of."""
    no_secret = bytes(31).hex() + "01"  # X25519: each secret with it is 0

    def keys(answer: SumsAnswer, **changes: str) -> SumsAnswer:
        assert answer.keys is not None
        return SumsAnswer(keys=dataclasses.replace(answer.keys, **changes))

    def signed(site: Site, **changes: str) -> SumsAnswer:
        said = site.round.own_keys(site.signer.public, site.signer.sign)
        said = dataclasses.replace(said, **changes)
        signature = site.signer.sign(KEYS + said.canonical)
        return SumsAnswer(keys=dataclasses.replace(said, signature=signature))

    def sealed(answer: SumsAnswer, sender: str) -> SumsAnswer:
        more = dataclasses.replace(answer.sealed[0], sender=sender)
        return SumsAnswer(sealed=(*answer.sealed, more))

    for step, spoil in (
        ("keys", lambda site, answer: signed(site, masking=no_secret)),
        ("keys", lambda site, answer: signed(site, sealing=no_secret)),
        ("keys", lambda site, answer: keys(answer, signature="0" * 128)),
        ("shares", lambda site, answer: sealed(answer, "nobody")),
        ("shares", lambda site, answer: sealed(answer, "site-01")),
        ("shares", lambda site, answer: SumsAnswer(sealed=answer.sealed[:1] * (number - 1))),
    ):
        sites, server = some_sites(number), ServerRound(JOB, 3)
        bad = sites["site-00"]
        ask = server.ask_keys()
        given = {name: site.answer(ask) for name, site in sites.items()}
        if step == "keys":
            given[bad.name] = spoil(bad, given[bad.name])
        ask = server.ask_shares(given)
        given = {
            name: site.answer(ask) for name, site in sites.items() if step != "keys" or site != bad
        }
        if step == "shares":
            given[bad.name] = spoil(bad, given[bad.name])
        for name, one in server.ask_take(given).items():
            sites[name].answer(one)
        assert server.members == tuple(sorted(sites))[1:]
        rest = {name: sites[name] for name in server.members}
        for site in rest.values():
            server.add(site.masked())
        ask = server.ask_unmask(rest)
        answers = {name: site.answer(ask) for name, site in rest.items()}
        found = server.unmask(rest, sum(one.weight for one in rest.values()), answers).mean()
        expected = mean_of(rest)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_server_that_passes_on_a_key_of_no_secret_is_refused() -> None:
    sites, server = some_sites(4), ServerRound(JOB, 3)
    ask = server.ask_keys()
    shares = server.ask_shares({name: site.answer(ask) for name, site in sites.items()})
    bad = sites["site-01"]
    for field in ("sealing", "masking"):
        said = dataclasses.replace(shares.keys[1], **{field: "00" * 32})
        said = dataclasses.replace(said, signature=bad.signer.sign(KEYS + said.canonical))
        lie = dataclasses.replace(shares, keys=(shares.keys[0], said, *shares.keys[2:]))
        assert code_of(sites["site-00"].answer, lie) == "other-peer"


def test_shares_that_another_sealed_are_refused_and_a_settled_sum_stays() -> None:
    sites = some_sites(4)
    server = ServerRound(JOB, 3)
    keys = server.ask_keys()
    shares = server.ask_shares({name: site.answer(keys) for name, site in sites.items()})
    asks = server.ask_take({name: site.answer(shares) for name, site in sites.items()})
    site, ask = sites["site-00"], asks["site-00"]
    assert code_of(site.masked) == "no-sum"
    assert code_of(site.answer, unmask(sorted(sites))) == "no-sum"

    first, second, *rest = ask.sealed
    crossed = (
        type(first)(sender=first.sender, receiver=first.receiver, data=second.data),
        *(second, *rest),
    )
    wrong = SumsAsk(step="take", job=JOB, round=3, sealed=crossed)
    assert code_of(site.answer, wrong) == "bad-shares"
    site.answer(ask)
    fewer = SumsAsk(step="take", job=JOB, round=3, sealed=ask.sealed[:2])
    assert code_of(site.answer, fewer) == "other-sum"
    masked = site.masked()
    site.answer(ask)  # again, after a restart of the server
    assert all(torch.equal(site.masked()[name], masked[name]) for name in masked)


def test_a_server_that_starts_again_goes_on_with_the_sum_that_was_settled() -> None:
    sites = some_sites(4)
    server = ServerRound(JOB, 3)
    settle(sites, server)
    kept = server.to_keep()
    assert ServerRound.restored(kept, JOB, 4) is None
    with pytest.raises(ValueError):
        ServerRound.restored({"job": JOB}, JOB, 3)
    again = ServerRound.restored(kept, JOB, 3)
    assert again is not None
    for name, ask in again.ask_take_again().items():
        sites[name].answer(ask)
    for site in sites.values():
        again.add(site.masked())
    ask = again.ask_unmask(sites)
    answers = {name: site.answer(ask) for name, site in sites.items()}
    total = sum(site.weight for site in sites.values())
    found, expected = again.unmask(sites, total, answers).mean(), mean_of(sites)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------ its parts


def test_any_shares_of_the_threshold_give_the_secret_and_fewer_do_not() -> None:
    secret = bytes(range(32))
    shares = split(secret, 7, 5)
    for chosen in ((1, 2, 3, 4, 5), (3, 7, 1, 6, 2), (7, 6, 5, 4, 3)):
        assert join({place: shares[place - 1] for place in chosen}) == secret
    few = {place: shares[place - 1] for place in (1, 2, 3, 4)}
    with pytest.raises(ValueError):  # a number of the whole field, with all probability
        join(few)
    with pytest.raises(ValueError):
        split(secret, 3, 4)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_mask_is_the_key_stream_of_aes_in_counter_mode(kind: torch.dtype) -> None:
    """NIST SP 800-38A has no vector from counter 0: the block cipher itself, block by block."""
    seed = bytes(range(32))
    blocks = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    values = 300_001  # over the border of what is masked at a time
    stream = blocks.update(b"".join(struct.pack(">QQ", 0, n) for n in range(values // 2 + 1)))
    expected = np.frombuffer(stream, f"<i{kind.itemsize}")[:values]
    tensors = {"b": torch.zeros(values - 5, dtype=kind), "a": torch.zeros(5, dtype=kind)}
    add_mask(tensors, seed, 1)
    assert np.array_equal(np.concatenate([tensors["a"].numpy(), tensors["b"].numpy()]), expected)
    add_mask(tensors, seed, -1)
    assert not any(one.any() for one in tensors.values())
