"""A sum of which nobody sees a part: what a site and the server know of one round, and do.

The protocol of Bonawitz et al. 2017 (masks.py), with the trainers' own keys for its signatures:

1. *keys*. Each site makes two X25519 keys and a seed for this round, and signs the public keys.
2. *shares*. Each site sees the keys of all. It splits its masking key and its seed among them, and
   seals each part for whom it is. Who did so is in the sum; the others are not.
3. *take*. Each site gets what was sealed for it. From here on its sum is settled: for this round it
   never takes part in another one. Before that, a round that is begun again has new keys.
4. A site sends its weighted difference in fixed point, of 64 bits a value or of 32, plus the mask
   of its seed, plus or minus a mask for each other site, which that one subtracts or adds. It does
   so for one difference only: of two, the same mask would fall out.
5. *unmask*. Sites give their shares of the seeds of those whose answers arrived, and of the masking
   keys of those that did not: so what does not cancel is taken off. Of no site does a site give
   both, and it gives them for one set of arrived sites only.

What is sealed, and each mask that two sites have in common, is made for one list of keys: sites to
which a server showed different lists cannot take each other's shares, so that all count by the same
`threshold`. So many sites can do the last step. A server that lies to some of them about who
arrived can have the sum of fewer sites than it says, and of a single one only if sites that collude
with it are more than `2 * threshold - sites`, or as many.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import StringConstraints, TypeAdapter
from torch import Tensor

from fedfms.contracts.sums import (
    KEYS,
    LEAST_SITES,
    Key,
    Piece,
    RoundKeys,
    SealedShares,
    Share,
    SumsAnswer,
    SumsAsk,
)
from fedfms.contracts.wire import Count, Name
from fedfms.errors import DoorClosed, FederationError
from fedfms.exchange.averaging import FixedSum, weighted_units, weighted_units_32
from fedfms.exchange.masks import (
    SEED_BYTES,
    SHARE_BYTES,
    add_mask,
    common_seed,
    has_secrets,
    join,
    public_of,
    split,
)
from fedfms.exchange.signatures import is_signed_by_trainer
from fedfms.exchange.tensors import fingerprint

log = logging.getLogger(__name__)

_MASK, _SEAL = b"fedfms mask\n", b"fedfms shares\n"
_NONCE = bytes(12)  # each key seals one message
_FOR_A_SUM = "sites for its sum, it needs"


def threshold(sites: int) -> int:
    """How many of a sum's sites can take its masks off: 2 of 3, else more than two thirds."""
    return 2 if sites == LEAST_SITES else 2 * sites // 3 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRound:
    """What a trainer knows of one round, secrets included; each step gives the next one.

    All of it are JSON types, so that it outlives the trainer.
    """

    site: Name
    job: Name
    round: Count
    sealing: Key  # private keys, and the seed of its own mask
    masking: Key
    seed: Key
    keys: tuple[RoundKeys, ...] = ()  # of all, by name
    sealed: tuple[SealedShares, ...] = ()  # what it sealed for others
    # by sender, this site included: shares of its masking key and of its seed
    held: dict[Name, tuple[Share, Share]] = dataclasses.field(default_factory=dict)
    # SHA-256 of what it masked: a second difference under the same mask would show both
    hidden: Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")] = ""
    arrived: tuple[Name, ...] = ()  # as the server said when it asked to unmask

    @classmethod
    def begin(cls, site: str, job: str, round_number: int) -> SiteRound:
        """Step 1, with secrets from the operating system's random source."""
        new = [secrets.token_hex(SEED_BYTES) for _ in range(3)]
        return cls(
            site=site, job=job, round=round_number, sealing=new[0], masking=new[1], seed=new[2]
        )

    def own_keys(self, trainer: str, sign: Callable[[bytes], str]) -> RoundKeys:
        """Its public keys, signed.

        Args:
            trainer: public key of the trainer, hexadecimal digits.
            sign: gives the signature of that key, hexadecimal digits.
        """
        keys = RoundKeys(
            site=self.site,
            job=self.job,
            round=self.round,
            sealing=public_of(bytes.fromhex(self.sealing)).hex(),
            masking=public_of(bytes.fromhex(self.masking)).hex(),
            trainer=trainer,
        )
        return dataclasses.replace(keys, signature=sign(KEYS + keys.canonical))

    @property
    def is_settled(self) -> bool:
        """Whether its sites are known, and no others can be."""
        return len(self.held) >= LEAST_SITES

    @property
    def members(self) -> tuple[str, ...]:
        """The sites of the sum, by name, as soon as they are settled."""
        return tuple(sorted(self.held))

    def answer(
        self, ask: SumsAsk, peers: Callable[[], Mapping[str, str]]
    ) -> tuple[SiteRound, SumsAnswer]:
        """The step after its keys that the server asks for.

        Args:
            peers: gives the keys of trainers that may be in a sum, by site; for step 2.

        Raises:
            DoorClosed: as `seal`, `take` and `unmask`.
        """
        if ask.step == "shares":
            now = self.seal(ask.keys, peers())
            return now, SumsAnswer(sealed=now.sealed)
        if ask.step == "take":
            return self.take(ask.sealed), SumsAnswer()
        now, pieces = self.unmask(ask.arrived)
        return now, SumsAnswer(pieces=pieces)

    def seal(self, keys: Iterable[RoundKeys], peers: Mapping[str, str]) -> SiteRound:
        """Step 2: `sealed` of what comes back is for the others.

        Args:
            keys: of all sites, as the server passed them on.
            peers: public key of each other site's trainer, as this site knows it.

        Raises:
            DoorClosed: code few-for-a-sum, other-sum, unknown-peer or other-peer.
        """
        of = {one.site: one for one in keys}
        if self.keys:
            if of != {one.site: one for one in self.keys}:
                raise _other_sum()
            return self
        self._check(of, peers)
        names = sorted(of)
        parts = zip(
            split(bytes.fromhex(self.masking), len(names), threshold(len(names))),
            split(bytes.fromhex(self.seed), len(names), threshold(len(names))),
            strict=True,
        )
        sealed, held = [], {}
        keys_by_name = tuple(of[name] for name in names)
        this = roster(keys_by_name)
        for name, (mask, seed) in zip(names, parts, strict=True):
            if name == self.site:
                held = {name: (mask.hex(), seed.hex())}
                continue
            data = self._box(this, of[name], self.site, name).encrypt(_NONCE, mask + seed, None)
            sealed.append(SealedShares(sender=self.site, receiver=name, data=data.hex()))
        return dataclasses.replace(self, keys=keys_by_name, sealed=tuple(sealed), held=held)

    def take(self, sealed: Iterable[SealedShares]) -> SiteRound:
        """Step 3: what comes back knows its sum.

        Raises:
            DoorClosed: code few-for-a-sum, other-sum or bad-shares.
        """
        of = {one.sender: one for one in sealed}
        if self.is_settled:
            if set(of) != set(self.held) - {self.site}:
                raise _other_sum()
            return self
        keys = {one.site: one for one in self.keys}
        if not set(of) <= set(keys) - {self.site}:
            raise _other_sum()
        needed = max(LEAST_SITES, threshold(len(keys)))
        if len(of) + 1 < needed:
            raise _few(len(of) + 1, needed)
        held, this = dict(self.held), roster(self.keys)
        for name, one in sorted(of.items()):
            try:
                box = self._box(this, keys[name], name, self.site)
                data = box.decrypt(_NONCE, bytes.fromhex(one.data), None)
            except InvalidTag:
                raise DoorClosed(
                    f"what {name} is said to have sealed for this site was not sealed by it, or "
                    "for other keys than this site was shown",
                    "look who runs the server, and whether all sites run the same version of "
                    "fedfms; the next round tries again",
                    code="bad-shares",
                ) from None
            held[name] = (data[:SHARE_BYTES].hex(), data[SHARE_BYTES:].hex())
        return dataclasses.replace(self, held=held)

    def masked(
        self, tensors: Mapping[str, Tensor], weight: int, bits: int = 64
    ) -> tuple[SiteRound, dict[str, Tensor]]:
        """Step 4: what leaves, by name: for anybody alone they are random numbers.

        The mask is for one difference: what is masked again has to be the same.

        Args:
            tensors: the difference, fp32 or fp16, see `FixedSum.add`.
            weight: of this site, a positive number.
            bits: of a value that leaves: 64, int64, or 32, int32.

        Raises:
            DoorClosed: code no-sum, the sum is not settled; or summed-before, another difference
                has had this mask.
            ValueError, OverflowError: see `FixedSum.add` and `weighted_units_32`.
        """
        if not self.is_settled:
            raise no_sum()
        if bits == 32:
            masked = weighted_units_32(tensors, weight, len(self.members))
        else:
            masked = weighted_units(tensors, weight)
        hidden = fingerprint(masked)
        if self.hidden not in ("", hidden):
            raise summed_before(self.round)
        add_mask(masked, bytes.fromhex(self.seed), 1)
        keys, this = {one.site: one for one in self.keys}, roster(self.keys)
        for name in self.members:
            if name != self.site:
                seed = _mask_seed(this, self.masking, keys[self.site], keys[name])
                add_mask(masked, seed, 1 if self.site < name else -1)
        return dataclasses.replace(self, hidden=hidden), masked

    def unmask(self, arrived: Iterable[str]) -> tuple[SiteRound, tuple[Piece, ...]]:
        """Step 5: a share of each member's seed, or of its masking key.

        Args:
            arrived: the members whose answers are in the sum.

        Raises:
            DoorClosed: code no-sum, few-for-a-sum or other-sum.
        """
        names = tuple(sorted(set(arrived)))
        if not self.is_settled:
            raise no_sum()
        if not {self.site} <= set(names) <= set(self.held):
            raise _other_sum()  # a site that did not answer has nothing to unmask
        if self.arrived and names != self.arrived:
            raise _other_sum()
        if len(names) < (needed := threshold(len(self.keys))):
            raise _few(len(names), needed)
        pieces = tuple(
            Piece(site=name, share=self.held[name][1 if name in names else 0])
            for name in self.members
        )
        return dataclasses.replace(self, arrived=names), pieces

    def _check(self, of: Mapping[str, RoundKeys], peers: Mapping[str, str]) -> None:
        if len(of) < LEAST_SITES:
            raise _few(len(of), LEAST_SITES)
        mine = of.get(self.site)
        expected = (
            public_of(bytes.fromhex(self.sealing)).hex(),
            public_of(bytes.fromhex(self.masking)).hex(),
        )
        if mine is None or (mine.sealing, mine.masking) != expected:
            raise _other_sum()
        trainers = Counter(one.trainer for one in of.values())
        for name, one in sorted(of.items()):
            if (one.job, one.round) != (self.job, self.round):
                raise _other_sum()
            if trainers[one.trainer] > 1:
                raise _other_peer(name, "is signed by a trainer that is in the sum twice")
            if not is_signed_by_trainer(one.trainer, one.signature, KEYS + one.canonical):
                raise _other_peer(name, "is not signed by the key that it names")
            if not _has_secrets(one):
                raise _other_peer(name, "makes a secret that everybody knows")
            if name == self.site:
                continue
            if name not in peers:
                raise DoorClosed(
                    f"{name} is in the sum, and this site does not know its trainer",
                    f"ask {name} for the key of its trainer, and write it into policy/peers.json",
                    code="unknown-peer",
                )
            if one.trainer != peers[name]:
                raise _other_peer(name, "is signed by another trainer than policy/peers.json says")

    def _box(self, this: str, other: RoundKeys, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Seals what one of two sends the other (RFC 8439); each direction has its own key."""
        purpose = _SEAL + f"{self.job}\n{self.round}\n{this}\n{sender}\n{receiver}\n".encode()
        return ChaCha20Poly1305(
            common_seed(bytes.fromhex(self.sealing), bytes.fromhex(other.sealing), purpose)
        )


@dataclass(frozen=True, slots=True)
class _Settled:
    job: Name
    round: Count
    members: tuple[Name, ...]
    keys: tuple[RoundKeys, ...]
    sealed: tuple[SealedShares, ...] = ()
    arrived: tuple[Name, ...] = ()


_SETTLED = TypeAdapter(_Settled)


class ServerRound:
    """What the server knows of one round: public keys, what it cannot read, and a masked sum.

    Args:
        job, round_number: whose.
    """

    def __init__(self, job: str, round_number: int) -> None:
        self.job, self.round = job, round_number
        self.members: tuple[str, ...] = ()  # sites of the sum, as soon as they have taken shares
        self.arrived: tuple[str, ...] = ()  # of them, as soon as sites are asked to unmask
        self._keys: dict[str, RoundKeys] = {}
        self._sealed: list[SealedShares] = []
        self._sum: dict[str, Tensor] = {}

    @property
    def threshold(self) -> int:
        """How many sites take its masks off."""
        return threshold(len(self._keys))

    def takes(self, site: str) -> bool:
        """Whether this site's answer may be added: sites unmask one set of answers only."""
        return site in (self.arrived or self.members)

    def ask_keys(self) -> SumsAsk:
        """Step 1, the same for all."""
        return SumsAsk(step="keys", job=self.job, round=self.round)

    def ask_shares(self, answers: Mapping[str, SumsAnswer]) -> SumsAsk:
        """Step 2, the same for all whose keys came.

        Args:
            answers: to `ask_keys`, by site.

        Raises:
            FederationError: code few-for-a-sum.
        """
        for site, answer in sorted(answers.items()):
            keys = answer.keys
            about = (site, self.job, self.round)
            if keys is None or (keys.site, keys.job, keys.round) != about:
                continue
            signed = is_signed_by_trainer(keys.trainer, keys.signature, KEYS + keys.canonical)
            if not (signed and _has_secrets(keys)):  # each site would refuse a sum with it
                log.warning("%s has no part in a sum: its keys cannot be used", site)
                continue
            self._keys[site] = keys
        self._enough(len(self._keys))
        keys_by_name = tuple(self._keys[name] for name in sorted(self._keys))
        return SumsAsk(step="shares", job=self.job, round=self.round, keys=keys_by_name)

    def ask_take(self, answers: Mapping[str, SumsAnswer]) -> dict[str, SumsAsk]:
        """Step 3, for each site of the sum.

        Args:
            answers: to `ask_shares`, by site.

        Raises:
            FederationError: code few-for-a-sum.
        """
        for site, answer in sorted(answers.items()):
            if site not in self._keys:
                continue
            expected = [(site, other) for other in sorted(self._keys) if other != site]
            if sorted((one.sender, one.receiver) for one in answer.sealed) == expected:
                self._sealed += answer.sealed
            else:  # nor what it seals in the name of another
                log.warning("%s has no part in a sum: its shares are not one for each", site)
        members = sorted({one.sender for one in self._sealed})
        self._enough(len(members))
        self.members = tuple(members)
        return self.ask_take_again()

    def ask_take_again(self) -> dict[str, SumsAsk]:
        """Step 3 once more, as after a restart of the server: a sum that is settled stays so."""
        return {
            site: SumsAsk(
                step="take",
                job=self.job,
                round=self.round,
                sealed=tuple(
                    one
                    for one in self._sealed
                    if one.receiver == site and one.sender in self.members
                ),
            )
            for site in self.members
        }

    def to_keep(self) -> dict[str, Any]:
        """What was said before the round, as JSON types: nothing of an answer."""
        kept = _Settled(self.job, self.round, self.members, tuple(self._keys.values()))
        kept = dataclasses.replace(kept, sealed=tuple(self._sealed), arrived=self.arrived)
        return dict(_SETTLED.dump_python(kept, mode="json"))

    @classmethod
    def restored(cls, values: Any, job: str, round_number: int) -> ServerRound | None:
        """The round of `to_keep`; None where that is of another one.

        Raises:
            ValueError: that is something else.
        """
        kept = _SETTLED.validate_python(values)
        if (kept.job, kept.round) != (job, round_number):
            return None
        made = cls(job, round_number)
        made.members, made.arrived = kept.members, kept.arrived
        made._keys = {one.site: one for one in kept.keys}
        made._sealed = list(kept.sealed)
        return made

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one site's masked answer, all int64 or all int32, and keep nothing else of it."""
        if not self._sum:
            self._sum = {name: one.clone() for name, one in tensors.items()}
        else:
            for name, one in tensors.items():
                self._sum[name].add_(one)

    def leave_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a masked answer off again that was added; for the others its site has dropped out.

        Before sites are asked to unmask: they do so for one set of answers.
        """
        for name, one in tensors.items():
            self._sum[name].sub_(one)

    def ask_unmask(self, arrived: Iterable[str]) -> SumsAsk:
        """Step 5, for all whose answers arrived.

        Raises:
            FederationError: code few-for-a-sum.
        """
        names = tuple(sorted(arrived))
        self._enough(len(names), max(self.threshold, len(self.arrived)))
        self.arrived = names
        return SumsAsk(step="unmask", job=self.job, round=self.round, arrived=names)

    def unmask(
        self, arrived: Iterable[str], total: int, answers: Mapping[str, SumsAnswer]
    ) -> FixedSum:
        """The sum of the answers that were added, without masks.

        Args:
            arrived: whose they are.
            total: of their weights.
            answers: to `ask_unmask`, by site.

        Raises:
            FederationError: code few-for-a-sum or bad-shares.
        """
        names = sorted(self._keys)
        here, this = set(arrived), roster(self._keys.values())
        needed = self.threshold
        shares: dict[str, dict[int, bytes]] = {name: {} for name in self.members}
        for site, answer in answers.items():
            if site in names:
                for piece in answer.pieces:
                    if piece.site in shares:
                        place = names.index(site) + 1
                        shares[piece.site][place] = bytes.fromhex(piece.share)
        for name in self.members:
            self._enough(len(shares[name]), needed)
            try:
                secret = join(dict(sorted(shares[name].items())[:needed]))
            except ValueError:
                raise _wrong_shares(name) from None
            if name in here:
                add_mask(self._sum, secret, -1)
                continue
            if public_of(secret).hex() != self._keys[name].masking:
                raise _wrong_shares(name)
            for other in sorted(here):
                seed = _mask_seed(this, secret.hex(), self._keys[name], self._keys[other])
                add_mask(self._sum, seed, 1 if name < other else -1)
        return FixedSum.of(self._sum, total)

    def _enough(self, sites: int, needed: int = LEAST_SITES) -> None:
        if sites < needed:
            raise FederationError(
                f"round {self.round} has {sites} {_FOR_A_SUM} {needed}",
                "look at the sites that did not answer; a recipe without secure_sum needs fewer",
                code="few-for-a-sum",
            )


def roster(keys: Iterable[RoundKeys]) -> str:
    """SHA-256 of the keys of all sites of a sum, in whatever order."""
    digest = hashlib.sha256()
    for one in sorted(keys, key=lambda one: one.site):
        digest.update(one.canonical + b"\n")
    return digest.hexdigest()


def _mask_seed(this: str, private: str, one: RoundKeys, other: RoundKeys) -> bytes:
    """Of the mask that two sites have in common.

    Args:
        this: the roster that both were shown.
        private: the one's masking key.
        one, other: their public keys.
    """
    pair = "\n".join(sorted((one.site, other.site)))
    purpose = _MASK + f"{one.job}\n{one.round}\n{this}\n{pair}\n".encode()
    return common_seed(bytes.fromhex(private), bytes.fromhex(other.masking), purpose)


def is_for_few_in_a_sum(reason: str) -> bool:
    """Whether a job ends because too few sites answered for a sum or to take its masks off."""
    return _FOR_A_SUM in reason


def _has_secrets(keys: RoundKeys) -> bool:
    return all(has_secrets(bytes.fromhex(one)) for one in (keys.sealing, keys.masking))


def no_sum() -> DoorClosed:
    """The error of a round whose sum this site is not in."""
    return DoorClosed(
        "this site is in no sum of this round",
        "nothing, if it came late: the next round has it; else look in the server's log",
        code="no-sum",
    )


def summed_before(round_number: int) -> DoorClosed:
    """The error of a round that this site has answered by another difference."""
    return DoorClosed(
        f"this site has answered round {round_number} by another difference, under the same mask",
        "nothing, where a trainer started again or its data changed in the middle of the round: "
        "the next round has its own masks; else ask the coordinator why a round is asked for twice",
        code="summed-before",
    )


def _few(sites: int, needed: int) -> DoorClosed:
    return DoorClosed(
        f"this sum has {sites} sites and needs {needed}: fewer would show what single ones sent",
        "run the job with at least three training sites, or with secure_sum false if all agree",
        code="few-for-a-sum",
    )


def _other_sum() -> DoorClosed:
    return DoorClosed(
        "the server asks for another sum of the same round",
        "nothing: the round has one sum only; the next round has its own",
        code="other-sum",
    )


def _other_peer(name: str, what: str) -> DoorClosed:
    return DoorClosed(
        f"the key in the name of {name} {what}",
        f"ask {name} by telephone for the key of its trainer, and compare it with "
        "policy/peers.json; until they agree nobody knows who would see the sum",
        code="other-peer",
    )


def _wrong_shares(name: str) -> FederationError:
    return FederationError(
        f"the shares for {name} do not fit each other",
        "look for a site that runs another version of fedfms",
        code="bad-shares",
    )
