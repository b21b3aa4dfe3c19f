"""Recipe to network: the one place where FedSAM and FedMSA differ."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import Recipe
from fedfms.models.adapters import add_adapters, is_adapter
from fedfms.models.sam import build_parts, load_backbone, load_checkpoint

MASK_TOKENS = 4  # of SAM's decoder; several classes are a mixture of their masks


class SamSegmenter(nn.Module):
    """SAM that segments without prompts: (B, 3, S, S) pictures to (B, K, M, M) logits.

    Tensors of SAM keep their official names. `class_head` exists only with several classes.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.method = recipe.method
        self.classes = recipe.classes
        self.encoder_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.image_encoder, self.prompt_encoder, self.mask_decoder = build_parts(
            recipe, norm_padding=recipe.paper_compat and recipe.method == "fedmsa"
        )
        self.class_head: nn.Conv2d | None = None
        self.image_position: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every class, before the sigmoid.

        Args:
            images: (B, 3, S, S) float, already normalized; S is the recipe's image_size.

        Returns:
            (B, K, M, M) float32; M is the recipe's mask_size.
        """
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.encoder_dtype == torch.bfloat16
        ):
            embeddings = self.image_encoder(images)
        embeddings = embeddings.float()
        if self.class_head is None:
            return self.mask_decoder(embeddings, self.image_position, 1)  # type: ignore[no-any-return]
        masks = self.mask_decoder(embeddings, self.image_position, MASK_TOKENS)
        return self.class_head(masks)  # type: ignore[no-any-return]

    def locate(self) -> None:
        """Work out the pixels' positions, (1, C, h, w); again after the prompt encoder changed."""
        with torch.no_grad():
            position = self.prompt_encoder.get_dense_pe()
        self.register_buffer("image_position", position, persistent=False)

    def train(self, mode: bool = True) -> SamSegmenter:
        """Training mode for the modules that hold a learning tensor; the others stay as they are.

        SAM has no layer that minds; a backbone with dropout or batch statistics would.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self


def build_model(recipe: Recipe, checkpoint: Path | None) -> SamSegmenter:
    """The network of a recipe on the CPU in fp32, with requires_grad where a tensor travels.

    Args:
        recipe: method, backbone, sizes, classes and seed.
        checkpoint: from `find_checkpoint`; None for random weights, as tests use them.

    What the checkpoint does not hold (adapters, the head of several classes) is drawn from the
    recipe's seed and therefore the same on every machine; with `start_draws` it is a mean of draws.

    Raises:
        CheckpointError: the file cannot be read or does not fit the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would leave every GPU with a seed that everybody knows
        torch.default_generator.manual_seed(recipe.seed)
        model = SamSegmenter(recipe)
        if checkpoint is not None:
            load_backbone(model, load_checkpoint(checkpoint))
        torch.default_generator.manual_seed(recipe.seed)
        if len(recipe.classes) > 1:  # drawn first, so that both methods start with the same head
            model.class_head = nn.Conv2d(MASK_TOKENS, len(recipe.classes), kernel_size=1)
        if recipe.method == "fedmsa":
            add_adapters(model.image_encoder, starts_as_zero=not recipe.paper_compat)
        if recipe.start_draws:
            _average_draws(model, recipe)
    model.locate()
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(_travels(name, recipe.method, len(recipe.classes)))
    return model


@torch.no_grad()
def _average_draws(model: SamSegmenter, recipe: Recipe) -> None:
    """Let the adapters and the head start as the weighted mean of independent draws.

    FedFMS averages its sites once before FedMSA trains, so that its start is such a mean over the
    sites, whose standard deviation is sqrt(sum of squared shares) of a single draw's. The draw that
    is there is the first. What starts as zero stays so.
    """
    drawn = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (name == "class_head" or is_adapter(name))
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


def travelling_names(model: SamSegmenter) -> tuple[str, ...]:
    """Names of the tensors that leave a site, sorted: exactly those that learn."""
    names = (name for name, _ in model.named_parameters())
    return tuple(sorted(n for n in names if _travels(n, model.method, len(model.classes))))


def _travels(name: str, method: str, classes: int) -> bool:
    """Whether a tensor learns and leaves a site, by the method and the number of classes alone.

    The decoder's `k_proj.bias` are among them, though softmax cancels what they add: their gradient
    is rounding noise (1e-12), and Adam moves them by some 1e-7 a step. They are SAM's, and leaving
    them out would save 0.01 % of the bytes.
    """
    part, _, rest = name.partition(".")
    if part == "class_head":
        return True
    if part == "mask_decoder":
        if rest.startswith("iou_prediction_head."):
            return False  # no loss asks for mask quality
        if rest.startswith("output_hypernetworks_mlps."):
            return classes > 1 or rest.startswith("output_hypernetworks_mlps.0.")
        return True
    if part == "image_encoder":
        return method == "fedsam" or is_adapter(name)
    return False  # the prompt encoder: there are no prompts
