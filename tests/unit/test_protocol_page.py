"""docs/protocol.md names switches and tests; both have to exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.flare.session import MIN_CLIENTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ")
]


def test_every_test_that_the_page_names_is_there() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert named - functions == set()
    paths = {path.relative_to(ROOT / "tests").as_posix() for path in files}
    for file in set(re.findall(r"`([\w/]*test_\w+\.py)`", PAGE)):
        assert any(path == file or path.endswith(f"/{file}") for path in paths), file


def test_every_switch_is_a_field_and_every_row_with_one_names_its_test() -> None:
    known = {f.name for one in (Recipe, SiteConfig, Intensity) for f in dataclasses.fields(one)}
    known |= {MIN_CLIENTS, "optic_disc", "od_mode"}  # the last two: a class, how it is prepared
    switched, tests = 0, ""
    for row in ROWS:
        if len(row) != 6 or row[0] in ("topic", "---"):
            continue
        if not row[5].startswith("the same"):  # as in the row above
            tests = row[5]
        for word in re.findall(r"`(\w+)(?:[=:][^`]*)?`", row[4]):
            switched += 1
            assert word in known, word
            assert "test" in tests, f"{row[0]}: {word} has a switch and no test"
    assert switched > 15
