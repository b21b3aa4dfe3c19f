"""What the processes of one run are told, as a JSON file in the run's unfinished folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms.contracts.recipe import Recipe
from fedfms.local.sites import Site
from fedfms_lab.study.record import Engine, Phase, RunKey, SiteFacts

SPEC_FILE, MEASURED_FILE = "spec.json", "measured.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run to do."""

    study: str
    key: RunKey
    recipe: Recipe
    job: Path  # job folder, for FLARE
    engine: Engine | None  # of a federated run
    sites: tuple[Site, ...]  # all that are scored; those in key.trained_on train
    facts: dict[str, SiteFacts]
    checkpoints: Path | None
    threads: int | None
    pictures: bool

    def write(self, path: Path) -> None:
        """Write it."""
        values = {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()}
        path.write_text(json.dumps(values, default=str, indent=1))

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read it back."""
        values: dict[str, Any] = json.loads(path.read_text())
        values["key"]["trained_on"] = tuple(values["key"]["trained_on"])
        sites = (
            Site(s["name"], Path(s["folder"]), Path(s["data"]) if s["data"] else None)
            for s in values["sites"]
        )
        return cls(
            **{
                **values,
                "key": RunKey(**values["key"]),
                "recipe": Recipe.from_dict(values["recipe"], str(path)),
                "job": Path(values["job"]),
                "sites": tuple(sites),
                "facts": {name: SiteFacts(**facts) for name, facts in values["facts"].items()},
                "checkpoints": Path(values["checkpoints"]) if values["checkpoints"] else None,
            }
        )


def write_phase(folder: Path, name: str, phase: Phase) -> None:
    """Add what a phase cost to the run's unfinished folder."""
    _add(folder, "phases", {name: dataclasses.asdict(phase)})


def write_machine(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add what the run computed on."""
    _add(folder, "machine", facts)


def read_phases(folder: Path) -> dict[str, Phase]:
    """The phases that were added."""
    return {name: Phase(**phase) for name, phase in _read(folder)["phases"].items()}


def read_machine(folder: Path) -> dict[str, Any]:
    """What was added about the machine."""
    return dict(_read(folder)["machine"])


def _add(folder: Path, key: str, values: Mapping[str, Any]) -> None:
    known = _read(folder)
    known[key] |= values
    (folder / MEASURED_FILE).write_text(json.dumps(known))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MEASURED_FILE
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {"phases": {}, "machine": {}, **known}
