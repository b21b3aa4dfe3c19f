"""The network with its resizing inside: grey slices of any size to logits of that size.

TorchScript, because it runs wherever PyTorch is installed, without this package. What is around the
network is scripted, since it depends on the picture's size; the network is traced, since its input
has one size.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.geometry import (
    covered,
    on_canvas,
    pixel_aspect,
    pixel_statistics,
    resized,
    unpadded,
)
from fedfms.models.segmenter import Segmenter


class SliceNetwork(nn.Module):
    """Grey slices to logits at their own size; what geometry.py computes, in one module.

    Args:
        network: (B, C, S, S) normalised pictures to (B, K, M, M) logits.
        recipe: image_size, resize and the rest.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.image_size = recipe.image_size
        self.mask_size = recipe.mask_size
        self.patch = recipe.image_size // recipe.mask_size  # input pixels a side of a mask pixel
        self.stretch = recipe.resize == "stretch"
        self.antialias = not recipe.paper_compat
        mean, std = pixel_statistics(recipe)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, grey: Tensor, pixel: Tensor | None = None) -> Tensor:
        """Logits of every class, before the sigmoid.

        Args:
            grey: (B, 1, H, W), or (B, C, H, W) with one slice for each channel; C is 3, or the
                number of the recipe's contrasts. float32 grey levels 0 to 255, which are rounded.
                H, W: at least 2.
            pixel: (2,) millimetres from row to row and from column to column; None: squares.

        Returns:
            (B, K, H, W) float32.
        """
        height, width = grey.shape[-2], grey.shape[-1]
        rows, columns = self.mask_size, self.mask_size
        if not self.stretch:
            aspect = 1.0
            if pixel is not None:
                aspect = pixel_aspect(float(pixel[0]), float(pixel[1]))
            rows, columns = covered(height, width, aspect, self.mask_size)
        # 8-bit on the processor, as in training: a GPU has no such kernel
        levels = grey.round().clamp(0.0, 255.0).to(torch.uint8).cpu().contiguous()
        picture = resized(levels, rows * self.patch, columns * self.patch, self.antialias)
        shown = on_canvas(picture.to(self.mean.device), self.mean, self.std, self.image_size)
        return unpadded(self.network(shown), rows, columns, height, width, self.antialias)


def write_torchscript(model: Segmenter, recipe: Recipe, file: Path) -> None:
    """Trace the network, put the resizing around it and write both, without this machine's paths.

    The file runs on the processor and on a GPU: `torch.jit.load(file, map_location=device)`.
    """
    size = recipe.image_size
    pictures = torch.zeros(2, len(recipe.contrasts) or 3, size, size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of sizes that a trace fixes: the input has one size
        traced = torch.jit.trace(model, pictures, check_trace=False)  # type: ignore[no-untyped-call]
        scripted = torch.jit.script(SliceNetwork(traced, recipe).eval())
    with_paths = file.with_suffix(".paths")
    torch.jit.save(scripted, with_paths)  # type: ignore[no-untyped-call]
    _without_paths(with_paths, file)
    with_paths.unlink()


def _without_paths(archive: Path, file: Path) -> None:
    """Copy a TorchScript file without its debug records.

    They name the Python files behind each line, and with them folders and users of this machine.
    """
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                new.writestr(entry, old.read(entry), compress_type=zipfile.ZIP_STORED)
