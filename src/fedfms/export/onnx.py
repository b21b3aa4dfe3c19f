"""A model as an ONNX graph: normalised pictures in, logits out, any batch size.

The graph holds no path of this machine: the exporter writes the Python file and line behind every
node, which is taken out again.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfms import __version__
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Reading
from fedfms.errors import ConfigError, TrainingError
from fedfms.export.facts import TERMS_KEY, VERSION_KEY, about, input_facts, site_facts, terms
from fedfms.models.segmenter import Segmenter
from fedfms.models.trained import INPUT_KEY, RECIPE_KEY, Trained

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20  # the exporter's own choice in torch 2.13, and what its operators are tested with
LARGEST_DIFFERENCE = 1e-3  # of a logit, against PyTorch; fp32 sums in another order give 1e-5
_LARGEST_FILE = 2**31 - 1  # bytes; of one protobuf message


def require_packages() -> None:
    """Stop early where the optional packages are missing.

    Raises:
        ConfigError: "no-onnx".
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--as onnx needs {', '.join(PACKAGES)}; not installed here: {', '.join(missing)}",
            f"pip install {' '.join(PACKAGES)}",
            code="no-onnx",
        )


def write_onnx(trained: Trained, site: Reading | None, file: Path) -> tuple[tuple[str, ...], float]:
    """Write one file; check it with onnx.checker, and its output with onnxruntime.

    Input `images` (B, C, S, S) float32, normalised; output `logits` (B, K, M, M) float32, before
    the sigmoid. Metadata: the recipe, whose weights it was trained from, and how a picture
    becomes the input; how a file becomes a picture where `site` says it.

    Returns:
        sentences for the person who exports, and the largest difference of a logit from PyTorch.

    Raises:
        ConfigError: "no-onnx", or "too-large-for-onnx".
        TrainingError: "wrong-graph"; the file computes something else than the network.
    """
    require_packages()
    import onnx

    recipe, model = trained.recipe, trained.model
    size_bytes = sum(tensor.nbytes for tensor in model.parameters())
    if size_bytes > _LARGEST_FILE:
        raise ConfigError(
            f"{recipe.backbone} has {size_bytes / 1e9:.1f} GB of numbers, and one ONNX file can "
            "hold 2.1 GB",
            "export it with --as bundle or --as fedfms",
            code="too-large-for-onnx",
        )
    graph = _graph(model, recipe)
    for key, text in {
        RECIPE_KEY: recipe.to_json(),
        INPUT_KEY: json.dumps({**input_facts(recipe), **site_facts(site)}),
        VERSION_KEY: __version__,
        **({TERMS_KEY: licence} if (licence := terms(recipe)) else {}),
    }.items():
        graph.metadata_props.add(key=key, value=text)
    graph.doc_string = about(recipe)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save_model(graph, file)
    difference = _difference(file, model, recipe)
    if not difference <= LARGEST_DIFFERENCE:
        raise TrainingError(
            f"the ONNX graph's logits differ from PyTorch's by up to {difference:.3g}",
            "report this with your versions of torch, onnxscript and onnxruntime; meanwhile "
            "export with --as bundle",
            code="wrong-graph",
        )
    return (
        "Grey levels become the input, and logits a mask, as docs/export.md says; the numbers for "
        f"it are in the file's metadata under {INPUT_KEY}.",
    ), difference


def _graph(model: Segmenter, recipe: Recipe) -> Any:
    """The network as onnx.ModelProto, without notes on where its nodes come from."""
    size = recipe.image_size
    # 2: torch.export keeps a batch of 1 fixed
    pictures = torch.zeros(2, len(recipe.contrasts) or 3, size, size)
    log_of_parts = logging.getLogger("torch.onnx._internal.exporter._registration")
    log_of_parts.setLevel(logging.ERROR)  # it warns that torchvision, which nobody uses, is missing
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        program = torch.onnx.export(
            model,
            (pictures,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is None only with the older exporter
    graph: Any = program.model_proto
    parts = [graph.graph, *graph.functions]
    for part in parts:
        notes = [part, *part.node, *part.value_info]
        notes += [*part.initializer, *part.input, *part.output] if part is graph.graph else []
        for noted in notes:
            del noted.metadata_props[:]
            noted.doc_string = ""
    return graph


def _difference(file: Path, model: Segmenter, recipe: Recipe) -> float:
    """Largest difference of a logit between the file and the network, on one random picture."""
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    size = recipe.image_size
    picture = torch.randn(1, len(recipe.contrasts) or 3, size, size, generator=generator)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["logits"], {"images": picture.numpy()})[0])
    with torch.inference_mode():
        expected: Tensor = model(picture)
    return float((got - expected).abs().max())
