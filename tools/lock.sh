#!/usr/bin/env bash
# Write requirements.lock, requirements-lab.lock (what the laboratory needs beyond it),
# requirements-dev.lock, and requirements-build.lock (what tools/bill.py needs, which the image's build
# runs): every package with its hashes, for any Python that pyproject.toml allows. Then the wheel's bill
# of materials, src/fedfms/sbom.cdx.json, from these locks. torch is left out with what it brings for
# CUDA: which build of it fits, CPU or CUDA, is the machine's matter, so the Makefile installs it first,
# at its own pin. The image is for one
# Python on one platform: docker/torch-cuda.lock is written here, docker/torch-cpu.lock by hand, since
# its hash stands on PyTorch's own index. Pins that still fit stay; tools/lock.sh --upgrade takes the
# newest of everything. tools/lock.sh --torch cu126 writes docker/torch-cu126.lock alone, for a build
# with --build-arg TORCH=cu126; the hashes are those that PyTorch's index shows on that day
# (UV_INDEX=URL for your own archive of it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v uv >/dev/null; then
  echo "lock: there is no uv on the PATH" >&2
  echo "  fix: pip install uv" >&2
  exit 69
fi

torch=$(sed -n 's/^TORCH ?= //p' Makefile)

# torch and what it brings for CUDA, for the image's Python and platform, with hashes
lock_torch() {
  uv pip compile - <<<"$1" --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-annotate --no-header |
    awk '/^[^ ]/ { keep = /^(torch|triton|nvidia-|cuda-)/ } keep'
}

if [[ "${1:-}" == --torch ]]; then
  build=${2:-}
  if [[ ! "$build" =~ ^cu[0-9]+$ ]]; then
    echo "lock: --torch needs a build of PyTorch, not '$build'" >&2
    echo "  fix: tools/lock.sh --torch cu126, as on pytorch.org under \"Get Started\"" >&2
    exit 64
  fi
  export UV_INDEX=${UV_INDEX:-https://download.pytorch.org/whl/$build}
  compiled=$(lock_torch "$torch+$build")
  {
    echo "# $torch+$build with what it brings for CUDA. Written by tools/lock.sh --torch $build."
    echo "$compiled"
  } >"docker/torch-$build.lock"
  exit
fi

pins=$(mktemp)
others=$(mktemp)
trap 'rm -f "$pins" "$others"' EXIT
# dp-accounting, which tests alone use, asks for attrs of before 2024 and works with any
echo "attrs>=23" >"$others"
if [[ "${1:-}" != --upgrade ]]; then
  # one line for each package, without its hashes
  sed -n 's/ *\\$//; /^[A-Za-z0-9]/p' requirements-dev.lock >"$pins"
fi

lock() {
  local target=$1
  shift
  local compiled
  compiled=$(uv pip compile "$@" --constraint "$pins" --override "$others" --quiet --universal --python-version 3.10 \
    --generate-hashes --no-annotate --no-header)
  {
    echo "# Written by tools/lock.sh; do not edit. Install torch first, then this with --no-deps."
    # a block is a requirement line and the hash lines under it
    awk '/^[^ ]/ { keep = $0 !~ /^(torch|triton|nvidia-|cuda-)/ } keep' <<<"$compiled"
  } >"$target"
}

lab=src/fedfms_lab/pyproject.toml
python=${PYTHON:-.venv/bin/python} # with requirements-dev.lock installed: make test does that
lock requirements.lock pyproject.toml
lock requirements-dev.lock pyproject.toml "$lab" --extra test --extra lint
lock requirements-lab.lock pyproject.toml "$lab"
# without the packages of the first, which are installed by then
awk 'NR == FNR { if (/^[^ #]/) known[$1] = 1; next } /^[^ ]/ { keep = !($1 in known) } keep' \
  requirements.lock requirements-lab.lock >"$pins"
cat "$pins" >requirements-lab.lock

sed -n 's/ *\\$//; /^[A-Za-z0-9]/p' requirements-dev.lock >"$pins" # its own pins, as of now
lock requirements-build.lock --group pyproject.toml:build

compiled=$(lock_torch "$torch")
{
  echo "# PyTorch for NVIDIA GPUs, with what it brings for CUDA, from PyPI. Written by tools/lock.sh; do not edit."
  echo "$compiled"
} >docker/torch-cuda.lock

"$python" tools/bill.py wheel
