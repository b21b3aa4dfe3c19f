"""The page's tables as LaTeX for a paper (booktabs, graphicx); the same text, rounded the same."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from fedfms.pages.parts import Cell, Table

# a table that is wider than the text becomes as wide as it, others stay
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl is not there in the default encoding
    "`": r"\textasciigrave{}",
    "÷": r"$\div$",
    "Ð": "D",  # neither are these
    "ð": "d",
    "Þ": "Th",
    "þ": "th",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "…": r"\ldots{}",
    "’": "'",
    "\u00a0": "~",
    "\u202f": r"\,",
}


def escape(text: str) -> str:
    """Text that LaTeX sets as it is.

    Letters that pdfLaTeX knows without packages (Latin-1) stay. Others lose their accents, and what
    is then still no ASCII becomes a question mark: a paper's preamble is not known here.
    """
    text = re.sub(r"[ \t\r\n\f\v]+", " ", text)
    escaped = "".join(
        "-{}" if (character, following) == ("-", "-") else _escape(character)  # no dash of two
        for character, following in itertools.pairwise(f"{text} ")
    )
    # at the start of a row the \\ before would take these as its own
    return f"{{}}{escaped}" if text.lstrip(" ")[:1] in ("[", "*") else escaped


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if " " <= character <= "~" or "À" <= character <= "ÿ":
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_ESCAPES.get(c, c) for c in plain if c.isprintable()) or "?"


def document(title: str, tables: Sequence[tuple[str, Table]]) -> str:
    """All tables, each a float that can be moved to where it belongs.

    Args:
        tables: label (letters, digits, hyphens) and table, in this order.
    """
    head = [
        f"% {re.sub(r'[^ -~]+', ' ', title)}",
        "% Written by fedfms study, for \\input. In the preamble: \\usepackage{booktabs,graphicx}",
        "% The numbers with all their digits, and the runs they come from: study.csv",
    ]
    return "\n".join(head) + "\n" + "".join(_table(label, table) for label, table in tables)


def _table(label: str, table: Table) -> str:
    columns = "".join("r" if column.number else "l" for column in table.columns)
    lines = [
        "",
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{escape(table.title)}. {escape(table.note)}}}",
        rf"\label{{tab:study-{label}}}",
        r"\smallskip",
        _FITTED,
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        _row([escape(column.title) for column in table.columns]),
    ]
    if any(column.measure for column in table.columns):
        lines.append(_row([_small(column.measure) for column in table.columns]))
    lines.append(r"\midrule")
    lines += [_row(map(_cell, row)) for row in table.rows]
    if table.total:
        lines += [r"\midrule", _row(map(_cell, table.total))]
    lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""]
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.tag:
        text += rf" \emph{{{escape(cell.tag)}}}"
    if cell.small:
        text += f" {_small(f'({cell.small})')}"
    return text if cell.span == 1 else rf"\multicolumn{{{cell.span}}}{{l}}{{{text}}}"


def _small(text: str) -> str:
    return rf"{{\footnotesize {escape(text)}}}" if text else ""


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
