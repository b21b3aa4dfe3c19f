"""What every page of fedfms is made of: tables, tiles, figures, pictures; the same in each format.

Texts are plain here. The templates' environment escapes them for HTML, `| md` for Markdown.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

# Of overlays: Okabe and Ito's colours, which people with any colour blindness tell apart.
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00")

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PICTURE = 8_000_000  # bytes

SHADES = 8  # steps of a heat table: .shade-0 … .shade-7 in the style sheet of its page


@dataclass(frozen=True, slots=True)
class Column:
    """A table column: its title, what it measures, and whether it holds numbers."""

    title: str
    measure: str = ""
    number: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell; `tag` is a mark beside the text, `small` a remark below it."""

    text: str
    tag: str = ""
    small: str = ""
    span: int = 1  # columns
    link: str = ""  # relative address
    shade: int | None = None  # of a heat table: 0 (low) to SHADES - 1 (high)
    code: bool = False  # a hash: in the font of code


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the report, the same in HTML and Markdown."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its caption; the caption says what the picture shows."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the summary, with what it measures."""

    label: str
    value: str
    caption: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An overlay, embedded."""

    file: str  # relative to the results folder
    source: str  # data: address


@dataclass(frozen=True, slots=True)
class Line:
    """What a line of the overlays means."""

    colour: str  # of CSS
    meaning: str
    style: str = "solid"  # or dashed


def picture_key(classes: Sequence[str]) -> list[Line]:
    """The lines of overlays: two colours of one class, or a colour a class and two kinds of lines.

    Args:
        classes: the recipe's, in its order.
    """
    if len(classes) < 2:
        return [Line(CLASS_COLOURS[0], "annotation"), Line(CLASS_COLOURS[1], "prediction")]
    kinds = [Line("currentColor", "annotation", "dashed"), Line("currentColor", "prediction")]
    return kinds + [
        Line(CLASS_COLOURS[place % len(CLASS_COLOURS)], str(name).replace("_", " "))
        for place, name in enumerate(classes)
    ]


def with_note(tables: Sequence[Table], note: str) -> list[Table]:
    """The same tables, the note below the last."""
    return [*tables[:-1], *(dataclasses.replace(table, note=note) for table in tables[-1:])]


def is_embeddable(path: Path) -> bool:
    """Whether a file is a PNG of a size that a page can hold."""
    with path.open("rb") as file:
        return path.stat().st_size <= _LARGEST_PICTURE and file.read(len(_PNG)) == _PNG


def embed_png(path: Path) -> str:
    """A PNG file as a data: address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def environment(*packages: str) -> jinja2.Environment:
    """Templates of these packages, looked for in this order; what is missing there is an error."""
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in packages]),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["md"] = markdown
    return made


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    text = re.sub(r"\s+", " ", text.replace("\u202f", "\u00a0").replace("\u00a0", "&nbsp;"))
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text.replace("<", "&lt;"))
