"""Launches machine code on a GPU by NVIDIA's driver, without Triton and without a compiler.

Triton's own launcher is a C extension, which it compiles on each machine: that takes a C compiler
and a folder to execute from, and a container has neither. The four functions of the driver that it
would call are called here (CUDA driver API: cuModuleLoadData, cuModuleGetFunction,
cuFuncSetAttribute, cuLaunchKernel). Work goes to torch's current stream and needs no answer, so it
can be recorded in a CUDA graph; loading can not, and has to come before.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedfms.models.gpu.kernels import Code, Kernel, code_of

LIBRARY = "libcuda.so.1"
WARP = 32  # threads
LEAST_SHARED = 48 * 1024  # bytes that a tile's threads may share on every GPU
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def launch(
    kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Tensor | float | int]
) -> None:
    """Start a kernel on the device of its tensors; on a processor, with Triton's interpreter.

    Args:
        kernel: whose constants are not among the arguments.
        grid: tiles and heads.
        arguments: in the order of source.py; tensors contiguous and aligned to 16 bytes.

    Raises:
        RuntimeError: the driver refuses; or as `load`.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.device.type == "cpu":
        _interpret(kernel, grid, arguments)
        return
    loaded = load(kernel, first.device.index)
    packed = pack(arguments)
    # two more arguments: memory for scratch and for a profiler, of which there is none
    values = [*packed, ctypes.c_void_p(None), ctypes.c_void_p(None)]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream(first.device).cuda_stream)
    threads, shared = WARP * loaded.code.warps, loaded.code.shared_bytes
    _check(
        _driver().cuLaunchKernel(
            loaded.function, *grid, 1, threads, 1, 1, shared, stream, places, None
        ),
        kernel,
    )


def pack(arguments: Sequence[Tensor | float | int]) -> list[Any]:
    """As C passes them: addresses, 32-bit floats and 32-bit whole numbers.

    Raises:
        ValueError: a tensor that the machine code could not read.
    """
    packed: list[Any] = []
    for one in arguments:
        if isinstance(one, Tensor):
            if not one.is_contiguous() or one.data_ptr() % 16:
                raise ValueError("a kernel reads tensors that are contiguous and aligned")
            packed.append(ctypes.c_void_p(one.data_ptr()))
        elif isinstance(one, int):
            packed.append(ctypes.c_int32(one))
        else:
            packed.append(ctypes.c_float(one))
    return packed


class Loaded:
    """A kernel in a GPU's memory.

    Args:
        kernel: for messages.
        code: of it.
        shared_limit: bytes that a tile's threads may share on this GPU.

    Raises:
        RuntimeError: it does not fit, or the driver refuses it.
    """

    def __init__(self, kernel: Kernel, code: Code, shared_limit: int) -> None:
        if code.shared_bytes > shared_limit:
            raise RuntimeError(
                f"{kernel.name} needs {code.shared_bytes} bytes of shared memory, and the GPU has "
                f"{shared_limit}"
            )
        self.code, self.function = code, ctypes.c_void_p()
        driver, module = _driver(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code.cubin), kernel)
        entry = code.entry.encode()
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, entry), kernel)
        size = code.shared_bytes
        _check(driver.cuFuncSetAttribute(self.function, _MAX_DYNAMIC_SHARED, size), kernel)


@functools.lru_cache(maxsize=256)
def load(kernel: Kernel, device: int) -> Loaded:
    """Bring a kernel to a GPU, once.

    Raises:
        RuntimeError: the driver refuses it; or as `code_of`.
    """
    facts = torch.cuda.get_device_properties(device)
    shared_limit = getattr(facts, "shared_memory_per_block_optin", LEAST_SHARED)
    code = code_of(kernel, 10 * facts.major + facts.minor)
    with torch.cuda.device(device):
        torch.cuda.current_stream(device)  # torch's context is this thread's own
        return Loaded(kernel, code, shared_limit)


@functools.cache
def _driver() -> ctypes.CDLL:
    """NVIDIA's driver, as the container's runtime puts it in; OSError where there is none."""
    return ctypes.CDLL(LIBRARY)


def _check(result: int, kernel: Kernel) -> None:
    if result == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(result, ctypes.byref(text))
    said = (text.value or b"").decode(errors="replace")
    raise RuntimeError(f"CUDA driver error {result} for {kernel.name}: {said}")


def _interpret(kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Any]) -> None:
    """With numpy on the processor, where TRITON_INTERPRET=1 says so: for tests, and slow."""
    from fedfms.models.gpu import source

    getattr(source, kernel.name)[grid](*arguments, **kernel.constants)
