"""Draw docs/the-house.svg from the floors in docs/architecture.md: python tools/draw_floors.py."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
INK, GREY, BLUE, PURPLE, EDGE = "#1f2328", "#59636e", "#1b6e8c", "#8250a8", "#8c959f"
FONT = "system-ui, Segoe UI, Helvetica, Arial, sans-serif"
WIDTH, TOP, HEIGHT, GAP = 1010, 52, 46, 12  # of the drawing; of its first floor, a floor, between
LEFT, RIGHT = 250, 956  # of the hospital's rooms
NOTES = {
    "fedfms_lab": "studies, public data sets",
    "cli": "arguments in, exit code out",
    "provisioning": "kits, made and renewed",
    "watch": "a page of what runs",
    "flare": "alone imports nvflare",
    "preflight": "is a site well?",
    "report": "tables and page of a run",
    "predict": "masks of new images",
    "trainer": "sees images and no network",
    "export": "other people's formats",
    "training": "one round, scores",
    "local": "a federation on one machine",
    "models": "networks, what travels",
    "data": "files, cases, slices",
    "exchange": "door, guard, average",
    "kits": "what a kit says",
    "pages": "what pages are of",
    "records": "what happened",
    "contracts": "every word that crosses a process, a wire or a disk",
    "about": "which build runs here",
    "geometry": "pictures to input, masks back",
    "bounded": "what others wrote, decoded within bounds",
    "errors": "problem and fix",
}
SAYS = (
    "The packages as floors of two buildings: imports lead down, never up or aside. The laboratory "
    "imports the hospital's building, which does not know it."
)


def floors() -> list[list[str]]:
    """From the top down, as in the page."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("<!-- floors -->\n")[2].partition("\n\n")[0]
    return [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]


def text(x: float, y: float, words: str, size: float, colour: str, rest: str = "") -> str:
    """Words around or from a point."""
    return f'  <text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{rest}>{words}</text>'


def room(x: float, y: float, width: float, name: str) -> list[str]:
    """A box with the package's name and what it is for."""
    colour = PURPLE if name in ("flare", "fedfms_lab") else BLUE
    note = NOTES.get(name, "")
    middle = x + width / 2
    centred = ' text-anchor="middle"'
    bold = f' class="room" font-weight="600"{centred}'
    drawn = [
        f'  <rect x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="5" fill="#ffffff" '
        f'stroke="{colour}" stroke-width="1.4"/>',
        text(middle, y + (20 if note else 28), name, 14, colour, bold),
    ]
    return [*drawn, text(middle, y + 37, note, 11.5, GREY, centred)] if note else drawn


def draw() -> str:
    """The whole drawing."""
    (laboratory,), *hospital = floors()
    height = TOP + len(hospital) * (HEIGHT + GAP) + 24
    first, last = TOP + HEIGHT / 2, TOP + (len(hospital) - 1) * (HEIGHT + GAP) + HEIGHT / 2
    bold = ' font-weight="600"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{FONT}" role="img" aria-label="{SAYS}">',
        f'  <rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'  <rect x="10" y="10" width="190" height="{height - 20}" rx="10" fill="#fbf8fd" '
        f'stroke="{PURPLE}"/>',
        text(24, 36, "the laboratory", 14, PURPLE, bold),
        *room(24, TOP, 162, laboratory),
        text(24, TOP + 78, "A package of its own.", 12.5, GREY),
        text(24, TOP + 97, "It imports any room;", 12.5, GREY),
        text(24, TOP + 116, "no room imports it.", 12.5, GREY),
        f'  <rect x="{LEFT - 16}" y="10" width="{WIDTH - LEFT + 4}" height="{height - 20}" '
        f'rx="10" fill="#f6f8fa" stroke="{EDGE}"/>',
        text(LEFT, 36, "fedfms: what a hospital approves", 14, INK, bold),
        f'  <line x1="186" y1="{first}" x2="{LEFT - 26}" y2="{first}" stroke="{INK}" '
        'stroke-width="1.8"/>',
        f'  <path d="M{LEFT - 16} {first} l-11 -5 v10 z" fill="{INK}"/>',
    ]
    for number, names in enumerate(hospital):
        width = (RIGHT - LEFT - GAP * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = LEFT + place * (width + GAP)
            lines += room(x, TOP + number * (HEIGHT + GAP), width, name)
    turned = f' transform="rotate(90 968 {(first + last) / 2:g})" text-anchor="middle"'
    lines += [
        f'  <line x1="984" y1="{first}" x2="984" y2="{last - 10}" stroke="{INK}" '
        'stroke-width="1.8"/>',
        f'  <path d="M984 {last} l-5 -11 h10 z" fill="{INK}"/>',
        text(968, (first + last) / 2, "imports lead down", 12, GREY, turned),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (DOCS / "the-house.svg").write_text(draw(), encoding="utf-8")
