"""What of a network leaves a site: names, values out of it, values into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedfms.errors import CheckpointError
from fedfms.exchange.tensors import find_fault, shapes_of
from fedfms.models.segmenter import Segmenter
from fedfms.models.upstream import LayerNorm2d

# layers of normalization, whose parameters follow a site's contrast (FedBN, Li et al. 2021, arXiv
# 2102.07623)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, LayerNorm2d, _NormBase)


def travelling_names(model: Segmenter) -> tuple[str, ...]:
    """Names of the tensors that leave a site, sorted: what learns and does not stay."""
    return tuple(sorted(name for name in _learning(model) if not _stays(model, name)))


def staying_names(model: Segmenter) -> tuple[str, ...]:
    """Names of the tensors that learn and never leave the site, sorted."""
    return tuple(sorted(name for name in _learning(model) if _stays(model, name)))


def shared_at_first(model: Segmenter) -> tuple[str, ...]:
    """Names of those that travel until the recipe's `personal_after` and are a site's own then.

    They are in the global model, which no site moves in them from that round on; sorted.
    """
    if model.recipe.personal_after == 0:
        return ()
    return tuple(name for name in travelling_names(model) if _is_personal(model, name))


def read_travelling(model: Segmenter) -> dict[str, Tensor]:
    """Copies of the model's travelling tensors, fp32 on the CPU, by sorted name."""
    return _copies(model, travelling_names(model))


def read_staying(model: Segmenter) -> dict[str, Tensor]:
    """Copies of what learns and stays at the site, fp32 on the CPU, by sorted name."""
    return _copies(model, staying_names(model))


def write_travelling(model: Segmenter, tensors: Mapping[str, Tensor]) -> None:
    """Put received values into the model, in place; nothing is written unless all of them fit.

    Args:
        model: on any device.
        tensors: exactly the travelling tensors by name and shape; fp32 or fp16, finite.

    Raises:
        CheckpointError: code unknown-tensor, missing-tensor, wrong-shape, wrong-type or non-finite.
    """
    _write(model, travelling_names(model), tensors, "the received model")


def read_shared_at_first(model: Segmenter) -> dict[str, Tensor]:
    """Copies of `shared_at_first`, fp32 on the CPU, by sorted name."""
    return _copies(model, shared_at_first(model))


def write_shared_at_first(model: Segmenter, tensors: Mapping[str, Tensor]) -> None:
    """Put a site's own values of `shared_at_first` into the model; as `write_travelling`."""
    _write(model, shared_at_first(model), tensors, "what the site kept")


def read_own(model: Segmenter) -> dict[str, Tensor]:
    """Copies of all that is a site's own when a run is over: what stayed, and what did at last."""
    return {**read_staying(model), **read_shared_at_first(model)}


def write_own(model: Segmenter, tensors: Mapping[str, Tensor]) -> None:
    """Make the model that of a site; as `write_travelling`, of the names of `read_own`."""
    names = tuple(sorted({*staying_names(model), *shared_at_first(model)}))
    _write(model, names, tensors, "what the site kept")


def write_staying(model: Segmenter, tensors: Mapping[str, Tensor]) -> None:
    """Put what stayed at the site back into the model; as `write_travelling`."""
    _write(model, staying_names(model), tensors, "what the site kept")


def _learning(model: Segmenter) -> list[str]:
    learns, recipe = model.method.learns, model.recipe
    return [name for name, _ in model.named_parameters() if learns(name, recipe)]


def _stays(model: Segmenter, name: str) -> bool:
    if model.method.stays(name, model.recipe):
        return True
    return model.recipe.personal_after == 0 and _is_personal(model, name)


def _is_personal(model: Segmenter, name: str) -> bool:
    if model.recipe.personal == "adapters":
        return model.method.is_added(name, model.recipe)
    if model.recipe.personal == "norms":
        return isinstance(model.get_submodule(name.rpartition(".")[0]), _NORMS)
    return False


def _copies(model: Segmenter, names: tuple[str, ...]) -> dict[str, Tensor]:
    by_name = dict(model.named_parameters())
    return {name: by_name[name].detach().to("cpu", torch.float32, copy=True) for name in names}


def _write(
    model: Segmenter, names: tuple[str, ...], tensors: Mapping[str, Tensor], what: str
) -> None:
    by_name = dict(model.named_parameters())
    own = {name: by_name[name] for name in names}
    if fault := find_fault(shapes_of(own), tensors):
        code, problem = fault
        raise CheckpointError(
            f"{what} does not fit this recipe: {problem}",
            "use the same recipe and the same version of fedfms at the server and every site",
            code=code,
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
