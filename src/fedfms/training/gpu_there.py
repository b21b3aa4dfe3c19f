"""Whether a GPU that was there can still be used by this container; needs no torch.

A process keeps what it has opened, so that a trainer may compute on for hours while nothing new can
reach the GPU: a container whose access to devices was taken away (Docker with systemd's cgroups
does that to running containers when the host reloads its units, and NVML then says "Unknown
Error"), a driver that was updated under it, a card that fell off the bus. What opens everything
anew sees it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CONTROL = "/dev/nvidiactl"  # what every use of the driver opens first; WSL has none
_LIBRARY = "libnvidia-ml.so.1"
_GPU_IS_LOST = 15  # NVML_ERROR_GPU_IS_LOST


def why_lost() -> str | None:
    """Why no GPU can be reached from here; None where nothing says so.

    Only to ask where there was a GPU: without driver and devices nothing says so either.
    """
    return _closed_device() or _silent_driver()


def _closed_device() -> str | None:
    """A device of the driver that is there and cannot be opened."""
    reason = _cannot_open(_CONTROL)
    if reason is not None:
        return reason
    cards = [f"/dev/{path.name}" for path in Path("/dev").glob("nvidia[0-9]*")]
    reasons = [_cannot_open(card) for card in sorted(cards)]
    return reasons[0] if reasons and all(reasons) else None


def _cannot_open(device: str) -> str | None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{device} cannot be opened ({error.strerror})"
    return None


def _silent_driver() -> str | None:
    """What NVML, the driver's own library, says; None where it is well or not installed."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    library.nvmlErrorString.restype = ctypes.c_char_p
    if code := library.nvmlInit_v2():
        return f"NVML says: {library.nvmlErrorString(code).decode(errors='replace')}"
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or count.value == 0:
            return "NVML finds no GPU"
        codes = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            codes.append(library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
        if all(code == _GPU_IS_LOST for code in codes):
            return "NVML says: the GPU is lost"
        return None
    finally:
        library.nvmlShutdown()
