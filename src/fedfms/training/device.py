"""The site's machine: which device, made ready, how many threads, and what its failures mean.

Nothing else in fedfms asks `torch.cuda` for anything that depends on a device: before CUDA is
initialized some of its functions fail and others answer for another GPU. `torch_device` only
chooses; `ready_device` and `make_ready` start CUDA, and from then on everything may be asked.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute
from fedfms.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

_DRIVER = Path("/proc/driver/nvidia/version")  # every container of the host sees it

# How the allocators say it where they raise no torch.OutOfMemoryError.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|DefaultCPUAllocator|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)


def torch_device(compute: Compute) -> torch.device:
    """The device this site computes on; a CUDA device has its number. Starts nothing there.

    "auto" takes the first CUDA device where there is one, and "cuda" means the first. A site that
    names CUDA never computes on the processor by mistake: that is an error.

    Raises:
        ConfigError: code no-gpu.
    """
    if compute.device == "cpu" or (compute.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {compute.device} is asked for, and torch finds no CUDA device here: "
            f"{why_no_gpu()}",
            "check the driver with nvidia-smi, start the trainer with the GPU overlay, or set "
            "device: cpu in site.yml (predict: --device cpu)",
            code="no-gpu",
        )
    device = torch.device("cuda", int(compute.device.partition(":")[2] or 0))
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ConfigError(
            f"device {compute.device} is asked for, and torch finds {count} CUDA device(s) here",
            f"use cuda:0 to cuda:{count - 1}, or let the trainer see more devices",
            code="no-gpu",
        )
    return device


def ready_device(compute: Compute) -> torch.device:
    """The device this site computes on, made ready for this thread, and its number of CPU threads.

    Raises:
        ConfigError: code no-gpu.
        TrainingError: as `make_ready`.
    """
    device = torch_device(compute)
    if (
        device.type == "cpu"
        and compute.device == "auto"
        and torch.version.cuda
        and _DRIVER.exists()
    ):
        _warn_once(f"computing on the processor, though there is a GPU's driver: {why_no_gpu()}")
    make_ready(device)
    if compute.threads is not None and compute.threads != torch.get_num_threads():
        torch.set_num_threads(compute.threads)
        log.info("torch uses %d CPU threads", compute.threads)
    return device


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def make_ready(device: torch.device) -> None:
    """Start CUDA on a device, make it this thread's own, and let it compute one number.

    Otherwise torch's helper threads would take memory on the first GPU, and a GPU that this build
    of torch has no code for would fail in the middle of a round. On the processor it does nothing.

    Args:
        device: from `torch_device`.

    Raises:
        TrainingError: the GPU does not compute; see `failures_explained`.
    """
    if device.type != "cuda":
        return
    with failures_explained():
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(device)
        if device not in _proved:
            torch.ones(1).to(device).add_(1).item()
            _proved.add(device)


def set_products(recipe: Recipe, device: torch.device) -> None:
    """Let a GPU round the factors of fp32 products to TF32, or not, as the recipe's precision says.

    In bf16 they are what is left to fp32 beside the encoder. A processor has no such thing.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = recipe.precision != "fp32"


def why_no_gpu() -> str:
    """In torch's words, why it finds no CUDA device: no driver, an old one, no build for CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return _first_sentence(error)
    return "it may have come or gone a moment ago"


def require_gpu() -> None:
    """Refuse to compute on the processor where the trainer was started to have a GPU.

    Raises:
        ConfigError: code no-gpu.
    """
    if Machine.from_environment().require_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "this trainer was started with the GPU overlay (FEDFMS_REQUIRE_GPU), and torch finds "
            f"no CUDA device here: {why_no_gpu()}",
            "check the driver with nvidia-smi on the host, and that the image is one for GPUs; to "
            "compute on the processor, take compose.gpu.yml out of COMPOSE_FILE in .env",
            code="no-gpu",
        )


def slices_at_once(recipe: Recipe, compute: Compute, device: torch.device) -> int:
    """The micro-batch to begin with: `micro_batch` of the site, else the whole batch.

    Without a GPU and above 512 pixels it is one slice where the site does not say. More gain
    nothing there; they cost gigabytes on a machine whose kernel kills a process rather than refuse
    it memory, and they make single operations, which no abort can interrupt, last many seconds.
    """
    if compute.micro_batch is None and device.type == "cpu" and recipe.image_size > 512:
        return 1
    return min(compute.micro_batch or recipe.batch_size, recipe.batch_size)


def halved(slices: int, one: str, many: str) -> int:
    """Half as many slices at once, after memory ran out; what torch keeps unused is given back.

    Args:
        slices: that did not fit.
        one, many: say for a person what was done with a single slice, and with several.

    Raises:
        TrainingError: code out-of-memory; it was a single slice.
    """
    if slices == 1:
        raise TrainingError(
            f"memory ran out {one}",
            "use a smaller image_size or backbone in recipe.json, precision bf16, or a machine "
            "with more memory; check that nothing else uses this device",
            code="out-of-memory",
        )
    free_unused_memory()
    log.warning("memory ran out %s %d slices at once; going on with %d", many, slices, slices // 2)
    return slices // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error of torch or Python means that memory ran out, on the GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def gpu_is_in_use() -> bool:
    """Whether this process holds memory of a GPU, if only what CUDA itself needs there."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def free_unused_memory() -> None:
    """Give the GPU memory that torch keeps for later back, so that a smaller try can have it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with contextlib.suppress(RuntimeError):  # of a GPU that failed: the first error is the news
            torch.cuda.empty_cache()


# ------------------------------------------------------------------ what a device's failures mean

GPU_FAILED = "gpu-failed"

_proved: set[torch.device] = set()  # that have computed in this process


@dataclass(frozen=True, slots=True)
class _Failure:
    signs: str  # regular expression on CUDA's own words
    code: str
    means: str
    fix: str


_ELSE = _Failure(
    "",
    GPU_FAILED,
    "the GPU failed",
    "start again; if it comes back, look at nvidia-smi and at the kernel's log (dmesg, Xid), or "
    "set device: cpu in site.yml",
)
_FAILURES = (
    _Failure(
        r"no kernel image|unsupported toolchain|device kernel image is invalid",
        "gpu-unsupported",
        "this build of torch has no code for this GPU",
        "use a build of torch that names the GPU's compute capability, a newer GPU, or device: cpu "
        "in site.yml",
    ),
    _Failure(
        r"driver (version )?(on your system )?is (too old|insufficient)|forward compatibility|"
        r"no NVIDIA driver|No CUDA GPUs|no CUDA-capable device|not compiled with CUDA|"
        r"driver initialization failed|CUDA unknown error|system not yet initialized",
        "no-gpu",
        "torch cannot use a GPU here",
        "nvidia-smi must work and name a driver new enough for this build of torch; update the "
        "driver, use an image for GPUs, or set device: cpu in site.yml",
    ),
    _Failure(
        r"busy or unavailable|exclusive",
        "gpu-busy",
        "another process has the GPU for itself",
        "see who with nvidia-smi; wait for it, or let several share it (nvidia-smi -c DEFAULT)",
    ),
    _Failure(
        r"device-side assert",
        GPU_FAILED,
        "a computation on the GPU met a number that it cannot use",
        "run once with device: cpu in site.yml, which says where; then tell us",
    ),
    _Failure(
        r"(CUBLAS|CUDNN)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)",
        GPU_FAILED,
        "a library of CUDA could not start on the GPU, mostly since its memory is nearly full",
        "see with nvidia-smi what else uses it, or set a smaller micro_batch in site.yml",
    ),
    _Failure(
        r"ECC|uncorrectable|fallen off|GPU is lost",
        GPU_FAILED,
        "the GPU has a fault or is gone",
        "start the machine again; if it comes back, the GPU needs service: nvidia-smi -q -d ECC",
    ),
)
# codes of errors of the device itself: the next image or task on it would fail alike
DEVICE_CODES = frozenset(one.code for one in (*_FAILURES, _ELSE))
# What CUDA and torch write before their own codes; a tensor on the wrong device is a mistake of
# ours, has none of them, and keeps its traceback.
_OF_THE_DEVICE = re.compile(
    r"CUDA error|CUDA driver|CUDA call failed|CUDA unknown error|CUDA runtime error|"
    r"with CUDA enabled|initialize CUDA|No CUDA GPUs|NVIDIA driver|cuDNN error|CUDNN_STATUS|"
    r"CUBLAS_STATUS|CUSOLVER_STATUS|CUFFT_|NVML|Invalid device (argument|id|ordinal)|"
    r"no kernel image"
)


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Let what a device raises reach a person as problem and fix; other errors pass as they are.

    Raises:
        TrainingError: code out-of-memory; no-gpu, gpu-unsupported, gpu-busy; or gpu-failed, after
            which this process cannot use its GPU any more.
    """
    try:
        yield
    except Exception as error:  # torch's own class for CUDA's errors is young
        if (explained := explanation(error)) is None:
            raise
        raise explained from error


def explanation(error: Exception) -> TrainingError | None:
    """What an error of torch says of the device, as problem and fix; None if it is none of it."""
    if is_out_of_memory(error):
        return TrainingError(
            f"memory ran out: {_first_sentence(error)}",
            "see what else uses this device; use a smaller image_size or backbone in recipe.json, "
            "precision bf16, or a machine with more memory",
            code="out-of-memory",
        )
    text = str(error)
    of_torch = isinstance(error, RuntimeError | AssertionError | torch.cuda.DeferredCudaCallError)
    if not of_torch or _OF_THE_DEVICE.search(text) is None:
        return None
    found = next((one for one in _FAILURES if re.search(one.signs, text)), _ELSE)
    has = _capabilities() if found.code == "gpu-unsupported" else ""
    problem = f"{found.means}{has}: {_first_sentence(error)}"
    return TrainingError(problem, found.fix, code=found.code)


def _capabilities() -> str:
    """What this thread's GPU can run and what this build of torch was made for, if they say it."""
    with contextlib.suppress(Exception):
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        built_for = " ".join(torch.cuda.get_arch_list())
        return f" ({name} has compute capability {major}.{minor}; the build: {built_for})"
    return ""


def _first_sentence(error: Exception) -> str:
    """The first line of an error; torch puts advice for programmers and a C++ trace below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(". ")[:300] if lines else type(error).__name__
