"""What the processes of one run are told, as a JSON file in the run's unfinished folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedfms.contracts.decode import validate
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
    members: dict[str, Path] = field(default_factory=dict)  # of an ensemble: each site's model

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=1))

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read it back."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text()))


@dataclass(frozen=True, slots=True)
class Measured:
    """What the run's processes have measured so far."""

    phases: dict[str, Phase] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)  # what the run computed on


def add_measured(folder: Path, phases: Mapping[str, Phase], **machine: object) -> None:
    """Add what phases cost, and facts of the machine, to the run's unfinished folder."""
    known = read_measured(folder)
    known.phases.update(phases)
    known.machine.update(machine)
    (folder / MEASURED_FILE).write_text(json.dumps(dataclasses.asdict(known)))


def read_measured(folder: Path) -> Measured:
    """All that was added."""
    path = folder / MEASURED_FILE
    return validate(Measured, json.loads(path.read_text())) if path.is_file() else Measured()
