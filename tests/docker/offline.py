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
from dataclasses import dataclass
from pathlib import Path

from containers import wait_until

# a new network namespace has a loopback, which is down
START = 'ip link set lo up && exec /usr/sbin/dockerd "$@"'


@dataclass
class Engine:
    """A daemon; everything that it has is below one folder."""

    folder: Path
    process: subprocess.Popen[bytes]

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
    # not `ip netns exec`, which mounts a new /sys without the control groups
    command = ["unshare", "--net", "sh", "-c", START, "dockerd"]
    settings = {
        "--host": f"unix://{folder / 'docker.sock'}",
        "--data-root": folder / "data",
        "--exec-root": folder / "run",
        "--pidfile": folder / "dockerd.pid",
        "--log-level": "warn",
    }
    with (folder / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in settings.items())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for the tests, which then stop it in order
        )
    engine = Engine(folder, process)
    try:
        wait_until(engine.answers, 60, "the second engine answers")
        yield engine
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for mount in _mounts_below(folder):
            subprocess.run(["umount", mount], check=False)
        shutil.rmtree(folder)


def _mounts_below(folder: Path) -> list[str]:
    """Deepest first: what a daemon leaves mounted that did not end in order."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    places = [line.split()[1] for line in lines]
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)
