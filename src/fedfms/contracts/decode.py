"""Files and JSON objects as typed values; whatever does not fit is one ConfigError."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fedfms import bounded
from fedfms.contracts.yaml_text import parse_yaml
from fedfms.errors import ConfigError, Undecodable

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def require(condition: bool, problem: str, fix: str) -> None:
    """Raise a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(problem, fix)


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
        return bounded.read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", "check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "name the file in it") from None
    except Undecodable as error:
        raise ConfigError(error.problem, error.fix) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "let this user read it"
        ) from None
    except ValueError:  # a null byte in it
        raise ConfigError(f"{str(path)!r} is no name of a file", "check the path") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """A JSON object whose keys stand once; raises ConfigError."""
    try:
        return bounded.json_object(text, source)
    except Undecodable as error:
        raise ConfigError(error.problem, error.fix) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: there is no such file, or it is no YAML with keys.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys", "write one 'key: value' a line")
    return values


def require_known(cls: type, values: Mapping[str, Any], source: str) -> None:
    """Refuse a key that is none of this config dataclass.

    Raises:
        ConfigError: naming the key, and the one that was meant or all that there are.
    """
    for key in values:
        require_key(str(key), fields_in_file(cls), source)


def fields_in_file(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a config dataclass that a person may write, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}


def from_dict(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Build a contract (a dataclass) from plain JSON or YAML values; lists become tuples.

    Types are taken strictly, as pydantic does for JSON; only whole numbers, and texts such as 1e-4
    (which YAML takes for text), become numbers where a number is asked for.

    Args:
        cls: the dataclass; what its `__post_init__` refuses is refused here.
        values: by the names of its fields.
        source: where they stood, such as a file: every error begins with it. `OPTIONS` for what
            the options of a command gave.

    Raises:
        ConfigError: with source, key and value.
    """
    require_known(cls, values, source)
    plain = _plain(values)
    while True:
        try:
            return validate(cls, plain)
        except Misfits as misfits:
            wrong = [error for error in misfits.errors if not _made_a_number(plain, error)]
            if wrong:
                raise _as_config_error(wrong, cls, source) from None
        except ConfigError as error:  # of a __post_init__, which cannot know the source
            problem = _said(source, error.problem)
            raise ConfigError(problem, error.fix, code=error.code) from None


def changed(config: T, given: Mapping[str, Any], source: str) -> T:
    """A contract with other values, as JSON types; errors are of those, see `from_dict`."""
    cls = type(config)
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    kept = {name: getattr(config, name) for name in fields_in_file(cls)}
    beside = {name: getattr(config, name) for name in names if name not in kept}
    made: Any = from_dict(cls, {**kept, **given}, source)
    return typing.cast(T, dataclasses.replace(made, **beside))


class Misfits(Exception):
    """What does not fit a contract, as pydantic lists it: type, loc, input, msg of each error."""

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(errors[0]["type"])
        self.errors = errors

    @property
    def kind(self) -> Literal["unknown", "missing", "unusable"]:
        """What is wrong first."""
        kinds: dict[str, Literal["unknown", "missing"]] = {
            "unexpected_keyword_argument": "unknown",
            "missing": "missing",
        }
        return kinds.get(self.errors[0]["type"], "unusable")

    @property
    def loc(self) -> tuple[int | str, ...]:
        """Where that is: names of entries, and numbers in lists."""
        return tuple(self.errors[0]["loc"])


def validate(cls: type[T], values: Any, *, unknown: Literal["forbid", "ignore"] = "forbid") -> T:
    """The one door from JSON types to a contract, for files and wires.

    Args:
        cls: a dataclass; constraints stand in its annotations.
        values: of JSON's types.
        unknown: what becomes of entries that the dataclass does not have.

    Raises:
        Misfits: an entry is unknown, missing, or not of its type.
    """
    from pydantic import ValidationError

    adapter = _adapter(typing.cast(Any, cls))
    try:
        text = json.dumps(values)
        return typing.cast(T, adapter.validate_json(text, strict=True, extra=unknown))
    except ValidationError as error:
        raise Misfits(error.errors(include_url=False)) from None
    except (TypeError, ValueError, RecursionError):  # nothing that JSON has
        raise Misfits([{"type": "json", "loc": (), "input": None, "msg": "no JSON"}]) from None


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter  # here: commands that decode nothing start without it

    return TypeAdapter(cls)


class _AnyBytes:
    """Of a path: its name may hold bytes that are no text, which JSON has not."""

    BEGIN = "\0bytes:"  # no name of a file holds this

    def write(self, path: Path) -> str:
        return self.BEGIN + os.fsencode(path).hex()

    def read(self, text: str) -> Path:
        if text.startswith(self.BEGIN):
            return Path(os.fsdecode(bytes.fromhex(text.removeprefix(self.BEGIN))))
        return Path(text)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import AfterValidator, StrictStr

        return handler.generate_schema(Annotated[StrictStr, AfterValidator(self.read)])


AnyPath = Annotated[Path, _AnyBytes()]  # of a field; values are paths, or their texts

_FOREIGN = ""  # key of what stands for a value that JSON has not


def _plain(value: Any) -> Any:
    """A copy in JSON's types; what JSON has not, such as a date, becomes what no type takes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in fields_in_file(type(value))}
    if isinstance(value, Path):
        return _AnyBytes().write(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return {_FOREIGN: repr(value)}


def _made_a_number(plain: Any, error: Mapping[str, Any]) -> bool:
    """Puts the number that a text means in its place; whether that was all that was wrong."""
    if error["type"] != "float_type" or not isinstance(error["input"], str):
        return False
    *path, last = error["loc"]
    for part in path:
        plain = plain[part]
    try:
        plain[last] = bounded.number(plain[last], "the value")
    except Undecodable:
        return False
    return True


OPTIONS = "--"  # source: the options of a command


def _said(source: str, what: str) -> str:
    return f"--{what}" if source == OPTIONS else f"{source}: {what}"


# by pydantic's type of an error: what to write
_WRITE = {
    "int_type": "use a whole number",
    "int_parsing": "use a whole number",
    "int_from_float": "use a whole number",
    "float_type": "use a number",
    "string_type": "use a text",
    "bool_type": "use true or false",
    "tuple_type": "write a list, [ … ]",
    "dict_type": "write 'name: value' lines",
    "dataclass_type": "write 'name: value' lines",
}


def _as_config_error(errors: Sequence[Mapping[str, Any]], cls: type, source: str) -> ConfigError:
    """The first of pydantic's errors as a person reads it."""
    unknown_first = sorted(errors, key=lambda one: one["type"] != "unexpected_keyword_argument")
    error = unknown_first[0]
    kind, loc = error["type"], tuple(error["loc"])
    names = [str(part) for part in loc if isinstance(part, str) and part != "[key]"]
    if kind == "unexpected_keyword_argument":
        known = fields_in_file(_contract_in(_type_at(cls, loc[:-1])))
        require_key(names[-1], known, ", ".join([source, *names[:-1]]))
    if kind == "missing":
        here = [one["loc"] for one in errors if one["type"] == kind]
        missing = [str(other[-1]) for other in here if other[:-1] == loc[:-1]]
        where = ", ".join([source, *names[:-1]])
        return ConfigError(f"{where} has no {', '.join(missing)}", "add what is missing")
    if not loc:  # half a surrogate pair, which YAML and JSON can spell
        return ConfigError(f"{source} holds a text that is no Unicode", "write that text anew")
    given = error["input"]
    is_foreign = isinstance(given, dict) and _FOREIGN in given
    shown = given[_FOREIGN] if is_foreign else short(given)
    verb = "holds" if isinstance(loc[-1], int) else "is"
    if loc[-1] == "[key]":
        names, verb = names[:-1], "has the key"
    fix = _WRITE.get(kind, str(error["msg"]))
    if kind == "literal_error":
        fix = "use one of " + ", ".join(re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    if len(loc) == 1 and type(None) in typing.get_args(_type_at(cls, loc)):
        fix += " or null"
    is_one_value = is_foreign or not isinstance(given, dict)
    if kind == "string_type" and is_one_value and not source.endswith(".json"):
        fix += "; YAML takes words such as no, off, 12 or 2024-01-31 for something else: use quotes"
    return ConfigError(_said(source, f"{', '.join(names)} {verb} {shown}"), fix)


def _type_at(hint: Any, loc: Sequence[int | str]) -> Any:
    """The type that a contract asks for at a place in it."""
    for part in loc:
        hint = _contract_in(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint)[str(part)]
        else:  # of a list the first, of a mapping the last, which is what its values are
            hint = [one for one in typing.get_args(hint) if one is not ...][-1]
    return hint


def _contract_in(hint: Any) -> Any:
    """X of X | None, and all else as it is."""
    args = typing.get_args(hint)
    return next(one for one in args if one is not type(None)) if type(None) in args else hint


def short(value: Any) -> str:
    """A value as it is written, of a long one (a range of label values) the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


def parse_override(key: str, text: str, hint: Any) -> Any:
    """The value of `--set key=text`, for a field of this type."""
    if typing.get_origin(hint) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if hint is str or (typing.get_origin(hint) is Literal):
        return text
    try:
        return bounded.decode_json(
            {"True": "true", "False": "false", "None": "null"}.get(text, text), f"--set {key}"
        )
    except Undecodable:
        raise ConfigError(
            f"--set {key}={text[:200]}: the value is no number, true, false or null",
            f"look at {key} in the job's recipe.json for an example",
        ) from None
