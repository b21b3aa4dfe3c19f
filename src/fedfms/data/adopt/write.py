"""A proposal as a site.yml that a person reads and edits."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from fedfms.data.adopt.propose import Proposal
from fedfms.errors import ConfigError

_MEANING = {
    "images": "what the wildcards match pairs an image with its label",
    "classes": "class name -> label values; names are the job's",
    "label_files": "class name -> files in which it alone is drawn; names are the job's",
    "label_names": "label value -> names in the segmentation or structure set; 0 leaves it out",
    "patient": "its one group is the patient, whom the split never separates",
}


def site_yml(proposal: Proposal) -> str:
    """The text; every key that is not here has its default, which docs/site.md explains."""
    lines = [
        "# Written by fedfms adopt from the files as they lie; none of them was changed. It is",
        "# yours to edit. Keys that are not here have their defaults.",
        f"# Layout: {_one_line(proposal.layout)}",
    ]
    if proposal.unsure:
        lines.append("# Not sure of:")
        lines += [f"#   - {_one_line(one)}" for one in proposal.unsure]
    values = dict(proposal.values)
    if "contrasts" in values:
        del values["images"]
    if "label_files" in values:
        del values["labels"], values["classes"]
    lines += [
        "",
        "# SITE_DATA in the environment, or --data, goes before it",
        f"data_root: {_text(str(proposal.root))}",
    ]
    order = (
        "format",
        "images",
        "contrasts",
        "missing_contrast",
        "labels",
        "label_files",
        "pair_by",
        "unlabelled",
        "classes",
        "background",
        "void",
        "label_names",
        "overlap",
        "series",
        "plane",
        "channels",
        "intensity",
        "patient",
        "split",
    )
    assert set(values) <= set(order), set(values) - set(order)
    for key in order:
        if key not in values:
            continue
        if key in _MEANING:
            lines += ["", f"# {_MEANING[key]}"]
        lines += _entry(key, values[key])
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}:", *(f"  {_key(name)}: {_value(one)}" for name, one in value.items())]
    if key == "patient":
        return [f"{key}: '" + str(value).replace("'", "''") + "'"]
    return [f"{key}: {_value(value)}"]


def _key(name: Any) -> str:
    text = str(name)
    plain = isinstance(name, int) or (text.isidentifier() and text not in _WORDS)
    return text if plain else _text(text)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        numbers = [one for one in value if isinstance(one, int)]
        if len(numbers) == len(value) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f'["{numbers[0]}-{numbers[-1]}"]' if numbers[0] >= 0 else str(numbers)
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, str):
        return value if value.isidentifier() and value not in _WORDS else _text(value)
    return str(value)


_WORDS = {
    "yes",
    "no",
    "on",
    "off",
    "true",
    "false",
    "null",
    "y",
    "n",
    "Yes",
    "No",
    "NO",
    "On",
    "ON",
}


def _text(text: str) -> str:
    """In double quotes, as JSON and YAML both read it."""
    if any(unicodedata.category(sign) == "Cc" for sign in text):
        raise ConfigError(
            f"{text!r} has a line break or another sign that does not show, which a path in "
            "site.yml may not hold",
            "rename that folder or file",
        )
    if any(0xDC80 <= ord(sign) <= 0xDCFF for sign in text):
        raise ConfigError(
            f"{text!r} has bytes that are no UTF-8, which a site.yml cannot hold",
            "rename that folder or file",
        )
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().split())


def write_site(proposal: Proposal, file: Path) -> None:
    """Write it to a new file.

    Raises:
        ConfigError: "output-exists", or it cannot be written.
    """
    text = site_yml(proposal)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{file} is there already and is not written over",
            "name another file with --output, or move this one away",
            code="output-exists",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}", "name another file with --output"
        ) from None
