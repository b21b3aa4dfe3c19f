"""Keeps FLARE from starting with a kit that `nvflare deploy prepare` turned; see kits/turned.py.

Provisioning names this component in `local/resources.json.default` alone. FLARE reads that file
only where `local/resources.json` is gone, and `nvflare deploy prepare` takes that one away but
keeps the components of the other.
"""

from __future__ import annotations

from nvflare.apis.fl_component import FLComponent

from fedfms.kits.turned import turned

COMPONENT = {"id": "turned_kit", "path": "fedfms.flare.turned.TurnedKit", "args": {}}


class TurnedKit(FLComponent):  # type: ignore[misc]
    """Cannot be made: the process ends with one sentence and exit code 1 before it connects."""

    def __init__(self) -> None:
        error = turned("this workspace")
        raise SystemExit(f"error: {error.problem}\n  fix: {error.fix}")
