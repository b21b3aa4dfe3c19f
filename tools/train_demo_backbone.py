"""Train `vit_demo`, the small SAM of the demo, on generic shapes, and write its checkpoint.

    python tools/train_demo_backbone.py            # some ten minutes on one core

Pictures are made on the fly: polygons, boxes, ellipses and blobs of any size, brightness and
sharpness, alone or many together, on textures; no medical image and none of the demo's phantoms.
The network learns to outline the largest shape with SAM's first mask token, and all shapes, their
borders, and the smallest shape with the other three. It runs without prompts, as in federated
training.

Writes src/fedfms/models/vit_demo.safetensors in the layout of the official SAM checkpoints, and
vit_demo.json beside it, which says how it was made. Equal arguments give equal bytes on one machine
and one version of torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from fedfms.contracts.recipe import MASK_TOKENS, Recipe
from fedfms.models.build import SamSegmenter, build_model
from fedfms.models.sam import file_sha256

SIZE = 128  # pixels, square
TARGETS = ("largest", "all", "borders", "smallest")  # what the four mask tokens learn
TARGET_WEIGHTS = torch.tensor([1.0, 0.3, 0.3, 0.3])
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)  # SAM's, grey levels 0 to 255
PIXEL_STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)
GRAINS = (6, 16, 40, 80, 128)  # of the textures, from smooth to grainy, a side
WARMUP_STEPS = 50
VALIDATION_PICTURES = 240


# ---------------------------------------------------------------------------------------- pictures


def outline(rng: np.random.Generator, radius: float) -> list[tuple[float, float]]:
    """Corners (x, y) of a random shape of about this radius around (0, 0), in pixels."""
    kind = rng.choice(["polygon", "box", "ellipse", "blob", "star"])
    if kind == "box":
        half_width, half_height = radius * rng.uniform(0.5, 1.1, 2)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [half_width, half_height]
    else:
        count = {"polygon": rng.integers(3, 8), "star": 2 * rng.integers(4, 8)}.get(kind, 40)
        angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
        distance = np.ones(count)
        if kind == "polygon":
            angles = angles + rng.uniform(-0.3, 0.3, count)
        if kind == "star":
            distance[::2] = rng.uniform(0.4, 0.7)
        if kind == "blob":
            for wave in (2, 3, 4, 5):
                distance += rng.normal(0, 0.35 / wave) * np.cos(wave * angles + rng.uniform(0, 6.3))
        distance = np.clip(distance, 0.3, 1.6)[:, None]
        stretch = np.array([1.0, rng.uniform(0.35, 1.0)])
        corners = radius * distance * np.stack([np.cos(angles), np.sin(angles)], 1) * stretch
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [(float(x), float(y)) for x, y in corners @ rotation]


def shapes(rng: np.random.Generator) -> np.ndarray:
    """Which shape a pixel shows: (SIZE, SIZE) int, 0 for none."""
    many = rng.random() < 0.25
    count = int(rng.integers(8, 30)) if many else int(rng.integers(1, 7))
    radii = rng.uniform(3, 7, count) if many else rng.uniform(4, 22, count)
    radii[0] = rng.uniform(9, 15) if many else rng.uniform(10, 40)
    canvas = Image.new("I", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(canvas)
    for number in np.argsort(radii):  # the largest on top, so that it is seen whole
        x, y = rng.uniform(0.1 * SIZE, 0.9 * SIZE, 2)
        corners = [(x + dx, y + dy) for dx, dy in outline(rng, radii[number])]
        draw.polygon(corners, fill=int(number) + 1)
    return np.asarray(canvas)


def texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Noise of zero mean with this many grains a side: (SIZE, SIZE) float32, deviation 1."""
    grains = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    noise = np.asarray(grains.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def background(rng: np.random.Generator) -> np.ndarray:
    """A few regions of different brightness: (SIZE, SIZE) float32 around 0."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    centers = rng.uniform(0, SIZE, (int(rng.integers(1, 6)), 2))
    distance = (rows - centers[:, 0, None, None]) ** 2 + (columns - centers[:, 1, None, None]) ** 2
    levels = rng.normal(0, rng.choice([0.02, 0.12]), len(centers))
    return gaussian_filter(levels[distance.argmin(0)].astype(np.float32), rng.uniform(0, 3))


def picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its four targets.

    Returns:
        (3, SIZE, SIZE) float32, normalized with SAM's mean and standard deviation; and
        (4, SIZE / 2, SIZE / 2) float32, 0 or 1, in the order of TARGETS.
    """
    owner = shapes(rng)
    present, areas = np.unique(owner[owner > 0], return_counts=True)
    if len(present) == 0:
        return picture(rng)
    gray = background(rng) + rng.uniform(0, 0.08) * texture(rng, rng.choice(GRAINS))
    contrast = rng.choice([-1.0, 1.0]) * rng.uniform(0.15, 0.5)
    inner = rng.uniform(0, 0.08) * texture(rng, rng.choice(GRAINS))
    for number in present:  # alike, but not the same; a few of the opposite contrast
        sign = -1.0 if number != present[areas.argmax()] and rng.random() < 0.15 else 1.0
        where = owner == number
        gray[where] = 0.3 * gray[where] + sign * contrast * rng.uniform(0.7, 1.2) + inner[where]
    gray = gaussian_filter(gray, rng.uniform(0, 1.6))
    gray = gray + rng.uniform(0, 0.08) * texture(rng, 3)  # a slow change over the picture
    gray = gray + rng.uniform(0, 0.08) * rng.standard_normal(gray.shape, dtype=np.float32)
    gray = np.clip(rng.uniform(0.3, 0.7) + gray, 0, 1) ** rng.uniform(0.7, 1.5)
    colors = np.repeat(gray[None], 3, axis=0)
    if rng.random() < 0.4:  # stained tissue and photographs: brightness along a random color
        dark, bright = rng.uniform(0, 0.6, 3), rng.uniform(0.6, 1, 3)
        colors = dark[:, None, None] + (bright - dark)[:, None, None] * colors
        colors += 0.03 * rng.standard_normal(colors.shape)
    levels = 255 * np.clip(colors, 0, 1)
    normalized = (levels - PIXEL_MEAN[:, None, None]) / PIXEL_STD[:, None, None]

    anything = owner > 0
    borders = anything & ~np.logical_or.reduce(
        [binary_erosion(owner == number, iterations=2) for number in present]
    )
    targets = np.stack(
        [owner == present[areas.argmax()], anything, borders, owner == present[areas.argmin()]]
    )
    half = targets.reshape(len(TARGETS), SIZE // 2, 2, SIZE // 2, 2).mean((2, 4)) >= 0.5
    return normalized.astype(np.float32), half.astype(np.float32)


def batch(seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures number `first` to `first + count`: (count, 3, S, S) and (count, 4, S/2, S/2)."""
    pairs = [picture(np.random.default_rng([seed, first + i])) for i in range(count)]
    images, targets = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets))


# ---------------------------------------------------------------------------------------- training


def all_masks(model: SamSegmenter, images: Tensor) -> Tensor:
    """Logits of the four mask tokens themselves, before any head: (B, 4, M, M)."""
    embeddings = model.image_encoder(images)
    logits: Tensor = model.mask_decoder(embeddings, model.image_position, MASK_TOKENS)
    return logits


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE plus soft Dice loss of each token, weighted."""
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((0, 2, 3))
    probability = torch.sigmoid(logits)
    overlap = (probability * targets).sum((2, 3))
    dice = (2 * overlap + 1) / (probability.sum((2, 3)) + targets.sum((2, 3)) + 1)
    return ((bce + 1 - dice.mean(0)) * TARGET_WEIGHTS).sum()


@torch.no_grad()
def dice_of(model: SamSegmenter, seed: int) -> list[float]:
    """Mean Dice of each token over held-out pictures, at probability 0.5."""
    scores = []
    for first in range(0, VALIDATION_PICTURES, 24):
        images, targets = batch(seed + 1, first, 24)
        predicted = (all_masks(model, images) >= 0).float()
        overlap = (predicted * targets).sum((2, 3))
        scores.append((2 * overlap + 1e-6) / ((predicted + targets).sum((2, 3)) + 1e-6))
    return [round(float(value), 4) for value in torch.cat(scores).mean(0)]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> SamSegmenter:
    """The trained network, in evaluation mode; weights and pictures follow from the seed."""
    recipe = Recipe(  # several classes, so that every mask token learns; their head is not used
        method="fedsam",
        backbone="vit_demo",
        backbone_sha256="0" * 64,
        classes=TARGETS,
        rounds=1,
        image_size=SIZE,
        seed=seed,
    )
    model = build_model(recipe, None).train()
    assert isinstance(model, SamSegmenter)
    learning = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=learning_rate)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, steps)
        images, targets = batch(seed, step * batch_size, batch_size)
        optimizer.zero_grad()
        loss = loss_of(all_masks(model, images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s")
            sys.stdout.flush()
    model.eval()
    return model


def main() -> None:
    """Train, score on held-out pictures, write both files, print the line for config.py."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src/fedfms/models")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    started = time.process_time()
    model = train(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
    dice = dict(zip(TARGETS, dice_of(model, arguments.seed), strict=True))
    cpu_seconds = round(time.process_time() - started)
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("class_head.")
    }
    path = arguments.out / "vit_demo.safetensors"
    save_file(state, path)
    made = {
        "file": path.name,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "values": sum(tensor.numel() for tensor in state.values()),
        "made_by": "tools/train_demo_backbone.py",
        "data": "generic synthetic shapes on textures, made on the fly; no images of people",
        "image_size": SIZE,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "schedule": f"linear warm-up over {WARMUP_STEPS} steps, then cosine",
        "optimizer": "Adam, gradient norm clipped at 1",
        "loss": "BCE + soft Dice for each of SAM's four mask tokens",
        "mask_tokens": TARGETS,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "cpu_seconds": cpu_seconds,
        "held_out_dice": dice,
        "held_out_pictures": VALIDATION_PICTURES,
    }
    path.with_suffix(".json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"Dice on {VALIDATION_PICTURES} held-out pictures: {dice}; {cpu_seconds} CPU seconds")
    print(f"the SHA-256 of vit_demo in BACKBONES, src/fedfms/contracts/recipe.py: {made['sha256']}")


if __name__ == "__main__":
    main()
