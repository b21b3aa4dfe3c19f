"""`fedfms export` as a person or a script meets it."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from fedfms.cli.export import _next_command
from fedfms.export.run import Exported

Run = Callable[..., tuple[int, str, str]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_help_names_the_formats_and_answers_without_torch(run: Run) -> None:
    code, out, _ = run("export", "--help")
    assert code == 0
    for word in ("sam:", "fedfms:", "onnx:", "bundle:", "--site", "--overwrite"):
        assert word in out
    seen = "import sys, fedfms.cli.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen], check=False).returncode == 0


def test_it_prints_what_was_written_and_what_to_type_next(run: Run, results, tmp_path) -> None:
    output = tmp_path / "sam.pth"
    code, out, _ = run("export", results(method="fedsam"), output, "--as", "sam")
    assert code == 0
    for file in (output, tmp_path / "sam.pth.md"):
        assert f"{file}  " in out
        assert sha256(file) in out
    assert f"{output.stat().st_size / 1e6:.1f} MB" in out
    assert "no_mask_embed" in out
    assert f"next: read {output}.md" in out


def test_the_next_command_of_an_onnx_file_runs(tmp_path) -> None:
    output = tmp_path / "it's a model.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    same = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([same], "same", [value], [result])
    model = onnx.helper.make_model(
        graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    model.metadata_props.add(key="fedfms_recipe", value="{}")
    onnx.save(model, output)
    command = _next_command(Exported("onnx", "vit_demo", 32, (), (), 0.0), output)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "fedfms_recipe" in printed.stdout


def test_a_bundle_comes_with_the_command_that_runs_it(run: Run, results, tmp_path) -> None:
    output = tmp_path / "a bundle"
    code, out, _ = run("export", results(), output, "--as", "bundle")
    assert code == 0
    assert "checked: logits differ from PyTorch's by at most" in out
    network = output / "models/model.ts"
    assert out.splitlines()[0].startswith(f"{network}  ")  # the network first
    assert sha256(network) in out.splitlines()[0]
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    words = shlex.split(line)
    for option in ("--bundle_root", "--config_file", "--meta_file"):
        assert Path(words[words.index(option) + 1]).exists()


def test_json_for_scripts(run: Run, results, tmp_path) -> None:
    output = tmp_path / "model.safetensors"
    code, out, _ = run("export", results(), output, "--as", "fedfms", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["format"] == "fedfms"
    assert values["largest_difference"] is None
    assert values["files"] == [
        {"path": str(output), "bytes": output.stat().st_size, "sha256": sha256(output)}
    ]


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        (["RESULTS", "m.pth", "--as", "torch"], "no format 'torch'", "sam, fedfms, onnx, bundle"),
        (["RESULTS", "m.bin", "--as", "sam"], "writes a .pth file", "name it m.pth"),
        (["RESULTS", "m.pth", "--as", "sam"], "adapters", "--as fedfms"),
        (["RESULTS", "m.onnx", "--as", "onnx", "--site", "s.yml"], "there is no", "check the path"),
        (["RESULTS", "b", "--as", "bundle", "--site", "s.yml"], "there is no", "check the path"),
        (["nowhere", "b", "--as", "bundle"], "there is no model at nowhere", "results folder"),
    ],
)
def test_a_mistake_ends_with_its_fix_and_writes_nothing(
    run: Run, results, tmp_path, monkeypatch, arguments, problem, fix
) -> None:
    source = str(results(method="fedmsa"))
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, _, err = run("export", *[source if word == "RESULTS" else word for word in arguments])
    assert code == 1
    assert problem in err
    assert fix in err
    assert set(tmp_path.rglob("*")) == before
