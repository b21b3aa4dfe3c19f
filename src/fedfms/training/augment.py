"""Augmentation: a training slice as another pose, another scanner or another day would give it.

What is drawn for a slice follows from the site's secret, the recipe's seed, the round, the epoch
and the slice alone. So whoever computes it, worker, rank or a process that starts again, gets the
same bits, and what one patient's slices become says nothing of who else is there. Pictures change
as 8-bit levels at the size of the network's input, masks at the size of its output, by one grid.
Void pixels are one more mask. What comes in from beyond a slice's edge is padding, as what lies
right of it or below: zeros in the network's input, background in its masks, and never void.

MONAI has most of these transforms, and the tests hold ours to its arithmetic. It is not in the
hospital's image for it: its random transforms keep a generator of 32 bits, seeded a process and
not a slice, and it would add a package and seconds of imports for some lines of torch.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from fedfms.contracts.recipe import AUGMENTATIONS, Recipe
from fedfms.data.slices import Levels, Slices, located
from fedfms.geometry import Part, mask_of_cover, normalised, resized_anywhere

_BENDS = 6  # control points a side of an elastic deformation
_KNOTS = 6  # of a random mapping of grey levels
_DEGREE = 3  # of a bias field's polynomial, as in MONAI's RandBiasField
_FIELD = 64  # points a side of a bias field, which is smooth, before it is resized
_TRUNCATED = 4.0  # standard deviations of a Gaussian's kernel, as MONAI's
# bytes that changing one slice takes at most, for a number of its picture and for its grid's places
_OF_A_NUMBER, _OF_A_PLACE = 20, 48

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Tone:
    """What becomes of grey levels. They are of 0 to 255, whatever of these a slice shows."""

    inverted: bool = False
    gamma: float = 1.0
    # of each colour, or of all: share of a mapping through these values at equal distances
    mapping: tuple[float, NDArray[np.float64]] | None = None  # (1 or 3, 6) in [0, 1]

    @property
    def changes(self) -> bool:
        """Whether any level becomes another."""
        return self.inverted or self.gamma != 1.0 or self.mapping is not None

    def words(self) -> list[str]:
        """What it does, for people."""
        said = [
            ("inverted", self.inverted),
            (f"gamma {self.gamma:.2f}", self.gamma != 1.0),
            (f"contrast {self.mapping[0] if self.mapping else 0:.2f}", self.mapping is not None),
        ]
        return [text for text, holds in said if holds]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is done to one slice: first to its grey levels, then to its place, then as a scanner.

    What is done to its place is the same for all its channels.
    """

    # of all channels; or of several contrasts one each, since each is a recording of its own
    tones: tuple[Tone, ...] = (Tone(),)
    flips: tuple[bool, bool] = (False, False)  # of rows (upside down), of columns
    degrees: float = 0.0  # counter-clockwise as seen
    scale: float = 1.0  # above 1: larger
    bends: Floats | None = None  # (2, 6, 6): to the right and down, as shares of the longer side
    bias: Floats | None = None  # (10,) coefficients of the logarithm, the constant one 0
    blur: float = 0.0  # standard deviation, as a share of the longer side
    noise: float = 0.0  # standard deviation, as a share of the grey range
    seed: int = 0  # of the noise

    @property
    def moves(self) -> bool:
        """Whether masks change, too."""
        return any(self.flips) or self.bent

    @property
    def bent(self) -> bool:
        """Whether pixels come to lie between others."""
        return self.degrees != 0.0 or self.scale != 1.0 or self.bends is not None

    def words(self, contrast: int = 0) -> list[str]:
        """What it does, for people; of several contrasts to this one."""
        said = [
            ("upside down", self.flips[0]),
            ("mirrored", self.flips[1]),
            (f"turned {self.degrees:.0f}°", self.degrees != 0.0),
            (f"scaled {self.scale:.2f}", self.scale != 1.0),
            ("bent", self.bends is not None),
            ("bias field", self.bias is not None),
            (f"blurred {1e3 * self.blur:.1f} ‰", self.blur != 0.0),
            (f"noise {100 * self.noise:.1f} %", self.noise != 0.0),
        ]
        return self.tones[contrast].words() + [text for text, holds in said if holds]


def draw(recipe: Recipe, generator: np.random.Generator, channels: int = 1) -> Change:
    """A change by the recipe's strengths.

    All numbers are drawn whatever is off, so that what one strength is moves none of the others.

    Args:
        channels: 3 where each has a random mapping of its own, as the colours of a picture. The
            recipe's contrasts have a tone of their own each.
    """

    def applies() -> bool:
        return bool(generator.random() < recipe.augment_probability)

    def either_way(most: float) -> float:
        return float(generator.uniform(-most, most))

    def factor(most: float) -> float:
        return math.exp(either_way(math.log(most)))

    def tone() -> Tone:
        inverted = bool(generator.random() < recipe.augment_inversion)
        does, gamma = applies(), factor(recipe.augment_gamma)
        gamma = gamma if does else 1.0
        does, share = applies(), float(generator.uniform(0, recipe.augment_contrast))
        knots = generator.uniform(size=(3, _KNOTS))[:channels]
        return Tone(inverted, gamma, (share, knots) if does and share > 0 else None)

    tones = tuple(tone() for _ in range(max(1, len(recipe.contrasts))))
    coins = generator.random(2) < 0.5
    allowed = recipe.augment_flips
    does, degrees = applies(), either_way(recipe.augment_rotation)
    degrees = degrees if does else 0.0
    does, scale = applies(), factor(recipe.augment_scale)
    scale = scale if does else 1.0
    does, most = applies(), recipe.augment_elastic
    bends = generator.uniform(-most, most, (2, _BENDS, _BENDS)).astype(np.float32)
    bends_or_none = bends if does and most > 0 else None
    does, most = applies(), recipe.augment_bias
    bias = generator.uniform(-most, most, (_DEGREE + 1) * (_DEGREE + 2) // 2).astype(np.float32)
    bias[0] = 0.0  # how bright all is says gamma
    bias_or_none = bias if does and most > 0 else None
    does, blur = applies(), float(generator.uniform(0, recipe.augment_blur))
    blur = blur if does else 0.0
    does, noise = applies(), float(generator.uniform(0, recipe.augment_noise))
    noise = noise if does else 0.0
    return Change(
        tones=tones,
        flips=(
            bool(coins[0]) and allowed in ("vertical", "both"),
            bool(coins[1]) and allowed in ("horizontal", "both"),
        ),
        degrees=degrees,
        scale=scale,
        bends=bends_or_none,
        bias=bias_or_none,
        blur=blur,
        noise=noise,
        seed=int(generator.integers(2**62)),
    )


# ------------------------------------------------------------------------------- pictures and masks


def change_picture(picture: Tensor, change: Change) -> tuple[Tensor, Tensor | None]:
    """A slice's levels after a change.

    Of several contrasts one that is black throughout stays so, as it is where a case lacks it.

    Args:
        picture: (1, 3 or contrasts, h, w) uint8, as it covers the network's input.

    Returns:
        as the picture, on its device; and (h, w) bool, what of it was in the slice. Elsewhere the
        picture's edge goes on, and the network is to see padding. None: all was.
    """
    values = _mapped(picture, change)
    values, inside = _moved(values, change)
    if change.bias is not None:
        values = values * _bias_field(change.bias, values.shape[1], values.shape[2], values.device)
    if change.blur:
        values = gaussian_blur(values, change.blur * max(values.shape[1:]))
    if change.noise:
        values = values + 255.0 * change.noise * _normal(values.shape, change.seed, values.device)
    if len(change.tones) > 1:
        values = values * (picture.amax(dim=(1, 2), keepdim=True) > 0)
    return values.round_().clamp_(0, 255).to(torch.uint8), inside


def change_masks(target: Tensor, rows: int, columns: int, change: Change) -> Tensor:
    """The masks of a slice after a change, by the same rule for thin objects as `mask_target`.

    Args:
        target: (K, M, M) bool; a plane of void pixels is one more, by the same rule.
        rows, columns: that the slice covers, from the upper left; outside nothing is foreground,
            and nothing void.
    """
    if not change.moves:
        return target
    moved, inside = _moved(target[:, :rows, :columns].float(), change)
    changed = torch.zeros_like(target)
    part = changed[:, :rows, :columns]
    if inside is None:
        part.copy_(moved > 0.5)
    else:
        part.copy_(mask_of_cover(moved * inside))
    return changed


def _mapped(picture: Tensor, change: Change) -> Tensor:
    """(C, h, w) uint8 to float32 in [0, 255], through a table of all 256 levels."""
    if not any(tone.changes for tone in change.tones):
        return picture.float()
    table = torch.from_numpy(level_table(change)).to(picture.device)
    if len(table) == 1:
        return table[0][picture.long()]
    return torch.stack([one[part.long()] for one, part in zip(table, picture, strict=True)])


def level_table(change: Change) -> Floats:
    """(1, 3 or contrasts, 256) float32 in [0, 255]: what becomes of each level.

    First the random mapping, a broken line through values at equal distances, of which a share is
    taken; then the power; then the inversion.
    """
    return np.concatenate([_table_of_tone(tone) for tone in change.tones])


def _table_of_tone(tone: Tone) -> Floats:
    level = np.linspace(0.0, 1.0, 256)[None]
    if tone.mapping is not None:
        share, knots = tone.mapping
        places = np.linspace(0.0, 1.0, knots.shape[1])
        line = np.stack([np.interp(level[0], places, values) for values in knots])
        level = (1.0 - share) * level + share * line
    level = level**tone.gamma
    return (255.0 * (1.0 - level if tone.inverted else level)).astype(np.float32)


def _moved(values: Tensor, change: Change) -> tuple[Tensor, Tensor | None]:
    """(C, h, w) float32, mirrored and then sampled at the grid; and what of it lay inside."""
    flipped = [axis for axis, flips in zip((1, 2), change.flips, strict=True) if flips]
    if flipped:
        values = torch.flip(values, flipped)
    if not change.bent:
        return values, None
    grid = _grid(values.shape[1], values.shape[2], change, values.device)
    sampled = F.grid_sample(values[None], grid[None], padding_mode="border", align_corners=False)
    return sampled[0], grid.abs().amax(dim=-1) <= 1.0


def _grid(rows: int, columns: int, change: Change, device: torch.device) -> Tensor:
    """(rows, columns, 2) float32: where each pixel comes from, as `grid_sample` takes it.

    One product or sum of two numbers at a time: where they are fused depends on a machine's cores.
    """
    longer = max(rows, columns)
    right = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) - columns / 2
    down = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) - rows / 2
    cosine = math.cos(math.radians(change.degrees)) / change.scale
    sine = math.sin(math.radians(change.degrees)) / change.scale
    from_right = (right * cosine)[None, :] - (down * sine)[:, None]
    from_down = (right * sine)[None, :] + (down * cosine)[:, None]
    if change.bends is not None:
        control = torch.from_numpy(change.bends).to(device)[None]
        bent = F.interpolate(control, size=[rows, columns], mode="bicubic", align_corners=False)[0]
        from_right, from_down = from_right + bent[0] * longer, from_down + bent[1] * longer
    return torch.stack([from_right * (2.0 / columns), from_down * (2.0 / rows)], dim=-1)


def _bias_field(coefficients: Floats, rows: int, columns: int, device: torch.device) -> Tensor:
    """(1, rows, columns) float32 factors: exp of a polynomial over [-1, 1] x [-1, 1].

    Of all Legendre polynomials to the third degree, as Van Leemput et al. 1999 (IEEE TMI 18:885)
    and MONAI's RandBiasField.
    """
    place = np.linspace(-1.0, 1.0, _FIELD)
    powers = [
        np.polynomial.legendre.legval(place, np.eye(_DEGREE + 1)[degree])
        for degree in range(_DEGREE + 1)
    ]
    total = np.zeros((_FIELD, _FIELD))
    pairs = [(i, j) for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i)]
    for coefficient, (i, j) in zip(coefficients.tolist(), pairs, strict=True):
        total += coefficient * powers[i][:, None] * powers[j][None, :]
    field = torch.from_numpy(np.exp(total).astype(np.float32)).to(device)[None, None]
    return F.interpolate(field, size=[rows, columns], mode="bilinear", align_corners=True)[0]


def gaussian_blur(values: Tensor, sigma: float) -> Tensor:
    """(C, h, w) float32, by a Gaussian of `sigma` pixels; beyond the edge its values go on.

    A sum of shifted pictures, in one order: what a library's convolution adds first depends on
    machine and threads.
    """
    radius = max(1, math.ceil(_TRUNCATED * sigma))
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-radius, radius + 1)]
    whole = sum(weights)
    for axis, padding in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        padded = F.pad(values[None], padding, mode="replicate")[0]
        size = values.shape[axis]
        blurred = torch.zeros_like(values)
        for step, weight in enumerate(weights):
            blurred += padded.narrow(axis, step, size) * (weight / whole)
        values = blurred
    return values


def _normal(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Standard normal float32; of a GPU by its own generator, which takes all of the seed."""
    if device.type == "cpu":
        drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
        return torch.from_numpy(drawn)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(list(shape), generator=generator, device=device)


def bytes_of_change(recipe: Recipe) -> int:
    """That changing one slice after the other takes beside the batch: the memory plan's part.

    All pictures of the batch after their change, what of them lay inside, and what the one that is
    being changed needs. 0 of a recipe that augments nothing.
    """
    if not recipe.augment:
        return 0
    places = recipe.image_size**2
    numbers = places * (len(recipe.contrasts) or 3)
    return recipe.batch_size * (numbers + places) + _OF_A_NUMBER * numbers + _OF_A_PLACE * places


# ------------------------------------------------------------------------------ slices of a round


class Variation:
    """How the slices of a round vary.

    Args:
        dataset: whose slices they are.
        recipe: for its strengths and its seed.
        round_number: from 0.
        secret: of the site, as of `train_round`; None: who knows the recipe knows what is drawn.
        variants: of a slice, which come in turn; None: each turn has one of its own.
    """

    def __init__(
        self,
        dataset: Slices,
        recipe: Recipe,
        round_number: int,
        secret: bytes | None = None,
        variants: int | None = None,
    ) -> None:
        self._dataset, self._recipe, self._secret = dataset, recipe, secret
        self._variants = variants
        if recipe.patient_rate is None:
            self._steps_a_turn = math.ceil(len(dataset) / recipe.batch_size)
            self._first = round_number * recipe.local_epochs
        else:  # who is in a step is drawn: each step is a turn
            self._steps_a_turn = 1
            self._first = round_number * recipe.steps_of_patients

    @classmethod
    def of(
        cls,
        dataset: Slices,
        recipe: Recipe,
        round_number: int,
        secret: bytes | None,
        *,
        keeps: bool = False,
    ) -> Variation | None:
        """None for a recipe that augments nothing.

        Args:
            keeps: whether what a frozen part makes of slices is kept, so that there are few of
                each.
        """
        if not recipe.augment:
            return None
        variants = recipe.augment_variants if keeps else None
        return cls(dataset, recipe, round_number, secret, variants)

    def turn(self, step: int) -> int:
        """In which turn of all rounds a step of this round is, or which variant it has."""
        turn = self._first + step // self._steps_a_turn
        return turn if self._variants is None else turn % self._variants

    def turns(self, order: Sampler[list[int]]) -> _Turns:
        """The same batches, of pairs of item and turn."""
        return _Turns(order, self)

    def change(self, item: int, turn: int) -> Change:
        """What becomes of an item of the dataset."""
        dataset, _ = located(self._dataset, item)
        digest = int.from_bytes(self._digest(item, turn), "big")
        generator = np.random.Generator(np.random.PCG64(digest))
        in_colours = dataset.site.channels == "rgb" and not self._recipe.contrasts
        return draw(self._recipe, generator, 3 if in_colours else 1)

    def name(self, item: int, turn: int) -> str:
        """Of all that decides a change, 32 hexadecimal digits."""
        strengths = {key: getattr(self._recipe, key) for key in AUGMENTATIONS}
        how = f"{strengths} {self._recipe.augment_flips} {self._recipe.augment_probability}"
        return hashlib.sha256(self._digest(item, turn) + how.encode()).hexdigest()[:32]

    def _digest(self, item: int, turn: int) -> bytes:
        """By the slice's content, not its number, which other patients could move."""
        dataset, place = located(self._dataset, item)
        number, index = dataset.slices[place]
        name = dataset.names[number]
        part = dataset.picture(place)[0]
        which = f"{index} at {part.tile[:2]}" if isinstance(part, Part) else f"{index}"
        text = f"turn {turn} of slice {which} of {name}, seed {self._recipe.seed}".encode()
        if self._secret is None:
            return hashlib.sha256(text).digest()
        return hmac.digest(self._secret, text, "sha256")  # RFC 2104


class _Turns(Sampler[list[tuple[int, int]]]):
    """See `Variation.turns`."""

    def __init__(self, order: Sampler[list[int]], variation: Variation) -> None:
        self._order, self._variation = order, variation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, items in enumerate(self._order):
            turn = self._variation.turn(step)
            yield [(item, turn) for item in items]


def changed_pictures(
    pictures: Sequence[Tensor],
    covered: Sequence[tuple[int, int]],
    changes: Sequence[Change],
    recipe: Recipe,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Slices of any sizes as the network's input will have them, after their changes.

    Args:
        pictures: (1, 3 or contrasts, h, w) uint8 each, on the device.
        covered: rows and columns of the input that each covers.

    Returns:
        pictures of those sizes, and of each what was in the slice, see `change_picture`.
    """
    changed, insides = [], []
    for picture, (rows, columns), change in zip(pictures, covered, changes, strict=True):
        if picture.shape[1:] != (rows, columns):
            picture = resized_anywhere(picture, rows, columns, not recipe.paper_compat)
        picture, inside = change_picture(picture, change)
        changed.append(picture)
        insides.append(inside)
    return changed, insides


def pad_outside(image: Tensor, insides: Sequence[Tensor | None]) -> None:
    """Make padding, in place, of what was in no slice.

    Args:
        image: (B, C, S, S) float32, the network's input.
        insides: of each, see `change_picture`.
    """
    for one, inside in zip(image, insides, strict=True):
        if inside is not None:
            one[:, : inside.shape[0], : inside.shape[1]] *= inside


def changed_targets(
    targets: Tensor, covered: Sequence[tuple[int, int]], changes: Sequence[Change], recipe: Recipe
) -> Tensor:
    """(B, K, M, M) bool of slices, void pixels with them, after their changes.

    See `changed_pictures`.
    """
    patch = recipe.image_size // recipe.mask_size
    return torch.stack(
        [
            change_masks(target, rows // patch, columns // patch, change)
            for target, (rows, columns), change in zip(targets, covered, changes, strict=True)
        ]
    )


def changed_item(levels: Levels, change: Change, recipe: Recipe) -> dict[str, Tensor]:
    """An item of a `SliceDataset` after a change, from its levels as they were resized."""
    picture, covered, target, annotated = levels
    picture, inside = change_picture(picture, change)
    image = normalised(picture, recipe)
    pad_outside(image[None], [inside])
    changed = changed_targets(target[None], [covered], [change], recipe)[0]
    return {"image": image, "target": changed.float(), "annotated": annotated.clone()}
