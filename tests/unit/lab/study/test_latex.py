import re

import pytest

from fedfms.pages.parts import Cell, Column, Table
from fedfms_lab.study.page.latex import document, escape

SPECIAL = "\\{}$&#%_~^"

# What LaTeX prints for each command that `escape` may write, from LaTeX's own documentation.
PRINTED = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    "''": '"',  # as a closing quotation mark
    r"\textasciigrave{}": "`",
    r"\{": "{",
    r"\}": "}",
    r"\$": "$",
    r"\&": "&",
    r"\#": "#",
    r"\%": "%",
    r"\_": "_",
    "{}": "",
}


def printed(tex):
    """The text that LaTeX would print, read command by command; anything else is an error."""
    commands = sorted(PRINTED, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, commands)) + "|.", re.S)
    text = ""
    for token in pattern.findall(tex):
        assert token in PRINTED or token not in SPECIAL + '<>|"`', token
        text += PRINTED.get(token, token)
    return text


@pytest.mark.parametrize("character", [chr(code) for code in range(32, 127)])
def test_every_ascii_character_is_printed_as_it_is(character):
    assert printed(escape(character)) == character
    if character != " ":  # LaTeX sets two as one
        assert printed(escape(f"a{character}b{character}")) == f"a{character}b{character}"


def test_a_command_in_a_name_is_printed_and_not_run():
    evil = r"\input{/etc/passwd} \\ & $x_1^2$ % gone"
    assert printed(escape(evil)) == evil


def test_nothing_is_joined_or_taken_by_the_end_of_the_row_before():
    assert escape("a -- b --- c") == "a -{}- b -{}-{}- c"
    assert escape("[1]") == "{}[1]" and escape("*") == "{}*"
    assert escape("site-1*") == "site-1*" and escape("") == ""
    assert escape("– --") == "-- -{}-"


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("0.842 ± 0.011", r"0.842 $\pm$ 0.011"),
        ("−0.013", "$-$0.013"),
        ("–", "--"),
        ("10\u202f000", r"10\,000"),
        ("a\u00a0b", "a~b"),
        ("Zürich, Besançon", "Zürich, Besançon"),
        ("Łódź", "?ódz"),  # without a package pdfLaTeX knows Latin-1 alone
        ("東京", "??"),
        ("Þór ÷ 2", r"Thór $\div$ 2"),
        ("a\n\tb\x00c", "a b?c"),
    ],
)
def test_what_is_not_ascii(text, tex):
    assert escape(text) == tex


def test_a_float_has_its_caption_label_columns_and_rows():
    table = Table(
        "Dice & more",
        [Column("Method", number=False), Column("site_1", "9 cases"), Column("Mean")],
        [
            [Cell("FedMSA", small="federated"), Cell("0.842 ± 0.011"), Cell("0.8", tag="fails")],
            [Cell("Both", span=2), Cell("0.9")],
        ],
        note="100 % of it.",
    )
    text = document("Demo %\n\\end", [("dice-1", table)])
    assert text.splitlines()[0] == r"% Demo % \end"
    assert text.split("\n\n", 1)[1] == "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            r"\caption{Dice \& more. 100 \% of it.}",
            r"\label{tab:study-dice-1}",
            r"\smallskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            r"\begin{tabular}{@{}lrr@{}}",
            r"\toprule",
            r"Method & site\_1 & Mean \\",
            r" & {\footnotesize 9 cases} &  \\",
            r"\midrule",
            r"FedMSA {\footnotesize (federated)} & 0.842 $\pm$ 0.011 & 0.8 \emph{fails} \\",
            r"\multicolumn{2}{l}{Both} & 0.9 \\",
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )
