#!/usr/bin/env bash
# A Docker engine for the tests, on a bare Debian 12 machine, as root: engine.sh start | stop | status
#
# Where an engine answers, `start` installs and starts nothing and `stop` ends nothing: it is not ours.
# Debian 12's own engine and Compose are too old (Compose is v1), so these five packages come from
# Debian 13 on the same mirror; pinned by release, they lie beside an otherwise untouched machine.
set -euo pipefail

packages=(docker.io docker-cli docker-compose docker-buildx containerd)
pid_file=/run/fedfms-dockerd.pid # dockerd writes and removes it
log=${FEDFMS_DOCKER_LOG:-/var/log/fedfms-dockerd.log}
data_root=${FEDFMS_DOCKER_ROOT:-/var/lib/docker} # images and volumes: 10 GB and more
sources=/etc/apt/sources.list.d/debian.sources
lock_seconds=300 # another installation may be at work

say() { echo "engine: $*"; }

fail() {
  echo "engine: $1" >&2
  echo "  fix: $2" >&2
  exit "${3:-1}"
}

answers() { docker info >/dev/null 2>&1; }

# Prints the pid of the daemon that `start` started, if it still runs.
our_daemon() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  [[ $(cat "/proc/$pid/comm" 2>/dev/null) == dockerd ]] || return 1
  echo "$pid"
}

plugins() { docker compose version >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1; }

install_packages() {
  [[ $EUID -eq 0 ]] || fail "installing an engine needs root" "install Docker with Compose v2 and buildx, then start it" 77
  [[ -f $sources ]] || fail "there is no $sources: this is no Debian 12" \
    "install Docker with Compose v2 and buildx, then start it" 69
  say "installing ${packages[*]} from Debian 13"
  # the machine's own mirror, one release further
  sed '/^Suites:/s/bookworm/trixie/g' "$sources" >/etc/apt/sources.list.d/fedfms-trixie.sources
  cat >/etc/apt/preferences.d/fedfms-trixie <<PREFERENCES
Package: *
Pin: release n=trixie*
Pin-Priority: 1

Package: ${packages[*]}
Pin: release n=trixie*
Pin-Priority: 990
PREFERENCES
  apt-get -o DPkg::Lock::Timeout="$lock_seconds" update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout="$lock_seconds" install -y -qq --no-install-recommends \
    "${packages[@]}" iptables >/dev/null
}

start() {
  if answers; then
    plugins || fail "an engine answers, but docker has no compose v2 or no buildx" "install both plugins"
    say "an engine answers: $(docker version --format '{{.Server.Version}}')"
    return
  fi
  if [[ ! -x /usr/sbin/dockerd ]] || ! plugins; then install_packages; fi
  if ! our_daemon >/dev/null; then
    # A killed daemon leaves its pid file, and the next one refuses to start when that number is taken.
    rm -f "$pid_file"
    setsid /usr/sbin/dockerd --pidfile "$pid_file" --data-root "$data_root" \
      --log-level warn </dev/null >>"$log" 2>&1 &
  fi
  for _ in {1..120}; do
    if answers; then
      say "started $(docker version --format '{{.Server.Version}}') as process $(our_daemon), log in $log"
      return
    fi
    sleep 0.5
  done
  tail -n 20 "$log" >&2
  fail "the daemon does not answer after 60 s" "read $log"
}

stop() {
  local pid
  if ! pid=$(our_daemon); then
    say "no daemon of ours runs"
    return
  fi
  kill "$pid"
  for _ in {1..120}; do
    if [[ ! -d /proc/$pid ]]; then
      say "stopped process $pid"
      return
    fi
    sleep 0.5
  done
  fail "process $pid has not ended after 60 s" "read $log"
}

status() {
  if answers; then
    say "answers: engine $(docker version --format '{{.Server.Version}}'), compose $(docker compose version --short)," \
      "process $(our_daemon || echo 'not ours')"
  else
    say "does not answer"
    exit 1
  fi
}

case ${1:-} in
  start | stop | status) "$1" ;;
  *) fail "start, stop or status?" "tests/docker/engine.sh start" 64 ;;
esac
