"""Folders on small disks of their own, which can be full. It takes the right to mount."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SIZE = "256m"
_FILL = ".full"  # the file that takes all the room


def may_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        if _mount(Path(folder)).returncode != 0:
            return False
        _unmount(Path(folder))
        return True


class Disk:
    """A folder with what is in it, from now on alone on a small disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        aside = folder.with_name(f"{folder.name}.aside")
        folder.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        folder.mkdir(mode=0o700)
        _mount(folder).check_returncode()
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def fill(self, seconds: float) -> None:
        """Take all the room there is, and what is freed meanwhile, for so long."""
        until = time.monotonic() + seconds
        place = self.folder / _FILL
        with place.open("wb", buffering=0) as file:
            while time.monotonic() < until:
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    with contextlib.suppress(OSError):  # the last page
                        file.write(bytes(1 << 12))
                    time.sleep(0.2)
        place.unlink()

    def close(self) -> None:
        """Unmount it; what was in it is gone."""
        _unmount(self.folder)


def mounts_below(folder: Path) -> list[str]:
    """Where something is mounted below a folder."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [place for place in places if place.startswith(f"{folder}/")]


def _mount(folder: Path) -> subprocess.CompletedProcess[bytes]:
    options = f"size={SIZE},mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options, "fedfms-chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True)
