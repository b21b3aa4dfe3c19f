"""A rank of a training beside rank 0, which is the trainer.

It is started by the trainer alone, speaks with it through a pair of sockets without a name, and
ends with it. It is told of each round and of each gradient, and answers with its share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfms.user import end_with

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from fedfms.contracts.recipe import Recipe
    from fedfms.contracts.site import SiteConfig
    from fedfms.data.slices import SliceDataset
    from fedfms.models.segmenter import Segmenter
    from fedfms.training.loader import Loader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Who this rank is, and where the ranks find each other."""

    rank: int
    size: int
    device: torch.device
    store: Path  # file of a torch.distributed.FileStore
    backend: str  # gloo or nccl
    threads: int | None  # of torch on the processor
    timeout_seconds: float  # of a message between ranks


@dataclass(frozen=True, slots=True)
class Round:
    """A round begins; the network's values follow by broadcast."""

    recipe: Recipe
    site: SiteConfig
    number: int
    secret: bytes | None
    dataset: SliceDataset | None  # None: that of the round before
    kept_files: int  # with it as many open files follow, of slices as they were resized once


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient is asked for; the learning values follow by broadcast."""

    step: int  # of the round, in ascending order; the same again for the same batch
    over: float  # what the sum of the losses is divided by
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Done:
    """The share is computed; its gradient follows by a sum to rank 0."""

    loss: float


@dataclass(frozen=True, slots=True)
class Failed:
    """What a person reads of an error; `code` is empty for one that nobody foresaw."""

    problem: str
    fix: str
    code: str


def say(connection: Connection, what: Any) -> None:
    """To the other side; not `send`, by which torch passes tensors on as sockets and files."""
    connection.send_bytes(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))


def heard(connection: Connection) -> Any:
    """What the other side said, once it does; only processes of one trainer speak here.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


def main() -> None:
    """Serve rank 0, whose process id is the second argument; the first is the connection's file."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, for all; rank 0 ends this one
    from fedfms.trainer.__main__ import refuse_networks

    refuse_networks()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    try:
        _serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # rank 0 is gone, or wants no ranks any more
    except BaseException as error:
        _tell(connection, error)
        os._exit(1)
    os._exit(0)


def _tell(connection: Connection, error: BaseException) -> None:
    from fedfms.errors import FedfmsError
    from fedfms.training.device import explanation

    known = error if isinstance(error, FedfmsError) else None
    if known is None and isinstance(error, Exception):
        known = explanation(error)
    failed = Failed(traceback.format_exc(), "", "")
    if known is not None:
        failed = Failed(known.problem, known.fix, known.code)
    with contextlib.suppress(OSError):
        say(connection, failed)


def _serve(connection: Connection) -> None:
    import torch

    from fedfms.training.device import make_ready
    from fedfms.training.ranks import join

    start: Start = heard(connection)
    if start.threads is not None:
        torch.set_num_threads(start.threads)
    make_ready(start.device)
    say(connection, None)  # imported and ready to meet
    join(start.backend, start.store, start.rank, start.size, start.timeout_seconds)
    say(connection, None)  # and needs the file where they met no more
    helper = _Helper(connection, start)
    while True:
        helper.do(heard(connection))


class _Helper:
    """What a rank keeps between two requests."""

    def __init__(self, connection: Connection, start: Start) -> None:
        self._connection, self._start = connection, start
        self._round: Round | None = None
        self._model: Segmenter | None = None
        self._dataset: SliceDataset | None = None
        self._loader: Loader | None = None
        self._batches: Iterator[dict[str, Tensor] | None] = iter(())
        self._batch: dict[str, Tensor] | None = None
        self._step = -1  # that the batch is of
        self._micro_batch = sys.maxsize  # slices that fitted here

    def do(self, request: Any) -> None:
        """One request of rank 0."""
        if isinstance(request, Round):
            self._begin(request)
        else:
            assert isinstance(request, Gradient)
            self._give(request)

    def _begin(self, asked: Round) -> None:
        import torch

        from fedfms.models.build import build_model
        from fedfms.training.augment import Variation
        from fedfms.training.loader import Loader
        from fedfms.training.loop import ShuffledBatches, round_seed
        from fedfms.training.ranks import ShareOfBatches, frozen, spread, wait_for

        start, recipe = self._start, asked.recipe
        if self._model is None or self._round is None or recipe != self._round.recipe:
            self._model = None
            self._model = build_model(recipe, None).to(start.device)  # rank 0 fills it
            self._micro_batch = sys.maxsize
        if asked.dataset is not None:
            files = [recv_handle(self._connection) for _ in range(asked.kept_files)]
            self._dataset, self._loader = asked.dataset, None
            if files:
                self._dataset.share_kept(files)
        assert self._dataset is not None
        if self._loader is None:
            self._loader = Loader(self._dataset, recipe, asked.site, start.device)
        self._round = asked
        self._model.train()
        spread(frozen(self._model), wait_for)
        seed = round_seed(recipe, asked.number, asked.secret)
        torch.manual_seed(seed ^ start.rank)  # no other rank's, for a method that draws
        of_all = ShuffledBatches(len(self._dataset), recipe, asked.number, asked.secret)
        variation = Variation.of(self._dataset, recipe, asked.number, asked.secret)
        own = ShareOfBatches(of_all, start.rank, start.size)
        self._batches = self._loader.batches(own, variation)
        self._batch, self._step = None, -1

    def _give(self, asked: Gradient) -> None:
        from fedfms.training.ranks import learning, spread, sum_gradients, wait_for

        assert self._model is not None
        while self._step < asked.step:
            self._batch = next(self._batches)
            self._step += 1
        parameters = learning(self._model)
        spread(parameters, wait_for)
        loss = 0.0
        self._empty()
        if self._batch is not None:
            self._micro_batch = min(self._micro_batch, asked.micro_batch)
            loss = self._compute(self._batch, asked.over)
        say(self._connection, Done(loss))
        sum_gradients(parameters, wait_for)
        self._empty()

    def _compute(self, batch: dict[str, Tensor], over: float) -> float:
        """The gradient of this rank's share, by as many slices at once as memory allows."""
        from fedfms.control import Control
        from fedfms.training.device import halved, is_out_of_memory
        from fedfms.training.gradients import accumulate_gradients

        assert self._model is not None and self._round is not None
        recipe = self._round.recipe
        while True:
            try:
                return accumulate_gradients(
                    self._model, batch, recipe, self._micro_batch, Control(), over
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._empty()
            self._micro_batch = halved(self._micro_batch, "with a single slice in memory", "with")

    def _empty(self) -> None:
        assert self._model is not None
        self._model.zero_grad(set_to_none=True)
