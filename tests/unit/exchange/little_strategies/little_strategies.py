"""Strategies of another distribution: one with a memory, one in two passes, one that is wrong."""

from statistics import median
from typing import ClassVar

from fedfms.exchange.averaging import averaging_weights
from fedfms.exchange.strategies import Strategy
from fedfms.exchange.tensors import update_norm

MOMENTUM = 0.9


class Sums(Strategy):
    """The weighted sum as differences come, one fp64 copy whatever the number of sites."""

    def begin(self, round_number, slices):
        weights = averaging_weights(self.recipe, slices)
        self.shares = {site: weight / sum(weights.values()) for site, weight in weights.items()}
        self.total = {}

    def add(self, site, tensors, pass_number):
        for name, tensor in tensors.items():
            part = tensor.double() * self.shares[site]
            self.total[name] = self.total[name] + part if name in self.total else part

    def finish(self):
        return {name: self.total[name].float() for name in sorted(self.total)}


class FedAvgM(Sums):
    """Server momentum (Hsu et al. 2019, arXiv 1909.06335)."""

    name: ClassVar[str] = "fedavgm"

    def __init__(self, recipe):
        super().__init__(recipe)
        self.velocity = {}

    def finish(self):
        for name, mean in self.total.items():
            self.velocity[name] = MOMENTUM * self.velocity.get(name, 0) + mean
        return {name: self.velocity[name].float() for name in sorted(self.velocity)}

    def state_dict(self):
        return dict(self.velocity)

    def load_state_dict(self, state):
        self.velocity = dict(state)


class Bounded(Sums):
    """No site's difference longer than the median of all: looked at first, summed then."""

    name: ClassVar[str] = "bounded"
    passes: ClassVar[int] = 2

    def begin(self, round_number, slices):
        super().begin(round_number, slices)
        self.norms = {}

    def add(self, site, tensors, pass_number):
        if pass_number == 0:
            self.norms[site] = update_norm(tensors)
            return
        scale = min(1.0, median(self.norms.values()) / self.norms[site])
        super().add(site, {name: tensor * scale for name, tensor in tensors.items()}, 1)


class Wrong(Sums):
    name: ClassVar[str] = "wrong"

    def finish(self):
        return {name: value for name, value in super().finish().items() if name != "b"}
