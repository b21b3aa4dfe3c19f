"""Attention with relative positions by the kernels of source.py, where a GPU has them and may.

A kernel is used on a GPU only after it gave there, once in each process and for each size, what the
folded form gives: outputs and gradients; in fp32, where torch has a fast way of its own, only if it
also took less time than that. Whatever goes wrong before is a reason, said in one line, and
attention is computed in one of torch's ways.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedfms.contracts.machine import Machine
from fedfms.models.gpu.driver import launch
from fedfms.models.gpu.kernels import Precision, computes, kernel_for, precision_of
from fedfms.models.positions import add_from_places, to_places

log = logging.getLogger(__name__)

COLUMNS = range(17, 65)  # of a grid; where fewer, torch's kernels lose little
HEAD_DIMS = (32, 64)
# relative L2 distance from the folded form on random numbers: factors have 8, 11 or 24 bits
TOLERANCE: dict[Precision, float] = {"bf16": 2e-2, "tf32": 5e-3, "fp32": 1e-5}

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
        precision = _precision(query)
        places = to_places(query, rows, columns)
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        kernel = kernel_for("attend", precision, query.shape[-1], height, width)
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
        precision = _precision(query)
        d_out = d_out.contiguous()
        inner = (d_out.float() * out).sum(-1)
        d_split = torch.empty_like(split)
        d_rows, d_columns = torch.empty_like(to_rows), torch.empty_like(to_columns)
        given = (query, key, value, to_rows, to_columns, d_out, log_sums, inner)
        sizes = (ctx.scale, height, width)
        of_keys = kernel_for("of_keys", precision, query.shape[-1], height, width)
        launch(of_keys, (height, query.shape[0]), (*given, d_split[1], d_split[2], *sizes))
        of_queries = kernel_for("of_queries", precision, query.shape[-1], height, width)
        launch(
            of_queries,
            (_tiles(query, of_queries.tiling.queries), query.shape[0]),
            (*given, d_split[0], d_rows, d_columns, *sizes),
        )
        of_tables = add_from_places(
            d_split[0], (d_rows, d_columns), query, (rows, columns), ctx.needs_input_grad[1:3]
        )
        return d_split, *of_tables, None


def _precision(query: Tensor) -> Precision:
    precision = precision_of(query.dtype)
    assert precision is not None  # `refusal` was asked
    return precision


def _tiles(query: Tensor, queries: int) -> int:
    return -(-query.shape[1] // queries)


class Rivals(NamedTuple):
    """Other ways to the same numbers.

    folded: what a kernel has to equal.
    plain: what runs in fp32 where no kernel does, and has to be slower.
    """

    folded: Attention
    plain: Attention


def refusal(
    dtype: torch.dtype, head_dim: int, height: int, width: int, rivals: Rivals
) -> str | None:
    """Why these kernels are not used on this thread's GPU; None where they are.

    Args:
        dtype: of queries, keys and values.
        head_dim: values of a query.
        height, width: of the grid of tokens.
        rivals: what they are compared with.
    """
    if width not in COLUMNS or head_dim not in HEAD_DIMS:
        return "our kernel is for heads of 32 or 64 and grids of 17 to 64 columns"
    precision = precision_of(dtype)
    if precision is None:
        return "our kernel multiplies in bf16, TF32 or fp32"
    if not torch.cuda.is_available():
        return "there is no GPU for our kernel"
    return _unproved(precision, head_dim, height, width, torch.cuda.current_device(), rivals)


@functools.lru_cache(maxsize=64)
def _unproved(
    precision: Precision, head_dim: int, height: int, width: int, device: int, rivals: Rivals
) -> str | None:
    if Machine.from_environment().plain_gpu:
        return "FEDFMS_PLAIN_GPU is set"
    major, minor = torch.cuda.get_device_capability(device)
    if not computes(precision, 10 * major + minor):
        return f"our kernel in {precision} is not for compute capability {major}.{minor}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    given = (dtype, head_dim, height, width, torch.device("cuda", device))
    try:
        apart = distance(*given, rivals.folded)
        if apart <= TOLERANCE[precision] and precision == "fp32":
            own, plain = (seconds(*given, form) for form in (OwnAttention.apply, rivals.plain))
            if own >= plain:
                return f"torch's products are faster here, {1e3 * plain:.1f} ms to {1e3 * own:.1f}"
    except Exception as error:  # of Triton, of the driver, of a file: the folded form needs none
        said = (str(error).splitlines() or [""])[0]
        why = f"our kernel does not run here ({type(error).__name__}: {said})"
    else:
        if apart <= TOLERANCE[precision]:
            return None
        why = f"our kernel is {apart:.1e} from the folded form here"
    log.warning("attention of %d x %d tokens goes on without our kernels: %s", height, width, why)
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
    own: Attention = OwnAttention.apply
    with _trial(dtype, head_dim, height, width, device, heads=1) as run:
        pairs = zip(run(own), run(other), strict=True)
    return max(float(((a - b).float().norm() / b.float().norm()).item()) for a, b in pairs)


def seconds(
    dtype: torch.dtype,
    head_dim: int,
    height: int,
    width: int,
    device: torch.device,
    form: Attention,
) -> float:
    """What forward and backward of a form take with ViT-B's twelve heads: the least of three."""
    times = []
    with _trial(dtype, head_dim, height, width, device, heads=12) as run:
        for _ in range(4):  # the first chooses and loads
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            run(form)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times[1:])


@contextlib.contextmanager
def _trial(
    dtype: torch.dtype, head_dim: int, height: int, width: int, device: torch.device, heads: int
) -> Iterator[Callable[[Attention], list[Tensor]]]:
    """What gives a form's output and gradients, of random numbers; whatever asks first."""
    with torch.inference_mode(False), torch.enable_grad():
        numbers = torch.Generator().manual_seed(0)
        shapes = [(3, heads, height * width, head_dim), (height, height, head_dim)]
        shapes += [(width, width, head_dim), (heads, height * width, head_dim)]
        split, rows, columns, weights = (
            torch.randn(shape, generator=numbers).to(device, dtype) for shape in shapes
        )
        given = [split, rows.mul(0.1), columns.mul(0.1)]

        def run(form: Attention) -> list[Tensor]:
            leaves = [one.detach().requires_grad_() for one in given]
            out = form(leaves[0], leaves[1], leaves[2], head_dim**-0.5)
            return [out.detach(), *torch.autograd.grad(out, leaves, weights)]

        yield run
