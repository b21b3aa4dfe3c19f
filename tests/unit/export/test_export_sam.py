"""Read by upstream's own classes, with the code that the export itself hands out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Setup
from fedfms.control import Control
from fedfms.data.manifest import Case
from fedfms.data.prepared import PreparedCase, PreparedImage
from fedfms.errors import ConfigError
from fedfms.export.run import export_model
from fedfms.geometry import network_input
from fedfms.models import upstream  # which also lets segment_anything.modeling be imported
from fedfms.models.build import SamSegmenter, build_model
from fedfms.models.trained import RECIPE_KEY, load_trained, whole_network
from fedfms.training.evaluate import foreground, predict, probabilities
from rounding import assert_as_right, exactly


def code_blocks(note: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", note.read_text(), re.DOTALL)


def run_as_the_note_says(folder: Path, name: str, monkeypatch) -> tuple[Any, str]:
    """Upstream's Sam by the first block of the note, and its second block."""
    load, segment = code_blocks(folder / f"{name}.md")
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(load, names)
    return names["sam"], segment


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "lora", "image_size": 80},
        {"image_size": 128, "normalize": False, "probability_threshold": 0.7},
        {"image_size": 80, "paper_compat": True},  # border windows are padded
    ],
)
def test_upstream_gives_our_embeddings_and_logits(tmp_path, results, monkeypatch, values):
    source = results(**{"method": "fedsam", **values})
    export_model(source, tmp_path / "sam.pth", "sam")
    sam, segment = run_as_the_note_says(tmp_path, "sam.pth", monkeypatch)

    ours = load_trained(source, None)
    size = ours.recipe.image_size
    grey = np.random.default_rng(0).integers(0, 256, (1, size, size)).astype(np.uint8)
    case = PreparedCase(
        Case("a", "a", Path("a"), Path("a"), "validation"),
        grey,
        np.zeros(grey.shape, np.int16),
        (1.0, 1.0, 1.0),
        False,
    )
    own_input = network_input(case, 0, Setup(format="nifti"), ours.recipe)[None]
    their_input = sam.preprocess(torch.from_numpy(grey).float().expand(3, -1, -1))[None]
    with torch.no_grad():
        expected = ours.model(own_input)
        embeddings = ours.model.image_encoder(own_input)
        theirs = sam.image_encoder(their_input)
        assert_as_right(embeddings, theirs, exactly(sam.image_encoder, their_input))
        exact = exactly(ours.model, own_input)
    names: dict[str, Any] = {"sam": sam}
    exec(segment, names)
    assert expected.std() > 0.1  # something is there to be equal
    assert_as_right(names["logits_of"](their_input), expected, exact)
    probability = torch.tensor(sam.mask_threshold).sigmoid()
    assert float(probability) == pytest.approx(ours.recipe.probability_threshold, abs=1e-6)


def test_every_tensor_is_there_as_trained_and_what_never_trained_as_in_the_checkpoint(
    tmp_path, results
):
    source = results(method="fedsam", image_size=128)
    export_model(source, tmp_path / "sam.pth", "sam")
    state = torch.load(tmp_path / "sam.pth", weights_only=True)
    ours = load_trained(source, None).model.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    official = load_file(Path(upstream.__file__).with_name("vit_demo.safetensors"))
    assert state.keys() == official.keys()
    untrained = [n for n in official if n.startswith(("prompt_encoder", "mask_decoder.iou_pred"))]
    assert len(untrained) > 10
    for name in untrained:
        assert torch.equal(state[name], official[name]), name


def test_a_model_without_adapters_is_sam(tmp_path, results):
    source = results(adapter_blocks="last:0", image_size=128)
    export_model(source, tmp_path / "sam.pth", "sam")
    state = torch.load(tmp_path / "sam.pth", weights_only=True)
    ours = load_trained(source, None).model.state_dict()
    assert (
        state.keys() == load_file(Path(upstream.__file__).with_name("vit_demo.safetensors")).keys()
    )
    assert all(torch.equal(state[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"method": "fedmsa"}, "--as fedfms"),
        ({"method": "fedmsa", "adapter_blocks": "last:1"}, "--as fedfms"),
        ({"method": "fedsam", "classes": ("disc", "cup")}, "train one class"),
    ],
)
def test_what_sam_has_no_place_for_is_refused_and_leaves_nothing(tmp_path, results, values, fix):
    source = results(**values)
    with pytest.raises(ConfigError, match="no place") as error:
        export_model(source, tmp_path / "out" / "sam.pth", "sam")
    assert fix in error.value.fix
    assert not [*tmp_path.glob("out/*")]


def test_what_differs_from_plain_sam_is_said(tmp_path, results):
    source = results(method="fedsam", resize="stretch", normalize=False, probability_threshold=0.6)
    notes = " ".join(export_model(source, tmp_path / "sam.pth", "sam").notes)
    for word in ("no_mask_embed", "vit_demo", "pixel mean", "stretched", "0.6"):
        assert word in notes, word
    plain = results("plain", method="fedsam")
    notes = " ".join(export_model(plain, tmp_path / "plain.pth", "sam").notes)
    for word in ("pixel mean", "stretched", "probability"):
        assert word not in notes, word


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"resize": "stretch", "paper_compat": True, "normalize": False},
    ],
)
def test_the_note_gives_the_masks_of_slices_whose_pixels_are_not_square(
    tmp_path, results, monkeypatch, values
):
    source = results(method="fedsam", **values)
    ours = load_trained(source, None)
    grey = np.random.default_rng(2).integers(0, 256, (3, 17, 40)).astype(np.uint8)
    volume = PreparedImage(grey, (1.0, 3.1, 0.9), True)
    slices = [(volume, index) for index in range(3)]
    site = Setup(format="nifti")
    logits = torch.stack(list(predict(ours.model, slices, ours.recipe, site, Control())))
    middle = float(next(probabilities(iter(logits), volume, ours.recipe, 3))[1].median())
    recipe = dataclasses.replace(ours.recipe, probability_threshold=round(middle, 3))
    (source / "recipe.json").write_text(recipe.to_json())
    expected = foreground(logits, volume, recipe)[0]
    assert 0.2 < expected.mean() < 0.8

    export_model(source, tmp_path / "sam.pth", "sam")
    sam, segment = run_as_the_note_says(tmp_path, "sam.pth", monkeypatch)
    names: dict[str, Any] = {"sam": sam}
    exec(segment, names)
    masks = [
        names["mask_of"](torch.from_numpy(one).expand(3, -1, -1), row_mm=3.1, column_mm=0.9)
        for one in grey
    ]
    differ = np.stack(masks) != expected
    assert (
        differ.sum() <= 2
    )  # of 2040: pixels at the threshold, since sums differ in the last digit


def vit_b(folder: Path, image_size: int) -> SamSegmenter:
    """A FedSAM model on ViT-B with random weights, as one file in the folder."""
    recipe = Recipe(
        method="fedsam",
        backbone="vit_b",
        backbone_sha256=BACKBONES["vit_b"].sha256,
        classes=("lesion",),
        rounds=1,
        image_size=image_size,
    )
    model = build_model(recipe, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:  # upstream starts them as zeros
                parameter += 0.1 * torch.randn(parameter.shape)
    save_file(whole_network(model), folder / "own.safetensors", {RECIPE_KEY: recipe.to_json()})
    return model


@pytest.mark.slow
def test_upstreams_registry_loads_vit_b_of_1024_pixels(tmp_path, monkeypatch):
    ours = vit_b(tmp_path, 1024).state_dict()
    done = export_model(tmp_path / "own.safetensors", tmp_path / "sam.pth", "sam")
    sam, _ = run_as_the_note_says(tmp_path, "sam.pth", monkeypatch)
    assert "sam_model_registry" in code_blocks(tmp_path / "sam.pth.md")[0]
    theirs = sam.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert not any("position tables" in note for note in done.notes)


@pytest.mark.slow
def test_vit_b_of_256_pixels_is_refused_by_the_registry_and_loads_by_the_note(
    tmp_path, monkeypatch
):
    from segment_anything.build_sam import sam_model_registry

    model = vit_b(tmp_path, 256)
    done = export_model(tmp_path / "own.safetensors", tmp_path / "sam.pth", "sam")
    assert any("position tables of 256" in note for note in done.notes)
    with pytest.raises(RuntimeError, match="pos_embed"):
        sam_model_registry["vit_b"](checkpoint=str(tmp_path / "sam.pth"))
    sam, segment = run_as_the_note_says(tmp_path, "sam.pth", monkeypatch)
    names: dict[str, Any] = {"sam": sam}
    exec(segment, names)
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        exact = exactly(model, images)
        assert_as_right(names["logits_of"](images), model(images), exact)
