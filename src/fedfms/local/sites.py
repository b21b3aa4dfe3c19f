"""The sites of a federation on one machine: their folders, and how a trainer is started."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.data.content import JUNK, may_enter, unreadable_folder
from fedfms.data.memory import CACHE_FOLDER, FEATURES_FOLDER
from fedfms.errors import ConfigError
from fedfms.local.processes import Processes, Supervised

# of the caller's environment, what no process of a site or the server should see
_NOT_PASSED_ON = ("SITE_DATA", "FEDFMS_EXCHANGE", "FEDFMS_CHECKPOINTS", "PYTHONPATH")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_SERVER = "localhost"  # the name of the server in FLARE's kits for one machine


@dataclass(frozen=True, slots=True)
class Site:
    """One site folder."""

    name: str
    folder: Path  # with site.yml and policy/
    data: Path | None  # its images, where they are not where site.yml says
    trainer: str = "fedfms.trainer"  # module that is its trainer


def find_sites(folder: Path, data: Path | None) -> list[Site]:
    """The sites below a folder, by name.

    Raises:
        ConfigError: there is none, or one has no images or a name that FLARE cannot use.
        SiteDataError: a folder in it cannot be entered.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_own = not path.name.startswith(".") and path.name.lower() not in JUNK
        if is_own and path.is_dir() and not may_enter(path):
            raise unreadable_folder(path, PermissionError())
    found = sorted(path.parent for path in folder.glob("*/site.yml"))
    if not found:
        raise ConfigError(
            f"{folder} holds no site",
            "name a folder with one folder for each site, each with a site.yml; "
            "fedfms synth DIR makes such a folder of phantoms",
            code="no-sites",
        )
    sites = []
    for path in found:
        images = data / path.name if data is not None else None
        if images is not None and not images.is_dir():
            raise ConfigError(
                f"there is no folder {images} for the images of {path.name}",
                "give --data a folder that holds one folder for each site, of the site's name",
                code="no-data",
            )
        if not path.name.replace("-", "").replace("_", "").isalnum() or path.name == _SERVER:
            raise ConfigError(
                f"a site cannot be called {path.name}", "use letters, digits, - and _"
            )
        sites.append(Site(path.name, path.resolve(), images.resolve() if images else None))
    return sites


def trainer_command(site: Site, exchange: Path, work: Path, checkpoints: Path | None) -> list[str]:
    """How a site's trainer is started; it alone is told where the images are.

    The order of its slices follows from the recipe's seed, so that runs on one machine come out
    equal; at a hospital it is the site's secret.

    Args:
        site: whose images it sees.
        exchange: folder for its socket and the numbers of a task.
        work: its private folder.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
    """
    arguments = [
        *(sys.executable, "-m", site.trainer, "--site", site.name),
        *("--config", str(site.folder / "site.yml"), "--policy", str(site.folder / "policy")),
        *("--exchange", str(exchange), "--work", str(work), "--order-from-seed"),
    ]
    if site.data is not None:
        arguments += ["--data", str(site.data)]
    if checkpoints is not None:
        arguments += ["--checkpoints", str(checkpoints)]
    return arguments


def start_trainer(
    processes: Processes,
    site: Site,
    arguments: Sequence[str],
    *,
    work: Path,
    log_file: Path,
    settings: Mapping[str, str],
) -> Supervised:
    """Start a site's trainer, from `trainer_command`; where it ends it is started again.

    Args:
        processes: that it is to belong to.
        site: of whom.
        arguments: the command.
        work: its working directory, private.
        log_file: for its output.
        settings: for its environment, such as OMP_NUM_THREADS.
    """
    return processes.start(
        f"{site.name}'s trainer",
        arguments,
        folder=work,
        log_file=log_file,
        environment=child_environment(settings),
        restarts=True,
    )


@contextlib.contextmanager
def images_forgotten(folder: Path) -> Iterator[None]:
    """At the end, the trainers' prepared cases and kept features below a folder go.

    A run on one machine keeps none.

    Args:
        folder: with each site's private folder.
    """
    try:
        yield
    finally:
        for name in (CACHE_FOLDER, FEATURES_FOLDER):
            for cache in folder.glob(f"*/{name}"):
                shutil.rmtree(cache, ignore_errors=True)


def threads_of_a_trainer(training_sites: int) -> int:
    """CPU threads for each trainer where so many compute side by side on this machine."""
    return max(1, (os.cpu_count() or 1) // max(1, training_sites))


def child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what is a site's own, and without proxies: all is local."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_PASSED_ON and name.lower() not in _PROXIES
    }
    return {**kept, **settings}
