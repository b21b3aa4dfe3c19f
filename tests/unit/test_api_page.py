"""docs/api.md is one script: its examples run from the top, and name what the page is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"
TEXT = PAGE.read_text(encoding="utf-8")


def examples() -> list[tuple[int, str]]:
    """The page's Python, with the line of the page that each example starts in."""
    found = re.finditer(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    return [(TEXT[: match.start(1)].count("\n"), match[1]) for match in found]


def test_each_function_of_the_page_is_called_under_its_heading() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    named = 0
    for section in sections:
        heading, _, body = section.partition("\n")
        code = "".join(re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE))
        for function in re.findall(r"`(\w+)`", heading):
            named += 1
            assert re.search(rf"\b{function}\(", code), f"{function} is not called"
    assert named >= 12


def test_the_examples_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, object] = {"__name__": "page"}
    for line, code in examples():
        # the blank lines put the page's own line numbers into a traceback
        exec(compile("\n" * line + code, str(PAGE), "exec"), values)
    assert len(list(Path("masks").glob("*.nii.gz"))) == 6
