"""What a container was given: memory, room on its volumes, a GPU, no network."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from fedfms.contracts.machine import Machine
from fedfms.contracts.recipe import BACKBONES
from fedfms.contracts.site import Compute
from fedfms.data.memory import GIB, allowed_bytes
from fedfms.data.memory import size_text as _size
from fedfms.errors import CheckpointError, ConfigError, FedfmsError
from fedfms.files import file_sha256
from fedfms.preflight.items import NotHere, Worry

MIN_DISK_BYTES = GIB  # for job logs and scores
MIN_EXCHANGE_BYTES = 3 * 45 * 1000**2  # a round of FedMSA on ViT-B: model, result, one to spare
FEDSAM_EXCHANGE_BYTES = 3 * 375 * 1000**2  # the same of FedSAM on ViT-B
BASE_MEMORY_BYTES = GIB  # Python, torch and a batch of slices
# what a worker process keeps ready: two batches of four slices of SAM's size, float32
WORKER_SHM_BYTES = 2 * 4 * 3 * 1024**2 * 4

# The oldest driver for Linux that runs what was made with CUDA of this major version, by NVIDIA's
# "CUDA Toolkit Release Notes" (minor version compatibility).
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
DRIVER_FILE = Path("/proc/driver/nvidia/version")  # the host's; any container of it can read it
_NEW_EXCHANGE = (
    "set EXCHANGE_SIZE={size}g in .env and make the volume anew: docker compose down, then docker "
    "volume rm the one whose name ends in -exchange (docker volume ls), then docker compose up -d"
)
_OLDER_BUILD = "an image built with --build-arg TORCH=cu126, for drivers from 525 and older GPUs"


class MachineError(FedfmsError):
    """This container lacks something that it needs."""

    default_code = "machine"


def check_writable(folder: Path) -> str:
    """Whether files can be made in a folder; what was seen.

    Raises:
        MachineError: code not-writable.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return f"{folder} can be written"
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be written by this container's user, {os.getuid()}:{os.getgid()} "
            f"({error.strerror})",
            "mount a volume there, for a user of group 10001; set FEDFMS_UID to your own id",
            code="not-writable",
        ) from None


def check_disk(folder: Path, data: int = 0) -> str:
    """Whether there is room on a folder's disk; how much.

    Args:
        folder: on the disk.
        data: bytes that prepared images and labels will take in it.

    Raises:
        MachineError: code disk-full.
    """
    free = shutil.disk_usage(folder).free
    needed = MIN_DISK_BYTES + data
    for_data = f", {_size(data)} of it for prepared images and labels" if data else ""
    if free >= needed:
        return f"{_size(free)} free in {folder}, {_size(needed)} needed{for_data}"
    raise MachineError(
        f"only {_size(free)} are free in {folder}; at least {_size(needed)} are needed{for_data}",
        "free room on the disk that holds Docker's volumes"
        + (", or name a folder on another disk with cache in site.yml" if data else ""),
        code="disk-full",
    )


def check_exchange(folder: Path, checkpoints: Path | None = None) -> str:
    """Whether a round fits into the volume that trainer and FLARE client share; its size.

    Args:
        checkpoints: folder of SAM checkpoints; the largest says what a round of FedSAM needs.

    Raises:
        MachineError: code exchange-small.
        Worry: enough for FedMSA alone, or not in memory.
    """
    total = shutil.disk_usage(folder).total
    if total < MIN_EXCHANGE_BYTES:
        raise MachineError(
            f"the exchange volume {folder} holds {_size(total)}; a round of FedMSA needs "
            f"{_size(MIN_EXCHANGE_BYTES)}",
            _NEW_EXCHANGE.format(size=2),
            code="exchange-small",
        )
    wanted = max(FEDSAM_EXCHANGE_BYTES, 3 * _largest(checkpoints))
    if total < wanted:
        raise Worry(
            f"{_size(total)} in {folder}: enough for FedMSA, not for FedSAM ({_size(wanted)})",
            "if FedSAM is to run here: " + _NEW_EXCHANGE.format(size=-(-wanted // GIB)),
        )
    if _file_system(folder) not in ("tmpfs", "ramfs"):
        raise Worry(
            f"{folder} is no volume in memory: models on their way are written to a disk",
            "use the volumes of the kit's own compose.yml",
        )
    return f"{_size(total)} in {folder}, in memory"


def check_memory(checkpoints: Path | None, on_gpu: bool, data: int = 0) -> str:
    """Whether this container may use the memory that backbone and data need.

    Args:
        checkpoints: folder of SAM checkpoints; the largest counts.
        on_gpu: whether the model computes in the GPU's own memory.
        data: bytes that the site's images and labels need.

    Raises:
        MachineError: code memory.
        Worry: the limit is enough, but others use the memory now.
    """
    limit = allowed_bytes()
    # on the CPU: weights, gradients, Adam's two moments and a copy; else loading and sending
    needed = BASE_MEMORY_BYTES + (2 if on_gpu else 5) * _largest(checkpoints) + data
    for_data = f", {_size(data)} of it for images and labels" if data else ""
    if limit < needed:
        raise MachineError(
            f"this container may use {_size(limit)} of memory; with the largest backbone here it "
            f"needs {_size(needed)}{for_data}",
            f"set TRAINER_MEMORY={-(-needed // GIB)}g in .env, on a machine that has it",
            code="memory",
        )
    free = psutil.virtual_memory().available
    if free < needed:
        raise Worry(
            f"{_size(limit)} allowed, but only {_size(free)} free now; {_size(needed)} are needed"
            f"{for_data}",
            "end what else uses memory on this machine",
        )
    return f"{_size(limit)} allowed, {_size(free)} free, {_size(needed)} needed{for_data}"


def check_shared_memory(workers: int) -> str:
    """Whether the worker processes can pass slices on; the size of shared memory.

    Args:
        workers: as in site.yml.

    Raises:
        MachineError: code shm-small.
    """
    folder = Path("/dev/shm")
    total, needed = shutil.disk_usage(folder).total, workers * WORKER_SHM_BYTES
    if total < needed:
        raise MachineError(
            f"{folder} holds {_size(total)}; {workers} worker processes need {_size(needed)}",
            f"set TRAINER_SHM={-(-needed // GIB)}g in .env, or workers: 0 in site.yml",
            code="shm-small",
        )
    return f"{_size(total)} in {folder}, {_size(needed)} needed (workers: {workers})"


def check_data_folder(folder: Path) -> str:
    """Whether there is anything in the folder of the images, for this user; how much.

    Raises:
        MachineError: code no-data, data-empty or data-unreadable.
    """
    try:
        count = len(list(folder.iterdir()))
    except PermissionError as error:
        raise MachineError(
            f"{folder} cannot be read ({error.strerror}) by this container's user, "
            f"{os.getuid()}:{os.getgid()}",
            _let_read(folder),
            code="data-unreadable",
        ) from None
    except OSError as error:
        raise _no_data(folder, error) from None
    if count == 0:
        raise MachineError(
            f"{folder} is empty",
            "is SITE_DATA in .env the right folder? If it lies on a network drive, see that it is "
            "mounted on this machine, then: docker compose up -d --force-recreate",
            code="data-empty",
        )
    return f"{folder} holds {count} files and folders"


def _no_data(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"there is no folder {folder} ({error.strerror})",
        "set SITE_DATA in .env to the folder that holds your images",
        code="no-data",
    )


def check_read_only(folder: Path) -> str:
    """Whether the images are mounted read-only.

    Raises:
        MachineError: code data-writable or no-data.
    """
    try:
        flags = os.statvfs(folder).f_flag
    except OSError as error:
        raise _no_data(folder, error) from None
    if flags & os.ST_RDONLY:
        return f"{folder} is mounted read-only"
    raise MachineError(
        f"{folder} is not mounted read-only",
        "mount it as the kit's own compose.yml does, with read_only: true",
        code="data-writable",
    )


def check_no_network() -> str:
    """Whether this container is without a network.

    Raises:
        MachineError: code network.
    """
    found = sorted(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name != "lo" and any(address.family.name.startswith("AF_INET") for address in addresses)
    )
    if not found:
        return "this container has no network"
    raise MachineError(
        f"this container has a network ({', '.join(found)}); who sees the images must have none",
        "start the trainer with network_mode: none, as the kit's own compose.yml does",
        code="network",
    )


def check_checkpoints(folder: Path | None) -> str:
    """Whether each SAM checkpoint that is here is the one that its name says; which are here.

    Raises:
        CheckpointError: code wrong-checkpoint, or missing-checkpoint for the package's own.
    """
    here = []
    for name, backbone in BACKBONES.items():
        own = name == "vit_demo"
        place = Path(__file__).parents[1] / "models" if own else folder
        path = place / backbone.file_name if place is not None else None
        if path is None or not path.is_file():
            if own:
                raise CheckpointError(
                    f"{path}, which comes with the package, is not there",
                    "install fedfms again",
                    code="missing-checkpoint",
                )
            continue
        found = file_sha256(path)
        if found != backbone.sha256:
            raise CheckpointError(
                f"{path} is not the checkpoint of {name}: its SHA-256 is {found}, not "
                f"{backbone.sha256}",
                f"get it again and compare (sha256sum): {backbone.source}",
                code="wrong-checkpoint",
            )
        here.append(name)
    return f"{', '.join(here)}; the SHA-256 is right"


def check_gpu(site: Compute | None) -> str:
    """Whether torch sees the GPU that was asked for.

    Args:
        site: the site's configuration; None where it cannot be read.

    Raises:
        ConfigError: code no-gpu.
        NotHere: nobody asked for one.
    """
    wanted = site.device if site is not None else "auto"
    if not Machine.from_environment().require_gpu and not wanted.startswith("cuda"):
        raise NotHere(f"no GPU is asked for (device: {wanted})")
    import torch

    from fedfms.training.device import make_ready, require_gpu, torch_device

    if DRIVER_FILE.exists():  # torch says of an old driver only that there is no device
        check_driver(torch.version.cuda)
    require_gpu()
    device = torch_device(site) if site is not None else torch.device("cuda", 0)
    if device.type != "cuda":
        raise ConfigError(
            f"this trainer was started with the GPU overlay, and site.yml says device: {wanted}",
            "set device: auto in site.yml, or take compose.gpu.yml out of COMPOSE_FILE in .env",
            code="no-gpu",
        )
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    check_capability(name, capability, torch.cuda.get_arch_list())
    make_ready(device)  # it computes one number: a GPU that is taken or broken is told here
    return f"torch {torch.__version__} sees {name}, compute capability {_dotted(capability)}"


def image_cuda() -> str | None:
    """The CUDA version that this image's torch was made with, such as 13.0; None for processors.

    Without importing torch, which takes seconds and memory.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    cuda = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return cuda if isinstance(cuda, str) else None


def check_driver(
    cuda: str | None,
    version: Path = DRIVER_FILE,
    kernel: Path = Path("/proc/sys/kernel/osrelease"),
) -> str:
    """Whether this host has a driver of NVIDIA that this image's CUDA can use; what was seen.

    Args:
        cuda: the CUDA version of this image's torch; None for an image for processors.
        version: what NVIDIA's driver says of itself.
        kernel: the host's kernel. Under Windows (WSL2) the driver is Windows' own, and only a
            container that was given the GPU sees it.

    Raises:
        MachineError: code no-driver, cpu-image or old-driver.
    """
    try:
        said = version.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        if "microsoft" not in kernel.read_text().lower():
            raise MachineError(
                "this host has no NVIDIA driver, so that no container of it can use a GPU",
                "install the driver (nvidia-smi must work on the host) and the NVIDIA Container "
                "Toolkit, or take compose.gpu.yml out of COMPOSE_FILE in .env to compute on the "
                "processor",
                code="no-driver",
            ) from None
        said = "the driver is that of Windows (WSL2) and is not seen from here"
    if cuda is None:
        raise MachineError(
            "this image has torch for processors only",
            "set FEDFMS_GPU_IMAGE in .env to an image that was built with --build-arg TORCH=cuda, "
            "or device: cpu in site.yml without compose.gpu.yml in COMPOSE_FILE",
            code="cpu-image",
        )
    needed = OLDEST_DRIVERS.get(int(cuda.split(".")[0]))
    found = re.search(r"\b(\d{3,})\.\d+(\.\d+)?", said)
    if needed is None or found is None:
        return said
    if int(found[1]) < needed:
        raise MachineError(
            f"this host's NVIDIA driver is {found[0]}; this image has CUDA {cuda}, which needs "
            f"{needed} or later",
            f"install a newer driver, or ask the coordinator for {_OLDER_BUILD}",
            code="old-driver",
        )
    return f"{said}; CUDA {cuda} needs {needed} or later"


def check_capability(name: str, capability: tuple[int, int], kernels: Sequence[str]) -> None:
    """Whether torch's build has code for a GPU.

    Args:
        name: the GPU's.
        capability: its compute capability, such as (7, 5).
        kernels: what the build has code for, as torch.cuda.get_arch_list() says it: sm_75 is for
            7.5 and later ones of the same major number, compute_75 for all later ones.

    Raises:
        MachineError: code other-gpu.
    """
    able = []
    for kind, major, minor in re.findall(r"\b(sm|compute)_(\d+)(\d)\b", " ".join(kernels)):
        made_for = int(major), int(minor)
        same = kind == "compute" or made_for[0] == capability[0]
        if same and made_for <= capability:
            return
        able.append(made_for)
    if not able:  # a build that does not say
        return
    other = "a newer image" if capability > max(able) else _OLDER_BUILD
    raise MachineError(
        f"{name} has compute capability {_dotted(capability)}; this image's torch is made for "
        f"{_dotted(min(able))} to {_dotted(max(able))}",
        f"ask the coordinator for {other}; or compute on the processor: device: cpu in site.yml, "
        "without compose.gpu.yml in COMPOSE_FILE",
        code="other-gpu",
    )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _let_read(folder: Path) -> str:
    """How this container's user comes to read the images, by whom they belong to."""
    try:
        facts = folder.stat()
    except OSError:
        return "let the user of FEDFMS_UID, or a group that SITE_DATA_GID names, read SITE_DATA"
    if facts.st_mode & 0o050 == 0o050:
        return f"set SITE_DATA_GID={facts.st_gid} in .env: that group may read it"
    if facts.st_uid != 0:
        return f"set FEDFMS_UID={facts.st_uid} in .env: that user owns it"
    return "let a group read it (chgrp, chmod g+rX), and set SITE_DATA_GID in .env to its number"


def _largest(checkpoints: Path | None) -> int:
    """Bytes of the largest known checkpoint in a folder; 0 if none is there."""
    if checkpoints is None:
        return 0
    paths = [checkpoints / backbone.file_name for backbone in BACKBONES.values()]
    return max((path.stat().st_size for path in paths if path.is_file()), default=0)


def _file_system(folder: Path) -> str:
    resolved = str(folder.resolve())
    inside = [
        partition
        for partition in psutil.disk_partitions(all=True)
        if Path(resolved).is_relative_to(partition.mountpoint)
    ]
    return max(inside, key=lambda p: len(p.mountpoint)).fstype if inside else ""
