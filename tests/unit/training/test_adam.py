from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fedfms.training.adam import Adam


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 3))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Five steps on random numbers."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(8, 20, generator=random)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_it_steps_as_that_of_torch_to_the_last_bit_also_from_a_kept_state(fused: bool) -> None:
    ours, theirs = network(), network()
    own = Adam(ours.parameters(), lr=1e-2, fused=fused)
    known = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=fused)
    learn(ours, own, seed=2)
    learn(theirs, known, seed=2)
    again = Adam(ours.parameters(), lr=1e-2, fused=fused)
    again.load_state_dict(own.state_dict())
    learn(ours, again, seed=3)
    learn(theirs, known, seed=3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(ours.parameters()), next(network().parameters()))


def test_a_training_process_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from fedfms.training.adam import Adam
model = torch.nn.Linear(3, 2)
optimizer = Adam(model.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad(set_to_none=True)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
assert "torch._dynamo" not in sys.modules
optimizer.state_dict()  # as it is kept between rounds: torch's own, with all that it imports
"""
    subprocess.run([sys.executable, "-c", code], check=True)
