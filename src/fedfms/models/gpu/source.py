"""Attention with relative positions in Triton's language: the kernels of models/gpu/attention.py.

All three go through the keys (or the queries) once and keep logits in registers alone, as
FlashAttention does (arXiv 2205.14135; backward as in 2307.08691). A tile of keys is one row of the
grid of tokens. So of what a query adds for rows one number belongs to a tile, and what it adds for
columns is the same for all tiles and is read once: no bias of tokens x tokens is ever made.

In each, the first axis of programs is tiles (of queries, or rows of keys), the second heads. With
N = height * width tokens and D = head_dim, of each head:

    query, key, value, out and their gradients (N, D)
    to_rows (N, height), to_columns (N, width)    what the query adds for each row, each column
    log_sums (N)                                  log2 of the sum of exp(logit) over the keys, fp32
    inner (N)                                     sum over D of out times its gradient, fp32

Sums are fp32. `columns` is the least power of two that is `width` or more; `whole` says that
neither columns nor tiles of queries reach past the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)  # a logit that has no part in a softmax, without becoming NaN


@triton.jit
def _block(matrix, rows, columns, width, height, most, whole: tl.constexpr):
    """Some rows and columns of (height, width); zeros where rows or `most` columns are passed."""
    where = matrix + rows[:, None] * width + columns[None, :]
    if whole:
        found = tl.load(where)
    else:
        there = (rows[:, None] < height) & (columns[None, :] < most)
        found = tl.load(where, mask=there, other=0.0)
    return found


@triton.jit
def _put(matrix, values, rows, columns, width, height, most, whole: tl.constexpr):
    """`values` to where `_block` would find them."""
    where = matrix + rows[:, None] * width + columns[None, :]
    rounded = values.to(matrix.dtype.element_ty)
    if whole:
        tl.store(where, rounded)
    else:
        tl.store(where, rounded, mask=(rows[:, None] < height) & (columns[None, :] < most))


@triton.jit
def _column_logits(to_columns, token, column, width, tokens, whole: tl.constexpr):
    """(queries, columns): what each query adds for each column, in bits."""
    added = _block(to_columns, token, column, width, tokens, width, whole).to(tl.float32) * LOG2_E
    if not whole:
        added = tl.where(column[None, :] < width, added, NOTHING)
    return added


@triton.jit
def attend(
    query, key, value, to_rows, to_columns, out, log_sums, scale, height, width,
    head_dim: tl.constexpr, columns: tl.constexpr, queries: tl.constexpr,
    whole: tl.constexpr, products: tl.constexpr,
):  # fmt: skip
    """Softmax of (query . key * scale + positions), times value: `out` and `log_sums`."""
    wide = columns if whole else width
    tokens = height * wide
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * queries + tl.arange(0, queries)
    column, place = tl.arange(0, columns), tl.arange(0, head_dim)
    there = token < tokens
    first = head * tokens
    keys, values = key + first * head_dim, value + first * head_dim
    q = _block(query + first * head_dim, token, place, head_dim, tokens, head_dim, whole)
    by_column = _column_logits(to_columns + first * wide, token, column, wide, tokens, whole)
    by_row = to_rows + first * height + token * height
    most = tl.full([queries], NOTHING, tl.float32)
    total = tl.zeros([queries], tl.float32)
    found = tl.zeros([queries, head_dim], tl.float32)
    for row in range(height):
        # columns past the width are the next row's keys, whose weight is nothing
        k = _block(keys + row * wide * head_dim, column, place, head_dim, wide, head_dim, whole)
        added = tl.load(by_row + row, mask=there, other=0.0).to(tl.float32) * LOG2_E
        logits = tl.dot(q, tl.trans(k), input_precision=products) * (scale * LOG2_E)
        logits += by_column + added[:, None]
        now = tl.maximum(most, tl.max(logits, 1))
        weights = tl.exp2(logits - now[:, None])
        shrunk = tl.exp2(most - now)
        total = total * shrunk + tl.sum(weights, 1)
        v = _block(values + row * wide * head_dim, column, place, head_dim, wide, head_dim, whole)
        found = found * shrunk[:, None]
        found += tl.dot(weights.to(v.dtype), v, input_precision=products)
        most = now
    found = found / total[:, None]
    _put(out + first * head_dim, found, token, place, head_dim, tokens, head_dim, whole)
    tl.store(log_sums + first + token, most + tl.log2(total), mask=there)


@triton.jit
def of_queries(
    query, key, value, to_rows, to_columns, d_out, log_sums, inner, d_query, d_rows, d_columns,
    scale, height, width,
    head_dim: tl.constexpr, columns: tl.constexpr, queries: tl.constexpr,
    whole: tl.constexpr, products: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries through their products alone, of `to_rows` and of `to_columns`."""
    wide = columns if whole else width
    tokens = height * wide
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * queries + tl.arange(0, queries)
    column, place = tl.arange(0, columns), tl.arange(0, head_dim)
    there = token < tokens
    first = head * tokens
    keys, values = key + first * head_dim, value + first * head_dim
    q = _block(query + first * head_dim, token, place, head_dim, tokens, head_dim, whole)
    g = _block(d_out + first * head_dim, token, place, head_dim, tokens, head_dim, whole)
    by_column = _column_logits(to_columns + first * wide, token, column, wide, tokens, whole)
    by_row = to_rows + first * height + token * height
    d_by_row = d_rows + first * height + token * height
    log_sum = tl.load(log_sums + first + token, mask=there, other=0.0)
    within = tl.load(inner + first + token, mask=there, other=0.0)
    d_q = tl.zeros([queries, head_dim], tl.float32)
    d_column = tl.zeros([queries, columns], tl.float32)
    for row in range(height):
        k = _block(keys + row * wide * head_dim, column, place, head_dim, wide, head_dim, whole)
        v = _block(values + row * wide * head_dim, column, place, head_dim, wide, head_dim, whole)
        added = tl.load(by_row + row, mask=there, other=0.0).to(tl.float32) * LOG2_E
        logits = tl.dot(q, tl.trans(k), input_precision=products) * (scale * LOG2_E)
        weights = tl.exp2(logits + by_column + added[:, None] - log_sum[:, None])
        d_weights = tl.dot(g, tl.trans(v), input_precision=products)
        d_logits = weights * (d_weights - within[:, None])
        d_column += d_logits
        d_row = tl.sum(d_logits, 1).to(d_rows.dtype.element_ty)
        tl.store(d_by_row + row, d_row, mask=there)
        d_q += tl.dot(d_logits.to(k.dtype), k, input_precision=products)
    d_q = d_q * scale
    _put(d_query + first * head_dim, d_q, token, place, head_dim, tokens, head_dim, whole)
    _put(d_columns + first * wide, d_column, token, column, wide, tokens, wide, whole)


@triton.jit
def of_keys(
    query, key, value, to_rows, to_columns, d_out, log_sums, inner, d_key, d_value,
    scale, height, width,
    head_dim: tl.constexpr, columns: tl.constexpr, queries: tl.constexpr,
    whole: tl.constexpr, products: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and the values of one row of the grid."""
    wide = columns if whole else width
    tokens = height * wide
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    column, place = tl.arange(0, columns), tl.arange(0, head_dim)
    first = head * tokens
    these = (first + row * wide) * head_dim
    k = _block(key + these, column, place, head_dim, wide, head_dim, whole)
    v = _block(value + these, column, place, head_dim, wide, head_dim, whole)
    d_k = tl.zeros([columns, head_dim], tl.float32)
    d_v = tl.zeros([columns, head_dim], tl.float32)
    for begin in range(0, tokens, queries):
        token = begin + tl.arange(0, queries)
        there = token < tokens
        q = _block(query + first * head_dim, token, place, head_dim, tokens, head_dim, whole)
        g = _block(d_out + first * head_dim, token, place, head_dim, tokens, head_dim, whole)
        by_column = _column_logits(to_columns + first * wide, token, column, wide, tokens, whole)
        by_row = to_rows + first * height + token * height
        added = tl.load(by_row + row, mask=there, other=0.0).to(tl.float32) * LOG2_E
        log_sum = tl.load(log_sums + first + token, mask=there, other=0.0)
        within = tl.load(inner + first + token, mask=there, other=0.0)
        # keys go down and queries across, so that no product has to be turned
        logits = tl.dot(k, tl.trans(q), input_precision=products) * (scale * LOG2_E)
        weights = tl.exp2(logits + tl.trans(by_column) + (added - log_sum)[None, :])
        if not whole:
            weights = tl.where(there[None, :], weights, 0.0)
        d_v += tl.dot(weights.to(g.dtype), g, input_precision=products)
        d_weights = tl.dot(v, tl.trans(g), input_precision=products)
        d_logits = weights * (d_weights - within[None, :])
        d_k += tl.dot(d_logits.to(q.dtype), q, input_precision=products)
    _put(d_key + these, d_k * scale, column, place, head_dim, wide, head_dim, whole)
    _put(d_value + these, d_v, column, place, head_dim, wide, head_dim, whole)
