"""A run's scores to FLARE's own receivers, TensorBoard and MLflow, where the server asks for them.

What they get is what records hold: what sites let out. They work in a thread of their own behind a
bounded queue: a tracking server that does not answer costs points of a curve, and never a round.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import EventScope, FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.widgets.streaming import ANALYTIC_EVENT_TYPE, create_analytic_dxo

from fedfms.contracts.machine import Machine
from fedfms.records.schema import ContributionRecord, EvaluationRecord, Record
from fedfms.records.scores import over_classes

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # values that a receiver has not taken yet; more are dropped
END_SECONDS = 5.0  # for the last ones, at the end of a run

# by the word in FEDFMS_TRACKING: FLARE's class, and what it needs that the image does not hold
RECEIVERS: Mapping[str, tuple[str, str]] = {
    "tensorboard": (
        "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver",
        "pip install tensorboard",
    ),
    "mlflow": (
        "nvflare.app_opt.tracking.mlflow.mlflow_receiver.MLflowReceiver",
        "pip install mlflow",
    ),
}


class Tracking:
    """Hands values to receivers; what fails is a line in the log."""

    def __init__(self, receivers: list[Any], engine: Any) -> None:
        self._receivers = receivers
        self._engine = engine
        self._waiting: queue.Queue[tuple[str, str, float, int] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._hand_on, name="tracking", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """The numbers in a record, if it has any; returns at once."""
        for value in values_of(record):
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(value)

    def end(self) -> None:
        """Wait a little for what has not been taken yet."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(END_SECONDS)

    def _hand_on(self) -> None:
        self._fire(EventType.START_RUN)
        while (value := self._waiting.get()) is not None:
            self._fire(f"fed.{ANALYTIC_EVENT_TYPE}", value)
        self._fire(EventType.END_RUN)

    def _fire(self, event: str, value: tuple[str, str, float, int] | None = None) -> None:
        for receiver in self._receivers:
            try:
                with self._engine.new_context() as fl_ctx:
                    if value is not None:
                        _put(fl_ctx, *value)
                    receiver.handle_event(event, fl_ctx)
            except Exception as error:
                log.warning("a value could not be tracked: %s", error)


def start_tracking(fl_ctx: FLContext) -> Tracking | None:
    """What FEDFMS_TRACKING names, such as tensorboard or tensorboard,mlflow; None without it.

    Raises nothing: a run goes on without curves elsewhere.
    """
    try:
        here = Machine.from_environment()
        made = [one for name in here.tracking if (one := _receiver(name, here.mlflow)) is not None]
        return Tracking(made, fl_ctx.get_engine()) if made else None
    except Exception as error:
        log.error("nothing is tracked: %s", error)
        return None


def values_of(record: Record) -> Iterator[tuple[str, str, float, int]]:
    """(site, name, value, round) of each number that is worth a curve."""
    if isinstance(record, ContributionRecord) and record.accepted and record.said is not None:
        said, number, prefix = record.said, record.round, ""
        yield from (
            (record.site, name, float(value), number)
            for name, value in (
                ("loss", said.loss),
                ("update_norm", said.update_norm),
                ("bytes_down", record.bytes_down),
                ("bytes_up", record.bytes_up),
                *((f"seconds_{phase}", seconds) for phase, seconds in said.seconds.items()),
            )
            if value is not None
        )
    elif isinstance(record, EvaluationRecord) and record.said is not None:
        said, number, prefix = record.said, record.said.round, f"{record.model}_"
    else:
        return
    for name in ("dice", "iou", "hd95"):
        if (value := over_classes(said.metrics, name)) is not None:
            yield record.site, prefix + name, value, number


def _receiver(name: str, mlflow: str | None) -> Any:
    path, install = RECEIVERS[name]
    module, _, kind = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        log.error(
            "FEDFMS_TRACKING asks for %s, which is not installed here (%s); fix: an image with %s",
            name,
            error,
            install,
        )
        return None
    return made(tracking_uri=mlflow) if name == "mlflow" else made()


def _put(fl_ctx: FLContext, site: str, name: str, value: float, number: int) -> None:
    """As if the site had sent it by FLARE's own events."""
    dxo = create_analytic_dxo(
        tag=name, value=value, data_type=AnalyticsDataType.SCALAR, global_step=number
    )
    shareable = dxo.to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    put = fl_ctx.set_prop
    put(FLContextKey.EVENT_DATA, shareable, private=True, sticky=False)
    put(FLContextKey.EVENT_SCOPE, EventScope.FEDERATION, private=True, sticky=False)
