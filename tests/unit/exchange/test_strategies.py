"""What the server makes of a round's differences, against numpy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distributions import install
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, FederationError
from fedfms.exchange.averaging import average, averaging_weights
from fedfms.exchange.strategies import GROUP, combine, find_strategy
from fedfms.exchange.strategies.mean import Mean
from fedfms.plugins import installed
from memory_peak import GIVES_BACK

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256="0" * 64,
    classes=("blob",),
    rounds=3,
    holdout=("site-9",),
)
SLICES = {"site-1": 10, "site-2": 4, "site-3": 7, "site-9": 0}
SHARES = {"site-1": 10 / 21, "site-2": 4 / 21, "site-3": 7 / 21}


def differences(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Of three sites, the third three times as long; the holdout has none."""
    random = torch.Generator().manual_seed(seed)
    length = {"site-1": 1, "site-2": 1, "site-3": 3}
    of_sites = {
        site: {name: torch.randn(5, generator=random) * times for name in "ab"}
        for site, times in length.items()
    }
    return {"site-9": {}, **dict(reversed(of_sites.items()))}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("little")
    install(Path(__file__).parent / "little_strategies", folder / "packages", folder)
    return folder / "packages"


@pytest.fixture
def little(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(packages))


def asked(name: str) -> Recipe:
    return dataclasses.replace(RECIPE, strategy=name)


@pytest.mark.parametrize("paper_compat", [False, True])
def test_the_mean_is_the_average_bit_for_bit(paper_compat: bool) -> None:
    recipe = dataclasses.replace(RECIPE, paper_compat=paper_compat)
    strategy = find_strategy(recipe)
    for number in range(2):
        given = differences(number)
        got = combine(strategy, number, SLICES, given)
        expected = average(given, averaging_weights(recipe, SLICES))
        assert list(got) == ["a", "b"]
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert strategy.state_dict() == {}


def test_a_round_without_training_sites_adds_nothing() -> None:
    assert combine(find_strategy(RECIPE), 0, {"site-9": 0}, {"site-9": {}}) == {}


def test_a_strategy_with_a_memory_goes_on_from_round_to_round_and_from_its_state(little) -> None:
    """Server momentum: v = 0.9 v + mean."""
    strategy = find_strategy(asked("fedavgm"))
    velocity = {name: np.zeros(5) for name in "ab"}
    for number in range(3):
        given = differences(number)
        if number == 2:  # as after a restart
            state, strategy = strategy.state_dict(), find_strategy(asked("fedavgm"))
            strategy.load_state_dict(state)
        got = combine(strategy, number, SLICES, given)
        for name in "ab":
            mean = sum(share * given[site][name].numpy() for site, share in SHARES.items())
            velocity[name] = 0.9 * velocity[name] + mean
            np.testing.assert_allclose(got[name].numpy(), velocity[name], rtol=0, atol=1e-6)


def optimized(name: str, mean: np.ndarray, state: dict[str, np.ndarray], recipe: Recipe):
    """Reddi et al. 2021, Algorithm 2, as written, in fp64."""
    beta, beta_2 = recipe.server_momentum, recipe.server_second_momentum
    rate, tau = recipe.server_learning_rate, recipe.server_epsilon
    if name == "server_momentum":
        state["v"] = beta * state.get("v", 0) + mean
        return rate * state["v"]
    state["m"] = beta * state.get("m", 0) + (1 - beta) * mean
    state["v"] = beta_2 * state.get("v", tau**2) + (1 - beta_2) * mean**2
    return rate * state["m"] / (np.sqrt(state["v"]) + tau)


@pytest.mark.parametrize("name", ["server_momentum", "server_adam"])
def test_a_server_optimizer_is_that_of_the_paper_and_goes_on_from_its_state(name: str) -> None:
    recipe = dataclasses.replace(
        asked(name), server_learning_rate=0.3, server_momentum=0.8, server_epsilon=0.01
    )
    strategy, by_mean = find_strategy(recipe), find_strategy(recipe)
    undisturbed = find_strategy(recipe)
    states: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    for number in range(4):
        given = differences(number)
        if number == 2:  # as after a restart
            state, strategy = strategy.state_dict(), find_strategy(recipe)
            strategy.load_state_dict(state)
        got = combine(strategy, number, SLICES, given)
        assert all(
            torch.equal(one, got[tensor])
            for tensor, one in combine(undisturbed, number, SLICES, given).items()
        )
        mean = average(given, averaging_weights(recipe, SLICES))
        of_the_mean = by_mean.change(mean)  # as of a secure sum
        for tensor in "ab":
            expected = optimized(name, mean[tensor].numpy().astype(float), states[tensor], recipe)
            np.testing.assert_allclose(got[tensor].numpy(), expected, rtol=2e-5, atol=1e-7)
            assert torch.equal(of_the_mean[tensor], got[tensor])


@pytest.mark.parametrize("name", ["server_momentum", "server_adam"])
def test_a_tensor_that_no_site_moved_stays_whatever_is_remembered_of_it(name: str) -> None:
    strategy = find_strategy(asked(name))
    combine(strategy, 0, SLICES, differences(0))
    still = differences(1)
    for tensors in still.values():
        if tensors:
            tensors["b"] = torch.zeros(5)
    got = combine(strategy, 1, SLICES, still)
    assert not got["b"].any() and got["a"].all()


def test_a_state_of_another_strategy_is_no_state() -> None:
    momentum, adam = (find_strategy(asked(name)) for name in ("server_momentum", "server_adam"))
    combine(momentum, 0, SLICES, differences(0))
    with pytest.raises(ValueError, match="server_adam keeps first and second, and got velocity/a"):
        adam.load_state_dict(momentum.state_dict())


def test_a_strategy_in_two_passes_sees_every_difference_before_it_sums(little) -> None:
    given = differences(4)
    got = combine(find_strategy(asked("bounded")), 0, SLICES, given)
    flat = {s: np.concatenate([given[s][n].numpy() for n in "ab"]) for s in SHARES}
    norms = {site: np.linalg.norm(values) for site, values in flat.items()}
    bound = np.median(list(norms.values()))
    assert norms["site-3"] > bound
    expected = sum(SHARES[s] * flat[s] * min(1.0, bound / norms[s]) for s in SHARES)
    together = np.concatenate([got[name].numpy() for name in "ab"])
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6)


def test_a_strategy_that_loses_a_tensor_ends_the_round_with_its_name(little) -> None:
    with pytest.raises(FederationError, match=r"strategy wrong .* b is missing") as caught:
        combine(find_strategy(asked("wrong")), 0, SLICES, differences(0))
    assert caught.value.code == "bad-strategy"


def test_an_unknown_strategy_is_told_with_what_is_installed(little) -> None:
    assert installed(GROUP, {"mean": Mean}) == ("bounded", "fedavgm", "mean", "wrong")
    with pytest.raises(ConfigError, match="no strategy 'fedavg' here; inst") as caught:
        find_strategy(asked("fedavg"))
    assert caught.value.fix.startswith("did you mean fedavgm?")


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 11])
def test_the_middle_of_each_value_is_that_of_numpy(
    name: str, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfms.exchange.strategies.robust._BLOCK_BYTES", 4 * sites * 3)  # 3 values
    random = torch.Generator().manual_seed(sites)
    given = {
        f"site-{number}": {"a": torch.randn(2, 4, generator=random), "b": torch.tensor(1.0)}
        for number in range(1, sites + 1)
    }
    slices = {site: 7 * number + 1 for number, site in enumerate(given)}
    got = combine(find_strategy(asked(name)), 0, slices, given)
    values = np.sort(np.stack([given[site]["a"].numpy().astype(float) for site in given]), axis=0)
    cut = {"median": (sites - 1) // 2, "trimmed_mean": max(1, sites // 5) if sites > 2 else 0}[name]
    expected = values[cut : sites - cut].mean(axis=0)
    np.testing.assert_allclose(got["a"].numpy(), expected, rtol=1e-6, atol=1e-7)
    if name == "median":
        np.testing.assert_allclose(expected, np.median(values, axis=0))
    assert float(got["b"]) == 1.0
    backwards = combine(find_strategy(asked(name)), 0, slices, dict(reversed(given.items())))
    assert torch.equal(backwards["a"], got["a"])


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_one_of_five_cannot_carry_a_robust_mean_beyond_the_others(name: str) -> None:
    random = torch.Generator().manual_seed(2)
    others = {f"site-{n}": {"a": torch.randn(500, generator=random)} for n in range(1, 5)}
    for bad in (1e6, -50.0, 60.0):
        given = {**others, "site-5": {"a": torch.full((500,), bad)}}
        got = combine(find_strategy(asked(name)), 0, dict.fromkeys(given, 9), given)["a"]
        values = torch.stack([of["a"] for of in others.values()])
        assert bool(((values.amin(dim=0) <= got) & (got <= values.amax(dim=0))).all())


_MEMORY = """
import sys, tempfile, torch
from pathlib import Path
from fedfms.contracts.recipe import Recipe
from fedfms.exchange.strategies import combine, find_strategy
from fedfms.exchange.waiting import WaitingRoom
from memory_peak import forget_peak, peak
sites, values = int(sys.argv[1]), int(sys.argv[2])
recipe = Recipe(method="fedmsa", backbone="vit_demo", backbone_sha256="a" * 64,
                classes=("disc",), rounds=1, strategy="median")
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    room = WaitingRoom(Path(folder) / "waiting")
    given = {f"site-{number:02d}": room.put({"a": torch.full((values,), float(number))})
             for number in range(1, sites + 1)}
    before = forget_peak()
    result = combine(find_strategy(recipe), 0, dict.fromkeys(given, 1), given)
    assert float(result["a"][-1]) == (sites + 1) / 2
    print(peak() - before)
"""


def test_a_median_of_forty_contributions_takes_the_memory_of_one_of_two() -> None:
    """Beside the result, blocks of a bounded size; forty differences would be 20 times two."""
    values = 6_000_000
    taken = []
    for sites in (2, 40):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(sites), str(values)],
            env={**os.environ, **GIVES_BACK, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append(int(done.stdout))
    two, forty = taken
    model = 4 * values
    assert two > model  # the result alone
    assert forty < 1.2 * two + model / 4, taken
    assert forty < 40 * model / 5
