"""Methods of other distributions, by entry points of one that is really installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distributions import install
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import ConfigError
from fedfms.models.build import build_model
from fedfms.models.methods import find_method, installed_methods
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_staying, read_travelling, write_travelling
from fedfms.report.words import method as words_of
from fedfms.training.loop import accumulate_gradients, train_step

LITTLE = Path(__file__).parent / "little_methods"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("little")
    install(LITTLE, folder / "packages", folder)
    return folder / "packages"


@pytest.fixture
def little(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(packages))


@pytest.fixture
def tiny(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(method="tiny").with_values({"backbone": "none", "image_size": 16}, "test")


def test_there_are_fedsam_fedmsa_and_lora_and_the_laboratorys_unet():
    assert installed_methods() == ("fedmsa", "fedsam", "lora", "unet")
    titles = [find_method(name).title for name in installed_methods()]
    assert titles == ["FedMSA", "FedSAM", "LoRA", "U-Net"]


def test_an_unknown_method_is_told_with_what_is_installed_and_what_was_meant(make_recipe):
    with pytest.raises(ConfigError, match="no method 'fedmas' here; installed: fedmsa, ") as e:
        build_model(make_recipe(method="fedmas"), None)
    assert e.value.fix.startswith("did you mean fedmsa?")
    assert e.value.code == "unknown-part"
    with pytest.raises(ConfigError) as e:
        find_method("x9")
    assert e.value.fix == "install the package that brings x9 at the server and every site"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "ImportError: No module named 'frobnicate'"),
        ("misnamed", "little_methods:Tiny calls itself 'tiny'"),
        ("no-method", "little_methods:TinyNetwork is no class of fedfms.models.methods.method"),
    ],
)
def test_a_broken_method_is_one_error_that_names_its_distribution(little, name: str, why: str):
    with pytest.raises(ConfigError) as e:
        find_method(name)
    assert e.value.problem.startswith(
        f"the method {name} of little-methods 0.3 cannot be used: {why}"
    )
    assert e.value.code == "broken-part"


def test_a_broken_method_is_in_nobodys_way_and_none_takes_the_place_of_ours(little):
    everyone = ("broken", "fedmsa", "fedsam", "lora", "misnamed", "no-method", "tiny", "unet")
    assert installed_methods() == everyone
    assert find_method("fedsam").title == "FedSAM"
    assert find_method("tiny").title == "Tiny"


def test_two_distributions_with_one_name_are_both_named(little, tmp_path: Path, monkeypatch):
    text = (LITTLE / "pyproject.toml").read_text().replace("little-methods", "other-methods")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "pyproject.toml").write_text(text)
    for name in ("little_methods.py", "little_broken.py"):
        (tmp_path / "copy" / name).write_text((LITTLE / name).read_text())
    (tmp_path / "scratch").mkdir()
    install(tmp_path / "copy", tmp_path / "packages", tmp_path / "scratch")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(ConfigError, match=r"little-methods 0\.3 and other-methods 0\.3") as e:
        find_method("tiny")
    assert e.value.code == "ambiguous-part"


def test_a_network_of_its_own_needs_no_checkpoint_and_is_alike_everywhere(little, tiny: Recipe):
    assert find_checkpoint(tiny, None) is None
    first = build_model(tiny, None)
    torch.rand(3)
    second = build_model(tiny, None)
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    assert first(torch.zeros(2, 3, 16, 16)).shape == (2, 1, tiny.mask_size, tiny.mask_size)


def test_what_stays_at_the_site_learns_and_does_not_travel(little, tiny: Recipe):
    model = build_model(tiny, None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(read_travelling(model)) == [
        "features.bias",
        "features.weight",
        "head.bias",
        "head.weight",
    ]
    assert list(read_staying(model)) == ["norm.bias", "norm.weight"]
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    write_travelling(model, {name: t + 1 for name, t in read_travelling(model).items()})
    assert read_staying(model)["norm.weight"].tolist() == [3.0] * 4


def test_a_step_of_its_own_is_the_step_that_is_made(little, tiny: Recipe):
    """FedProx: w - lr (g + pull (w - received))."""
    model = build_model(tiny, None).train()
    make_step = find_method("tiny").start_round(model, tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {
        "image": torch.randn(4, 3, 16, 16),
        "target": (torch.rand(4, 1, 16, 16) > 0.5).float(),
        "annotated": torch.ones(4, 1),
    }
    accumulate_gradients(model, batch, tiny, 4, Control())
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    train_step(model, optimizer, batch, tiny, 4, Control(), make_step)
    for name, parameter in model.named_parameters():
        expected = before[name] - 0.25 * (gradient[name] + 0.5 * 0.1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_a_method_and_a_backbone_that_do_not_go_together_are_refused(little, make_recipe):
    with pytest.raises(ConfigError, match="fedmsa starts from SAM, and the recipe's back"):
        build_model(make_recipe().with_values({"backbone": "none"}, "test"), None)
    with pytest.raises(ConfigError, match="tiny has a network of its own") as e:
        build_model(make_recipe(method="tiny"), None)
    assert e.value.fix == "set backbone to none"


def test_a_report_has_a_methods_own_words_and_only_its_name_where_it_is_not_installed(little):
    assert words_of("tiny")[1] == "two layers train and travel; the normalization stays at the site"
    assert words_of("from-elsewhere") == ("from-elsewhere", "")
