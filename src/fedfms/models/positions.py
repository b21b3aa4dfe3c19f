"""Relative positions of SAM's attention apart from its softmax: what a query adds for each place.

Decomposed relative positions (MViTv2, arXiv 2112.01526): the logit of a query and a key has
`query . R_row + query . R_column` added, with rows of two tables by how far apart they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """(Z, H W, X) to (Z, H, W, X)."""
    return tokens.view(tokens.shape[0], height, width, -1)


def to_places(query: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What each query (Z, H W, D) adds for each row and each column: (Z, H W, H), (Z, H W, W).

    Args:
        rows, columns: (H, H, D) and (W, W, D), a table's row for each two tokens.
    """
    grid = on_grid(query, rows.shape[0], columns.shape[0])
    return (
        torch.einsum("zhwc,hkc->zhwk", grid, rows).flatten(1, 2).contiguous(),
        torch.einsum("zhwc,wkc->zhwk", grid, columns).flatten(1, 2).contiguous(),
    )


def add_from_places(
    d_query: Tensor,
    of_places: tuple[Tensor, Tensor],
    query: Tensor,
    tables: tuple[Tensor, Tensor],
    needed: tuple[bool, bool],
) -> list[Tensor | None]:
    """The backward pass of `to_places`.

    Args:
        d_query: (Z, H W, D), to which its part is added in place.
        of_places: the gradients of what `to_places` gave.
        query, tables: what it was given.
        needed: of which tables the gradient is wanted.

    Returns:
        the gradients of the tables, None of those that are not needed.
    """
    rows, columns = tables
    height, width = rows.shape[0], columns.shape[0]
    grid, of_grid = on_grid(query, height, width), on_grid(d_query, height, width)
    by_row, by_column = (on_grid(one, height, width) for one in of_places)
    of_grid += torch.einsum("zhwk,hkc->zhwc", by_row, rows)
    of_grid += torch.einsum("zhwk,wkc->zhwc", by_column, columns)
    return [
        torch.einsum(f"zhwk,zhwc->{side}kc", by, grid) if wanted else None
        for side, by, wanted in zip("hw", (by_row, by_column), needed, strict=True)
    ]
