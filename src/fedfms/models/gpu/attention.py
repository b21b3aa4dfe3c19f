"""Attention with relative positions by the kernels of source.py, where a GPU has them and may.

A kernel is used on a GPU only after it gave there, once in each process and for each size, what the
folded form gives: outputs and gradients. Whatever goes wrong before that is a reason, said in one
line, and the folded form is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedfms.contracts.machine import Machine
from fedfms.models.gpu.driver import launch
from fedfms.models.gpu.kernels import DTYPES, kernel_for
from fedfms.models.positions import add_from_places, to_places

log = logging.getLogger(__name__)

COLUMNS = range(17, 65)  # of a grid; where fewer, torch's kernels lose little
HEAD_DIMS = (32, 64)
LEAST_CAPABILITY = (8, 0)  # tensor cores for bf16 and TF32
# relative L2 distance from the folded form on random numbers: either rounds factors to 8 or 11 bits
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 5e-3}

# queries, keys and values (3, Z, H W, D), tables (H, H, D) and (W, W, D), scale: to (Z, H W, D)
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class OwnAttention(torch.autograd.Function):
    """(3, Z, H W, D) queries, keys, values; (H, H, D), (W, W, D); scale: to (Z, H W, D)."""

    @staticmethod
    def forward(ctx: Any, split: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        """Keeps what the backward pass needs: no more than the output and a number a query."""
        split = split.contiguous()
        query, key, value = split
        height, width = rows.shape[0], columns.shape[0]
        places = to_places(query, rows, columns)
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        kernel = kernel_for("attend", query.dtype, query.shape[-1], height, width)
        launch(
            kernel,
            (_tiles(query, kernel.tiling.queries), query.shape[0]),
            (query, key, value, *places, out, log_sums, scale, height, width),
        )
        ctx.save_for_backward(split, rows, columns, *places, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Two kernels: one goes along the keys of some queries, one along the queries of a row."""
        split, rows, columns, to_rows, to_columns, out, log_sums = ctx.saved_tensors
        query, key, value = split
        height, width = rows.shape[0], columns.shape[0]
        d_out = d_out.contiguous()
        inner = (d_out.float() * out).sum(-1)
        d_split = torch.empty_like(split)
        d_rows, d_columns = torch.empty_like(to_rows), torch.empty_like(to_columns)
        given = (query, key, value, to_rows, to_columns, d_out, log_sums, inner)
        sizes = (ctx.scale, height, width)
        of_keys = kernel_for("of_keys", query.dtype, query.shape[-1], height, width)
        launch(of_keys, (height, query.shape[0]), (*given, d_split[1], d_split[2], *sizes))
        of_queries = kernel_for("of_queries", query.dtype, query.shape[-1], height, width)
        launch(
            of_queries,
            (_tiles(query, of_queries.tiling.queries), query.shape[0]),
            (*given, d_split[0], d_rows, d_columns, *sizes),
        )
        of_tables = add_from_places(
            d_split[0], (d_rows, d_columns), query, (rows, columns), ctx.needs_input_grad[1:3]
        )
        return d_split, *of_tables, None


def _tiles(query: Tensor, queries: int) -> int:
    return -(-query.shape[1] // queries)


def refusal(
    dtype: torch.dtype, head_dim: int, height: int, width: int, folded: Attention
) -> str | None:
    """Why these kernels are not used on this thread's GPU; None where they are.

    Args:
        dtype: of queries, keys and values.
        head_dim: values of a query.
        height, width: of the grid of tokens.
        folded: what they have to equal.
    """
    if width not in COLUMNS or head_dim not in HEAD_DIMS:
        return "our kernel is for heads of 32 or 64 and grids of 17 to 64 columns"
    if dtype not in DTYPES or (
        dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    ):
        return "our kernel multiplies in bf16 or TF32"
    if not torch.cuda.is_available():
        return "there is no GPU for our kernel"
    return _unproved(dtype, head_dim, height, width, torch.cuda.current_device(), folded)


@functools.lru_cache(maxsize=64)
def _unproved(
    dtype: torch.dtype, head_dim: int, height: int, width: int, device: int, folded: Attention
) -> str | None:
    if Machine.from_environment().plain_gpu:
        return "FEDFMS_PLAIN_GPU is set"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "our kernel wants compute capability 8.0"
    try:
        apart = distance(dtype, head_dim, height, width, torch.device("cuda", device), folded)
    except Exception as error:  # of Triton, of the driver, of a file: the folded form needs none
        said = (str(error).splitlines() or [""])[0]
        why = f"our kernel does not run here ({type(error).__name__}: {said})"
    else:
        if apart <= TOLERANCE[dtype]:
            return None
        why = f"our kernel is {apart:.1e} from the folded form here"
    log.warning("attention of %d x %d tokens goes on in the folded form: %s", height, width, why)
    return why


def distance(
    dtype: torch.dtype,
    head_dim: int,
    height: int,
    width: int,
    device: torch.device,
    other: Attention,
) -> float:
    """How far outputs and gradients are from another form's, on one head of random numbers.

    Returns:
        the largest relative L2 distance of the output and the four gradients.
    """
    found = []
    # whatever asks first, a prediction or a training step
    with torch.inference_mode(False), torch.enable_grad():
        numbers = torch.Generator().manual_seed(0)
        shapes = [(3, 1, height * width, head_dim), (height, height, head_dim)]
        shapes += [(width, width, head_dim), (1, height * width, head_dim)]
        split, rows, columns, weights = (
            torch.randn(shape, generator=numbers).to(device, dtype) for shape in shapes
        )
        given = [split, rows.mul(0.1), columns.mul(0.1)]
        own: Attention = OwnAttention.apply
        for form in (own, other):
            leaves = [one.detach().requires_grad_() for one in given]
            out = form(leaves[0], leaves[1], leaves[2], head_dim**-0.5)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, weights)])
    pairs = zip(*found, strict=True)
    return max(float(((a - b).float().norm() / b.float().norm()).item()) for a, b in pairs)
