from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fedfms.errors import ConfigError
from fedfms.export.onnx import LARGEST_DIFFERENCE, _difference
from fedfms.export.run import export_model
from fedfms.models.trained import load_trained
from rounding import EPSILON, assert_as_right, exactly

ROOT = Path(__file__).resolve().parents[3]


def run(file: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def test_onnxruntime_reports_to_nobody(tmp_path):
    """It keeps an identifier of the machine below the home folder whenever it does report."""
    outer = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    left = {}
    for what, code in (("fedfms", "import fedfms, onnxruntime"), ("alone", "import onnxruntime")):
        home = tmp_path / what
        home.mkdir()
        environment = {**outer, "HOME": str(home), "https_proxy": "http://127.0.0.1:9"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        left[what] = [path.name for path in home.rglob("*")]
    assert left["fedfms"] == []
    assert "deviceid" in left["alone"]  # what is there to be found is found


@pytest.mark.parametrize(
    ("method", "classes"),
    [
        ("fedsam", ("lesion",)),
        ("fedmsa", ("disc", "cup")),
        pytest.param("fedsam", ("disc", "cup"), marks=pytest.mark.slow),
        pytest.param("fedmsa", ("lesion",), marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_gives_pytorchs_logits(tmp_path, results, pictures, method, classes):
    source = results(method=method, classes=classes, image_size=128)
    file = tmp_path / "model.onnx"
    done = export_model(source, file, "onnx")
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)

    trained = load_trained(source, None)
    for batch in (1, 3):
        images = pictures(batch, 128)
        with torch.inference_mode():
            expected, exact = trained.model(images), exactly(trained.model, images)
        assert expected.std() > 0.1
        assert_as_right(run(file, images), expected, exact)
    assert done.largest_difference <= 128 * EPSILON * float(expected.abs().max())

    (given,), (asked,) = graph.graph.output, graph.graph.input
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (asked, given)
    ]
    assert (asked.name, given.name) == ("images", "logits")
    assert shapes == [["batch", 3, 128, 128], ["batch", len(classes), 64, 64]]

    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["fedfms_recipe"]) == trained.recipe.to_dict()
    facts = json.loads(metadata["fedfms_input"])
    assert facts["classes"] == list(classes)
    assert facts["pixel_mean"] == [123.675, 116.28, 103.53]
    assert facts["pixel_std"] == [58.395, 57.12, 57.375]

    data = file.read_bytes()
    for folder in (ROOT, Path(sys.prefix).resolve(), *map(Path, site.getsitepackages())):
        assert str(folder).encode() not in data
    assert b"stack_trace" not in data

    # and the check before the file is handed over does see another network
    with torch.no_grad():
        trained.model.mask_decoder.mask_tokens.weight[0] += 0.1
    assert _difference(file, trained.model, trained.recipe) > LARGEST_DIFFERENCE


def test_missing_packages_are_named_with_what_to_install(tmp_path, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="not installed here: onnxscript") as error:
        export_model(results(), tmp_path / "model.onnx", "onnx")
    assert error.value.fix == "pip install onnx onnxscript onnxruntime"
    assert not (tmp_path / "model.onnx").exists()
