"""What stands for the paper's code: FedMSA and FedSAM, from a description of what FedFMS does.

FedFMS has no licence, so nothing of it is here. Its networks are segment-anything's own modules,
with Medical-SAM-Adapter's adapters written from their paper, and its step does what it does, with
what it does for nothing: depth adapters that no slice runs and Adam holds nevertheless, all four
masks and the mask quality of which one mask is used, tokens x tokens logits kept for the backward
pass. `tests/unit/test_benchmarks.py` holds its logits and gradients against the product's under
`paper_compat`, and `make bench` its operations and its memory against what is known of the paper's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.models.sam import GEOMETRY, Sam
from fedfms.models.upstream import (
    ImageEncoderViT,
    MaskDecoder,
    window_partition,
    window_unpartition,
)

# 2 x multiply-adds of one step of ViT-B with one picture of 1024 pixels, and peak resident bytes:
# of the paper's own code, as it was measured once on two cores; it may not be copied
KNOWN_FLOPS = {"fedmsa": 2335e9, "fedsam": 2922e9}
KNOWN_BYTES = {"fedmsa": 9.6e9, "fedsam": 11.2e9}


class Adapter(nn.Module):
    """C to C / 4 to C, with GELU between; (..., C) to (..., C)."""

    def __init__(self, width: int, *, skip: bool) -> None:
        super().__init__()
        self.down, self.act = nn.Linear(width, width // 4), nn.GELU()
        self.up = nn.Linear(width // 4, width)
        self.skip = skip

    def forward(self, tokens: Tensor) -> Tensor:
        """The bottleneck, with its input added where it has a skip."""
        added = self.up(self.act(self.down(tokens)))
        return tokens + added if self.skip else added


class AdaptedBlock(nn.Module):
    """Upstream's block in Medical-SAM-Adapter's order: windows, then their normalization."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )
        self.window_size = block.window_size
        width = self.attn.proj.out_features
        self.space_adapter = Adapter(width, skip=True)
        self.mlp_adapter = Adapter(width, skip=False)
        self.depth_adapter = Adapter(width, skip=False)  # for volumes; never run

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        attended, grid = tokens, tokens.shape[1:3]
        if self.window_size > 0:
            attended, padded = window_partition(attended, self.window_size)
        attended = self.space_adapter(self.attn(self.norm1(attended)))
        if self.window_size > 0:
            attended = window_unpartition(attended, self.window_size, padded, grid)
        tokens = tokens + attended
        normed = self.norm2(tokens)
        return tokens + self.mlp(normed) + 0.5 * self.mlp_adapter(normed)


class Decoder(MaskDecoder):  # type: ignore[misc]
    """Upstream's, without the prompts' tokens and their dense embedding; the first mask is used."""

    def forward(self, embeddings: Tensor, position: Tensor, prompts: Tensor) -> Tensor:
        """(B, C, h, w), (1, C, h, w) and the prompts, of which the batch counts: (B, 1, 4h, 4w)."""
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = tokens.unsqueeze(0).expand(prompts.shape[0], -1, -1)
        position = torch.repeat_interleave(position, tokens.shape[0], dim=0)
        batch, channels, height, width = embeddings.shape
        tokens, pixels = self.transformer(embeddings, position, tokens)
        pixels = pixels.transpose(1, 2).view(batch, channels, height, width)
        upscaled = self.output_upscaling(pixels)
        kernels = torch.stack(
            [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        masks = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        self.iou_prediction_head(tokens[:, 0])
        return masks[:, :1]


class Baseline(nn.Module):
    """FedFMS's network of one class with random weights; `load` gives it the product's.

    Args:
        recipe: its method, backbone and sizes; one class, fp32.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        sam, size = Sam(recipe), GEOMETRY[recipe.backbone]
        ours = sam.image_encoder
        encoder = ImageEncoderViT(
            img_size=recipe.image_size,
            patch_size=recipe.patch_size,
            embed_dim=size.width,
            depth=BACKBONES[recipe.backbone].depth,
            num_heads=size.heads,
            norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
            out_chans=size.decoder_width,
            use_rel_pos=True,
            window_size=size.window,
            global_attn_indexes=size.global_blocks,
        )
        encoder.load_state_dict(ours.state_dict())
        if recipe.method == "fedmsa":
            encoder.blocks = nn.ModuleList(map(AdaptedBlock, encoder.blocks))
        self.adapted = recipe.method == "fedmsa"
        self.image_encoder, self.prompt_encoder = encoder, sam.prompt_encoder
        self.mask_decoder = Decoder(
            num_multimask_outputs=3,
            transformer=sam.mask_decoder.transformer,
            transformer_dim=size.decoder_width,
            iou_head_hidden_dim=size.decoder_width,
        )
        self.class_head = nn.Conv2d(4, 1, 1)  # not used with one class

    def load(self, state: dict[str, Tensor]) -> None:
        """The product's tensors by its names; what it does not have stays as it is."""
        missing, unknown = self.load_state_dict(state, strict=False)
        own = (".depth_adapter.", "class_head.")
        assert not unknown, unknown
        assert all(any(part in name for part in own) for name in missing), missing

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to logits (B, 1, S / 4, S / 4)."""
        batch = images.shape[0]
        embeddings = self.image_encoder(images)
        with torch.no_grad():
            point = torch.zeros(batch, 1, 2, device=images.device)
            sparse, _ = self.prompt_encoder((point, torch.ones_like(point[..., 0])), None, None)
        position = self.prompt_encoder.get_dense_pe()
        return self.mask_decoder(embeddings, position, sparse)  # type: ignore[no-any-return]


class BaselineStep:
    """Forward, binary cross-entropy, backward and Adam, as FedFMS runs them for every batch."""

    def __init__(self, model: Baseline) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        weight = torch.tensor([2.0], device=next(model.parameters()).device)
        self.loss = nn.BCEWithLogitsLoss(pos_weight=weight)

    def __call__(self, images: Tensor, target: Tensor) -> float:
        """One step over (B, 3, S, S) and (B, 1, M, M); its loss."""
        loss = self.backward(images, target)
        self.optimizer.step()
        return float(loss.item())

    def backward(self, images: Tensor, target: Tensor) -> Tensor:
        """All of a step but Adam's; the loss."""
        if self.model.adapted:
            for name, parameter in self.model.image_encoder.named_parameters():
                parameter.requires_grad = "_adapter." in name
        device = next(self.model.parameters()).device
        logits = self.model(images.to(device))
        loss = self.loss(logits, target.to(device))
        self.optimizer.zero_grad()
        loss.backward()
        return loss  # type: ignore[no-any-return]
