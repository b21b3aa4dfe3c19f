from __future__ import annotations

import pytest
import torch
from little import little_recipe, little_site

from fedfms.errors import ConfigError, TrainingError
from fedfms.training.device import (
    explanation,
    failures_explained,
    is_out_of_memory,
    ready_device,
    slices_at_once,
    torch_device,
)


def test_the_processor_where_the_site_says_so_or_has_nothing_else():
    assert torch_device(little_site(device="cpu")) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert torch_device(little_site(device="auto")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_site_that_names_a_gpu_never_computes_without_it(device):
    if device == "cuda" and torch.cuda.is_available():
        assert torch_device(little_site(device=device)).type == "cuda"
        return
    with pytest.raises(ConfigError, match=r"in site\.yml|cuda:0 to") as caught:
        torch_device(little_site(device=device))
    assert caught.value.code == "no-gpu"


def test_threads_are_the_sites_matter():
    before = torch.get_num_threads()
    try:
        ready_device(little_site(device="cpu", threads=1))
        assert torch.get_num_threads() == 1
        ready_device(little_site(device="cpu", threads=None))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("image_size", "micro_batch", "device", "expected"),
    [
        (256, None, "cpu", 4),
        (256, 2, "cpu", 2),
        (256, 9, "cpu", 4),  # never more than a batch
        (512, None, "cpu", 4),
        (1024, None, "cpu", 1),
        (1024, 3, "cpu", 3),  # the site has the last word
        (1024, None, "cuda", 4),
    ],
)
def test_how_many_slices_are_in_memory_at_once(image_size, micro_batch, device, expected):
    recipe = little_recipe(image_size=image_size, batch_size=4)
    site = little_site(micro_batch=micro_batch)
    assert slices_at_once(recipe, site, torch.device(device)) == expected


def test_what_running_out_of_memory_looks_like():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator's own words
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))


# as torch 2.11 and 2.13 and the CUDA runtime write them
SAID = {
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors "
    "might be asynchronously reported": ("gpu-unsupported", "device: cpu"),
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver": ("no-gpu", "update the driver"),
    "CUDA driver version is insufficient for CUDA runtime version": ("no-gpu", "update the driver"),
    "Found no NVIDIA driver on your system. Please check that you have": ("no-gpu", "nvidia-smi"),
    "No CUDA GPUs are available": ("no-gpu", "nvidia-smi"),
    "CUDA unknown error - this may be due to an incorrectly set up environment": (
        "no-gpu",
        "nvidia-smi",
    ),
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": ("gpu-busy", "nvidia-smi"),
    "CUDA error: device-side assert triggered": ("gpu-failed", "device: cpu"),
    "CUDA error: an illegal memory access was encountered": ("gpu-failed", "start again"),
    "CUDA error: uncorrectable ECC error encountered": ("gpu-failed", "service"),
    "CUDA error: unspecified launch failure": ("gpu-failed", "dmesg"),
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": (
        "gpu-failed",
        "micro_batch",
    ),
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR": ("gpu-failed", "micro_batch"),
    "Invalid device argument": ("gpu-failed", "start again"),
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": (
        "out-of-memory",
        "what else uses this device",
    ),
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB": (
        "out-of-memory",
        "what else uses this device",
    ),
    "CUDA error: out of memory": ("out-of-memory", "what else uses this device"),
}


@pytest.mark.parametrize("said", SAID)
def test_what_a_gpu_says_becomes_problem_and_fix(said):
    code, fix = SAID[said]
    with pytest.raises(TrainingError) as caught, failures_explained():
        raise torch.AcceleratorError(said)
    assert caught.value.code == code
    assert fix in caught.value.fix
    first = said.splitlines()[0]
    assert first in caught.value.problem  # the words that a person can search for
    assert "asynchronously" not in str(caught.value)


@pytest.mark.parametrize(
    "ours",
    [
        RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
        ValueError("CUDA error: in a text of somebody else"),
    ],
)
def test_our_own_mistakes_keep_their_traceback(ours):
    assert explanation(ours) is None
    with pytest.raises(type(ours)), failures_explained():
        raise ours


def test_why_there_is_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError) as caught:
        ready_device(little_site(device="cuda"))
    reason = "not compiled with CUDA" if torch.version.cuda is None else "NVIDIA driver|No CUDA"
    assert caught.match(f"no CUDA device here: .*({reason})")


def test_auto_that_cannot_use_the_gpu_says_once_that_it_takes_the_processor(
    monkeypatch, caplog, tmp_path
):
    if torch.cuda.is_available():
        pytest.skip("it can")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57")
    monkeypatch.setattr("fedfms.training.device._DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for _ in range(2):
        assert ready_device(little_site(device="auto")) == torch.device("cpu")
    assert len([r for r in caplog.records if "computing on the processor" in r.message]) == 1
