"""Files and JSON objects as typed values; whatever does not fit is one ConfigError."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedfms.contracts.yaml_text import parse_yaml
from fedfms.errors import ConfigError

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def require(condition: bool, problem: str, fix: str) -> None:
    """Raise a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(problem, fix)


def build(cls: type[T], values: dict[str, Any], path: Path) -> T:
    """As `from_dict`; every error names this very file, since each site has one of that name."""
    try:
        return from_dict(cls, values, str(path))
    except ConfigError as error:
        if str(path) in error.problem:
            raise
        said = error.problem
        named = said[len(path.name) :] if said.startswith(path.name) else f": {said}"
        raise ConfigError(f"{path}{named}", error.fix, code=error.code) from None


def require_name(name: str, what: str) -> None:
    """Refuse a name that a table, a file or a page could not hold."""
    require(
        _NAME.fullmatch(name) is not None,
        f"{what} name {name!r} cannot be used",
        "use letters, digits, - and _, at most 63 of them",
    )


def require_key(key: str, known: typing.Iterable[str], source: str) -> None:
    """Refuse an unknown key, and name the one that was meant or all that there are."""
    known = sorted(known)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        fix = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        raise ConfigError(f"{source}: unknown key {key!r}", fix)


def read_text(path: Path) -> str:
    """A text file that a person wrote; the mark that some editors put before it is left out.

    Raises:
        ConfigError: it is not there, or cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", "check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text (at byte {error.start})",
            "save it again as UTF-8 in your editor",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "let this user read it"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """A JSON object whose keys stand once; raises ConfigError."""

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        twice = [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]
        if twice:
            lines = [
                str(number)
                for number, line in enumerate(text.splitlines(), start=1)
                if re.search(rf"{re.escape(json.dumps(twice[0]))}\s*:", line)
            ]
            at = f" (lines {' and '.join(lines)})" if len(lines) > 1 else ""
            raise ConfigError(
                f"{source}: the key {twice[0]} stands twice{at}",
                "leave one of them; the second would silently replace the first",
            )
        return values

    try:
        values = json.loads(text, object_pairs_hook=each_once)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is no JSON: {error}", "correct the file at that place"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no JSON object", "write { … } with its keys")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: there is no such file, or it is no YAML with keys.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys", "write one 'key: value' a line")
    return values


def require_known(cls: type, values: dict[str, Any], source: str) -> None:
    """Refuse a key that is none of this config dataclass.

    Raises:
        ConfigError: naming the key, and the one that was meant or all that there are.
    """
    for key in values:
        require_key(str(key), fields_in_file(cls), source)


def fields_in_file(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a config dataclass that a person may write, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}


def from_dict(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Build a config dataclass from plain JSON or YAML values; lists become tuples."""
    hints = typing.get_type_hints(cls)
    fields = fields_in_file(cls)
    require_known(cls, values, source)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        arguments[key] = convert(value, hints[key], f"{source}, {key}")
    missing = [
        name
        for name, f in fields.items()
        if name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{source} has no {', '.join(missing)}", "add what is missing")
    return cls(**arguments)


def convert(value: Any, hint: Any, where: str) -> Any:
    """A plain JSON or YAML value as what a type asks for; what does not fit stays as it is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return convert(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        require(
            isinstance(value, list | tuple), f"{where} is {short(value)}", "write a list, [ … ]"
        )
        return tuple(convert(item, args[0], where) for item in value)
    if origin is dict:
        require(isinstance(value, dict), f"{where} is {short(value)}", "write 'name: value' lines")
        if args[0] is int:  # JSON and YAML give whole numbers as they are, checked by fits
            return {key: convert(item, args[1], f"{where}, {key}") for key, item in value.items()}
        return {str(key): convert(item, args[1], f"{where}, {key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{where} is {short(value)}", "write 'name: value' lines")
        return from_dict(typing.cast(type, hint), value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as text
            return float(value)
        except ValueError:
            return value
    return value


def parse_override(key: str, text: str, hint: Any) -> Any:
    """The value of `--set key=text`, for a field of this type."""
    if typing.get_origin(hint) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if hint is str or (typing.get_origin(hint) is Literal):
        return text
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        raise ConfigError(
            f"--set {key}={text}: the value is no number, true, false or null",
            f"look at {key} in the job's recipe.json for an example",
        ) from None


def check_types(config: Any, source: str) -> None:
    """Refuse a config dataclass with a value that is not of its field's type; for __post_init__.

    Raises:
        ConfigError: naming the field and what it takes.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            raise ConfigError(
                f"{source}: {name} is {short(value)}",
                f"use {_describe(hint)}" + _quotes(value, hint, source),
            )


def short(value: Any) -> str:
    """A value as it is written, of a long one (a range of label values) the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


def _quotes(value: Any, hint: Any, source: str) -> str:
    """A word for those to whom YAML gave something else than the text that they wrote."""
    takes_text = hint is str or str in typing.get_args(hint)
    if source.endswith(".json"):
        return ""
    values = value if isinstance(value, tuple) else (value,)
    if not takes_text or all(one is None or isinstance(one, str | dict) for one in values):
        return ""
    return "; YAML takes words such as no, off, 12 or 2024-01-31 for something else: use quotes"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return f"'name: value' lines: {_describe(args[0])}, then {_describe(args[1])}"
    if hint is type(None):
        return "null"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
    }
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")
