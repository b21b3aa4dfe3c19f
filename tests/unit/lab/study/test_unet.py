"""The laboratory's U-Net: one more method of the registry, with a network of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedfms.contracts.recipe import Recipe, read_job_recipe
from fedfms.errors import ConfigError
from fedfms.exchange.tensors import save_tensors
from fedfms.export.run import export_model
from fedfms.models.build import build_model
from fedfms.models.methods import find_method
from fedfms.models.sam import find_checkpoint
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_travelling, travelling_names
from fedfms.shipped import JOBS
from fedfms_lab.study.ensemble import Ensemble


@pytest.fixture
def recipe() -> Recipe:
    own = read_job_recipe(JOBS / "unet")
    return own.with_values({"image_size": 32, "classes": ["disc", "cup"], "seed": 3}, "test")


def test_all_that_it_is_travels_and_every_machine_draws_the_same(recipe):
    model = build_model(recipe, find_checkpoint(recipe, None))
    assert set(travelling_names(model)) == {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == set(travelling_names(model))  # no statistics beside them
    assert sum(parameter.numel() for parameter in model.parameters()) < 600_000
    torch.manual_seed(99)
    again = read_travelling(build_model(recipe, None))
    own = read_travelling(model)
    assert all(torch.equal(again[name], own[name]) for name in own)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2, 32, 32)


def test_it_learns_a_bright_square(recipe):
    model = build_model(recipe, None).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(4, 3, 32, 32, generator=generator)
    target = torch.zeros(4, 2, 32, 32)
    for number in range(4):
        target[number, 0, 4 * number : 4 * number + 12, 8:24] = 1.0
    images += target[:, :1]
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(images), target)
        loss.backward()
        optimizer.step()
    found = model.eval()(images)[:, 0] > 0
    drawn = target[:, 0].bool()
    assert 2 * (found & drawn).sum() / (found.sum() + drawn.sum()) > 0.9


@pytest.mark.parametrize("size", [16, 40])
def test_a_size_that_its_levels_do_not_divide_is_refused(recipe, size):
    with pytest.raises(ConfigError, match="use a multiple of 16 pixels, 32 or more"):
        build_model(recipe.with_values({"image_size": size}, "test"), None)


def test_it_starts_from_no_sam(recipe):
    with pytest.raises(ConfigError, match="set backbone to none") as caught:
        build_model(recipe.with_values({"backbone": "vit_demo"}, "test"), None)
    assert caught.value.code == "method-and-backbone"


def test_its_exports_are_those_that_fit_it(recipe, tmp_path):
    model = build_model(recipe, None)
    save_tensors(tmp_path / "global_model.safetensors", read_travelling(model), "fp32")
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    with pytest.raises(ConfigError, match="a U-Net model cannot be exported as sam") as caught:
        export_model(tmp_path, tmp_path / "out" / "unet.pth", "sam")
    assert "export it with --as" in caught.value.fix
    assert find_method("unet").exports == ("fedfms", "onnx", "bundle")
    export_model(tmp_path, tmp_path / "out" / "unet.safetensors", "fedfms")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        whole = load_trained(tmp_path / "out" / "unet.safetensors", None).model
        assert torch.equal(whole(images), model.eval()(images))


def test_an_ensemble_says_the_mean_of_its_members_probabilities(recipe):
    members = [
        build_model(recipe.with_values({"seed": seed}, "test"), None).eval() for seed in (1, 2, 3)
    ]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        said = torch.sigmoid(Ensemble(members)(images))
        mean = sum(torch.sigmoid(member(images)) for member in members) / 3
    torch.testing.assert_close(said, mean, rtol=1e-5, atol=2e-6)
    certain = Ensemble([Constant(), Constant()])(images)
    assert bool(certain.isfinite().all()) and bool((certain < -10).all())


class Constant(torch.nn.Module):
    """A network that is certain that there is nothing."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images[:, :1], -1e4)
