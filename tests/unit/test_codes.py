"""contracts/codes.py lists every code that the package gives an error, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fedfms
from fedfms.contracts import codes
from fedfms.contracts.codes import CODES

SOURCES = [
    path
    for path in sorted(Path(fedfms.__file__).parent.rglob("*.py"))
    if path != Path(codes.__file__)
]
# functions that take it by place
POSITIONAL = {"_refused", "_mixed", "_stopped", "_Failure"}
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text())


def codes_given(tree: ast.Module) -> Iterator[ast.expr]:
    """What stands after code= in a call of an error, and as default_code of a class of errors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            if ast.unparse(node.targets[0]) == "default_code":
                yield node.value
        elif isinstance(node, ast.keyword):
            if node.arg == "code":
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in POSITIONAL:
            yield from filter(looks_like_a_code, node.args)


def looks_like_a_code(value: ast.expr) -> bool:
    text = value.value if isinstance(value, ast.Constant) else None
    return isinstance(text, str) and "-" in text and CODE.fullmatch(text) is not None


def test_every_code_of_an_error_has_its_meaning() -> None:
    unknown = {
        f"{path.name}:{value.lineno} {value.value}"
        for path, tree in trees()
        for value in codes_given(tree)
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
        if value.value not in CODES
    }
    assert not unknown


def test_every_code_that_has_a_meaning_is_used() -> None:
    texts: set[str] = set()
    patterns = []  # of codes that are put together, such as f"no-{what}"
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
        for value in codes_given(tree):
            if isinstance(value, ast.JoinedStr):
                parts = [
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z0-9]+"
                    for part in value.values
                ]
                patterns.append(re.compile("".join(parts)))
    unused = {
        code
        for code in CODES
        if code not in texts and not any(pattern.fullmatch(code) for pattern in patterns)
    }
    assert not unused


def test_a_code_means_one_thing_said_in_one_clause() -> None:
    written = ast.walk(ast.parse(Path(codes.__file__).read_text()))
    (literal,) = (node for node in written if isinstance(node, ast.Dict))
    assert len(literal.keys) == len(CODES)
    for code, means in CODES.items():
        assert CODE.fullmatch(code)
        assert means == means.strip() and not means.endswith("."), code
        assert re.match(r"[a-z]|SAM|FLARE", means), code
