"""Any model as one safetensors file: adapters, backbone, decoder, and the recipe in its metadata.

Unlike a results folder it needs no SAM checkpoint. `models.trained.load_trained` reads it.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from fedfms.exchange.trained import RECIPE_KEY, Trained, whole_network


def write_fedfms(trained: Trained, file: Path) -> tuple[str, ...]:
    """Write all tensors, fp32, and the recipe.

    Returns:
        sentences for the person who exports.
    """
    # one key alone: safetensors writes several in an order that changes, and the SHA-256 with it
    metadata = {RECIPE_KEY: trained.recipe.to_json()}
    safetensors.torch.save_file(whole_network(trained.model), file, metadata=metadata)
    return ("It holds everything: no SAM checkpoint and no recipe.json are needed beside it.",)
