"""Adam as torch has it, without the import of torch's compiler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_add_param_group: Callable[..., None] = inspect.unwrap(torch.optim.Adam.add_param_group)
_zero_grad: Callable[..., None] = inspect.unwrap(torch.optim.Adam.zero_grad)
_step: Callable[..., Any] = inspect.unwrap(torch.optim.Adam.step)


class Adam(torch.optim.Adam):
    """torch.optim.Adam, step for step; Kingma and Ba 2015, arXiv 1412.6980.

    What torch wraps around these three methods is for torch.compile alone, and imports
    torch._dynamo: 1.3 processor seconds and 60 MB in each trainer. Of an optimizer whose step is to
    be differentiated or compiled, torch's own class is the right one.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        _add_param_group(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        _zero_grad(self, set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See torch.optim.Adam."""
        with torch.no_grad():
            return _step(self, closure)
