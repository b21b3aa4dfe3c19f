"""The keys of sites' trainers, as people tell them to each other: {"site-2": "64 digits", …}."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from fedfms.contracts import decode
from fedfms.contracts.receipt import TrainerKey
from fedfms.errors import ConfigError

_PEERS = TypeAdapter(dict[str, TrainerKey])


def read_peers(path: Path) -> dict[str, str]:
    """Each site's name with the key of its trainer, as the trainer says it when it starts.

    Raises:
        ConfigError: it is not there, cannot be read, or holds something else (no-peers).
    """
    values = decode.read_json(path)
    try:
        return dict(_PEERS.validate_python(values))
    except ValueError:
        raise ConfigError(
            f"{path} holds something else than keys of trainers",
            'write each site with the key of its trainer, {"site-2": "0a1b…"}, 64 digits as its '
            "trainer's log says them",
            code="no-peers",
        ) from None
