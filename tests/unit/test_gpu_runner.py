"""`make test-gpu` where no GPU is: its words, and its checks on the processor, small."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

RUN = Path(__file__).parents[1] / "gpu/run.py"


def run_checks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_does_not_pass():
    done = run_checks()
    assert done.returncode == 3
    assert done.stdout.count("\n") == 1 and "nothing was tested: " in done.stdout


def test_the_table_says_what_ran_and_what_did_not():
    done = run_checks("--device", "cpu", "--only", "model-fedmsa,memory")
    assert done.returncode == 0, done.stderr
    assert "| right | fp32 logits 0.0e+00, gradient 0.0e+00 relative; bf16 logits" in done.stdout
    assert "| not run | only on a GPU |" in done.stdout
    assert "1 of 2 checks ran, 0 of them wrong." in done.stdout


@pytest.mark.slow
def test_its_checks_of_training_predict_and_restart_hold_on_the_processor():
    """They use the product's own functions, and would otherwise age where nobody runs them."""
    done = run_checks("--device", "cpu", "--only", "train-fedsam,predict,restart,commands")
    assert done.returncode == 0, done.stderr + done.stdout


def test_what_a_machine_lacks_is_named_and_an_error_is_wrong(runner, monkeypatch):
    end, python = time.monotonic() + 60, Path(sys.executable)
    monkeypatch.setitem(runner.CHECKS, "memory", ("", ("torch", "no_such_module"), 60, False))
    missing = ("not run", "missing here: no_such_module")
    assert runner.run_check("memory", "cpu", end, python)[:2] == missing
    monkeypatch.setitem(runner.CHECKS, "no-such-check", ("", (), 60, False))
    result, found, _ = runner.run_check("no-such-check", "cpu", end, python)
    assert (result, found) == ("WRONG", "KeyError: 'no-such-check'")
    late = runner.run_check("devices", "cpu", time.monotonic(), python)
    assert late[:2] == ("not run", "no time left")
