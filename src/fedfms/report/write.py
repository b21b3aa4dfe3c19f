"""A fetched job's folder to a results folder with its report, as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fedfms.errors import ConfigError, FederationError
from fedfms.files import scratch_folder
from fedfms.report.collect import collect
from fedfms.report.render import render


def check_results_folder(results: Path) -> None:
    """Whether a results folder can be written there; asked before a job begins.

    Raises:
        FederationError: code results-exist.
        ConfigError: code results-not-writable.
    """
    if results.is_file() or (results.is_dir() and any(results.iterdir())):
        raise FederationError(
            f"{results} holds something already", "name a new folder", code="results-exist"
        )
    if results.is_mount():
        raise ConfigError(
            f"{results} is a volume of its own, and results appear there as a whole or not at all",
            f"name a new folder in it, such as {results / 'run-1'}",
            code="results-not-writable",
        )
    try:
        with scratch_folder(results):
            pass
    except OSError as error:
        raise ConfigError(
            f"{results.parent} cannot be written: {error.strerror}",
            "name another folder with --results, or give this user the right to write there",
            code="results-not-writable",
        ) from None


def write_results(downloaded: Path, results: Path) -> None:
    """Models, tables and report of a fetched job, as a whole or not at all.

    Raises:
        FederationError: code results-exist, or no-records.
    """
    check_results_folder(results)
    collect(downloaded, results, finish=render)
