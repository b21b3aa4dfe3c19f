"""Seconds and memory of phases, against memory that is really taken and given back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfms.training.meter import Meter

MIB = 2**20


def test_seconds_of_a_phase_that_comes_again_are_added() -> None:
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        with meter("train"):
            time.sleep(0.05)
    with meter("evaluate"):
        pass
    assert 0.1 <= meter.seconds["train"] < 1
    assert meter.seconds["evaluate"] < 0.05
    assert list(meter.peak_memory_bytes) == ["train", "evaluate"]


def test_each_phase_has_its_own_peak() -> None:
    """The large phase comes first, which a peak of the whole process would hide."""
    code = """
import numpy as np, torch
from fedfms.training.meter import Meter
meter = Meter(torch.device("cpu"))
def take(mebibytes):
    block = np.ones(mebibytes * 2**20, np.uint8)  # above malloc's threshold: given back at once
    del block
for phase, mebibytes in (("large", 400), ("none", 0), ("small", 100), ("large", 10)):
    with meter(phase):
        take(mebibytes)
print(*(meter.peak_memory_bytes[phase] // 2**20 for phase in ("large", "none", "small")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large, none, small = map(int, done.stdout.split())
    assert large - none == pytest.approx(400, abs=20)
    assert small - none == pytest.approx(100, abs=20)


def test_without_the_right_to_count_anew_a_phase_has_the_peak_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr("fedfms.training.meter._PROCESS", tmp_path / "nothing")
    block = np.ones(200 * MIB, np.uint8)
    del block
    meter = Meter(torch.device("cpu"))
    with meter("evaluate"):
        pass
    assert meter.peak_memory_bytes["evaluate"] > 200 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpus_memory_is_counted_by_phase(device: str) -> None:
    """In a fresh process, where nobody has started CUDA, on the device that the product makes."""
    code = f"""
import torch
from little import little_site
from fedfms.training.device import torch_device
from fedfms.training.meter import Meter
device = torch_device(little_site(device={device!r}))
meter = Meter(device)
for phase, mebibytes in (("train", 256), ("evaluate", 64)):
    with meter(phase):
        block = torch.ones(mebibytes * 2**20, dtype=torch.uint8, device=device)
        del block
print(device, meter.peak_memory_bytes["train"] - meter.peak_memory_bytes["evaluate"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["cuda:0", str(192 * MIB)]
