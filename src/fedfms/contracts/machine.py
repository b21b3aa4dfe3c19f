"""Facts of the machine, from the environment, which is read here and nowhere else."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from fedfms.bounded import number
from fedfms.errors import ConfigError, Undecodable

# what a line is taken to carry of which nothing is said
UNTOLD_MEGABYTES_PER_SECOND = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of the machine, from the environment; read once."""

    site_name: str | None = None  # SITE_NAME: who this site believes it is
    site_data: Path | None  # SITE_DATA: the mounted imaging volume (trainer only)
    exchange: Path | None  # FEDFMS_EXCHANGE: the folder that trainer and FLARE client share
    checkpoints: Path | None  # FEDFMS_CHECKPOINTS: folder of SAM checkpoints
    log_level: str | None = None  # FEDFMS_LOG_LEVEL: of what FLARE logs in a container; info
    require_gpu: bool = False  # FEDFMS_REQUIRE_GPU: the trainer was started with the GPU overlay
    # FEDFMS_PLAIN_GPU: a GPU computes by torch's own kernels alone, launched one by one
    plain_gpu: bool = False
    # FEDFMS_ORDER_FROM_SEED: the order of slices is no secret of the site; for simulations
    order_from_seed: bool = False
    revision: str | None = None  # FEDFMS_REVISION: commit that a container image was made of
    image: str | None = None  # FEDFMS_IMAGE_DIGEST: the image's own, which it cannot know
    # FEDFMS_LINK_MB_PER_SECOND: what the line between this machine and the others carries
    link_megabytes_per_second: float | None = None
    # FEDFMS_METRICS_PORT, FEDFMS_METRICS_HOST: where the server answers Prometheus; None: nowhere
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    # FEDFMS_TRACKING: where the server's scores go as well: tensorboard, mlflow
    tracking: tuple[str, ...] = ()
    mlflow: str | None = (
        None  # FEDFMS_MLFLOW: address of the MLflow server; None: a file of the run
    )
    max_runs: int | None = (
        None  # FEDFMS_MAX_RUNS: that a server runs at once; the kit's, which is 1
    )
    notify: str | None = None  # FEDFMS_NOTIFY: command that a server tells what befalls runs
    # FEDFMS_KEEP_DAYS: after so many days old jobs are removed here; 0: never
    keep_days: float = 90.0
    # FEDFMS_KEEP_ANSWERS: a server keeps each round's accepted answers, for fedfms verify
    keep_answers: bool = False

    @classmethod
    def from_environment(cls) -> Machine:
        """Read what is set; an empty variable counts as not set."""

        def folder(name: str) -> Path | None:
            value = os.environ.get(name)
            return Path(value).absolute() if value else None  # relative to where the person stands

        days = _number(
            *("FEDFMS_KEEP_DAYS", 0, 36_500), "set a number of days, such as 90; 0: never", "config"
        )
        return cls(
            site_name=os.environ.get("SITE_NAME") or None,
            site_data=folder("SITE_DATA"),
            exchange=folder("FEDFMS_EXCHANGE"),
            checkpoints=folder("FEDFMS_CHECKPOINTS"),
            log_level=os.environ.get("FEDFMS_LOG_LEVEL") or None,
            require_gpu=os.environ.get("FEDFMS_REQUIRE_GPU", "") not in ("", "0"),
            plain_gpu=os.environ.get("FEDFMS_PLAIN_GPU", "") not in ("", "0"),
            order_from_seed=os.environ.get("FEDFMS_ORDER_FROM_SEED", "") not in ("", "0"),
            revision=os.environ.get("FEDFMS_REVISION") or None,
            image=os.environ.get("FEDFMS_IMAGE_DIGEST") or None,
            link_megabytes_per_second=_number(
                *("FEDFMS_LINK_MB_PER_SECOND", 0.01, 100_000),
                "set a number of megabytes a second, such as 2.5",
                "link",
            ),
            metrics_port=_whole_number(
                *("FEDFMS_METRICS_PORT", 1, 65535), "set a TCP port, such as 9464", "metrics"
            ),
            metrics_host=os.environ.get("FEDFMS_METRICS_HOST") or "127.0.0.1",
            tracking=_words("FEDFMS_TRACKING", ("tensorboard", "mlflow")),
            mlflow=os.environ.get("FEDFMS_MLFLOW") or None,
            max_runs=_whole_number(
                *("FEDFMS_MAX_RUNS", 1, 100), "set a whole number from 1 to 100", "max-runs"
            ),
            notify=os.environ.get("FEDFMS_NOTIFY") or None,
            keep_days=90.0 if days is None else days,
            keep_answers=os.environ.get("FEDFMS_KEEP_ANSWERS", "") not in ("", "0"),
        )


def _number(name: str, low: float, high: float, fix: str, code: str) -> float | None:
    """A number from `low` to `high`; None where the variable is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        value = number(text, name)
    except Undecodable:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{name} is {text}", fix, code=code)
    return value


def _whole_number(name: str, low: int, high: int, fix: str, code: str) -> int | None:
    """The same of a whole number, in digits."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name} is {text}", fix, code=code)
    value = _number(name, low, high, fix, code)
    return None if value is None else int(value)


def _words(name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(word.strip() for word in os.environ.get(name, "").split(",") if word.strip())
    if unknown := [word for word in words if word not in known]:
        raise ConfigError(
            f"{name} names {', '.join(unknown)}", f"use {' and '.join(known)}", code="tracking"
        )
    return words
