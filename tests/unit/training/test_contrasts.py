"""Networks that see several contrasts: the same as of colours, trained, exported, used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Setup, SiteConfig
from fedfms.control import Control
from fedfms.data.prepared import PreparedImage
from fedfms.errors import ConfigError
from fedfms.exchange.tensors import save_tensors
from fedfms.export.facts import input_facts
from fedfms.export.run import export_model
from fedfms.geometry import network_input, pixel_statistics
from fedfms.models.build import build_model
from fedfms.models.trained import load_trained
from fedfms.models.travelling import travelling_names
from fedfms.predict.find import find_items
from fedfms.predict.run import predict_items
from fedfms.training.pooled import train_pooled

CONTRASTS = ("t1", "t1ce", "t2", "flair")
SHAPE = (24, 20, 3)


def recipe(**changes: object) -> Recipe:
    values = {
        "method": "fedmsa",
        "backbone": "vit_demo",
        "backbone_sha256": BACKBONES["vit_demo"].sha256,
        "classes": ("tumour",),
        "rounds": 1,
        "image_size": 64,
        "contrasts": CONTRASTS,
    }
    return Recipe(**{**values, **changes})


def fets(root: Path, cases: int = 10, missing: int = 3) -> None:
    """A folder a subject; what shows the tumour is t1ce alone, which one case in ten lacks."""
    for n in range(cases):
        random = np.random.default_rng(n)
        label = np.zeros(SHAPE, np.uint8)
        row, column = random.integers(2, 12, 2)
        label[row : row + 8, column : column + 6] = 1
        (root / f"s{n}").mkdir(parents=True)
        for name in CONTRASTS:
            values = random.normal(100, 10, SHAPE) + (60 * label if name == "t1ce" else 0)
            if not (name == "t1ce" and n == missing):
                image = nibabel.Nifti1Image(values.astype(np.float32), np.eye(4))
                nibabel.save(image, root / f"s{n}" / f"s{n}_{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), root / f"s{n}" / f"s{n}_seg.nii.gz")


def site_of(root: Path) -> SiteConfig:
    globs = {name: f"*/*_{name}.nii.gz" for name in CONTRASTS}
    return SiteConfig(
        data_root=root,
        format="nifti",
        images=globs["t1"],
        contrasts=globs,
        missing_contrast="mean",
        labels="*/*_seg.nii.gz",
        classes={"tumour": (1,)},
        device="cpu",
    )


def test_three_contrasts_give_what_three_colours_give(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (1, 30, 40, 3)).astype(np.uint8)
    image = PreparedImage(levels, (1.0, 1.0, 1.0), False)
    names = ("a", "b", "c")
    site = dataclasses.replace(
        site_of(tmp_path), contrasts={n: f"{n}*" for n in names}, images="a*"
    )
    ours, plain = (recipe(contrasts=contrasts, normalize=False) for contrasts in (names, ()))
    several = network_input(image, 0, site, ours)
    colours = network_input(image, 0, Setup(format="image", channels="rgb"), plain)
    assert torch.equal(several, colours)
    with torch.inference_mode():
        got, expected = (build_model(one, None).eval()(several[None]) for one in (ours, plain))
    assert torch.equal(got, expected)


def test_the_mixture_is_all_that_travels_more_and_begins_as_a_share_out():
    several, one = build_model(recipe(), None), build_model(recipe(contrasts=()), None)
    assert set(travelling_names(several)) - set(travelling_names(one)) == {"contrast_mix.weight"}
    mixed = several.contrast_mix(torch.eye(4)[None, :, :, None])[0, :, :, 0]
    assert mixed.tolist() == [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert several.frozen_blocks is None
    frozen = recipe(adapter_blocks="last:1")
    assert build_model(frozen, None).frozen_blocks is None  # it learns before all blocks
    assert len(pixel_statistics(recipe())[0]) == 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Data, a trained model, and its Dice."""
    folder = tmp_path_factory.mktemp("contrasts")
    root = folder / "data"
    fets(root)
    scores = []
    chosen = recipe(rounds=3, local_epochs=2, learning_rate=2e-3)
    tensors = train_pooled(
        chosen,
        {"site": site_of(root)},
        checkpoints=None,
        control=Control(),
        on_round=lambda one: scores.append(one.metrics["site"][0].mean),
    )
    save_tensors(folder / "model.safetensors", tensors, "fp32")
    (folder / "recipe.json").write_text(chosen.to_json())
    assert not torch.equal(
        tensors["contrast_mix.weight"], build_model(chosen, None).contrast_mix.weight
    )
    return root, folder / "model.safetensors", scores[-1]


def test_four_contrasts_of_which_a_case_lacks_one_are_learnt_and_predicted(trained, tmp_path):
    root, file, dice = trained
    assert dice > 0.6  # t1ce alone shows it
    model = load_trained(file, None)
    site = site_of(root).part(Setup)
    items = find_items(root, tmp_path / "out", model.recipe, contrasts=site.contrasts)
    assert len(items) == 10
    assert [item.contrasts.count(None) for item in items].count(1) == 1
    done = list(predict_items(model, items, site))
    assert [one.error for one in done] == [None] * 10
    scores = []
    for n in (0, 1, 2):
        truth = np.asarray(nibabel.load(root / f"s{n}" / f"s{n}_seg.nii.gz").dataobj) > 0
        got = np.asarray(nibabel.load(tmp_path / "out" / f"s{n}" / f"s{n}_t1.nii.gz").dataobj) > 0
        scores.append(2 * (truth & got).sum() / (truth.sum() + got.sum()))
    assert np.mean(scores) > 0.6
    refusing = dataclasses.replace(site, missing_contrast="refuse")
    lacking = [item for item in items if None in item.contrasts]
    (one,) = predict_items(model, lacking, refusing, overwrite=True)
    assert one.error is not None and one.error.code == "missing-contrast"


def test_without_a_site_the_names_are_those_of_nnunet(trained, tmp_path):
    root, file, _ = trained
    model = load_trained(file, None)
    (tmp_path / "in").mkdir()
    for number, name in enumerate(CONTRASTS):
        source = root / "s1" / f"s1_{name}.nii.gz"
        (tmp_path / "in" / f"case_{number:04d}.nii.gz").write_bytes(source.read_bytes())
    (item,) = find_items(tmp_path / "in", tmp_path / "out", model.recipe)
    assert [path.name for path in item.contrasts] == [f"case_{n:04d}.nii.gz" for n in range(4)]
    (one,) = predict_items(model, [item], Setup(format="nifti", device="cpu"))
    assert one.error is None


def test_exports_know_of_contrasts_or_say_that_they_cannot(trained, tmp_path):
    _, file, _ = trained
    for format, name in (("sam", "m.pth"), ("bundle", "bundle")):
        with pytest.raises(ConfigError) as refused:
            export_model(file, tmp_path / name, format)
        assert refused.value.code in ("contrasts-not-exported", "no-sam-checkpoint")
    whole = export_model(file, tmp_path / "whole.safetensors", "fedfms")
    again = load_trained(whole.files[0].path, None)
    picture = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.model(picture), load_trained(file, None).model(picture))
    assert again.recipe.contrasts == CONTRASTS
    assert input_facts(again.recipe)["contrasts"] == list(CONTRASTS)  # what --as onnx writes down
