"""SAM's mask decoder without prompts, as FedFMS trains it: an image in, masks out."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfms.models.upstream import MaskDecoder


class PromptFreeMaskDecoder(MaskDecoder):  # type: ignore[misc]
    """Upstream's MaskDecoder run on its own tokens only, over a batch of images.

    No sparse prompt is appended and no dense prompt is added; mask quality is not predicted.
    """

    def forward(self, embeddings: Tensor, position: Tensor, masks: int) -> Tensor:
        """Logits of the first masks.

        Args:
            embeddings: (B, C, h, w), from the image encoder.
            position: (1, C, h, w), the prompt encoder's encoding of the same grid.
            masks: how many of the mask tokens to turn into masks, from the first on.

        Returns:
            (B, masks, 4 h, 4 w) logits.
        """
        batch = embeddings.shape[0]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = tokens.unsqueeze(0).expand(batch, -1, -1)
        tokens, pixels = self.transformer(embeddings, position, tokens)

        pixels = pixels.transpose(1, 2).reshape(embeddings.shape)
        upscaled = self.output_upscaling(pixels)
        kernels = torch.stack(  # token 0 predicts mask quality, which nobody asks for
            [self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in range(masks)], dim=1
        )
        return torch.einsum("bmc,bchw->bmhw", kernels, upscaled)
