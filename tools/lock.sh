#!/usr/bin/env bash
# Write requirements.lock and requirements-dev.lock: every package with its hashes, for any Python that
# pyproject.toml allows. torch is left out with what it brings for CUDA: which build of it fits, CPU or
# CUDA, is the machine's matter, so the Makefile installs it first, at its own pin. The image is for one
# Python on one platform: docker/torch-cuda.lock is written here, docker/torch-cpu.lock by hand, since
# its hash stands on PyTorch's own index. Pins that still fit stay; tools/lock.sh --upgrade takes the
# newest of everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v uv >/dev/null; then
  echo "lock: there is no uv on the PATH" >&2
  echo "  fix: pip install uv" >&2
  exit 69
fi

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
if [[ "${1:-}" != --upgrade ]]; then
  # one line for each package, without its hashes
  sed -n 's/ *\\$//; /^[A-Za-z0-9]/p' requirements-dev.lock >"$pins"
fi

lock() {
  local target=$1
  shift
  local compiled
  compiled=$(uv pip compile pyproject.toml "$@" --constraint "$pins" --quiet --universal --python-version 3.10 \
    --generate-hashes --no-annotate --no-header)
  {
    echo "# Written by tools/lock.sh; do not edit. Install torch first, then this with --no-deps."
    # a block is a requirement line and the hash lines under it
    awk '/^[^ ]/ { keep = $0 !~ /^(torch|triton|nvidia-|cuda-)/ } keep' <<<"$compiled"
  } >"$target"
}

lock requirements.lock
lock requirements-dev.lock --extra test --extra lint

torch=$(sed -n 's/^TORCH ?= //p' Makefile)
{
  echo "# PyTorch for NVIDIA GPUs, with what it brings for CUDA, from PyPI. Written by tools/lock.sh; do not edit."
  uv pip compile - <<<"$torch" --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-annotate --no-header |
    awk '/^[^ ]/ { keep = /^(torch|triton|nvidia-|cuda-)/ } keep'
} >docker/torch-cuda.lock
