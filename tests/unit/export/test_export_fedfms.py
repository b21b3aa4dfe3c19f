from __future__ import annotations

import json

import pytest
import safetensors
import torch

from fedfms.export.run import export_model
from fedfms.models.trained import load_trained


@pytest.mark.parametrize("classes", [("lesion",), ("disc", "cup")])
@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_one_file_gives_exactly_the_network_of_the_results(
    tmp_path, results, pictures, method, classes
):
    source = results(method=method, classes=classes, learning_rate=3e-4)
    output = tmp_path / "elsewhere" / "model.safetensors"
    done = export_model(source, output, "fedfms")
    before = load_trained(source, None)
    for path in source.iterdir():
        path.unlink()  # nothing but the one file is left
    after = load_trained(output, None)
    assert after.recipe == before.recipe
    with torch.inference_mode():
        assert torch.equal(after.model(pictures(2)), before.model(pictures(2)))

    numbers = sum(tensor.numel() for tensor in before.model.state_dict().values())
    (file,) = done.files
    assert file.size_bytes == output.stat().st_size
    assert 4 * numbers < file.size_bytes < 4 * numbers + 50_000  # fp32, and a header


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_with_few_adapters_is_the_same_in_every_format(
    tmp_path, results, pictures, precision
):
    source = results(adapter_blocks="last:1", precision=precision)
    before = load_trained(source, None)
    export_model(source, tmp_path / "model.safetensors", "fedfms")
    after = load_trained(tmp_path / "model.safetensors", None)
    images = pictures(2)
    with torch.inference_mode():
        expected = before.model(images)
        assert torch.equal(after.model(images), expected)
        assert torch.equal(after.model(after.model.prefix(images), from_prefix=True), expected)
    # and the graphs, which are compared with the network before they are handed over
    export_model(source, tmp_path / "model.onnx", "onnx")
    export_model(source, tmp_path / "bundle", "bundle")


def test_other_readers_find_the_recipe_in_the_metadata(tmp_path, results):
    export_model(results(classes=("disc", "cup")), tmp_path / "model.safetensors", "fedfms")
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["fedfms_recipe"])["classes"] == ["disc", "cup"]


def test_an_export_can_be_exported_again_with_the_same_bytes(tmp_path, results):
    export_model(results(method="fedsam"), tmp_path / "one.safetensors", "fedfms")
    export_model(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "fedfms")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()
    export_model(tmp_path / "two.safetensors", tmp_path / "sam.pth", "sam")


def test_the_names_of_sites_inside_are_said(tmp_path, results):
    source = results(holdout=("site-4",))
    done = export_model(source, tmp_path / "model.safetensors", "fedfms")
    assert any("names the sites" in note and "site-4" in note for note in done.notes)
