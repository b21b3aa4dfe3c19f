"""What an export says about the way from a site's files to the network's three channels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Setup
from fedfms.data.prepared import PreparedImage
from fedfms.export.run import export_model
from fedfms.geometry import network_input
from fedfms.models.trained import load_trained

LINES = {
    "nifti": "format: nifti\nimages: images/*.nii\nlabels: labels/*.nii\n",
    "image": "format: image\nimages: images/*.png\nlabels: labels/*.png\n",
}


def site_yml(folder: Path, format: str, **values: str) -> Path:
    file = folder / "given" / "site.yml"
    file.parent.mkdir()
    more = "".join(f"{key}: {value}\n" for key, value in values.items())
    file.write_text(f"data_root: nowhere\n{LINES[format]}classes: {{lesion: [1]}}\n{more}")
    return file


def written_facts(file: Path) -> dict[str, Any]:
    """`fedfms_input`, as other readers than ours find it."""
    if file.suffix == ".onnx":
        entries = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        return json.loads(entries["fedfms_input"])
    with safetensors.safe_open(file, "np") as opened:
        return json.loads(opened.metadata()["fedfms_input"])


@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors"])
def test_metadata_says_how_the_sites_pictures_came_about(tmp_path, results, name):
    site = site_yml(
        tmp_path, "nifti", plane="sagittal", channels="neighbours",
        intensity="{rule: window, center: 40, width: 400}",
    )  # fmt: skip
    kind = "onnx" if name == "m.onnx" else "fedfms"
    done = export_model(results(), tmp_path / name, kind, site=site)
    assert not any("--site" in note for note in done.notes)
    facts = written_facts(tmp_path / name)
    assert facts["plane"] == "sagittal"
    assert facts["channels"] == "neighbours"
    assert facts["intensity"] == {"rule": "window", "bounds": [-160, 240], "rounding": "nearest"}
    assert facts["image_size"] == 64
    assert str(tmp_path).encode() not in (tmp_path / name).read_bytes()


def test_a_file_of_everything_has_the_same_bytes_each_time_and_loads(tmp_path, results, pictures):
    site, source = site_yml(tmp_path, "image", channels="rgb"), results()
    digests = set()
    for number in range(4):
        file = tmp_path / f"{number}.safetensors"
        export_model(source, file, "fedfms", site=site)
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(digests) == 1
    facts = written_facts(file)
    assert (facts["plane"], facts["channels"]) == (None, "rgb")
    one, other = load_trained(source, None), load_trained(file, None)
    assert one.recipe == other.recipe
    with torch.inference_mode():
        assert torch.equal(one.model(pictures(2)), other.model(pictures(2)))


@pytest.mark.parametrize(("name", "kind"), [("m.onnx", "onnx"), ("m.safetensors", "fedfms")])
def test_without_a_site_an_export_says_that_it_does_not_know(tmp_path, results, name, kind):
    done = export_model(results(), tmp_path / name, kind)
    assert any("plane, channels and intensity" in note for note in done.notes)
    if kind == "onnx":
        facts = written_facts(tmp_path / name)
        assert (facts["plane"], facts["channels"], facts["intensity"]) == (None, None, None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "gray: three equal channels; neighbours: three channels: the slice before"),
        ({"channels": "neighbours"}, "axial slices, three channels: the slice before, the slice "),
        ({"channels": "gray", "plane": "coronal"}, "coronal slices, three equal channels"),
    ],
)
def test_the_text_beside_a_sam_checkpoint_says_the_channels(tmp_path, results, given, says):
    site = None if given is None else site_yml(tmp_path, "nifti", **given)
    export_model(results(method="fedsam"), tmp_path / "sam.pth", "sam", site=site)
    text = " ".join((tmp_path / "sam.pth.md").read_text().split())
    assert says in text
    if given is not None:
        assert "percentile 0.5 to 99.5 of each volume" in text
        assert ("equal" in says) == ("three equal channels" in text)


def test_the_words_for_neighbours_are_what_training_does(results):
    recipe = Recipe.from_json(results() / "recipe.json")
    grey = np.arange(1, 5, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    image = PreparedImage(grey, (1.0, 1.0, 1.0), True)
    plain = Setup(format="nifti", channels="neighbours")
    recipe = dataclasses.replace(recipe, normalize=False)
    for index, expected in {0: (1, 1, 2), 1: (1, 2, 3), 3: (3, 4, 4)}.items():  # before, it, after
        channels = network_input(image, index, plain, recipe)[:, 4, 4] * 255
        assert tuple(int(value) for value in channels.round()) == expected
