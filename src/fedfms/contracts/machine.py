"""Facts of the machine, from the environment, which is read here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedfms.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of the machine, from the environment; read once."""

    site_name: str | None = None  # SITE_NAME: who this site believes it is
    site_data: Path | None  # SITE_DATA: the mounted imaging volume (trainer only)
    exchange: Path | None  # FEDFMS_EXCHANGE: the folder that trainer and FLARE client share
    checkpoints: Path | None  # FEDFMS_CHECKPOINTS: folder of SAM checkpoints
    log_level: str | None = None  # FEDFMS_LOG_LEVEL: of what FLARE logs in a container; info
    require_gpu: bool = False  # FEDFMS_REQUIRE_GPU: the trainer was started with the GPU overlay
    revision: str | None = None  # FEDFMS_REVISION: commit that a container image was made of
    image: str | None = None  # FEDFMS_IMAGE_DIGEST: the image's own, which it cannot know
    # FEDFMS_LINK_MB_PER_SECOND: what the line between this machine and the others carries
    link_megabytes_per_second: float | None = None

    @classmethod
    def from_environment(cls) -> Machine:
        """Read what is set; an empty variable counts as not set."""

        def folder(name: str) -> Path | None:
            value = os.environ.get(name)
            return Path(value).absolute() if value else None  # relative to where the person stands

        return cls(
            site_name=os.environ.get("SITE_NAME") or None,
            site_data=folder("SITE_DATA"),
            exchange=folder("FEDFMS_EXCHANGE"),
            checkpoints=folder("FEDFMS_CHECKPOINTS"),
            log_level=os.environ.get("FEDFMS_LOG_LEVEL") or None,
            require_gpu=os.environ.get("FEDFMS_REQUIRE_GPU", "") not in ("", "0"),
            revision=os.environ.get("FEDFMS_REVISION") or None,
            image=os.environ.get("FEDFMS_IMAGE_DIGEST") or None,
            link_megabytes_per_second=_number("FEDFMS_LINK_MB_PER_SECOND"),
        )


def _number(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 100_000:
        raise ConfigError(
            f"{name} is {text}", "set a number of megabytes a second, such as 2.5", code="link"
        )
    return value
