"""FLARE stands behind its wall: who may import it, and what of it may be touched where."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

SRC = Path(__file__).resolve().parents[3] / "src"
FLARE = SRC / "fedfms/flare"
INTERNALS = FLARE / "internals"

# what FLARE documents for users of it; the rest is its own matter and belongs into internals
PUBLIC = (
    *("nvflare.apis", "nvflare.app_common", "nvflare.app_opt", "nvflare.widgets"),
    *("nvflare.fuel.flare_api", "nvflare.fuel.utils.fobs", "nvflare.lighter"),
)


def trees(*, below: Path = SRC, without: Path | None = None) -> Iterator[tuple[str, ast.Module]]:
    """Each file of the source, by its path below src."""
    for path in sorted(below.rglob("*.py")):
        if without is None or without not in path.parents:
            yield str(path.relative_to(SRC)), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """All that a file imports, dotted, names included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_only_the_folder_flare_imports_nvflare() -> None:
    guilty = [
        f"{path}: {name}"
        for path, tree in trees(without=FLARE)
        for name in imports(tree)
        if name.split(".")[0] == "nvflare"
    ]
    assert guilty == []


def test_outside_internals_only_public_modules_of_flare_are_imported() -> None:
    guilty = [
        f"{path}: {name}"
        for path, tree in trees(without=INTERNALS)
        for name in imports(tree)
        if name.startswith("nvflare.")
        and (not name.startswith(PUBLIC) or any(is_private(part) for part in name.split(".")))
    ]
    assert guilty == []


def test_outside_internals_no_text_names_a_private_module_of_flare() -> None:
    guilty = [
        f"{path}:{node.lineno}"
        for path, tree in trees(without=INTERNALS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("nvflare.private")
    ]
    assert guilty == []


def test_outside_internals_nothing_of_flare_is_replaced() -> None:
    guilty = []
    for path, tree in trees(below=FLARE, without=INTERNALS):
        flares = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvflare")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = node.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                if isinstance(owner, ast.Name) and owner.id in flares:
                    guilty.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert guilty == []


def test_in_flare_a_private_name_is_asked_of_nobody_but_oneself() -> None:
    guilty = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, tree in trees(below=FLARE, without=INTERNALS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and ast.unparse(node.value) not in ("self", "cls")
        and ast.unparse(node) != "os._exit"
    ]
    assert guilty == []


def private_names(kind: type) -> set[str]:
    """Private names that a class defines or that its functions look up."""
    names = set(vars(kind))
    codes: list[CodeType] = [
        inspect.unwrap(value).__code__ for value in vars(kind).values() if inspect.isfunction(value)
    ]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return {name for name in names if is_private(name)} - {"_abc_impl"}  # of Python's own abc


def test_our_components_share_no_private_name_with_the_classes_of_flare_below_them() -> None:
    """Such a name is an override, a use or a clash; none belongs outside internals."""
    guilty, seen = [], 0
    for found in pkgutil.iter_modules([str(FLARE)], "fedfms.flare."):
        if found.ispkg:
            continue
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != found.name:
                continue
            bases = [base for base in kind.__mro__ if base.__module__.startswith("nvflare.")]
            seen += bool(bases)
            theirs = set().union(*(private_names(base) for base in bases))
            guilty += [f"{kind.__name__}.{name}" for name in private_names(kind) & theirs]
    assert guilty == []
    assert seen > 10  # executors, aggregator, guard, recorder, … were looked at
