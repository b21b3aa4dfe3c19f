"""A trained SAM as Segment Anything's own checkpoint, for every program that loads one."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Reading
from fedfms.errors import ConfigError
from fedfms.export.facts import about, pictures_text
from fedfms.geometry import pixel_statistics
from fedfms.models.sam import GEOMETRY
from fedfms.models.trained import Trained, whole_network

UPSTREAM_IMAGE_SIZE = 1024  # pixels; the only one that upstream's build_sam.py builds


def write_sam(trained: Trained, site: Reading | None, file: Path) -> tuple[str, ...]:
    """Write the state dict, and beside it FILE.md that says how to load and use it.

    The tensors are the trained ones, fp32, under SAM's names. Position tables stay those of the
    recipe's image_size: resampling them for 1024 pixels would make a file that loads everywhere and
    segments worse than what was evaluated, without a word.

    Returns:
        sentences for the person who exports.

    Raises:
        ConfigError: "no-sam-checkpoint"; a class head, which SAM does not have. What else SAM does
            not have, `export_model` refuses.
    """
    recipe = trained.recipe
    if len(recipe.classes) > 1:
        raise ConfigError(
            f"the model segments {len(recipe.classes)} classes ({', '.join(recipe.classes)}) with "
            "a layer behind SAM's masks, for which SAM's own checkpoint has no place",
            "export it with --as fedfms, --as onnx or --as bundle; or train one class for --as sam",
            code="no-sam-checkpoint",
        )
    torch.save(whole_network(trained.model), file)
    notes = _notes(recipe)
    text = _explanation(recipe, site, file.name, notes)
    file.with_name(f"{file.name}.md").write_text(text, encoding="utf-8")
    return notes


def loading_code(recipe: Recipe, file_name: str) -> str:
    """Python that loads the file strictly with the segment-anything package, as `sam`."""
    if recipe.backbone != "vit_demo" and recipe.image_size == UPSTREAM_IMAGE_SIZE:
        return (
            "from segment_anything.build_sam import sam_model_registry\n\n"
            f'sam = sam_model_registry["{recipe.backbone}"](checkpoint="{file_name}")\n'
        ) + _own_pixels(recipe)
    size = GEOMETRY[recipe.backbone]
    grid = recipe.image_size // recipe.patch_size
    return f"""\
from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer,
)

sam = Sam(
    image_encoder=ImageEncoderViT(
        img_size={recipe.image_size}, patch_size={recipe.patch_size}, embed_dim={size.width},
        depth={size.depth}, num_heads={size.heads}, mlp_ratio=4, out_chans={size.decoder_width},
        qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
        window_size={size.window}, global_attn_indexes={list(size.global_blocks)},
    ),
    prompt_encoder=PromptEncoder(
        embed_dim={size.decoder_width}, image_embedding_size=({grid}, {grid}),
        input_image_size=({recipe.image_size}, {recipe.image_size}), mask_in_chans=16,
    ),
    mask_decoder=MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim={size.decoder_width}, mlp_dim={size.decoder_mlp},
            num_heads={size.decoder_heads},
        ),
        transformer_dim={size.decoder_width}, iou_head_depth=3,
        iou_head_hidden_dim={size.decoder_width},
    ),
).eval()
sam.load_state_dict(torch.load("{file_name}", weights_only=True))
""" + _own_pixels(recipe)


def segmenting_code(recipe: Recipe) -> str:
    """Python that segments without prompts with `sam`: `logits_of`, and `mask_of` a slice."""
    size, side, patch = recipe.image_size, recipe.mask_size, recipe.image_size // recipe.mask_size
    if recipe.resize == "stretch":
        covered = f"    rows = columns = {side}  # stretched to a square\n"
    else:
        covered = f"""\
    aspect = float(f"{{row_mm / column_mm:.5g}}")  # five digits: headers round
    tall, wide = grey.shape[1] * aspect, float(grey.shape[2])  # the longer side covers all
    rows = max(2, math.floor(tall * {side} / max(tall, wide) + 0.5))
    columns = max(2, math.floor(wide * {side} / max(tall, wide) + 0.5))
"""
    resizing = f'mode="bilinear", antialias={not recipe.paper_compat}'
    return f"""\
import math

import torch
from torch.nn import functional as F


@torch.no_grad()
def logits_of(images):
    \"\"\"(1, 3, {size}, {size}) float32 from sam.preprocess to (1, 1, {side}, {side}).\"\"\"
    embeddings = sam.image_encoder(images)
    return sam.mask_decoder(
        image_embeddings=embeddings,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=embeddings.new_zeros(1, 0, embeddings.shape[1]),
        dense_prompt_embeddings=torch.zeros_like(embeddings),  # not no_mask_embed
        multimask_output=False,
    )[0]


def mask_of(grey, row_mm=1.0, column_mm=1.0):
    \"\"\"(3, H, W) uint8 grey levels of a slice to its mask, (H, W) bool.

    row_mm, column_mm: from a row to the next, from a column to the next; alike in a picture.
    \"\"\"
{covered}\
    picture = F.interpolate(
        grey[None], size=(rows * {patch}, columns * {patch}), {resizing}
    )[0]
    logits = logits_of(sam.preprocess(picture.float())[None])[..., :rows, :columns]
    native = F.interpolate(logits, size=grey.shape[1:], {resizing})
    return native[0, 0].sigmoid() >= {recipe.probability_threshold!r}
"""


def _own_pixels(recipe: Recipe) -> str:
    """What the loaded Sam needs besides its tensors, if anything."""
    text = ""
    if not recipe.normalize:
        mean, std = pixel_statistics(recipe)
        text += f"sam.pixel_mean.fill_({mean[0]})\nsam.pixel_std.fill_({std[0]})\n"
    if recipe.probability_threshold != 0.5:
        text += f"sam.mask_threshold = {_logit(recipe.probability_threshold):.6f}\n"
    return text


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _notes(recipe: Recipe) -> tuple[str, ...]:
    notes = [
        "It was trained without prompts and with nothing in place of SAM's dense prompt: run the "
        "decoder as the .md file beside it shows. SamPredictor works, but adds no_mask_embed, "
        "which this decoder never saw, and the prompt encoder and the IoU head are still those of "
        "the SAM checkpoint that training started from."
    ]
    size = recipe.image_size
    if recipe.backbone == "vit_demo":
        notes.append(
            "vit_demo is a small SAM of this project: sam_model_registry does not know its sizes, "
            "the code in the .md file does."
        )
    elif size != UPSTREAM_IMAGE_SIZE:
        notes.append(
            f"It was trained at {size} pixels and has the position tables of {size}: "
            f'sam_model_registry["{recipe.backbone}"] builds {UPSTREAM_IMAGE_SIZE} and refuses it. '
            "Load it with the code in the .md file; for a file that the registry loads, train with "
            f"image_size {UPSTREAM_IMAGE_SIZE}."
        )
    if not recipe.normalize:
        notes.append(
            "It was trained on grey / 255 without SAM's pixel mean and standard deviation: "
            "set sam.pixel_mean and sam.pixel_std as the .md file shows."
        )
    if recipe.resize == "stretch":
        notes.append(
            "It was trained on pictures stretched to a square; SAM's ResizeLongestSide keeps the "
            "aspect ratio instead: resize as mask_of in the .md file does."
        )
    else:
        notes.append(
            "Slices of volumes kept their shape in millimetres; SAM's ResizeLongestSide counts "
            "pixels: where those of a slice are not square, resize as mask_of in the .md file does."
        )
    if recipe.probability_threshold != 0.5:
        notes.append(
            f"A pixel is foreground from probability {recipe.probability_threshold:g} on, logit "
            f"{_logit(recipe.probability_threshold):.4f}; SAM's own mask_threshold is 0."
        )
    return tuple(notes)


def _explanation(
    recipe: Recipe, site: Reading | None, file_name: str, notes: tuple[str, ...]
) -> str:
    started = BACKBONES[recipe.backbone].file_name
    lines = "\n".join(f"- {note}" for note in notes)
    return f"""# {file_name}

{about(recipe)}.

All tensors of Segment Anything in its own names, fp32, trained from {started} (SHA-256
{recipe.backbone_sha256}). One class: {recipe.classes[0]}, the first mask of the decoder.

{lines}

## Load

```python
{loading_code(recipe, file_name)}```

## Segment without prompts, as it was trained and evaluated

```python
{segmenting_code(recipe)}```

{pictures_text(site)}
`mask_of` takes them from there to the mask: to {recipe.image_size} pixels ({recipe.resize}),
logits at {recipe.mask_size} pixels, and back.

## The recipe

```json
{recipe.to_json()}```
"""
