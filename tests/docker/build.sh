#!/usr/bin/env bash
# The image fedfms:VERSION on a machine without an image registry: build.sh [base | wheels | image]
#
# docker/Dockerfile, unchanged, with two things from this machine: a stand-in for the public base image,
# made from Debian's packages, and a folder of packages, which the host's pip gets; the build itself has
# no network. Both are kept in workspace/docker/, so that a second build takes seconds. FEDFMS_TARGET:
# hospital (the default) or lab.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cache=workspace/docker
base=fedfms-base:local
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' src/fedfms/__init__.py)
image=${FEDFMS_IMAGE:-fedfms:$version}
python=${PYTHON:-python3} # of the image's version, 3.11: its pip chooses the packages

say() { echo "build: $*"; }

fail() {
  echo "build: $1" >&2
  echo "  fix: $2" >&2
  exit "${3:-1}"
}

# Python, a shell and certificates on Debian 12, as in the public python:3.11-slim-bookworm.
make_base() {
  local key root mirror started=$SECONDS
  key=$(declare -f make_base | sha256sum | cut -c1-16)
  if [[ $(docker image inspect -f '{{index .Config.Labels "fedfms.base"}}' "$base" 2>/dev/null) == "$key" ]]; then
    return
  fi
  if [[ ! -f $cache/base-$key.tar ]]; then
    [[ $EUID -eq 0 ]] || fail "debootstrap needs root" "run as root, or pull the public base image and build without this" 77
    if ! command -v debootstrap >/dev/null; then
      DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends debootstrap >/dev/null
    fi
    # the mirror that this machine itself uses
    mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=python3,python3-venv,python-is-python3,ca-certificates \
      bookworm "$root" "$mirror" >"$cache/base.log" 2>&1 || fail "debootstrap failed" "read $cache/base.log"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
      "$root"/usr/share/{doc,man,info,locale,lintian}/*
    rm -f "$cache"/base-*.tar
    tar -C "$root" --numeric-owner -cf "$cache/base.part" .
    mv "$cache/base.part" "$cache/base-$key.tar"
    rm -rf "$root"
  fi
  docker import -c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    -c 'ENV LANG=C.UTF-8' -c 'CMD ["python3"]' -c "LABEL fedfms.base=$key" "$cache/base-$key.tar" "$base" >/dev/null
  say "base image $base made in $((SECONDS - started)) s"
}

# Everything that the locks name, with their hashes, as files.
make_wheels() {
  local key started=$SECONDS
  key=$(cat requirements.lock requirements-lab.lock requirements-build.lock docker/torch-cpu.lock | sha256sum | cut -c1-16)
  if [[ $(cat "$cache/wheels/key" 2>/dev/null) == "$key" ]]; then
    return
  fi
  [[ $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') == 3.11 ]] ||
    fail "$python is not Python 3.11, as the image's is" "PYTHON=python3.11 tests/docker/build.sh"
  rm -rf "$cache/wheels"
  mkdir "$cache/wheels"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    -r requirements.lock -r requirements-lab.lock -r requirements-build.lock -r docker/torch-cpu.lock -d "$cache/wheels" 2>&1 | { grep -v '^WARNING: Location' || true; }
  echo "$key" >"$cache/wheels/key"
  say "$(find "$cache/wheels" -type f | wc -l) packages got in $((SECONDS - started)) s"
}

make_image() {
  local started=$SECONDS
  make_base &
  local base_job=$!
  trap wait EXIT # never leaves it behind
  make_wheels
  wait "$base_job"
  docker buildx build --quiet --file docker/Dockerfile --tag "$image" --network none \
    --target "${FEDFMS_TARGET:-hospital}" \
    --build-context "wheels=$cache/wheels" --build-arg PIP_NO_INDEX=1 --build-arg "BASE_IMAGE=$base" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD)" . >/dev/null
  say "$image, $(docker image inspect -f '{{.Size}}' "$image" | awk '{ printf "%.2f GB", $1 / 1e9 }')," \
    "in $((SECONDS - started)) s"
}

mkdir -p "$cache"
case ${1:-image} in
  base | wheels | image) "make_${1:-image}" ;;
  *) fail "base, wheels or image?" "tests/docker/build.sh" 64 ;;
esac
