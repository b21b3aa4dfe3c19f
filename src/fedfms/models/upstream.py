"""The parts of the pinned `segment-anything` package that we build on; imported here only."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types

log = logging.getLogger(__name__)


def _make_importable() -> None:
    """Let `segment_anything.modeling` be imported, with or without a working torchvision.

    The package's own `__init__` imports torchvision for its predictor, which we do not use. Where
    that fails, an empty package of the same name and place takes its part.
    """
    try:
        importlib.import_module("segment_anything")
    except (ImportError, RuntimeError, OSError) as error:  # what a missing or unfit one raises
        spec = importlib.util.find_spec("segment_anything")
        if spec is None or spec.submodule_search_locations is None:
            raise
        log.debug("segment_anything is used without its predictor: %s", error)
        shell = types.ModuleType("segment_anything")
        shell.__spec__ = spec
        shell.__path__ = list(spec.submodule_search_locations)
        sys.modules["segment_anything"] = shell


_make_importable()

from segment_anything.modeling import (  # noqa: E402 - only importable from here on
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d  # noqa: E402
from segment_anything.modeling.image_encoder import (  # noqa: E402
    get_rel_pos,
    window_partition,
    window_unpartition,
)

__all__ = [
    "ImageEncoderViT",
    "LayerNorm2d",
    "MaskDecoder",
    "PromptEncoder",
    "TwoWayTransformer",
    "get_rel_pos",
    "window_partition",
    "window_unpartition",
]
