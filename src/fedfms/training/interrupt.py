"""Stopping inside one long step: SAM at 1024 pixels takes many seconds a step without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from fedfms.control import Control

T = TypeVar("T")


@contextmanager
def interruptible(model: nn.Module, control: Control) -> Iterator[None]:
    """Within this context every module of the model asks `control` whether to go on.

    In the forward pass before each module runs; in the backward pass when the gradient of each
    module's output is known. The longest wait is then one layer, not one step. Each such question
    is also a sign of life. Values and gradients are untouched; the hooks end with the context.

    Raises:
        TaskAborted: out of the model's forward or backward pass, after `control.abort()`.
    """

    def before_forward(module: nn.Module, inputs: Any) -> None:
        control.check()

    def on_gradient(gradient: Tensor) -> None:
        control.check()

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before_forward))
            handles.append(module.register_forward_hook(after_forward))
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_turn(work: Iterable[Callable[[], T]], control: Control, *, beside: bool) -> Iterator[T]:
    """Call long functions that never look up, one at a time, and ask `control` meanwhile.

    Each runs in a thread that keeps no process alive; after an abort it is left to end by itself.

    Args:
        work: the functions; what makes the next one is called in this thread.
        beside: it is made while the one before it runs, and not after.

    Yields:
        what each gives, in their order.

    Raises:
        TaskAborted: after `control.abort()`; and whatever a function raises.
    """
    running: Future[T] | None = None
    for function in work:
        if running is not None:
            yield _result(running, control)
        running = started(function)
        if not beside:
            yield _result(running, control)
            running = None
    if running is not None:
        yield _result(running, control)


def started(function: Callable[[], T]) -> Future[T]:
    """Begin a function in a thread of its own, which keeps no process alive."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _result(future: Future[T], control: Control) -> T:
    while not wait([future], timeout=0.5).done:
        control.check()
    return future.result()
