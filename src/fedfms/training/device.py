"""The site's machine: which device, how many threads, and what running out of memory looks like."""

from __future__ import annotations

import logging
import re

import torch

from fedfms.config import Machine, Recipe, SiteConfig
from fedfms.errors import ConfigError

log = logging.getLogger(__name__)

# How the allocators say it where they raise no torch.OutOfMemoryError.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|DefaultCPUAllocator|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)


def torch_device(site: SiteConfig) -> torch.device:
    """The device this site computes on.

    "auto" takes a CUDA device where there is one. A site that names CUDA never computes on the
    processor by mistake: that is an error.
    """
    if site.device == "cpu" or (site.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"site.yml asks for device {site.device}, and torch finds no CUDA device here",
            "check the driver with nvidia-smi, start the trainer with the GPU overlay, or set "
            "device: cpu in site.yml",
            code="no-gpu",
        )
    device = torch.device("cuda", 0) if site.device == "auto" else torch.device(site.device)
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(
            f"site.yml asks for device {site.device}, and torch finds {count} CUDA device(s) here",
            f"use cuda:0 to cuda:{count - 1}, or let the trainer see more devices",
            code="no-gpu",
        )
    return device


def require_gpu() -> None:
    """Refuse to compute on the processor where the trainer was started to have a GPU.

    Raises:
        ConfigError: code no-gpu.
    """
    if Machine.from_environment().require_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "this trainer was started with the GPU overlay (FEDFMS_REQUIRE_GPU), and torch finds "
            "no CUDA device here",
            "check the driver with nvidia-smi on the host, and that the image is one for GPUs; to "
            "compute on the processor, take compose.gpu.yml out of COMPOSE_FILE in .env",
            code="no-gpu",
        )


def use_threads(site: SiteConfig) -> None:
    """Let torch use the site's number of CPU threads, in this process, from now on."""
    if site.threads is not None and site.threads != torch.get_num_threads():
        torch.set_num_threads(site.threads)
        log.info("torch uses %d CPU threads", site.threads)


def slices_at_once(recipe: Recipe, site: SiteConfig, device: torch.device) -> int:
    """The micro-batch to begin with: `micro_batch` of the site, else the whole batch.

    Without a GPU and above 512 pixels it is one slice where the site does not say. More gain
    nothing there; they cost gigabytes on a machine whose kernel kills a process rather than refuse
    it memory, and they make single operations, which no abort can interrupt, last many seconds.
    """
    if site.micro_batch is None and device.type == "cpu" and recipe.image_size > 512:
        return 1
    return min(site.micro_batch or recipe.batch_size, recipe.batch_size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error of torch or Python means that memory ran out, on the GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def free_unused_memory() -> None:
    """Give the GPU memory that torch keeps for later back, so that a smaller try can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
