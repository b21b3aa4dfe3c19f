"""The jobs and recipes that are part of the package, by name."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
# an editable installation leaves the jobs where they lie in the repository
JOBS = _HERE / "jobs" if (_HERE / "jobs").is_dir() else _HERE.parents[1] / "jobs"


def find_shipped(text: str) -> Path:
    """What a person means by a job or a recipe: a path, or else one of the package's own.

    `fedmsa` and `jobs/fedmsa` are the package's job where the path does not exist, and so is
    `jobs/recipes/fedmsa-paper.json` its recipe.
    """
    path = Path(text)
    if not path.is_absolute() and not path.exists():
        shipped = JOBS.joinpath(*path.parts[path.parts[0] == "jobs" :]) if path.parts else JOBS
        if shipped.exists() and shipped != JOBS and ".." not in path.parts:
            return shipped
    return path
