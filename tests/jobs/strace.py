"""What the processes of a program really did, by the kernel's account."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SYSTEM_CALLS = (
    "execve,clone,clone3,fork,vfork,socket,open,openat,openat2,stat,lstat,newfstatat,statx"
)


def traced(command: Sequence[str], folder: Path) -> str:
    """Run a program to its good end with all its processes under strace; what it printed."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian: apt install strace)")
    folder.mkdir()
    done = subprocess.run(
        [
            *(strace, "-ff", "--seccomp-bpf", "-qq", "-s", "400", "-e", f"trace={SYSTEM_CALLS}"),
            *("-o", str(folder / "trace"), *command),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class TracedProcess:
    """A program as strace saw it: its first arguments, and the calls of all its threads."""

    program: str
    calls: list[str]


def traced_processes(folder: Path) -> list[TracedProcess]:
    """Join the files of `strace -ff`, one for each thread, to programs.

    A thread or a fork belongs to the program it came from until it executes another one.
    """
    parents: dict[str, str] = {}
    lines = {path.suffix[1:]: path.read_text().splitlines() for path in folder.glob("trace.*")}
    for pid, calls in lines.items():
        for call in calls:
            if made := re.match(r"(?:clone3?|v?fork)\(.*= (\d+)$", call):
                parents[made[1]] = pid
    programs: dict[str, TracedProcess] = {}

    def program_of(pid: str) -> str:
        executed = [c for c in lines.get(pid, []) if c.startswith("execve(") and c.endswith("= 0")]
        if executed:
            programs.setdefault(pid, TracedProcess(executed[-1], []))
            return pid
        return program_of(parents[pid]) if pid in parents else ""

    for pid, calls in lines.items():
        if root := program_of(pid):
            programs[root].calls += calls
    return list(programs.values())
