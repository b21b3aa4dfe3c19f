"""Optimizers at the server: the mean difference of a round in the place of a gradient.

Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2, with server momentum as in Hsu et al. 2019 (arXiv
1909.06335). They ask for the mean alone, so that they work on a secure sum too. What they remember
lives in the run's state, in fp32; each value is computed by itself, so that a server that starts
again, on however many threads, comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.strategies.mean import Mean

_BETWEEN = "/"  # name of a memory / name of a tensor, in a state


class _Remembering(Mean):
    """A mean, and what is made of it with memories that have its names and shapes."""

    memories: ClassVar[tuple[str, ...]]
    usual_rate: ClassVar[float]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        rate = recipe.server_learning_rate
        self._rate = self.usual_rate if rate is None else rate
        self._of: dict[str, dict[str, Tensor]] = {memory: {} for memory in self.memories}

    def step(self, name: str, mean: Tensor) -> Tensor:
        """What to add to one tensor; its memories move on."""
        raise NotImplementedError

    def change(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's step.

        A tensor whose mean is zero throughout is one that no site moved, and stays as it is.
        """
        return {
            name: self.step(name, mean[name])
            if bool(mean[name].any())
            else torch.zeros_like(mean[name])
            for name in sorted(mean)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Every memory of every tensor."""
        return {
            f"{memory}{_BETWEEN}{name}": tensor
            for memory, tensors in self._of.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self._of = {memory: {} for memory in self.memories}
        for key, tensor in state.items():
            memory, _, name = key.partition(_BETWEEN)
            if memory not in self._of:
                raise ValueError(f"{self.name} keeps {' and '.join(self.memories)}, and got {key}")
            self._of[memory][name] = tensor.clone()


class ServerMomentum(_Remembering):
    """FedAvgM: with d the mean difference, v = beta v + d, and the model moves by rate * v."""

    name: ClassVar[str] = "server_momentum"
    memories: ClassVar[tuple[str, ...]] = ("velocity",)
    usual_rate: ClassVar[float] = 1.0

    def step(self, name: str, mean: Tensor) -> Tensor:
        """The velocity times the rate."""
        before = self._of["velocity"].get(name)
        velocity = mean.clone()
        if before is not None:
            velocity.add_(before, alpha=self.recipe.server_momentum)
        self._of["velocity"][name] = velocity
        return velocity * self._rate


class ServerAdam(_Remembering):
    """FedAdam: m = b1 m + (1 - b1) d and v = b2 v + (1 - b2) d^2; rate * m / (sqrt(v) + tau).

    As in the paper without a correction of the first rounds' bias, m from 0 and v from tau^2.
    """

    name: ClassVar[str] = "server_adam"
    memories: ClassVar[tuple[str, ...]] = ("first", "second")
    usual_rate: ClassVar[float] = 1e-3

    def step(self, name: str, mean: Tensor) -> Tensor:
        """Of each value the first moment over the root of the second."""
        recipe, tau = self.recipe, self.recipe.server_epsilon
        first, second = self._of["first"].get(name), self._of["second"].get(name)
        if first is None or second is None:
            first, second = torch.zeros_like(mean), torch.full_like(mean, tau**2)
        beta, beta_2 = recipe.server_momentum, recipe.server_second_momentum
        first = first * beta + mean * (1 - beta)
        second = second * beta_2 + mean * mean * (1 - beta_2)
        self._of["first"][name], self._of["second"][name] = first, second
        return first / (second.sqrt() + tau) * self._rate
