"""Recipe to network. What a method adds and what learns, `fedfms.models.methods` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedfms.contracts.recipe import MASK_TOKENS, NO_BACKBONE, Recipe
from fedfms.errors import ConfigError
from fedfms.models.methods import Method, find_method
from fedfms.models.sam import Sam, load_backbone, load_checkpoint
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import shared_at_first, staying_names, travelling_names


class SamSegmenter(Segmenter):
    """SAM that segments without prompts: (B, C, S, S) pictures to (B, K, M, M) logits.

    Args:
        recipe: the job's.
        method: as in `Segmenter`.
        sam: its parts, which become this network's under the same names; the method has added what
            it adds.
        class_head: (B, MASK_TOKENS, M, M) to (B, K, M, M), a mixture of all masks; None with one
            class.
        contrast_mix: (B, C, S, S) to (B, 3, S, S); None where the recipe names no contrasts.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        sam: Sam,
        class_head: nn.Conv2d | None,
        contrast_mix: ContrastMix | None = None,
    ) -> None:
        super().__init__(recipe, method)
        self.encoder_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.image_encoder = sam.image_encoder
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.class_head = class_head
        self.contrast_mix = contrast_mix
        self.image_position: Tensor  # of the pixels, (1, C, h, w); the prompt encoder's
        self.register_buffer("image_position", _positions(self.prompt_encoder), persistent=False)
        self.register_load_state_dict_post_hook(_locate)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor, *, from_prefix: bool = False) -> Tensor:
        """Logits of every class, before the sigmoid.

        Args:
            images: (B, C, S, S) float, already normalized; S is the recipe's image_size, C the
                number of its contrasts, or 3.
            from_prefix: `images` is what `prefix` made of them.

        Returns:
            (B, K, M, M) float32; M is the recipe's mask_size.
        """
        embeddings = self._embeddings(images, from_prefix)
        if self.class_head is None:
            return self.mask_decoder(embeddings, self.image_position, 1)  # type: ignore[no-any-return]
        masks = self.mask_decoder(embeddings, self.image_position, MASK_TOKENS)
        return self.class_head(masks)  # type: ignore[no-any-return]

    def prefix(self, images: Tensor) -> Tensor:
        """What goes into the first block that learns, (B, H, W, C), or the embeddings if none does.

        In bf16 where the encoder computes in bf16, for training, scores and predict alike; in fp32,
        and exact, where it does not.
        """
        assert self.frozen_blocks is not None
        return self._encoded(images, before=self.frozen_blocks).to(self.encoder_dtype)

    def hold_frozen(self) -> None:
        """Keep what of the encoder is frozen in the recipe's precision, for good: half the memory.

        Nothing of it travels. A network that is written down whole is built anew, and not held so.
        """
        for name, parameter in self.image_encoder.named_parameters():
            if not parameter.requires_grad and _is_rounded(name):
                parameter.data = parameter.data.to(self.encoder_dtype)

    def _embeddings(self, given: Tensor, from_prefix: bool) -> Tensor:
        """(B, C, h, w) float32, of images or of what `prefix` made of them."""
        if self.contrast_mix is not None:  # then nothing is frozen before what learns
            given = self.contrast_mix(given)
        if self.frozen_blocks is None:
            return self._encoded(given)
        tokens = given if from_prefix else self.prefix(given)
        return self._encoded(tokens, after=self.frozen_blocks).float()

    def _encoded(self, given: Tensor, **part: int) -> Tensor:
        """A part of the encoder. In bf16 the stream of tokens is bf16 too, and so its gradient.

        What learns stays fp32; its gradient goes through the rounding as if that were not there.
        """
        encoder = self.image_encoder
        if self.encoder_dtype == torch.float32:
            return encoder(given, **part)  # type: ignore[no-any-return]
        rounded = {
            name: parameter.to(self.encoder_dtype)
            for name, parameter in encoder.named_parameters()
            if _is_rounded(name)
        }
        return functional_call(encoder, rounded, (given.to(self.encoder_dtype),), part)  # type: ignore[no-any-return]


class ContrastMix(nn.Module):
    """(B, C, S, S) contrasts to the three channels that SAM's first layer has: a 1 x 1 convolution.

    It starts as a plain share-out: contrast i goes to channel i mod 3, and a channel that several
    share has their mean; with one contrast all channels are it, with two the third is their mean.
    Zeros, which fill a slice up to a square, stay zeros: there is no bias.
    """

    def __init__(self, contrasts: int) -> None:
        super().__init__()
        weight = torch.zeros(3, contrasts)
        for channel in range(3):
            mine = [n for n in range(contrasts) if n % 3 == channel] or list(range(contrasts))
            weight[channel, mine] = 1.0 / len(mine)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        """As of the class."""
        return nn.functional.conv2d(images, self.weight[:, :, None, None])


def _is_rounded(name: str) -> bool:
    """Whether a tensor of the encoder is used in bf16: all but its neck, next to no work."""
    return not name.startswith("neck.")


def hold_frozen(model: nn.Module) -> None:
    """`SamSegmenter.hold_frozen`, of a network that has it."""
    if isinstance(model, SamSegmenter):
        model.hold_frozen()


def build_model(recipe: Recipe, checkpoint: Path | None) -> Segmenter:
    """The network of a recipe on the CPU in fp32, with requires_grad where a tensor learns.

    Args:
        recipe: method, backbone, sizes, classes and seed.
        checkpoint: from `find_checkpoint`; None for random weights, as tests use them, and for a
            method whose network is not SAM.

    What the checkpoint does not hold (adapters, the head of several classes) is drawn from the
    recipe's seed and therefore the same on every machine; with `start_draws` it is a mean of draws.

    Raises:
        ConfigError: unknown-part, ambiguous-part, broken-part, nothing-travels, nothing-personal,
            method-and-backbone: the method does not go with the recipe's backbone, or
            method-and-adapters: nor with its adapter_blocks.
        CheckpointError: the file cannot be read or does not fit the backbone.
    """
    method = find_method(recipe.method)
    _check_backbone(method, recipe)
    _check_adapters(method, recipe)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would leave every GPU with a seed that everybody knows
        torch.default_generator.manual_seed(recipe.seed)
        model = _on_sam(recipe, method, checkpoint) if method.uses_sam else method.network(recipe)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(method.learns(name, recipe))
    if isinstance(model, SamSegmenter):
        model.frozen_blocks = _frozen_blocks(model)
    if not travelling_names(model):
        raise ConfigError(
            f"the method {method.name} lets nothing travel",
            "report this to whoever wrote the method: nothing could be learnt together",
            code="nothing-travels",
        )
    if recipe.personal != "none" and not (staying_names(model) or shared_at_first(model)):
        raise ConfigError(
            f"personal is {recipe.personal}, and of what {method.name} trains nothing is such",
            "leave personal out, or train a method that has them, such as fedmsa",
            code="nothing-personal",
        )
    return model


def _on_sam(recipe: Recipe, method: Method, checkpoint: Path | None) -> SamSegmenter:
    sam = Sam(recipe)
    if checkpoint is not None:
        load_backbone(sam, load_checkpoint(checkpoint))
    _begin_with(recipe.mask_token, sam)
    of_sam = {name for name, _ in sam.named_parameters()}
    torch.default_generator.manual_seed(recipe.seed)
    head: nn.Conv2d | None = None
    if len(recipe.classes) > 1:  # drawn first, so that all methods start with the same head
        head = nn.Conv2d(MASK_TOKENS, len(recipe.classes), kernel_size=1)
    method.add(sam.image_encoder, recipe)
    mix = ContrastMix(len(recipe.contrasts)) if recipe.contrasts else None
    model = SamSegmenter(recipe, method, sam, head, mix)
    if recipe.start_draws:
        _average_draws(model, of_sam, recipe)
    return model


@torch.no_grad()
def _begin_with(token: int, sam: Sam) -> None:
    """Let one of SAM's mask tokens and the first change places, with all that makes their masks.

    A single class is the first mask, so that all that comes after is as with the first token: what
    learns, what travels, and a SAM that is exported.
    """
    if token == 0:
        return
    decoder = sam.mask_decoder
    quality = decoder.iou_prediction_head.layers[-1]
    for tensor in (decoder.mask_tokens.weight, quality.weight, quality.bias):
        tensor[[0, token]] = tensor[[token, 0]]
    mlps = decoder.output_hypernetworks_mlps
    mlps[0], mlps[token] = mlps[token], mlps[0]


@torch.no_grad()
def _average_draws(model: nn.Module, of_sam: set[str], recipe: Recipe) -> None:
    """Let what was added to SAM start as the weighted mean of independent draws.

    FedFMS averages its sites once before FedMSA trains, so that its start is such a mean over the
    sites, whose standard deviation is sqrt(sum of squared shares) of a single draw's. The draw that
    is there is the first. What starts as zero stays so.
    """
    drawn = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and f"{name}.weight" not in of_sam
        and not bool((module.weight == 0).all())
    ]
    tensors = [tensor for module in drawn for tensor in module.parameters()]
    total = sum(recipe.start_draws)
    mean = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    for number, weight in enumerate(recipe.start_draws):
        if number > 0:
            for module in drawn:
                module.reset_parameters()
        for one, tensor in zip(mean, tensors, strict=True):
            one.add_(tensor, alpha=weight / total)
    for one, tensor in zip(mean, tensors, strict=True):
        tensor.copy_(one)


def _check_backbone(method: Method, recipe: Recipe) -> None:
    if method.uses_sam == (recipe.backbone != NO_BACKBONE):
        return
    raise ConfigError(
        f"the method {method.name} "
        + ("starts from SAM" if method.uses_sam else "has a network of its own")
        + f", and the recipe's backbone is {recipe.backbone}",
        "set backbone to a SAM, such as vit_b" if method.uses_sam else "set backbone to none",
        code="method-and-backbone",
    )


def _check_adapters(method: Method, recipe: Recipe) -> None:
    if method.places_adapters or recipe.frozen_blocks is None:
        return
    raise ConfigError(
        f"adapter_blocks is {recipe.adapter_blocks}, and the method {method.name} has no adapters",
        "leave adapter_blocks out, or train fedmsa",
        code="method-and-adapters",
    )


def _frozen_blocks(model: SamSegmenter) -> int | None:
    """Encoder blocks before the first that learns; None where that is the first of all."""

    def learns(part: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in part.parameters())

    if model.contrast_mix is not None and learns(model.contrast_mix):
        return None
    encoder = model.image_encoder
    if not learns(encoder):
        return len(encoder.blocks)
    in_blocks = [number for number, block in enumerate(encoder.blocks) if learns(block)]
    within = {id(parameter) for block in encoder.blocks for parameter in block.parameters()}
    outside = [parameter for parameter in encoder.parameters() if id(parameter) not in within]
    if not in_blocks or any(parameter.requires_grad for parameter in outside):
        return None
    return in_blocks[0] or None


def _positions(prompt_encoder: Any) -> Tensor:
    with torch.no_grad():
        return prompt_encoder.get_dense_pe()  # type: ignore[no-any-return]


def _locate(model: nn.Module, incompatible_keys: Any) -> None:
    """The positions again, after the prompt encoder was loaded."""
    assert isinstance(model, SamSegmenter)  # it registers this hook itself
    model.image_position.copy_(_positions(model.prompt_encoder))
