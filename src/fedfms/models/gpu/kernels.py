"""Which kernels there are, and their machine code: shipped with the image, or compiled here.

python -m fedfms.models.gpu.kernels FOLDER   compile all that an image ships

Compiling needs Triton (torch's CUDA builds bring it, with NVIDIA's assembler), and no GPU and no C
compiler. Launching needs none of them: driver.py hands machine code to NVIDIA's driver. So in a
container with a read-only root and no compiler kernels are read from the folder in which the
image's build left them (the stage `kernels` of docker/Dockerfile, which has this file and source.py
alone). For a GPU that is not in CAPABILITIES Triton compiles them when they are first used.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

FOLDER = Path(__file__).with_name("built")
# compute capabilities that an image is built for: A100, RTX A6000, L4, H100, B200, RTX 5090
CAPABILITIES = (80, 86, 89, 90, 100, 120)
Precision = Literal["bf16", "tf32", "fp32"]
# of products, as Triton calls it: tf32x3 writes each factor as a sum of two in TF32 and adds three
# of their four products, which leaves the error of fp32 (arXiv 2203.03341)
PRODUCTS: dict[Precision, str] = {"bf16": "tf32", "tf32": "tf32", "fp32": "tf32x3"}
LEAST_COLUMNS = 16  # the least that a tensor core multiplies

Name = Literal["attend", "of_queries", "of_keys"]


class Tiling(NamedTuple):
    """How a kernel divides its work.

    queries: in a tile.
    warps: of 32 threads, that share a tile.
    stages: tiles on their way from memory at a time.
    """

    queries: int
    warps: int
    stages: int


class Kernel(NamedTuple):
    """One kernel of source.py for some shapes.

    precision: of products, and of queries, keys and values, which are fp32 in TF32 too.
    head_dim: a power of two, at least 16.
    columns: the least power of two, from LEAST_COLUMNS, that a row of the grid fits into.
    whole: neither rows nor tiles of queries are cut off.
    """

    name: Name
    precision: Precision
    head_dim: int
    columns: int
    whole: bool

    @property
    def tiling(self) -> Tiling:
        """Of the fastest that were tried on an H100, with 64 columns."""
        if self.precision != "bf16":
            return Tiling(64 if self.precision == "tf32" else 32, 4, 2)
        if self.columns < 64:
            return Tiling(64, 4, 3 if self.name == "attend" else 2)
        return {
            "attend": Tiling(128, 4, 3),
            "of_queries": Tiling(128, 8, 2),
            "of_keys": Tiling(64, 4, 2),
        }[self.name]

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are known when it is compiled."""
        return {
            "head_dim": self.head_dim,
            "columns": self.columns,
            "queries": self.tiling.queries,
            "whole": self.whole,
            "products": PRODUCTS[self.precision],
        }

    def file(self, capability: int) -> str:
        """Its name in FOLDER, without an ending."""
        whole = "-whole" if self.whole else ""
        return f"{self.name}-{self.precision}-{self.head_dim}-{self.columns}{whole}-sm{capability}"


class Code(NamedTuple):
    """Machine code of a kernel for one compute capability.

    cubin: as the driver takes it.
    entry: the kernel's name in it.
    warps: see `Tiling`.
    shared_bytes: of the memory that the threads of a tile share.
    """

    cubin: bytes
    entry: str
    warps: int
    shared_bytes: int


def precision_of(dtype: torch.dtype) -> Precision | None:
    """What a type's products are computed in, by torch's settings now; None: by no kernel."""
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"


def kernel_for(name: Name, precision: Precision, head_dim: int, height: int, width: int) -> Kernel:
    """The kernel for heads of that width on a grid of that size."""
    columns = max(LEAST_COLUMNS, 1 << (width - 1).bit_length())
    kernel = Kernel(name, precision, head_dim, columns, whole=False)
    fits = width == columns and height * width % kernel.tiling.queries == 0
    return kernel._replace(whole=fits)


def computes(precision: Precision, capability: int) -> bool:
    """Whether kernels are for a GPU: from 8.0 on; in fp32, which takes many registers, on 9.x."""
    return capability // 10 == 9 if precision == "fp32" else capability >= 80


def shipped_kernels(capability: int) -> list[Kernel]:
    """What an image holds: for the global blocks of ViT-B and ViT-L, 17 to 64 columns."""
    names: tuple[Name, ...] = ("attend", "of_queries", "of_keys")
    return [
        Kernel(name, precision, 64, columns, whole)
        for name in names
        for precision in PRODUCTS
        if computes(precision, capability)
        for columns in (32, 64)
        for whole in (False, True)
    ]


def code_of(kernel: Kernel, capability: int) -> Code:
    """Machine code from the folder, or compiled now.

    Args:
        capability: major and minor number of the GPU, 90 for 9.0.

    Raises:
        ImportError: it is not in the folder, and Triton is not here.
        Exception: whatever Triton raises where it cannot compile.
    """
    built = FOLDER / kernel.file(capability)
    if built.with_suffix(".json").exists():
        return Code(
            built.with_suffix(".cubin").read_bytes(),
            **json.loads(built.with_suffix(".json").read_text()),
        )
    return compiled(kernel, capability)


def compiled(kernel: Kernel, capability: int) -> Code:
    """Machine code by Triton, which keeps it in its own cache; raises as `code_of`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedfms.models.gpu import source

    function, constants = getattr(source, kernel.name), kernel.constants
    types = {name: _type_of(name, kernel) for name in function.arg_names if name not in constants}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if types.get(name, "").startswith("*")
    }
    written = ASTSource(
        function,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs=aligned,
    )
    for stages in range(kernel.tiling.stages, 0, -1):  # fewer, until they fit
        found = triton.compile(
            written,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernel.tiling.warps, "num_stages": stages},
        )
        if found.metadata.shared <= _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES):
            break
    asked = parameters_in(found.asm["ptx"])
    # after ours: memory for scratch and for a profiler, of which these kernels need none
    expected = [_PTX[types[name].lstrip("*") if "*" not in types[name] else "*"] for name in types]
    if asked != [*expected, "u64", "u64"]:
        raise RuntimeError(f"Triton {triton.__version__} gives {kernel.name} the arguments {asked}")
    meta = found.metadata
    if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
        raise RuntimeError(f"Triton {triton.__version__} wants scratch memory for {kernel.name}")
    return Code(found.asm["cubin"], meta.name, meta.num_warps, meta.shared)


# that a tile's threads may share at most (CUDA C programming guide, "compute capabilities")
_LEAST_SHARED_BYTES = 99 * 1024
_SHARED_BYTES = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
_PTX = {"*": "u64", "fp32": "f32", "i32": "u32"}


def _type_of(argument: str, kernel: Kernel) -> str:
    if argument in ("height", "width"):
        return "i32"
    if argument == "scale":
        return "fp32"
    in_bf16 = kernel.precision == "bf16" and argument not in ("log_sums", "inner")
    return "*bf16" if in_bf16 else "*fp32"


def parameters_in(ptx: str) -> list[str]:
    """Types of a kernel's parameters, in their order, from its assembly."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    return re.findall(r"\.param\s+\.(\w+)", entry[1]) if entry else []


def build(folder: Path, capabilities: tuple[int, ...] = CAPABILITIES) -> int:
    """Compile what an image ships into a folder, which is made; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for capability in capabilities:
        for kernel in shipped_kernels(capability):
            code = compiled(kernel, capability)
            target = folder / kernel.file(capability)
            target.with_suffix(".cubin").write_bytes(code.cubin)
            facts = {key: value for key, value in code._asdict().items() if key != "cubin"}
            target.with_suffix(".json").write_text(json.dumps(facts))
            count += 1
    return count


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]))} kernels")  # noqa: T201
