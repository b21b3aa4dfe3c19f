"""Cells that several sections of the page share."""

from __future__ import annotations

from fedfms.pages.parts import Cell
from fedfms_lab.study.page import words


def way(method: str, regime: str, best: bool) -> Cell:
    """How a row was trained: the method, and below it federated, centralized or one site alone."""
    how = words.REGIMES.get(regime, regime)
    return Cell(words.method(method), small=f"{how}, best" if best else how)
