"""The site's own authorization.json: it must close what this project promises is closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedfms.bounded import MAX_JSON_BYTES, decode_json, read_bytes
from fedfms.errors import ConfigError, Undecodable
from fedfms.user import how_to_read

AUTHORIZATION_FILE = "authorization.json"

# FLARE's category and the single commands in it; a command goes before its category
_SHELL = ("shell_commands", "cat", "grep", "head", "ls", "pwd", "tail")
_CODE = ("byoc", "server-predeployed-flwr")
_NOBODY = ("none", "no")


def check_authorization(policy: Path, organisation: str) -> bytes:
    """Check the site's authorization.json and return its content.

    Args:
        policy: the site's policy folder.
        organisation: the site's own, from its certificate.

    Raises:
        ConfigError: the file is missing or no authorization policy of FLARE (policy-invalid), lets
            a job bring code (policy-lets-code-in), or lets somebody else run shell commands
            (policy-lets-shell-in).
    """
    path = policy / AUTHORIZATION_FILE
    try:
        content = read_bytes(path, MAX_JSON_BYTES)
        values = decode_json(content, str(path))
    except FileNotFoundError:
        raise _invalid(f"there is no {path}", "put the kit's policy/ back beside it") from None
    except OSError as error:
        raise _invalid(
            f"{path} cannot be read ({error.strerror}) by this container's user", how_to_read(path)
        ) from None
    except Undecodable as error:
        raise _invalid(error.problem, "correct it, or put the kit's own file back") from None
    for role, rights in _roles(values, path).items():
        _check_role(role, rights, organisation, path)
    return content


def _roles(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict) or values.get("format_version") != "1.0":
        raise _invalid(
            f'{path} has no "format_version": "1.0"', "put the kit's own file back and edit that"
        )
    roles = values.get("permissions")
    if not isinstance(roles, dict) or not roles:
        raise _invalid(f"{path} has no permissions", "put the kit's own file back and edit that")
    return roles


def _check_role(role: str, rights: Any, organisation: str, path: Path) -> None:
    if not isinstance(rights, dict):  # one condition for every right there is
        if not _only(rights, _NOBODY):
            raise ConfigError(
                f"{path} gives {role} every right, code in jobs and shell commands among them",
                f'list the rights of {role} one by one, with "byoc": "none" and '
                '"shell_commands": "none", as the kit\'s own file does',
                code="policy-lets-code-in",
            )
        return
    own = ("o:site", "org:site", f"o:{organisation.lower()}", f"org:{organisation.lower()}")
    for name, condition in rights.items():
        right = " ".join(str(name).lower().split())
        if not isinstance(condition, str | list) or not condition:
            raise _invalid(
                f"{path}: {role}'s {name} is {condition!r}", 'write a condition such as "none"'
            )
        if right in _CODE and not _only(condition, _NOBODY):
            raise ConfigError(
                f"{path} lets jobs of {role} bring code ({name} is {json.dumps(condition)})",
                f'set "{name}": "none"; what runs at this site is in its image',
                code="policy-lets-code-in",
            )
        if right in _SHELL and not _only(condition, (*_NOBODY, *own)):
            raise ConfigError(
                f"{path} lets {role} of other organisations run shell commands "
                f"({name} is {json.dumps(condition)})",
                f'set "{name}": "none", or "o:site" for this site\'s own people',
                code="policy-lets-shell-in",
            )


def _only(condition: Any, harmless: tuple[str, ...]) -> bool:
    """Whether a condition lets nobody in but by the harmless words.

    FLARE allows whoever any condition of a list allows; a list of "not ..." alone allows all
    others.
    """
    words = condition if isinstance(condition, list) else [condition]
    plain = [" ".join(str(word).lower().split()).replace(": ", ":") for word in words]
    allowed = [word for word in plain if not word.startswith("not ")]
    return bool(allowed) and all(word in harmless for word in allowed)


def _invalid(problem: str, fix: str) -> ConfigError:
    return ConfigError(problem, fix, code="policy-invalid")
