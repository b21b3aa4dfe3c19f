"""Which package may import which: the floors of docs/architecture.md, and two walls."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

# From the top down. What stands on a floor imports from the floors below it and from itself alone,
# so that there is no circle and no way back up. docs/architecture.md draws this table.
FLOORS = (
    ("fedfms_lab",),
    ("cli",),
    ("provisioning", "watch"),
    ("flare",),
    ("preflight", "report"),
    ("predict", "trainer"),
    ("export", "training"),
    ("local", "models"),
    ("data", "exchange", "kits", "pages", "records"),
    ("about", "geometry"),
    ("contracts",),
    ("control", "files", "notify", "plugins", "shipped", "user"),
    ("bounded",),
    ("errors",),
)
# A floor below may still be none of a package's business.
NEVER = {
    ("models", "data"): "a network knows tensors, not files",
    ("training", "exchange.door"): "the trainer asks the door, not the loop",
    ("pages", "contracts"): "both pages' toolkit knows no federation",
}
# Only these files may import nvflare.
FLARE = "fedfms/flare/"


class Import(NamedTuple):
    """One imported module, wherever in a file: at its top, in a function, for a type checker."""

    file: str
    line: int
    module: str
    at_start: bool  # it is executed when the file is imported

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def modules_under(source: Path) -> set[str]:
    files = (file.relative_to(source).with_suffix("") for file in source.rglob("*.py"))
    dotted = (".".join(file.parts) for file in files)
    return {name.removesuffix(".__init__") for name in dotted}


def imports(source: Path) -> Iterator[Import]:
    """Every import of all files under `source`, late ones and those for type checkers too."""
    known = modules_under(source)
    for file in sorted(source.rglob("*.py")):
        name = file.relative_to(source).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_start = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            first = id(node) in at_start
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(name, node.lineno, alias.name, first)
            elif isinstance(node, ast.ImportFrom):
                package = name.split("/")[: -node.level] if node.level else []
                base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
                for alias in node.names:  # `from fedfms import files` imports fedfms.files
                    whole = f"{base}.{alias.name}"
                    module = whole if whole in known else base
                    yield Import(name, node.lineno, module, first)
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                argument = node.args[0] if node.args else None
                if isinstance(argument, ast.Constant):
                    yield Import(name, node.lineno, str(argument.value), False)


@functools.cache
def of_the_tree() -> tuple[Import, ...]:
    return tuple(imports(SOURCE))


def room_of(dotted: str) -> str | None:
    """The package or module that stands on a floor; None for `fedfms` itself and other people's."""
    top, _, below = dotted.partition(".")
    if top == "fedfms_lab":
        return top
    return below.partition(".")[0] or None if top == "fedfms" else None


def floor_of(room: str) -> int:
    """Counted from the ground."""
    return next(number for number, rooms in enumerate(reversed(FLOORS)) if room in rooms)


def wrong_ways(found: Iterable[Import]) -> list[str]:
    """Each import between two rooms that does not lead down, or that a room must never make."""
    wrong = []
    for one in found:
        here = room_of(one.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        there = room_of(one.module)
        if here is None or there is None or here == there:
            continue
        why = next(
            (
                because
                for (room, never), because in NEVER.items()
                if room == here and f"{one.module}.".startswith(f"fedfms.{never}.")
            ),
            None,
        )
        if floor_of(there) >= floor_of(here):
            why = f"{there} does not stand below {here}"
        if why:
            wrong.append(f"{one}: {why}")
    return wrong


def test_every_room_stands_on_one_floor() -> None:
    rooms = {room for name in modules_under(SOURCE) if (room := room_of(name)) is not None}
    on_floors = [room for floor in FLOORS for room in floor]
    assert len(on_floors) == len(set(on_floors))
    assert rooms - set(on_floors) == set()
    assert set(on_floors) == rooms


def test_imports_lead_down() -> None:
    assert wrong_ways(of_the_tree()) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Within a package too; what is imported late or for a type checker alone is not counted."""
    known = modules_under(SOURCE)
    needs: dict[str, set[str]] = {module: set() for module in known}
    for one in of_the_tree():
        file = one.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if one.at_start and one.module in known:
            needs[file].add(one.module)
    assert sum(map(len, needs.values())) > 500
    assert list(graphlib.TopologicalSorter(needs).static_order())  # CycleError names a circle


def test_nvflare_is_imported_behind_one_wall() -> None:
    users = {one.file for one in of_the_tree() if one.module.split(".")[0] == "nvflare"}
    assert users, "no import of nvflare was found at all"
    assert {file for file in users if not file.startswith(FLARE)} == set()


def test_the_hospitals_building_does_not_know_the_laboratory() -> None:
    found = [one for one in of_the_tree() if one.file.startswith("fedfms/")]
    assert [str(one) for one in found if one.module.split(".")[0] == "fedfms_lab"] == []


def test_the_hospitals_image_is_made_of_stages_without_the_laboratory() -> None:
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    stages: dict[str, str] = {}
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\S+ AS (\S+)", stage)
        assert name is not None
        stages[name[1]] = stage
    assert list(stages)[-1] == "hospital"  # what is built where no target is named

    def made_of(stage: str) -> set[str]:
        below = re.findall(rf"(?:^|--from=)({'|'.join(stages)})\b", stages[stage], re.MULTILINE)
        return {stage}.union(*map(made_of, below))

    copied = {
        name: re.findall(r"^COPY (?!--from)(.+)$", stages[name], re.MULTILINE) for name in stages
    }
    assert made_of("hospital") >= {"image", "package", "dependencies"}
    in_hospital = " ".join(line for name in made_of("hospital") for line in copied[name])
    assert "src/fedfms src/fedfms" in in_hospital
    assert "fedfms_lab" not in in_hospital
    for name in made_of("hospital"):
        for line in copied[name]:
            assert not {".", "src", "src/"} & set(line.split()[:-1]), line  # both would be in it
    assert "laboratory" in made_of("lab")


def test_the_page_shows_these_floors_and_the_drawing_is_of_the_page() -> None:
    drawing = runpy.run_path(str(ROOT / "tools/draw_floors.py"))
    assert tuple(map(tuple, drawing["floors"]())) == FLOORS
    shown = (ROOT / "docs/the-house.svg").read_text(encoding="utf-8")
    assert shown == drawing["draw"](), "draw it again: python tools/draw_floors.py"


def test_the_drawing_of_a_round_names_files_and_functions_of_the_tree() -> None:
    drawing = (ROOT / "docs/a-round.svg").read_text(encoding="utf-8")
    files = re.findall(r"[\w/]+\.py", drawing)
    assert len(files) > 12
    for file in files:
        assert (SOURCE / "fedfms" / file).is_file(), file
    source = "".join(file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py"))
    called = re.findall(r">([a-z_]+(?:, [a-z_]+)*)<", drawing)
    functions = {name for line in called for name in line.split(", ") if "_" in name}
    assert functions >= {"train_round", "pass_door", "check_contribution", "averaging_weights"}
    for name in functions:
        assert f"def {name}(" in source, name


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("fedfms/data/x.py", "from fedfms.training.loop import a", "training does not stand below"),
        ("fedfms/data/x.py", "from fedfms import training", "training does not stand below data"),
        ("fedfms/data/x.py", "def f():\n    import fedfms.cli", "cli does not stand below data"),
        ("fedfms/data/x.py", "from ..cli import app", "cli does not stand below data"),
        ("fedfms/data/x.py", "from fedfms.exchange import a", "exchange does not stand below data"),
        ("fedfms/models/x.py", "from fedfms.data import a", "a network knows tensors, not files"),
        (
            "fedfms/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedfms import user",
            "user does not stand below errors",
        ),
        (
            "fedfms/cli/x.py",
            "import importlib\nimportlib.import_module('fedfms_lab.study')",
            "fedfms_lab does not stand below cli",
        ),
    ],
)
def test_an_arrow_that_leads_up_or_aside_is_found(
    tmp_path: Path, file: str, text: str, problem: str
) -> None:
    for room in ("training", "cli", "exchange", "data", "models"):
        (tmp_path / "fedfms" / room).mkdir(parents=True)
        (tmp_path / "fedfms" / room / "__init__.py").touch()
    (tmp_path / "fedfms/user.py").touch()
    (tmp_path / file).write_text(text, encoding="utf-8")
    (found,) = wrong_ways(imports(tmp_path))
    assert problem in found
