"""Any model as one safetensors file: adapters, backbone, decoder, and the recipe in its metadata.

Unlike a results folder it needs no SAM checkpoint. `models.trained.load_trained` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from fedfms.bounded import MAX_HEADER_BYTES, json_object
from fedfms.contracts.site import Reading
from fedfms.exchange.tensors import CHECKSUM_KEY, NO_CHECKSUM, write_checksum
from fedfms.export.facts import TERMS_KEY, input_facts, site_facts, terms
from fedfms.models.trained import INPUT_KEY, RECIPE_KEY, Trained, whole_network


def write_fedfms(
    trained: Trained, site: Reading | None, file: Path
) -> tuple[tuple[str, ...], None]:
    """Write all tensors, the recipe, and how a site's files become pictures if it is given.

    Returns:
        sentences for the person who exports, and no difference: the tensors are the same.
    """
    metadata = {RECIPE_KEY: trained.recipe.to_json(), CHECKSUM_KEY: NO_CHECKSUM}
    if licence := terms(trained.recipe):
        metadata[TERMS_KEY] = licence
    if site is not None:
        facts = {**input_facts(trained.recipe), **site_facts(site)}
        metadata[INPUT_KEY] = json.dumps(facts)
    safetensors.torch.save_file(whole_network(trained.model), file, metadata=metadata)
    _sort_metadata(file)
    write_checksum(file)
    return (
        "It holds everything: no SAM checkpoint and no recipe.json are needed beside it.",
    ), None


def _sort_metadata(file: Path) -> None:
    """safetensors writes its keys in an order that changes, and the file's SHA-256 with it."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json_object(opened.read(size), str(file), max_bytes=MAX_HEADER_BYTES)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # the same letters in another order, and blanks
        opened.seek(8)
        opened.write(text.ljust(size))
