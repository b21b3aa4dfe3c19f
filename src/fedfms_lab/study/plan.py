"""A study file to the runs that it asks for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfms.contracts.decode import AnyPath, from_dict, read_yaml, require_known
from fedfms.contracts.recipe import JOB_RECIPE, Recipe, read_job_recipe
from fedfms.errors import ConfigError
from fedfms.files import is_file
from fedfms.local.sites import Site, find_sites
from fedfms_lab.study.record import REGIMES, Engine, Regime, RunKey

NO_HOLDOUT = "none"
_Fold = tuple[str | None, tuple[str, ...]]  # the site that is held out, and those that train


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantoms:
    """Sites to make where a study has none of its own; the values of `fedfms synth`."""

    cases: int = 18  # patients of each site
    slices: int = 4  # of each volume
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """One method of a study, under the study's own name for it."""

    job: AnyPath  # job folder; its recipe is the method's
    recipe: AnyPath | None = None  # goes before the job's own
    set: dict[str, Any] = field(default_factory=dict)  # values of the recipe

    def __post_init__(self) -> None:
        if not is_file(self.job / JOB_RECIPE):
            raise ConfigError(
                f"{self.job} is no job folder: it has no {JOB_RECIPE}",
                "name a folder such as ../jobs/fedmsa in the study file, relative to that file",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What a study asks for; a YAML file such as studies/demo.yml.

    Folders in it are relative to the file.
    """

    methods: dict[str, MethodEntry]
    sites: AnyPath | None = None  # folder with one folder for each site, each with a site.yml
    data: AnyPath | None = (
        None  # the images of each site in a folder of its name, if not where it says
    )
    phantoms: Phantoms | None = None  # in place of sites
    name: str = ""  # of the study's folder; the file's own name where it is not given
    title: str = ""
    regimes: tuple[Regime, ...] = REGIMES
    holdout: tuple[str, ...] = ("each",)  # each; none; or sites to hold out one after the other
    seeds: tuple[int, ...] = (0,)
    set: dict[str, Any] = field(default_factory=dict)  # values of the recipe, for all methods
    engine: Engine = "flare"  # of federated runs
    threads: int | None = None  # CPU threads of central and local training; none: torch decides
    target_dice: float | None = None  # none: 95 % of what central training of the fold reaches

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("the study names no method", "add at least one under methods")
        if (self.sites is None) == (self.phantoms is None):
            raise ConfigError(
                "the study needs either sites or phantoms",
                "set sites to a folder with one folder for each site, or write phantoms: {}",
            )
        if not self.regimes or not self.seeds or not self.holdout:
            raise ConfigError(
                "the study asks for nothing: regimes, seeds or holdout is empty",
                f"name at least one of {', '.join(REGIMES)}, one seed, and each, none or a site",
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("the study names one seed twice", "name each seed once under seeds")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}", "set threads to 1 or more")

    @classmethod
    def from_yaml(
        cls,
        path: Path,
        *,
        sites: Path | None = None,
        data: Path | None = None,
        engine: Engine | None = None,
    ) -> Study:
        """Read a study file.

        Args:
            path: the file.
            sites, data, engine: go before what the file says.

        Raises:
            ConfigError: it cannot be used, with the key and what to write.
        """
        values = read_yaml(path)
        require_known(cls, values, str(path))  # first: a typo in methods is no study without them
        folder = path.parent
        values.setdefault("name", path.stem)
        if isinstance(values.get("holdout"), str):
            values["holdout"] = [values["holdout"]]
        _resolve(values, ("sites", "data"), folder)
        methods = values.get("methods")
        if not isinstance(methods, dict):
            raise ConfigError(
                f"{path}: methods is {methods!r}",
                "write 'name: {job: ../jobs/fedmsa}' lines under methods",
            )
        for entry in methods.values():
            if isinstance(entry, dict):
                _resolve(entry, ("job", "recipe"), folder)
        if sites is not None:
            values["sites"] = sites.resolve()
            values.pop("phantoms", None)
        if data is not None:
            values["data"] = data.resolve()
        if engine is not None:
            values["engine"] = engine
        return from_dict(cls, values, str(path))

    def recipe_of(self, key: RunKey) -> Recipe:
        """The recipe of one run.

        Central and local training keep the optimizer's moments: nothing is averaged that would make
        them belong to other weights. Nothing of what is for a federation alone is in their recipe.

        Raises:
            ConfigError: a value cannot be used.
        """
        entry = self.methods[key.method]
        recipe = read_job_recipe(entry.job, entry.recipe)
        values: dict[str, Any] = {**self.set, **entry.set, "seed": key.seed, "holdout": []}
        if key.regime == "federated":
            values["holdout"] = [] if key.holdout is None else [key.holdout]
        else:
            values["optimizer_state"] = "keep"
        made = recipe.with_values(values, f"the study's set, for {key.method}")
        return made if key.regime == "federated" else made.alone

    def runs(self, sites: Sequence[str]) -> list[RunKey]:
        """All runs, those that teach most first: federated, central, local, seed by seed.

        Raises:
            ConfigError: a site to hold out that is not there, or too few sites.
        """
        sites = sorted(sites)
        holdouts = self._holdouts(sites)
        at_one: list[_Fold] = [(None, (site,)) for site in sites]
        at_many: list[_Fold] = [(out, tuple(s for s in sites if s != out)) for out in holdouts]
        return [
            RunKey(method=method, regime=regime, holdout=holdout, trained_on=trained_on, seed=seed)
            for seed, method, regime in itertools.product(self.seeds, self.methods, self.regimes)
            for holdout, trained_on in (at_one if regime == "local" else at_many)
        ]

    def _holdouts(self, sites: Sequence[str]) -> list[str | None]:
        holdouts: list[str | None] = []
        for word in self.holdout:
            if word == "each":
                holdouts += sites
            elif word == NO_HOLDOUT:
                holdouts.append(None)
            elif word in sites:
                holdouts.append(word)
            else:
                raise ConfigError(
                    f"the study holds out {word}, and there is no such site",
                    f"name one of {', '.join(sites)}, or each, or none, under holdout",
                )
        if len(sites) < 2 or (len(sites) < 3 and any(holdouts) and "federated" in self.regimes):
            raise ConfigError(
                f"the study has {len(sites)} sites",
                "a federation needs two sites that train, and one more where one is held out",
            )
        return list(dict.fromkeys(holdouts))

    def find_sites(self, made: Path) -> list[Site]:
        """The sites; phantoms are made in the folder `made` where they are not there yet."""
        if self.phantoms is not None:
            from fedfms.local.synthetic import write_phantom_federation

            write_phantom_federation(
                made, **dataclasses.asdict(self.phantoms), format="nifti", keep=True
            )
            return find_sites(made, None)
        assert self.sites is not None  # __post_init__ checked it
        return find_sites(self.sites, self.data)

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))  # type: ignore[no-any-return]


def _resolve(values: dict[str, Any], keys: Sequence[str], folder: Path) -> None:
    """Make paths in a file whole, which are relative to its folder."""
    for key in keys:
        if isinstance(values.get(key), str):
            values[key] = (folder / Path(values[key]).expanduser()).resolve()
