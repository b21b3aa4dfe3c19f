"""Segment Anything by name: its parts from the `segment-anything` package, and its checkpoints.

Modules keep upstream's names, so that an official state dict fits key by key. A checkpoint is never
downloaded, is recognized by its SHA-256, and is loaded strictly. The image encoder of `vit_t` is in
tiny_vit.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedfms.contracts.recipe import BACKBONES, NO_BACKBONE, Recipe
from fedfms.errors import CheckpointError
from fedfms.files import file_sha256
from fedfms.models.decoder import PromptFreeMaskDecoder
from fedfms.models.encoder import ImageEncoder
from fedfms.models.tiny_vit import TinyViT
from fedfms.models.upstream import PromptEncoder, TwoWayTransformer

log = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")  # in any capitals


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """Sizes of a mask decoder; all of Meta's and MobileSAM's are alike."""

    decoder_width: int = 256  # channels of the image's embeddings too
    decoder_mlp: int = 2048
    decoder_heads: int = 8


@dataclass(frozen=True, slots=True)
class Geometry(DecoderSizes):
    """Sizes of a SAM with a ViT; those of vit_b, vit_l, vit_h are upstream's `build_sam.py`."""

    width: int  # channels of an encoder token
    heads: int
    global_blocks: tuple[int, ...]  # blocks whose attention spans the image
    window: int = 14  # tokens a side in the other blocks


GEOMETRY = {  # vit_t has no ViT: models/tiny_vit.py holds its sizes
    "vit_demo": Geometry(96, 3, (1, 3), 8, decoder_width=64, decoder_mlp=256, decoder_heads=4),
    "vit_b": Geometry(768, 12, (2, 5, 8, 11)),
    "vit_l": Geometry(1024, 16, (5, 11, 17, 23)),
    "vit_h": Geometry(1280, 16, (7, 15, 23, 31)),
}


class Sam(nn.Module):
    """SAM's three parts with upstream's random weights and its names; nothing else is in it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        size: DecoderSizes = GEOMETRY.get(recipe.backbone, DecoderSizes())
        grid = recipe.image_size // recipe.patch_size
        self.image_encoder = _encoder(recipe)
        self.prompt_encoder = PromptEncoder(
            embed_dim=size.decoder_width,
            image_embedding_size=(grid, grid),
            input_image_size=(recipe.image_size, recipe.image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = PromptFreeMaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=size.decoder_width,
                num_heads=size.decoder_heads,
                mlp_dim=size.decoder_mlp,
            ),
            transformer_dim=size.decoder_width,
            iou_head_depth=3,
            iou_head_hidden_dim=size.decoder_width,
        )


def _encoder(recipe: Recipe) -> ImageEncoder | TinyViT:
    if recipe.backbone == "vit_t":
        return TinyViT(DecoderSizes().decoder_width)
    size = GEOMETRY[recipe.backbone]
    return ImageEncoder(
        img_size=recipe.image_size,
        patch_size=recipe.patch_size,
        embed_dim=size.width,
        depth=BACKBONES[recipe.backbone].depth,
        num_heads=size.heads,
        mlp_ratio=4,
        out_chans=size.decoder_width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )


# ----------------------------------------------------------------------------------- checkpoints


def find_checkpoint(recipe: Recipe, folder: Path | None) -> Path | None:
    """The checkpoint that the recipe means, with its SHA-256 verified; None where it needs none.

    Args:
        recipe: names the backbone and the SHA-256 of its checkpoint.
        folder: where checkpoints lie. The file may have any name there; vit_demo comes with the
            package and needs no folder.

    Raises:
        CheckpointError: "missing-checkpoint" or "wrong-checkpoint", with where to get the file and
            where to put it.
    """
    if recipe.backbone == NO_BACKBONE:
        return None
    wanted = BACKBONES[recipe.backbone]
    here = Path(__file__).parent if recipe.backbone == "vit_demo" else folder
    named = here / wanted.file_name if here else None
    others = [path for path in _checkpoints_in(folder) if path != named]
    for path in [*([named] if named else []), *others]:
        if path.is_file() and checkpoint_sha256(path) == recipe.backbone_sha256:
            return path
    raise _not_found(recipe, folder, named)


def _checkpoints_in(folder: Path | None) -> list[Path]:
    """What may be a checkpoint by its name, in order of name."""
    there = folder.iterdir() if folder is not None and folder.is_dir() else ()
    return sorted(path for path in there if path.suffix.lower() in CHECKPOINT_SUFFIXES)


def _not_found(recipe: Recipe, folder: Path | None, named: Path | None) -> CheckpointError:
    wanted = BACKBONES[recipe.backbone]
    if recipe.backbone == "vit_demo":
        get = (
            "install the version of fedfms that the recipe is from: vit_demo comes with the package"
        )
    elif recipe.backbone_sha256 == wanted.sha256:
        get = f"get {wanted.source}"
    else:
        get = "ask the coordinator for the checkpoint that the recipe was written with"
    if folder is None:
        put = "put it into a folder of your choice and set FEDFMS_CHECKPOINTS to that folder"
    else:
        put = f"put it at {folder / wanted.file_name}"
    fix = get if recipe.backbone == "vit_demo" else f"{get} and {put}"
    if named is not None and named.is_file():
        return CheckpointError(
            f"{named} is another file than the recipe asks for: its SHA-256 is "
            f"{checkpoint_sha256(named)}, not {recipe.backbone_sha256}",
            fix,
            code="wrong-checkpoint",
        )
    where = f"in {folder}" if folder is not None else "here: no folder of checkpoints is set"
    if others := [path.name for path in _checkpoints_in(folder)]:
        where += f"; what lies there is another: {', '.join(others[:4])}"
    return CheckpointError(
        f"the SAM checkpoint of {recipe.backbone} (SHA-256 {recipe.backbone_sha256}) "
        f"is not {where}",
        fix,
        code="missing-checkpoint",
    )


def checkpoint_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint, as 64 hexadecimal digits.

    Raises:
        CheckpointError: "damaged-checkpoint" if the file cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    other = re.search(r"Unsupported (?:global|class)\S* (?:GLOBAL )?([\w.]+)", str(error))
    if other:
        return CheckpointError(
            f"{path} holds something else than tensors: {other.group(1)}",
            "a .pth must hold tensors only: save the state dict itself, as in the official SAM "
            "files, without numbers, numpy arrays or objects",
            code="damaged-checkpoint",
        )
    # torch's texts go on for lines, with codes of colours for a terminal
    reason = re.sub(r"\x1b\[\d*m", "", str(error)).partition("\n")[0].partition(". ")[0].strip()
    known = isinstance(error, OSError | SafetensorError | RuntimeError) and reason
    return CheckpointError(
        f"{path} cannot be read as a checkpoint: {reason if known else type(error).__name__}",
        "copy or download the file again, readable for this user; a .pth must hold tensors only",
        code="damaged-checkpoint",
    )


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of an official `.pth` state dict or of a safetensors file, on the CPU.

    Raises:
        CheckpointError: "missing-checkpoint", or "damaged-checkpoint" if the file cannot be read
            as what its name says. A `.pth` is read as tensors only: no code in it is run.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)  # type: ignore[no-any-return]
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path}", "check the path", code="missing-checkpoint"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # of a damaged pickle torch raises nearly anything
        raise _unreadable(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds something else than named tensors",
            "use the state dict itself, as in the official SAM files",
            code="damaged-checkpoint",
        )
    return state


def load_backbone(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model that has SAM's tensors and nothing else, strictly.

    Position tables of another input size are resampled to the model's.

    Raises:
        CheckpointError: "checkpoint-keys" or "checkpoint-shape", naming the tensor.
    """
    expected = model.state_dict()
    _refuse_keys("has no tensor", sorted(expected.keys() - state.keys()))
    _refuse_keys("has a tensor that SAM does not know:", sorted(state.keys() - expected.keys()))
    fitted = {}
    for name, tensor in state.items():
        target = expected[name].shape
        fitted[name] = resample_positions(name, tensor, target)
        if fitted[name].shape != target:
            raise CheckpointError(
                f"the checkpoint's {name} has shape {tuple(tensor.shape)}, the backbone's has "
                f"{tuple(target)}",
                "use the checkpoint of the backbone that the recipe names",
                code="checkpoint-shape",
            )
    model.load_state_dict(fitted, strict=True)


def _refuse_keys(what: str, names: list[str]) -> None:
    if names:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"the checkpoint {what} {names[0]}{others}",
            "use the checkpoint of the backbone that the recipe names, in SAM's own layout",
            code="checkpoint-keys",
        )


def resample_positions(name: str, table: Tensor, shape: torch.Size) -> Tensor:
    """A position table for another input size; any other tensor, and one that fits, as it is.

    Absolute positions, (1, h, w, C), are interpolated bicubically over the grid. Relative ones,
    (2 N - 1, C) over the distances of N tokens, linearly over the distances, as upstream's
    `get_rel_pos` does. Window blocks keep theirs: their N is the window.
    """
    if table.shape == shape or table.shape[-1:] != shape[-1:] or table.dim() != len(shape):
        return table
    if name.endswith("pos_embed"):
        grid = table.permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=shape[1:3], mode="bicubic", antialias=True)
        return grid.permute(0, 2, 3, 1)
    if name.endswith((".rel_pos_h", ".rel_pos_w")):
        distances = table.t().unsqueeze(0).float()
        return F.interpolate(distances, size=shape[0], mode="linear").squeeze(0).t()
    return table
