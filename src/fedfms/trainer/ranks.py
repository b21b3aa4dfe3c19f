"""The other ranks of a site's training: processes that the trainer starts, asks, and ends.

They are asked through pairs of sockets without a name and answer there; parameters and gradients go
by torch.distributed (gloo, or NCCL between GPUs) over the loopback interface, which a container
without network has. Whatever goes wrong ends all of them; the next round starts them anew, and they
are given everything again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.slices import SliceDataset
from fedfms.errors import TrainingError
from fedfms.trainer.rank import Done, Failed, Gradient, Round, Start, heard, say
from fedfms.training.device import halved, is_out_of_memory
from fedfms.training.gradients import accumulate_gradients
from fedfms.training.interrupt import started
from fedfms.training.loader import cpus_here
from fedfms.training.ranks import (
    frozen,
    join,
    learning,
    spread,
    sum_gradients,
    wait_for,
)

log = logging.getLogger(__name__)

MEETING_SECONDS = 120.0  # for all ranks to find each other, once each of them is there
# not by -m: what it says is of the module that this process knows
_RANK = "from fedfms.trainer.rank import main; main()"
ENDING_SECONDS = 5.0  # for a killed process to be gone


class Ranks:
    """The ranks of one site, this process being rank 0; see the module.

    Args:
        devices: of each rank, this one's first; at least two.
        site: for the CPU threads of each rank and for how long nothing may happen.
    """

    def __init__(self, devices: list[torch.device], site: SiteConfig) -> None:
        self.devices = devices
        self.site = site
        self._others: list[_Other] = []
        self._threads = site.threads
        if devices[0].type == "cpu" and site.threads is None:
            self._threads = max(1, cpus_here() // len(devices))
        self._dataset: SliceDataset | None = None  # that the others have
        self._fits = sys.maxsize  # slices at once in this process

    @contextlib.contextmanager
    def round(
        self,
        model: nn.Module,
        dataset: SliceDataset,
        recipe: Recipe,
        number: int,
        secret: bytes | None,
        control: Control,
    ) -> Iterator[_RoundOfRanks]:
        """One local round; whatever is raised inside ends the other ranks.

        Args:
            model: on this rank's device, as the round begins.
            number, secret: as of `train_round`.

        Raises:
            TrainingError: code rank-died, or what a rank raised.
            TaskAborted: `control.abort()` was called.
        """
        threads = torch.get_num_threads()
        try:
            if not self._others:
                self._start(control)
            if self._threads is not None and self._threads != threads:
                torch.set_num_threads(self._threads)
            had, self._dataset = self._dataset is dataset, dataset
            files = [] if had else dataset.kept_files
            about = None if had else dataset
            self._send(Round(recipe, self.site, number, secret, about, len(files)), files)
            spread(frozen(model), self._waits(control))
            yield _RoundOfRanks(self, dataset)
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(threads)

    def gradient(
        self,
        step: int,
        over: float,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        micro_batch: int,
        control: Control,
    ) -> float:
        """The gradient of a batch of all ranks into the parameters; its loss.

        Args:
            step: of the round.
            over: what the sum of the losses is divided by.
            batch: of this rank.
        """
        self._send(Gradient(step, over, micro_batch))
        waits = self._waits(control)
        parameters = learning(model)
        spread(parameters, waits)
        self._fits = min(self._fits, micro_batch)
        loss = self._of_this_rank(over, model, batch, recipe, control)
        for other in self._others:
            loss += self._done(other, control).loss
        sum_gradients(parameters, waits)
        return loss

    def close(self) -> None:
        """End the other ranks, at once; the next round starts new ones."""
        others, self._others, self._dataset = self._others, [], None
        for other in others:
            other.end()
        if not others or not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":  # which would wait for those that are gone
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def _of_this_rank(
        self,
        over: float,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        recipe: Recipe,
        control: Control,
    ) -> float:
        """As `train_step`, which must not ask anew: the others are at their shares."""
        while True:
            try:
                return accumulate_gradients(model, batch, recipe, self._fits, control, over)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            model.zero_grad(set_to_none=True)
            self._fits = halved(self._fits, "with a single slice in memory", "with")

    def _start(self, control: Control) -> None:
        size = len(self.devices)
        backend = "gloo" if self.devices[0].type == "cpu" else "nccl"
        folder = Path(tempfile.mkdtemp(prefix="fedfms-ranks-"))
        try:
            timeout = max(MEETING_SECONDS, self.site.stall_seconds + 60)
            for rank in range(1, size):
                other = _Other(rank)
                self._others.append(other)
                device, store = self.devices[rank], folder / "store"
                begin = Start(rank, size, device, store, backend, self._threads, timeout)
                say(other.connection, begin)
            for other in self._others:
                self._answer(other, control)
            met = started(partial(join, backend, folder / "store", 0, size, timeout))
            while not concurrent.futures.wait([met], timeout=0.05).done:
                self._look(control)
            met.result()
            for other in self._others:  # which may still read there when this rank has met all
                self._answer(other, control)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        log.info("%d ranks train together (%s)", size, backend)

    def _send(self, request: Any, files: Sequence[int] = ()) -> None:
        for other in self._others:
            try:
                say(other.connection, request)
                for file in files:
                    send_handle(other.connection, file, other.process.pid)
            except OSError:
                raise self._what_befell(other) from None

    def _done(self, other: _Other, control: Control) -> Done:
        answer = self._answer(other, control)
        assert isinstance(answer, Done)
        return answer

    def _answer(self, other: _Other, control: Control) -> Any:
        """What a rank says next; while it computes nothing here is a sign of life."""
        while not other.connection.poll(0.01):
            _stop_if_asked(control)
        try:
            answer = heard(other.connection)
        except (EOFError, OSError):
            raise self._died(other) from None
        if isinstance(answer, Failed):
            raise _as_error(answer, other.rank)
        return answer

    def _waits(self, control: Control) -> Any:
        def wait(work: dist.Work) -> None:
            try:
                wait_for(work, partial(self._look, control))
            except RuntimeError:  # of torch; a rank that failed says why, or its connection ends
                by_connection = {other.connection: other for other in self._others}
                if told := multiprocessing.connection.wait(by_connection, ENDING_SECONDS):
                    raise self._what_befell(by_connection[told[0]]) from None  # type: ignore[index]
                raise

        return wait

    def _look(self, control: Control) -> None:
        """Raise what ends the wait for others: an abort, or the end of one of them."""
        _stop_if_asked(control)
        for other in self._others:
            if other.process.poll() is not None:
                raise self._what_befell(other)

    def _what_befell(self, other: _Other) -> TrainingError:
        """What a rank said last, or that it died without a word."""
        with contextlib.suppress(EOFError, OSError):
            while other.connection.poll():
                if isinstance(said := heard(other.connection), Failed):
                    return _as_error(said, other.rank)
        return self._died(other)

    def _died(self, other: _Other) -> TrainingError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.process.wait(ENDING_SECONDS)
        code = other.process.returncode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        return TrainingError(
            f"rank {other.rank} of the {len(self.devices)} that train together ended ({how})",
            "the next round starts all of them again; if it comes back, most likely memory is "
            "short: give the trainer more, or set a smaller micro_batch, or ranks: 1, in site.yml",
            code="rank-died",
        )


class _Other:
    """One other rank's process, and the connection to it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.connection: Connection
        self.connection, theirs = multiprocessing.Pipe()
        try:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _RANK),
                    *(str(theirs.fileno()), str(os.getpid())),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_SECONDS)


@dataclass(frozen=True, slots=True)
class _RoundOfRanks:
    """See `training.ranks.RoundOfRanks`."""

    ranks: Ranks
    dataset: SliceDataset

    @property
    def size(self) -> int:
        return len(self.ranks.devices)

    def gradient_of(self, step: int, slices: int) -> partial[float]:
        over = max(1.0, slices * self.dataset.classes_drawn)
        return partial(self.ranks.gradient, step, over)


def _stop_if_asked(control: Control) -> None:
    """Raise TaskAborted; unlike `check` this is no sign of life."""
    if control.aborted:
        control.check()


def _as_error(said: Failed, rank: int) -> TrainingError:
    if said.code:
        return TrainingError(said.problem, said.fix, code=said.code)
    error = TrainingError(
        f"rank {rank} of the training failed: {said.problem.strip().splitlines()[-1]}",
        "report this with the trainer's errors.log; ranks: 1 in site.yml trains without it",
        code="rank-failed",
    )
    error.details = said.problem
    return error
