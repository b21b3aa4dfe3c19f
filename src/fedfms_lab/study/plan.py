"""A study file to the runs that it asks for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfms.contracts.decode import AnyPath, from_dict, read_yaml, require_known, require_name
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import JOB_RECIPE, Recipe, read_job_recipe
from fedfms.errors import ConfigError
from fedfms.files import is_file
from fedfms.local.sites import Site, find_sites
from fedfms.models.methods import find_method
from fedfms_lab.study.record import REGIMES, Engine, Regime, RunKey

NO_HOLDOUT = "none"
_OF_SAM: tuple[Regime, ...] = ("zero-shot", "scratch")  # a network of its own begins untrained
_UNTRAINED: tuple[Regime, ...] = ("zero-shot", "ensemble")  # no learning rate is theirs
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
    # other ways of averaging: values of the recipe of federated runs, under the study's own name
    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)
    # tried with the first seed for every way to train and every fold; the one with the best Dice on
    # the validation cases of the training sites is that of all seeds. None: the recipe's
    learning_rates: tuple[float, ...] = ()
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
        if "ensemble" in self.regimes and "local" not in self.regimes:
            raise ConfigError(
                "the study asks for an ensemble, and not for the models that make it",
                "add local to regimes, or take ensemble out",
            )
        if self.strategies and "federated" not in self.regimes:
            raise ConfigError(
                "the study names strategies, and has no federated runs",
                "add federated to regimes, or leave strategies out",
            )
        for name in self.strategies:
            require_name(name, "strategy")
        if len(set(self.learning_rates)) != len(self.learning_rates) or (
            len(self.learning_rates) == 1
        ):
            rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
            raise ConfigError(
                f"learning_rates is {rates}",
                "name two or more different rates to choose from, or leave it out",
            )
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

    def recipe_of(self, key: RunKey, rate: float | None = None) -> Recipe:
        """The recipe of one run.

        Training that is no federation keeps the optimizer's moments: nothing is averaged that would
        make them belong to other weights. Nothing of what is for a federation alone is in its
        recipe. `central-matched` is centralized training with the federation's optimizer and as
        many steps: a step is on as many slices as those of all its sites together.

        Args:
            rate: the learning rate that was chosen; None: the recipe's, or the one that `key`
                tries.

        Raises:
            ConfigError: a value cannot be used.
        """
        recipe = self._recipe(key.method)
        values: dict[str, Any] = {"seed": key.seed, "holdout": []}
        if (tried := key.rate if rate is None else rate) is not None:
            values["learning_rate"] = tried
        if key.regime == "federated":
            values["holdout"] = [] if key.holdout is None else [key.holdout]
            values.update(self.strategies.get(key.strategy, {}))
        elif key.regime == "central-matched":
            values["batch_size"] = recipe.batch_size * len(key.trained_on)
        else:
            values["optimizer_state"] = "keep"
        made = recipe.with_values(values, f"the study's set, for {key.method}")
        return made if key.regime == "federated" else made.alone

    def _recipe(self, method: str) -> Recipe:
        entry = self.methods[method]
        recipe = read_job_recipe(entry.job, entry.recipe)
        return recipe.with_values({**self.set, **entry.set}, f"the study's set, for {method}")

    def runs(self, sites: Sequence[str]) -> list[RunKey]:
        """All runs that answer, in the order of `regimes`, seed by seed.

        A method with a network of its own has neither zero-shot nor from scratch: it is the latter.

        Raises:
            ConfigError: a site to hold out that is not there, or too few sites.
        """
        sites = sorted(sites)
        holdouts = self._holdouts(sites)
        at_many: list[_Fold] = [(out, tuple(s for s in sites if s != out)) for out in holdouts]
        folds: dict[Regime, list[_Fold]] = {
            "local": [(None, (site,)) for site in sites],
            "zero-shot": [(None, ())],
        }
        return [
            RunKey(
                method=method,
                regime=regime,
                strategy=strategy,
                holdout=holdout,
                trained_on=trained_on,
                seed=seed,
            )
            for seed, method, regime in itertools.product(self.seeds, self.methods, self.regimes)
            if regime not in _OF_SAM or find_method(self._recipe(method).method).uses_sam
            for strategy in ("", *(self.strategies if regime == "federated" else ()))
            for holdout, trained_on in folds.get(regime, at_many)
        ]

    def tries(self, sites: Sequence[str]) -> list[RunKey]:
        """Runs that try learning rates, each for the runs of all seeds that differ in it alone."""
        return [
            dataclasses.replace(key, rate=rate)
            for key in self.runs(sites)
            if key.seed == self.seeds[0] and key.regime not in _UNTRAINED
            for rate in self.learning_rates
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
        """The sites; phantoms are made in the folder `made` where they are not there yet.

        Their policy allows what the study trains.
        """
        if self.phantoms is not None:
            from fedfms.local.synthetic import write_phantom_federation

            usual = Policy().methods
            others = {self._recipe(name).method for name in self.methods}.difference(usual)
            write_phantom_federation(
                made,
                **dataclasses.asdict(self.phantoms),
                format="nifti",
                keep=True,
                methods=(*usual, *sorted(others)) if others else (),
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
