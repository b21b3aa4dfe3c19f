"""Our attention kernels where no GPU is: right by Triton's interpreter, built, found, or refused.

Triton comes with torch's CUDA builds; what needs it skips elsewhere (PYTHONPATH=FOLDER, with
`pip install --target FOLDER triton`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fedfms.models.attention import _folded_split, _Tiled, choose
from fedfms.models.gpu import attention, kernels
from fedfms.models.gpu.driver import pack
from fedfms.models.gpu.kernels import Code, Kernel, code_of, kernel_for

WITH_TRITON = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here"),
]


def python(code: str, *arguments: object, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------ with Triton


class TestWithTriton:
    pytestmark = WITH_TRITON

    def test_outputs_and_gradients_are_those_of_the_folded_form(self):
        """Windows, a small twin of the 64 x 64 grid, rows and tiles that are cut off."""
        sizes = [(14, 14, 16), (16, 16, 32), (5, 7, 16), (3, 33, 16)]
        code = """
            import json, sys, torch
            from fedfms.models.attention import _folded_split
            from fedfms.models.gpu.attention import distance
            for height, width, head_dim in json.loads(sys.argv[1]):
                with torch.inference_mode():  # as where a prediction asks first
                    print(distance(
                        torch.float32, head_dim, height, width, torch.device("cpu"), _folded_split
                    ))
        """
        found = python(code, json.dumps(sizes), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        for size, apart in zip(sizes, map(float, found.split()), strict=True):
            assert apart < 2e-6, size
        whole = [kernel_for("attend", "fp32", d, h, w).whole for h, w, d in sizes]
        assert whole == [False, True, False, False]

    def test_what_a_build_leaves_is_found_without_triton_compiler_or_a_place_to_write(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("PATH", "")  # no C compiler; Triton brings NVIDIA's assembler
        some = [one for one in kernels.shipped_kernels(90) if one.precision == "bf16" and one.whole]
        some = [one for one in some if one.columns == 32]
        monkeypatch.setattr(kernels, "shipped_kernels", lambda _: some)
        folder = tmp_path / "built"
        assert kernels.build(folder, (90,)) == 3
        for place in (*folder.iterdir(), folder):
            place.chmod(0o500 if place.is_dir() else 0o400)
        code = """
            import sys
            from pathlib import Path
            import torch
            sys.modules["triton"] = None  # an import of it is an error
            from fedfms.models.gpu import kernels
            kernels.FOLDER = Path(sys.argv[1])
            for name in ("attend", "of_queries", "of_keys"):
                code = kernels.code_of(kernels.kernel_for(name, "bf16", 64, 32, 32), 90)
                assert code.cubin[:4] == b"\\x7fELF" and code.entry == name
                print(code.warps, code.shared_bytes)
            try:
                kernels.code_of(kernels.kernel_for("attend", "bf16", 64, 32, 32), 80)
            except ImportError:
                print("no code")
        """
        nowhere = str(tmp_path / "nowhere")
        found = python(code, folder, PATH="", HOME=nowhere, TRITON_CACHE_DIR=nowhere)
        lines = found.splitlines()
        assert len(lines) == 4 and lines[-1] == "no code"
        folder.chmod(0o700)

    def test_tiles_fit_into_what_a_smaller_gpu_shares(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        largest = Kernel("of_keys", "tf32", 64, 64, True)
        assert kernels.compiled(largest, 86).shared_bytes <= 99 * 1024


# --------------------------------------------------------------------------------- without Triton


def test_arguments_are_packed_as_c_passes_them():
    tensor = torch.zeros(8, 8)
    packed = pack((tensor, 0.125, 64, -2))
    kinds = [type(one) for one in packed]
    assert kinds == [ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int32]
    assert [one.value for one in packed] == [tensor.data_ptr(), 0.125, 64, -2]
    for wrong in (tensor.t()[:, :4], tensor.flatten()[1:]):  # strided; 4 bytes off
        with pytest.raises(ValueError, match="contiguous and aligned"):
            pack((wrong,))


def test_parameters_are_read_in_their_order():
    ptx = """
    .visible .entry attend(
        .param .u64 .ptr .global .align 16 attend_param_0,
        .param .f32 attend_param_1,
        .param .u32 attend_param_2
    )
    .reqntid 128
    """
    assert kernels.parameters_in(ptx) == ["u64", "f32", "u32"]
    assert kernels.parameters_in("") == []


@pytest.mark.parametrize(
    ("grid", "columns", "whole"),
    [((64, 64), 64, True), ((48, 48), 64, False), ((32, 32), 32, True), ((14, 14), 16, False)],
)
def test_a_kernel_is_whole_where_nothing_is_cut_off(grid, columns, whole):
    kernel = kernel_for("attend", "bf16", 64, *grid)
    assert (kernel.columns, kernel.whole) == (columns, whole)
    shipped = kernel in kernels.shipped_kernels(80)
    assert shipped == (columns in (32, 64))
    assert kernel.file(90).startswith(f"attend-bf16-64-{columns}") is True


def test_shipped_code_goes_before_compiling(tmp_path, monkeypatch):
    kernel = kernel_for("of_keys", "bf16", 64, 64, 64)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    (tmp_path / "of_keys-bf16-64-64-whole-sm90.cubin").write_bytes(b"code")
    facts = {"entry": "of_keys", "warps": 4, "shared_bytes": 51712}
    (tmp_path / "of_keys-bf16-64-64-whole-sm90.json").write_text(json.dumps(facts))
    assert code_of(kernel, 90) == Code(b"code", "of_keys", 4, 51712)


RIVALS = attention.Rivals(folded=_folded_split, plain=_Tiled.apply)


@pytest.fixture
def products():
    """torch's settings of products, put back afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    yield settings
    settings.allow_tf32 = before


@pytest.mark.parametrize(
    ("facts", "tf32", "why"),
    [
        ((torch.bfloat16, 64, 14, 14), True, "grids of 17 to 64 columns"),
        ((torch.bfloat16, 80, 64, 64), True, "heads of 32 or 64"),
        ((torch.float64, 64, 64, 64), True, "in bf16, TF32 or fp32"),
        ((torch.float32, 64, 64, 64), True, "no GPU"),
        ((torch.float32, 64, 64, 64), False, "no GPU"),
    ],
)
def test_a_refusal_has_a_reason(monkeypatch, products, facts, tf32, why):
    products.allow_tf32 = tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why in attention.refusal(*facts, RIVALS)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is there and on which nothing runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    attention._unproved.cache_clear()
    yield
    attention._unproved.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_fails_is_said_in_one_line_and_torch_takes_over(gpu, caplog):
    for _ in range(2):
        choice = choose("cuda", torch.bfloat16, 64, 64, 64, recorded=False)
        assert choice.way == "folded" and "our kernel does not run here" in choice.why
    (line,) = [line for line in caplog.messages if "goes on without our kernels" in line]
    assert line.startswith("attention of 64 x 64 tokens") and "\n" not in line


def test_a_person_can_do_without(gpu, monkeypatch, caplog):
    monkeypatch.setenv("FEDFMS_PLAIN_GPU", "1")
    choice = choose("cuda", torch.bfloat16, 64, 64, 64, recorded=False)
    assert choice.way == "folded" and "FEDFMS_PLAIN_GPU" in choice.why
    assert not caplog.messages


def test_an_old_gpu_is_not_asked(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    why = attention.refusal(torch.bfloat16, 64, 64, 64, RIVALS)
    assert why == "our kernel in bf16 is not for compute capability 7.5"


def test_in_fp32_only_where_the_registers_suffice(gpu, products, monkeypatch):
    """Elsewhere torch's plain products are exact, and faster than a kernel that spills."""
    products.allow_tf32 = False
    for capability, there in (((8, 6), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None, now=capability: now)
        attention._unproved.cache_clear()
        choice = choose("cuda", torch.float32, 64, 64, 64, recorded=False)
        assert choice.way == "tiled"
        assert ("does not run here" in choice.why) == there, choice
    shipped = {cap: {one.precision for one in kernels.shipped_kernels(cap)} for cap in (80, 90)}
    assert shipped == {80: {"bf16", "tf32"}, 90: {"bf16", "tf32", "fp32"}}


def test_source_and_build_stand_alone():
    """The image's build has these two files and no other of the package."""
    folder = Path(kernels.__file__).parent
    for name in ("kernels.py", "source.py"):
        lines = (folder / name).read_text().splitlines()
        ours = [line.strip() for line in lines if "fedfms" in line and "import" in line]
        assert ours in ([], ["from fedfms.models.gpu import source"])
