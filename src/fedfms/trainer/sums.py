"""A trainer's part in secure sums: its secrets of each round, kept in the site's private folder.

    WORK/sums/JOB/0003.json     of round 3 (exchange/secure_sum.py), mode 0600; of the last two

A round that is asked for again, by a server or a site that started again, has the same keys, the
same sum and the same masks. What was said once to unmask a round is said again, and nothing else.
Which trainers the other sites have, this site's people write into its policy folder: the authority
of the project's certificates is the coordinator's, who could make a site up.

    POLICY/peers.json           {"site-2": "64 hexadecimal digits", …}
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedfms.bounded import read_json
from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.peers import read_peers
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.errors import ConfigError, DoorClosed, Undecodable
from fedfms.exchange.averaging import LARGEST_TOTAL
from fedfms.exchange.secure_sum import SiteRound, no_sum
from fedfms.files import write_whole
from fedfms.trainer.own_key import SUMS, own_key

PEERS = "peers.json"  # in its policy folder
KEPT_ROUNDS = 2
KEPT_RUNS = 4
_LARGEST = 2**22  # bytes of a round's file


class Sums:
    """Answers what the server asks, and masks what leaves; for one site, from any thread.

    Args:
        site: its name.
        work: its private folder.
        peers: its peers.json.
    """

    def __init__(self, site: str, work: Path, peers: Path) -> None:
        self._site, self._work, self._peers = site, work, peers
        self._lock = threading.Lock()

    def answer(self, ask: SumsAsk) -> SumsAnswer:
        """Do the next step of a round.

        Raises:
            DoorClosed: the codes of `SiteRound`, and no-peers.
            ConfigError: code trainer-key.
            OSError: the folder cannot be read or written; nothing is said then.
        """
        with self._lock:
            if ask.step == "keys":
                now = self._read(ask.job, ask.round)
                if now is None or not now.is_settled:
                    now = self._begin(ask)
                signer = own_key(self._work)
                return SumsAnswer(keys=now.own_keys(signer.public, signer.sign))
            before = self._read(ask.job, ask.round)
            if before is None:
                raise no_sum()
            now, answer = before.answer(ask, self._known_peers)
            if now != before:
                self._write(now)
            return answer

    def check(self, job: str, round_number: int) -> None:
        """Whether this site is in the sum of a round; asked before anything is computed.

        Raises:
            DoorClosed: code no-sum.
        """
        with self._lock:
            now = self._read(job, round_number)
        if now is None or not now.is_settled:
            raise no_sum()

    def masked(
        self,
        job: str,
        round_number: int,
        tensors: Mapping[str, Tensor],
        weight: int,
        bits: int = 64,
    ) -> dict[str, Tensor]:
        """What leaves in the place of a difference; see `SiteRound.masked`.

        One difference a round: of two under one mask, who asked for both would see how they differ.

        Args:
            weight: the slices that it was trained on.
            bits: of a value, 64 or 32.

        Raises:
            DoorClosed: code no-sum, summed-before, sums-slices, sums-wrap or value-too-large.
            OSError: it could not be written down that the mask is used; nothing may leave then.
        """
        if weight > LARGEST_TOTAL:
            raise DoorClosed(
                f"{weight} slices are more than a secure sum can have",
                "train with fewer slices, or without secure_sum",
                code="sums-slices",
            )
        try:
            with self._lock:
                before = self._read(job, round_number)
                if before is None:
                    raise no_sum()
                now, masked = before.masked(tensors, weight, bits)
                if now != before:
                    self._write(now)
                return masked
        except OverflowError as error:
            raise DoorClosed(
                f"the round's result does not fit a sum of 32 bits: {error}",
                "submit the recipe with --set secure_sum_bits=64, or lower learning_rate",
                code="sums-wrap",
            ) from None
        except ValueError as error:
            raise DoorClosed(
                f"the round's result may not leave: {error}",
                "lower learning_rate in the recipe: no training comes to such a value",
                code="value-too-large",
            ) from None

    def forget(self, job: str) -> None:
        """Remove what is kept of a job.

        Raises:
            OSError: it could not be removed.
        """
        with self._lock:
            if (self._work / SUMS / job).exists():
                shutil.rmtree(self._work / SUMS / job)

    def _begin(self, ask: SumsAsk) -> SiteRound:
        """A round that is new here; never one that is over, whose secrets may have been said."""
        folder = self._work / SUMS / ask.job
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = sorted(int(path.stem) for path in folder.glob("*.json"))
        if there and ask.round < there[-1] and ask.round not in there:
            raise no_sum()
        now = SiteRound.begin(self._site, ask.job, ask.round)
        self._write(now)
        for old in sorted({*there, ask.round})[:-KEPT_ROUNDS]:
            self._path(ask.job, old).unlink(missing_ok=True)
        others = [path for path in folder.parent.iterdir() if path != folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for run in others[KEPT_RUNS - 1 :]:
            shutil.rmtree(run, ignore_errors=True)
        return now

    def _path(self, job: str, round_number: int) -> Path:
        return self._work / SUMS / job / f"{round_number:04d}.json"

    def _read(self, job: str, round_number: int) -> SiteRound | None:
        """What is kept; a file that cannot be used is an error and no new round."""
        path = self._path(job, round_number)
        try:
            return validate(SiteRound, read_json(path, max_bytes=_LARGEST))
        except FileNotFoundError:
            return None
        except (Misfits, Undecodable):
            raise no_sum() from None

    def _write(self, now: SiteRound) -> None:
        path = self._path(now.job, now.round)
        write_whole(path, json.dumps(dataclasses.asdict(now)).encode(), mode=0o600)

    def _known_peers(self) -> dict[str, str]:
        try:
            return read_peers(self._peers)
        except ConfigError as error:
            problem = error.problem
        raise DoorClosed(
            f"this site does not know the trainers of other sites: {problem}",
            'write each site of the federation with the key of its trainer, {"site-2": "0a1b…"}; '
            "the site reads it off the trainer's log, and tells it to you, not to the coordinator",
            code="no-peers",
        )
