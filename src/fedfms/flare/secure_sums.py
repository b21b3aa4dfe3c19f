"""Secure sums over FLARE: the server asks, a site's client passes on, its trainer answers.

The steps before a round run when FLARE starts it, and the last one inside `aggregate()`, as FLARE's
messages beside tasks: ScatterAndGather knows nothing of them. Each site is asked by a message of
its own: FLARE 2.9's multicast of different messages fails (docs/developer.md).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from torch import Tensor

from fedfms.bounded import read_json
from fedfms.contracts.decode import Misfits
from fedfms.contracts.machine import Machine
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.errors import FederationError, FedfmsError, Undecodable
from fedfms.exchange.averaging import LARGEST_TOTAL
from fedfms.exchange.secure_sum import ServerRound
from fedfms.files import write_whole
from fedfms.flare.job import REASON, reason_of
from fedfms.trainer.connection import ask_sums

log = logging.getLogger(__name__)

TOPIC = "fedfms.sums"  # of FLARE's messages beside tasks
SAID = "fedfms_sums"  # key in such a message and in its answer: JSON types

ASK_SECONDS = 20.0  # for one answer; a site that is gone takes all of it
KEYS_SECONDS = 90.0  # for the keys of all sites in the first round: a site may be starting
LATER_SECONDS = 20.0  # in a later one: who is gone takes part in the next round
UNMASK_TRIES, AGAIN_SECONDS = 3, 2.0  # where too few sites answer to take the masks off
PARALLEL = 16
LOOK_SECONDS = 0.5  # between two looks at the job's abort signal
_LARGEST = 2**26  # bytes of what is kept of a round

Asks = Mapping[str, SumsAsk]
Answers = dict[str, SumsAnswer]


def answer_for_trainer(topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
    """A site's part: hand the question to the trainer, and its answer back."""
    try:
        exchange = Machine.from_environment().exchange
        if exchange is None:
            raise FederationError("FEDFMS_EXCHANGE is not set", "set it", code="no-exchange")
        reply = make_reply(ReturnCode.OK)
        reply[SAID] = ask_sums(exchange, SumsAsk.from_dict(request.get(SAID))).to_dict()
        return reply
    except FedfmsError as error:
        log.error("no part in the sum: %s", error.public)
        return make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON: error.public})
    except Misfits:
        return make_reply(ReturnCode.BAD_REQUEST_DATA, {REASON: "a question that is none"})


class SecureSums:
    """The server's part in one job, round after round.

    Args:
        kept: where the run is kept, so that a round goes on after the server started again.
        holdout: sites that never train.
    """

    def __init__(self, kept: Path, holdout: Iterable[str]) -> None:
        self._kept, self._holdout = kept / "sums.json", set(holdout)
        self._round: ServerRound | None = None
        self._added = 0
        self._has_begun = False  # a round, in this process

    def begin(self, number: int, fl_ctx: FLContext) -> None:
        """The steps before a round: keys, shares, and that each site takes its own.

        Raises:
            FederationError: code few-for-a-sum; too few sites answer.
        """
        self._added = 0
        job = str(fl_ctx.get_job_id())
        self._round = self._restored(job, number)
        if self._round is not None:
            self._ask(self._round.ask_take_again(), fl_ctx)
            return
        now = ServerRound(job, number)
        ask = now.ask_shares(self._all_keys(now, fl_ctx))
        given = self._ask({one.site: ask for one in ask.keys}, fl_ctx)
        asks = now.ask_take(given)
        self._keep(now)
        self._ask(asks, fl_ctx)
        self._round = now

    def takes(self, site: str) -> bool:
        """Whether an answer of this site may be added: it is in the sum, or never trains."""
        return site in self._holdout or (self._round is not None and self._round.takes(site))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """An accepted answer of a training site; nothing of it is kept but the sum."""
        if self._round is None:
            raise RuntimeError("an answer came before its round began")
        self._round.add(tensors)
        self._added += 1

    @property
    def is_asked(self) -> bool:
        """Whether a process of before asked sites to unmask the open round: they do for one set."""
        return self._round is not None and bool(self._round.arrived)

    def change(
        self,
        slices: Mapping[str, int],
        fl_ctx: FLContext,
        left_out: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, Tensor]:
        """What to add to the global model, fp32 by name; empty where no training site answered.

        A round whose masks stay on ends the job: each site would refuse the next one, which would
        ask it for the same model again. It can be tried again, with the answers that it has.

        Args:
            slices: of each training site whose answer was added, and counts.
            left_out: answers that were added and do not count, as they came.

        Raises:
            FederationError: code few-for-a-sum, bad-shares or sums-slices.
        """
        now, self._round = self._round, None
        if now is None or not slices:
            return {}
        if len(slices) + len(left_out) != self._added:
            raise RuntimeError("other answers were added than FLARE has accepted")
        for tensors in left_out:
            now.leave_out(tensors)
        total = sum(slices.values())
        if total > LARGEST_TOTAL:
            raise FederationError(
                f"the sites have {total} slices together",
                f"train on at most {LARGEST_TOTAL}, or without secure_sum",
                code="sums-slices",
            )
        ask, answers = now.ask_unmask(slices), Answers()
        self._keep(now)
        for number in range(UNMASK_TRIES):
            if number and _waits(AGAIN_SECONDS, fl_ctx):
                break
            silent = [site for site in slices if site not in answers]
            answers |= self._ask(dict.fromkeys(silent, ask), fl_ctx)
            if len(answers) >= now.threshold:
                break
        return now.unmask(slices, total, answers).mean()

    def _all_keys(self, now: ServerRound, fl_ctx: FLContext) -> Answers:
        """Of all sites that are there; one that does not answer is asked again for a while."""
        patience = LATER_SECONDS if self._has_begun else KEYS_SECONDS
        deadline, found = time.monotonic() + patience, Answers()
        while True:
            sites = {str(client.name) for client in fl_ctx.get_engine().get_clients()}
            missing = sites - self._holdout - set(found)
            found |= self._ask(dict.fromkeys(missing, now.ask_keys()), fl_ctx)
            self._has_begun |= bool(found)
            if set(found) >= missing or time.monotonic() > deadline or _waits(1.0, fl_ctx):
                return found

    def _ask(self, asks: Asks, fl_ctx: FLContext) -> Answers:
        """Ask some sites at once; those that answered, of a job that is aborted by then.

        FLARE waits for an answer as long as it was told to and looks at no signal: who aborts has
        not to wait for it, and what comes afterwards is for nobody.
        """
        ask = _asker(fl_ctx.get_engine())
        came: SimpleQueue[tuple[str, SumsAnswer | None]] = SimpleQueue()
        places = threading.Semaphore(PARALLEL)

        def ask_one(site: str, question: SumsAsk) -> None:
            answer = None
            try:
                with places:
                    if not _is_stopped(fl_ctx):
                        answer = ask(site, question)
            finally:
                came.put((site, answer))

        for one in asks.items():  # of daemons, which keep no process from ending
            threading.Thread(target=ask_one, args=one, name="sums", daemon=True).start()
        answers = Answers()
        left = len(asks)
        while left and not _is_stopped(fl_ctx):
            with contextlib.suppress(Empty):
                site, answer = came.get(timeout=LOOK_SECONDS)
                left -= 1
                if answer is not None:
                    answers[site] = answer
        return answers

    def _restored(self, job: str, number: int) -> ServerRound | None:
        try:
            return ServerRound.restored(read_json(self._kept, _LARGEST), job, number)
        except (OSError, Undecodable, ValueError):
            return None

    def _keep(self, now: ServerRound) -> None:
        with contextlib.suppress(OSError):  # the round goes on; it does not outlive this process
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._kept, json.dumps(now.to_keep()), mode=0o600)


def _is_stopped(fl_ctx: FLContext) -> bool:
    signal = fl_ctx.get_run_abort_signal()
    return signal is not None and bool(signal.triggered)


def _waits(seconds: float, fl_ctx: FLContext) -> bool:
    """Wait so long; true, and at once, where the job is aborted."""
    until = time.monotonic() + seconds
    while not _is_stopped(fl_ctx):
        if (left := until - time.monotonic()) <= 0:
            return False
        time.sleep(min(left, LOOK_SECONDS))
    return True


def _asker(engine: Any) -> Callable[[str, SumsAsk], SumsAnswer | None]:
    def ask(site: str, question: SumsAsk) -> SumsAnswer | None:
        message = Shareable()
        message[SAID] = question.to_dict()
        with engine.new_context() as fl_ctx:
            replies = engine.send_aux_request(
                targets=[site], topic=TOPIC, request=message, timeout=ASK_SECONDS, fl_ctx=fl_ctx
            )
        reply = (replies or {}).get(site)
        if reply is None or reply.get_return_code() != ReturnCode.OK:
            why = "no answer" if reply is None else reason_of(reply)
            log.warning("%s has no part in a sum (%s): %s", site, question.step, why)
            return None
        try:
            return SumsAnswer.from_dict(reply.get(SAID))
        except Misfits:
            log.warning("%s answered something else (%s)", site, question.step)
            return None

    return ask
