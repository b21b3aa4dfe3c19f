"""A second Docker engine on a network of its own, from which no route leads anywhere.

It needs root. Nothing of it touches the first engine: its bridges and packet filter are those of
its network namespace, its images, sockets and containerd lie in a folder of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from containers import docker, wait_until

# a new network namespace has a loopback, which is down
START = 'ip link set lo up && exec /usr/sbin/dockerd "$@"'


@dataclass
class Engine:
    """A daemon; everything that it has is below one folder."""

    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it (again), on a new network; containers that restart come back with it."""
        settings = {
            "--host": f"unix://{self.folder / 'docker.sock'}",
            "--data-root": self.folder / "data",
            "--exec-root": self.folder / "run",
            "--pidfile": self.folder / "dockerd.pid",
            "--log-level": "warn",
        }
        # not `ip netns exec`, which mounts a new /sys without the control groups
        command = ["unshare", "--net", "sh", "-c", START, "dockerd"]
        with (self.folder / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(f"{name}={value}" for name, value in settings.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop it in order
            )
        wait_until(self.answers, 60, "the second engine answers")

    def stop(self) -> None:
        """End it in order; it stops its containers."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def lose_power(self) -> None:
        """`kill -9` of the daemon and of every process of its containers, at once."""
        of_it = [self.process.pid, *self._pids("ps", "-q")]
        shims = [p.pid for p in psutil.process_iter() if str(self.folder) in " ".join(_command(p))]
        for pid in [*of_it, *shims]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        (self.folder / "dockerd.pid").unlink(missing_ok=True)  # another process may have its number
        (self.folder / "run/containerd/containerd.pid").unlink(missing_ok=True)

    def _pids(self, *listing: str) -> list[int]:
        ids = docker(*listing, environment=self.environment).split()
        told = docker("inspect", "-f", "{{.State.Pid}}", *ids, environment=self.environment)
        return [int(pid) for pid in told.split()]

    @property
    def environment(self) -> dict[str, str]:
        """What makes docker and compose speak with this engine."""
        return {"DOCKER_HOST": f"unix://{self.folder / 'docker.sock'}"}

    def answers(self) -> bool:
        """Whether it has started."""
        assert self.process.poll() is None, self.log()
        asked = subprocess.run(
            ["docker", "info"], env={**os.environ, **self.environment}, capture_output=True
        )
        return asked.returncode == 0

    def log(self) -> str:
        """The end of what it said."""
        return (self.folder / "dockerd.log").read_text()[-4000:]

    def inside(self, *command: str) -> str:
        """Run a command of this machine on the engine's network."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *command],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


@contextlib.contextmanager
def engine_without_a_way_out() -> Iterator[Engine]:
    """Start an engine that has no image and no route; stop it and delete all that it had."""
    folder = Path(tempfile.mkdtemp(prefix="fedfms-offline-"))  # short, for the socket's sake
    engine = Engine(folder)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()
        for mount in _mounts_below(folder):
            subprocess.run(["umount", mount], check=False)
        shutil.rmtree(folder)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _mounts_below(folder: Path) -> list[str]:
    """Deepest first: what a daemon leaves mounted that did not end in order."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    places = [line.split()[1] for line in lines]
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)
