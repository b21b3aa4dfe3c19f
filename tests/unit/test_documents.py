"""Paths, links, commands and flags in the documents and the kits' texts are those of the tree."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fedfms.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "src/fedfms/provisioning/templates"
FOLDERS = ("docs", "docker", "jobs", "provisioning", "results", "sites", "studies")
PAGES = [
    ROOT / "README.md",
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))),
]
# what a hospital or a coordinator gets to read beside the pages
TEXTS = [
    *PAGES,
    *(path for path in TEMPLATES.rglob("*") if path.is_file() and path.suffix != ".dcm"),
    *(ROOT / "sites").rglob("site.yml"),
    *(ROOT / "studies").glob("*.yml"),
]
TOP = ("src", "docs", "tests", "jobs", "sites", "provisioning", "docker", "studies", "tools")
# a path has a letter that stands for others, or an ellipsis, where the reader fills something in
PLACEHOLDER = re.compile(r"[*…<>{}$]|\b(?:N|NAME|SITE|FILE|FOLDER)\b|\.\.\.")


ELSEWHERE = {
    "docs/README.md",  # of an exported bundle
    "docker/torch-cu126.lock",  # whoever builds for older drivers makes it: tools/lock.sh
}


def name(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def parametrized(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=map(name, paths))


# ------------------------------------------------------------------------------------------- paths


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


@parametrized(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def paths_named(text: str) -> Iterator[tuple[str, str | None]]:
    """Each path that starts in the tree, and the folder that bare names after it stand in."""
    for line in text.splitlines():
        folder: str | None = None
        for word in re.findall(r"[\w.…*<>{}$/-]+", line):
            word = word.rstrip(".")
            if word.split("/")[0] in TOP and "/" in word:
                yield word, None
                folder = word if word.endswith("/") else word.rpartition("/")[0]
            elif folder is not None and re.fullmatch(r"[\w-]+\.py", word):
                yield word, folder


@parametrized(PAGES)
def test_paths_of_the_tree_are_there(page: Path) -> None:
    for word, folder in paths_named(page.read_text(encoding="utf-8")):
        if PLACEHOLDER.search(word) or word in ELSEWHERE:
            continue
        places = (
            [ROOT / word, page.parent / word, ROOT / "tests" / word]
            if folder is None
            else [ROOT / folder / word]
        )
        if folder is not None:  # further names of one table row: there, or deeper in its package
            places += [ROOT / folder / ".." / word, *(ROOT / folder).rglob(word)]
        assert any(place.exists() for place in places), f"{word} (after {folder})"


@parametrized(TEXTS)
def test_modules_and_make_targets_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bfedfms(?:\.\w+)+", text)):
        parts = dotted.split(".")
        if parts[-1] in ("egg", "md", "yml", "sh", "whl"):
            continue
        for known in range(len(parts), 0, -1):
            try:
                if importlib.util.find_spec(".".join(parts[:known])) is not None:
                    break
            except ModuleNotFoundError:
                continue
        missing = parts[known:]
        assert len(missing) <= 1, dotted  # a module, or one name in it
        if missing:
            module = importlib.import_module(".".join(parts[:known]))
            assert hasattr(module, missing[0]), dotted
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)\s*make ([a-z][\w-]*)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


# ---------------------------------------------------------------------------------------- commands


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every `fedfms COMMAND …` of code lines and code spans, with the words after it."""
    joined = re.sub(r"\\\n\s*", " ", text)
    code = re.findall(r"`([^`\n]+)`", joined)
    in_fence = False
    for line in joined.splitlines():
        if line.startswith("```"):
            in_fence = not in_fence
        elif in_fence or line.startswith("    ") or line.lstrip().startswith("#"):
            code.append(line)
    for span in code:
        for match in re.finditer(r"(?:^|[\s/`(:])fedfms ([a-z][a-z-]+)((?: [^|`&;)]*)?)", span):
            yield match.group(1), words(match.group(2))


def words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # prose with an apostrophe
        return text.split()


# after `fedfms` in a sentence, not commands
PROSE = {*("alone", "at", "by", "for", "has", "in", "is", "itself", "of", "on", "reads", "turns")}


@parametrized(TEXTS)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for command, arguments in calls(page.read_text(encoding="utf-8")):
        if command in PROSE:
            continue
        assert command in COMMANDS, f"fedfms {command}"
        one = COMMANDS[command]
        below = getattr(one, "commands", {})  # prepare has one for each data set
        chosen = [below[word] for word in arguments[:1] if word in below] or [*below.values()]
        known = {
            flag
            for each in (one, *chosen)
            for parameter in each.params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        for argument in arguments:
            if argument.startswith("--") and argument != "--":
                flag = argument.partition("=")[0].rstrip(".,:")
                assert flag in known | {"--help"}, f"fedfms {command} {flag}"


def test_the_test_reads_many_commands() -> None:
    """It would also pass if it found none."""
    found = [call for page in TEXTS for call in calls(page.read_text(encoding="utf-8"))]
    assert len(found) > 80
    assert {command for command, _ in found} >= {"predict", "submit", "check-data", "provision"}
    assert sum(word.startswith("--") for _, arguments in found for word in arguments) > 40


def test_commands_in_error_texts_exist() -> None:
    found = 0
    for file in sorted((ROOT / "src/fedfms").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for command in re.findall(r"(?:: |`|\brun |\bwith )fedfms ([a-z][a-z-]+)", text):
            found += 1
            assert command in COMMANDS, f"{name(file)}: fedfms {command}"
    assert found > 20


def test_nobody_is_told_to_install_this_package_from_an_index() -> None:
    """Nobody owns that name there; whoever registers it would be installed at a hospital."""
    files = [*TEXTS, ROOT / "CHANGELOG.md", ROOT / "Makefile", *(ROOT / "docker").iterdir()]
    files += [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").iterdir()]
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search(r"\b(?:pip|uv|pipx|conda)\b[^|#]*\binstall\b", line):
                assert not re.search(r"[\s\"']fedfms(?:-kit)?(?:[\s\"'\[=<>~]|$)", line), (
                    f"{name(file)}: {line.strip()}"
                )
