"""What a kit says of itself: `fedfms.json` in the kit's folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from fedfms import __version__
from fedfms.bounded import read_json_object
from fedfms.errors import ConfigError, Undecodable

ABOUT_FILE = "fedfms.json"
MAX_ABOUT_BYTES = 64 * 1024  # it has 300
# Which files a kit has and what is in them. Kits without a number (1) list an executor for each
# method, and nothing in them stops FLARE after `nvflare deploy prepare`.
KIT_FORMAT = 3
ParticipantType = Literal["server", "client", "admin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KitAbout:
    """Whose kit it is, and which server it belongs to."""

    project: str
    participant: str
    type: ParticipantType
    server_host: str  # the name that sites connect to
    server_port: int
    version: str  # of fedfms, when the kit was made
    nvflare: str  # its version, when the kit was made
    kit_format: int = KIT_FORMAT

    def write(self, kit: Path) -> None:
        """Write `fedfms.json` into a kit's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (kit / ABOUT_FILE).write_text(text + "\n", encoding="utf-8")


def read_about(kit: Path) -> KitAbout:
    """Read `fedfms.json` of a kit.

    Args:
        kit: the folder with startup/ and local/.

    Raises:
        ConfigError: there is no kit (no-kit), its fedfms.json is none (kit-changed), or it was made
            by a version of fedfms that made other kits (kit-format).
        PermissionError: this user may not read it.
    """
    path = kit / ABOUT_FILE
    try:
        values = read_json_object(path, MAX_ABOUT_BYTES)
    except PermissionError:  # the reader knows which user it is, and what to do
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"there is no {path}",
            "name the folder kit/ of an unzipped kit, with startup/ and local/ in it",
            code="no-kit",
        ) from None
    except (OSError, ValueError) as error:
        why = error.problem if isinstance(error, Undecodable) else error
        raise _changed(path, str(why)) from None
    try:
        about = _ABOUT.validate_json(json.dumps({"kit_format": 1, **values}), strict=True)
    except (TypeError, ValueError):
        raise _changed(path, "it does not say what a kit says of itself") from None
    if about.kit_format != KIT_FORMAT:
        raise _other_format(kit, about)
    return about


_ABOUT = TypeAdapter(KitAbout)


def _other_format(kit: Path, about: KitAbout) -> ConfigError:
    problem = (
        f"the kit in {kit} was made by fedfms {about.version} in format {about.kit_format}, and "
        f"this version of fedfms ({__version__}) uses kits of format {KIT_FORMAT}"
    )
    if about.kit_format > KIT_FORMAT:
        fix = "install the version of fedfms that the coordinator uses"
    else:
        fix = (
            "it must be made again: ask the coordinator to run fedfms provision with this version, "
            "and put the new kit/ in the place of this one; keys and certificates stay"
        )
    return ConfigError(problem, fix, code="kit-format")


def _changed(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used: {why}",
        "unzip the kit again; if that does not help, ask the coordinator for a new one",
        code="kit-changed",
    )
