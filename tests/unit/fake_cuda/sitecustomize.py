"""CUDA devices that are not there, for whatever Python process has this folder on PYTHONPATH.

torch's own Python code for CUDA runs as it is; below it, in the place of the C++ functions that a
build for processors lacks, stand functions that behave as torch 2.11's do on a GPU: before CUDA is
initialized they refuse, in a forked child they refuse, a device number beyond the last is refused,
and after a failure everything is. Tensors "on" a GPU stay where they are.

FAKE_CUDA_DEVICES: how many there are. FAKE_CUDA_LOG: file that gets one line, WHAT and the device,
for each use. FAKE_CUDA_FAULT: file with an error's text; the next image that is moved to a GPU
removes the file and raises that error. FAKE_CUDA_LOST: file; while it is there, nothing of this
container opens the driver's device any more, as after Docker lost it to a reload of systemd.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def install(torch: ModuleType) -> None:
    devices = int(os.environ["FAKE_CUDA_DEVICES"])
    fault = Path(os.environ.get("FAKE_CUDA_FAULT", "/does/not/exist"))
    here = threading.local()  # the current device is each thread's own
    state: dict[str, Any] = {"initialized": False, "failed": None, "process": None}

    def note(what: str, device: int) -> None:
        if path := os.environ.get("FAKE_CUDA_LOG"):
            with Path(path).open("a") as log:
                log.write(f"{what} {device}\n")

    def check(device: int) -> int:
        if state["failed"] is not None:
            raise torch.AcceleratorError(state["failed"])
        if not state["initialized"] or not 0 <= device < devices:
            raise RuntimeError("Invalid device argument")
        return device

    def count() -> int:
        state["process"] = state["process"] or os.getpid()  # a fork is poisoned from here on
        return devices

    def initialize() -> None:
        if devices == 0:
            raise RuntimeError("No CUDA GPUs are available")
        torch.cuda.default_generators = tuple(torch.Generator() for _ in range(devices))
        state["initialized"] = True
        note("init", current())

    def current() -> int:
        return getattr(here, "device", 0)

    def current_started() -> int:
        torch.cuda.init()
        return current()

    def set_device(device: int) -> None:
        torch.cuda.init()
        if not 0 <= device < devices:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        here.device = device
        note("set", device)

    def exchange(device: int) -> int:
        before = current_started()
        if device >= 0:
            here.device = device
        return before

    def peak(device: int) -> dict[str, Any]:
        note("stats", check(device))
        return {"allocated_bytes": {"all": {"peak": 64 * 2**20}}}

    def reset(device: int) -> None:
        note("reset", check(device))

    def room(device: int) -> tuple[int, int]:
        check(device)
        return 7 * 2**30, 8 * 2**30

    def nothing(*_: Any) -> None:
        if state["failed"] is not None:
            raise torch.AcceleratorError(state["failed"])

    for name, function in {
        "_cuda_getDeviceCount": count,
        "_cuda_isInBadFork": lambda: state["process"] not in (None, os.getpid()),
        "_cuda_init": initialize,
        "_cuda_getDevice": current_started,
        "_cuda_setDevice": set_device,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_memoryStats": peak,
        "_cuda_resetPeakMemoryStats": reset,
        "_cuda_resetAccumulatedMemoryStats": reset,
        "_cuda_emptyCache": nothing,
        "_cuda_synchronize": nothing,
        "_cuda_getCurrentRawStream": lambda device: 0,
        "_cuda_getArchFlags": lambda: "sm_75 sm_90",
    }.items():
        setattr(torch._C, name, function)
    torch.cuda._cudart = SimpleNamespace(cudaMemGetInfo=room)
    torch.cuda._device_count_nvml = lambda: -1  # which would count real ones
    torch.cuda._is_in_bad_fork = torch._C._cuda_isInBadFork
    torch.cuda._get_device_properties = lambda device: SimpleNamespace(
        name="Fake GPU", major=9, minor=0, total_memory=8 * 2**30
    )
    move = torch.Tensor.to

    def place(tensor: Any, value: Any) -> Any:
        """The CPU in the place of a CUDA device, after what a move there would ask for."""
        if not isinstance(value, str | torch.device) or torch.device(value).type != "cuda":
            return value
        torch.cuda.init()
        index = torch.device(value).index
        device = check(current() if index is None else index)
        if tensor.ndim == 4 and tensor.shape[1] == 3 and fault.is_file():
            state["failed"] = fault.read_text()
            fault.unlink()
            raise torch.AcceleratorError(state["failed"])
        if tensor.ndim == 4 and tensor.shape[1] == 3:
            note("image", device)
            note("current", current())
        return torch.device("cpu")

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return move(
            self,
            *(place(self, value) for value in args),
            **{key: place(self, value) for key, value in kwargs.items()},
        )

    torch.Tensor.to = to

    def made_by(function: Any) -> Any:
        """A function that makes tensors, with the CPU in the place of a CUDA device."""

        def make(*args: Any, **kwargs: Any) -> Any:
            value = kwargs.get("device")
            if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
                torch.cuda.init()
                index = torch.device(value).index
                check(current() if index is None else index)
                kwargs["device"] = torch.device("cpu")
            return function(*args, **kwargs)

        return make

    for name in ("arange", "empty", "full", "tensor", "zeros"):
        setattr(torch, name, made_by(getattr(torch, name)))


def fake_device() -> None:
    """/dev/nvidiactl, as far as a process opens it by `os.open`."""
    lost, open_any = Path(os.environ.get("FAKE_CUDA_LOST", "/does/not/exist")), os.open

    def open_it(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if path != "/dev/nvidiactl":
            return open_any(path, flags, *args, **kwargs)
        if lost.exists():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return open_any("/dev/null", flags)

    os.open = open_it


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `install` once torch has been imported, by whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FAKE_CUDA_DEVICES" in os.environ:
    fake_device()
    sys.meta_path.insert(0, _AfterImport())
