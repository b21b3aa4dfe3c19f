"""Paths, links, commands and flags in the documents and the kits' texts are those of the tree."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

import fedfms
import fedfms_lab
from fedfms.cli import app
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.flare.session import MIN_CLIENTS
from fedfms_lab.study.plan import MethodEntry, Study

ENTRY_POINTS = {
    "fedfms.commands",
    "fedfms.methods",
    "fedfms.strategies",
    "fedfms.verify",
}  # groups, no modules
ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "src/fedfms/provisioning/templates"
FOLDERS = ("docs", "docker", "jobs", "provisioning", "results", "sites", "studies")
PAGES = [
    *(ROOT / page for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))),
]
# what a hospital or a coordinator gets to read beside the pages
TEXTS = [
    *PAGES,
    *(path for path in TEMPLATES.rglob("*") if path.is_file() and path.suffix != ".dcm"),
    *(ROOT / "sites").rglob("site.yml"),
    *(ROOT / "studies").glob("*.yml"),
]
TOP = (
    *("src", "docs", "tests", "jobs", "sites", "provisioning", "docker", "studies", "tools"),
    *("benchmarks", ".github"),
)
# a path has a letter that stands for others, or an ellipsis, where the reader fills something in
PLACEHOLDER = re.compile(r"[*…<>{}$]|\b(?:N|NAME|SITE|FILE|FOLDER)\b|\.\.\.")


ELSEWHERE = {
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


def test_every_page_is_on_a_readers_way() -> None:
    """A page that the index does not lead to is found by nobody."""
    index = ROOT / "docs/README.md"
    targets = re.findall(r"\]\(([^)#\s]+)", index.read_text(encoding="utf-8"))
    linked = {(index.parent / target).resolve() for target in targets}
    pages = {*(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")} - {index}
    assert {name(page) for page in pages - linked} == set()


def test_what_others_read_of_the_repository_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fedfms.__version__ == fedfms_lab.__version__
    (paper,) = citation["references"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["url"] in readme
    assert paper["title"] in re.sub(r"\s+", " ", readme)
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for word, _ in paths_named(notice):
        assert (ROOT / word).exists(), word
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    runs = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    made = {target for run in runs for target in re.findall(r"\bmake ([\w-]+)", run)}
    assert made >= {"lint", "test-all"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert made <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


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
        if parts[-1] in ("egg", "md", "yml", "sh", "whl") or dotted in ENTRY_POINTS:
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
            is_group = f'"{dotted}"' in machinery()  # of entry points, or what else is named so
            assert hasattr(module, missing[0]) or is_group, dotted
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
    files += (ROOT / ".github").rglob("*.yml")
    files += [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").iterdir()]
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            told = re.search(r"\b(?:pip|uv|pipx|conda)\b[^|#]*\binstall\b(.*)", line)
            if told is not None:
                assert not re.search(r"[\s\"']fedfms(?:-kit)?(?:[\s\"'\[=<>~]|$)", told[1]), (
                    f"{name(file)}: {line.strip()}"
                )


# ----------------------------------------------------------------------------------------- results


@parametrized(sorted((ROOT / "results").glob("*.md")))
def test_a_table_of_results_names_its_commit_and_its_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^\|[-: |]+\|$", text, re.MULTILINE), "there is no table"
    commits = re.findall(r"\b(?:[Cc]ommits?|fedfms at) ([0-9a-f]{7,40})\b", text)
    assert commits, "of which commit of this repository are these numbers?"
    assert list(calls(text)) or re.search(r"`?(?:make|docker) [a-z]", text), "no command is named"
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run(
        [*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False
    )
    if shallow.stdout.strip() == "false":  # a clone with all of its history
        for commit in commits:
            known = subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], check=False)
            assert known.returncode == 0, f"there is no commit {commit}"


# ----------------------------------------------------------------------- keys, variables, sentences


def fields(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


# of project.yml, FLARE's own format
PROJECT_KEYS = {*("api_version", "name", "participants", "own_key", "org", "type", "role")}
SETTINGS = fields(Recipe, SiteConfig, Intensity, Policy, Study, MethodEntry) | PROJECT_KEYS


@parametrized(TEXTS)
def test_keys_are_fields_of_what_they_are_set_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for key in re.findall(r"--set[ =]\"?([a-z_]+)=", text):
        assert key in fields(Recipe) | {MIN_CLIENTS}, f"--set {key}"
    if page.suffix != ".md":
        return
    for span in re.findall(r"`([a-z_]+: [^`\n]+)`", text):
        for key, value in re.findall(r"([a-z_]+): ([\[{]?)", span):
            is_class = value == "["  # with its label values
            assert is_class or key in SETTINGS, span
    for fence in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for key in re.findall(r"^([a-z_]+):", fence, re.MULTILINE):
            assert key in SETTINGS, key


def test_every_key_of_a_site_stands_in_the_template() -> None:
    text = (TEMPLATES / "site/site.yml").read_text(encoding="utf-8")
    in_files = {f.name for f in dataclasses.fields(SiteConfig) if f.metadata.get("in_file", True)}
    for key in in_files | {"rule", "low", "high", "rounding"}:
        assert re.search(rf"^(?:# )? *{key}:", text, re.MULTILINE), key


def machinery(*folders_too: str) -> str:
    """All of the tree that is no document, and what a kit's owner sets."""
    kinds = ("*.py", "*.yml", "*.sh", "*.env", "env", "check-site", "entrypoint", "Dockerfile")
    names = ("src", "docker", "provisioning", "sites", "tools", *folders_too)
    folders = [ROOT / folder for folder in names]
    files = [file for folder in folders for kind in kinds for file in folder.rglob(kind)]
    files += [ROOT / "docker-compose.yml", ROOT / "Makefile"]
    others = [file for file in files if file != Path(__file__)]
    return "\n".join(file.read_text(encoding="utf-8") for file in others)


def test_environment_variables_exist() -> None:
    """Of ours and the compose files': a name that nothing reads would be set in vain."""
    known = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", machinery("tests")))
    prefixes = "FEDFMS|SITE|SERVER|TRAINER|FLARE|GPU|EXCHANGE|CLIENT|DEAD|TORCH|PIP|COMPOSE"
    found = 0
    for page in [*TEXTS, ROOT / "CHANGELOG.md"]:
        text = page.read_text(encoding="utf-8")
        for variable in re.findall(rf"\b(?:{prefixes})_[A-Z0-9_]*[A-Z0-9]\b(?!_)", text):
            found += 1
            assert variable in known, f"{name(page)}: {variable}"
    assert found > 60


# said by Docker and by FLARE
OTHERS_SAY = (
    *("required variable SITE_DATA", "bind source path", "No such image", "permission denied"),
    *("unable to find user", "'docker-compose'", "could not select device driver"),
)


FILLED_IN = (
    r"…|\bsite-1\b|\d+:\d+|/\w+|\([A-Z]\w+ \w+\)|\([a-z-]+\)|\bvit_b\b|\w+\.key"
    r"|\bs behind\b|\bis connected"
)


def test_sentences_that_the_page_for_sites_explains_are_said_somewhere() -> None:
    """Where a message was changed, whoever looks for it on the page would not find it."""
    page = (ROOT / "docs/site.md").read_text(encoding="utf-8")
    table = page.partition("| it says | what to do |")[2].partition("\n\n")[0]
    source = re.sub(r"[\"']\s*(?:\n\s*)?(?:rf|fr|f|r)?[\"']", "", machinery())  # joined literals
    source = re.sub(r"\{[^{}]*\}|\s+", " ", source)
    looked_at = 0
    for row in table.splitlines()[2:]:
        for sentence in re.findall(r"`([^`]+)`", row.split("|")[1]):
            if sentence.startswith(OTHERS_SAY):
                continue
            for part in re.split(FILLED_IN, sentence):
                words = part.strip(" ,:")
                if len(words) > 3:
                    looked_at += 1
                    assert words in source, sentence
    assert looked_at > 40
