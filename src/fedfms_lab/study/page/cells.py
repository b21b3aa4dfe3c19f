"""Cells and tables that several sections of the page share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fedfms.pages.parts import Cell, Table
from fedfms_lab.study.page import words


def way(method: str, regime: str, best: bool) -> Cell:
    """How a row was trained: the method, and below it federated, centralized or one site alone."""
    how = words.REGIMES.get(regime, regime)
    return Cell(words.method(method), small=f"{how}, best" if best else how)


def with_note(tables: Sequence[Table], note: str) -> list[Table]:
    """The same tables, the note below the last."""
    return [*tables[:-1], *(dataclasses.replace(table, note=note) for table in tables[-1:])]
