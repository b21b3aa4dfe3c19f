"""YAML that a person wrote: what it says, or one sentence on the mistake and its cure.

The classic mistakes of site.yml, project.yml and study files are told by name: a glob without
quotes, a regular expression in double quotes, a tab. What YAML reads as something else without a
word is refused: a key that stands twice, a name such as `no` or `1_0`, a number such as 010. So is
what is larger or deeper than a person writes: with aliases a kilobyte could stand for gigabytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fedfms.bounded import MAX_DEPTH, short
from fedfms.errors import ConfigError

MAX_CHARACTERS = 1 << 20  # of one text; a project.yml of 200 sites has 20 kB
MAX_NODES = 50_000  # values, keys and lists, each alias counted as what it stands for
MAX_DIGITS = 64  # of a number

_VALUE = re.compile(r"^\s*(?:-\s+)?(?P<key>[\w.-]+\s*:\s+|-\s+)(?P<value>[^\s#].*?)\s*(?:\s#.*)?$")
_NEEDS_QUOTES = "*&!%@`|>?[]{},"  # at the start of a value they mean something else in YAML
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)")


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds.

    Args:
        text: one document.
        source: says in an error where it stood.

    Raises:
        ConfigError: with the line, YAML's reason and the cure.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{source} has more than {MAX_CHARACTERS >> 20} MB", "look what file that is"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except _Refused as error:
        raise ConfigError(f"{source}, line {error.line + 1}: {error.problem}", error.fix) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None)
        lines = text.splitlines()
        place = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
        at = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{source} is no YAML{at}{f': {reason}' if reason else ''}",
            _cure(place, str(reason or "")),
        ) from None
    # a date such as 2024-13-40; and what PyYAML trips over: a tag without its value
    except (ValueError, OverflowError, RecursionError, *_OF_PYYAML) as error:
        raise ConfigError(
            f"{source} holds a value that is none: {error}", "put it in quotes if it is a text"
        ) from None


_OF_PYYAML = (TypeError, KeyError, AttributeError, IndexError)


def _cure(line: str, reason: str) -> str:
    """What to do about the mistake in this line."""
    if "\t" in line and ("'\\t'" in reason or line[: len(line) - len(line.lstrip())].count("\t")):
        return "there is a tab in this line; write spaces in its place"
    if "escape" in reason:
        return (
            "write regular expressions and paths in single quotes, in which a \\ is a \\: "
            "patient: '^(p\\d+)_'"
        )
    found = _VALUE.match(line)
    if found and found["value"][0] in _NEEDS_QUOTES:
        key, value = found["key"], found["value"]
        text = value.replace("'", "''")
        return (
            f"put the value in quotes, {key}'{text}': a {value[0]} at its start means something "
            "else in YAML"
        )
    if found and ": " in found["value"]:
        return "put the value in quotes: it holds a colon with a space behind it"
    return "correct the file at that place"


class _Refused(Exception):
    """What YAML would read as something else than the person meant."""

    def __init__(self, node: yaml.Node | yaml.Event, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.line = node.start_mark.line if node.start_mark is not None else 0
        self.problem, self.fix = problem, fix


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses what it would otherwise read without a word."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0
        self._of_anchor: dict[str, int] = {}  # nodes that an alias stands for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._nodes
        if isinstance(event, yaml.AliasEvent):
            self._nodes += self._of_anchor.get(str(event.anchor), 1)
        self._nodes += 1
        self._depth += 1
        node = None
        if self._depth <= MAX_DEPTH and self._nodes <= MAX_NODES:
            node = super().compose_node(parent, index)
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise _Refused(
                event,
                "there is more in each other here, or in all, than a person writes",
                "write it out, without anchors and aliases",
            )
        self._depth -= 1
        if isinstance(event, yaml.NodeEvent) and not isinstance(event, yaml.AliasEvent):
            self._of_anchor[str(event.anchor)] = self._nodes - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}  # by text: 1 and "1" are one name to us
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            self._require_a_name(key)
            if key.value in lines:
                raise _Refused(
                    key,
                    f"the key {key.value} stands twice, first in line {lines[key.value] + 1}",
                    "leave one of them; the second would silently replace the first",
                )
            lines[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)

    def construct_whole_map(self, node: yaml.MappingNode) -> dict[Any, Any]:
        return self.construct_mapping(node, deep=True)

    def construct_whole_seq(self, node: yaml.SequenceNode) -> list[Any]:
        return list(self.construct_sequence(node, deep=True))  # type: ignore[no-untyped-call]

    def _require_a_name(self, key: yaml.ScalarNode) -> None:
        kind = key.tag.rpartition(":")[2]
        if kind == "str" or (kind == "int" and _PLAIN_NUMBER.fullmatch(key.value)):
            return
        read_as = {"bool": "true or false", "null": "nothing", "timestamp": "a date"}
        raise _Refused(
            key,
            f"YAML reads the name {key.value or 'that is empty'} as "
            f"{read_as.get(kind, 'a number')}",
            f"put it in quotes: '{key.value}'",
        )

    def construct_number(self, node: yaml.ScalarNode) -> float:
        if len(node.value) > MAX_DIGITS:
            raise _Refused(
                node,
                f"the number {short(node.value)} has more digits than a number may have here",
                "correct it, or put it in quotes if it is a text",
            )
        is_int = node.tag.endswith(":int")
        read = super().construct_yaml_int if is_int else super().construct_yaml_float
        number: float = read(node)
        # octal, or to the base of 60
        if ":" in node.value or (is_int and re.match(r"[-+]?0[\d_]", node.value)):
            raise _Refused(
                node,
                f"YAML reads {node.value} as the number {number}",
                "write the number that you mean, or put it in quotes if it is a text: "
                f"'{node.value}'",
            )
        return number


# at once and not, as PyYAML has it, after the rest: so what holds itself is an error
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_whole_map)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_whole_seq)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
