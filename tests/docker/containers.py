"""Docker Compose as the tests use it: real containers, looked at from outside."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def docker(
    *arguments: object,
    check: bool = True,
    seconds: float = 600,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a docker command; its words, when it fails."""
    done = subprocess.run(
        ["docker", *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if check:
        assert done.returncode == 0, f"docker {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Project:
    """One compose project: a folder with its files, and a name of its own."""

    folder: Path
    name: str
    environment: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def command(self, *arguments: object) -> list[str]:
        """The command line of `docker compose` for this project."""
        chosen = [part for file in self.files for part in ("-f", file)]
        return ["docker", "compose", "-p", self.name, *chosen, *map(str, arguments)]

    def run(
        self, *arguments: object, check: bool = True, seconds: float = 600, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; standard error goes into standard output."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env={**os.environ, **self.environment},
            input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout[-6000:]}"
        return done

    def start(self, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
        """Start it and go on; what it says goes into `log`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def down(self) -> None:
        """Leave nothing: containers, networks, volumes."""
        self.run("--profile", "*", "down", "-v", "--remove-orphans", "-t", "5", seconds=180)

    def containers(self) -> dict[str, dict[str, Any]]:
        """`docker inspect` of all its containers, by service."""
        of_it = ("--filter", f"label=com.docker.compose.project={self.name}")
        ids = self._docker("ps", "-aq", *of_it).split()
        found = json.loads(self._docker("inspect", *ids)) if ids else []
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def left(self) -> list[str]:
        """What the engine still holds of it."""
        of_it = ("--filter", f"label=com.docker.compose.project={self.name}")
        return [
            *self._docker("ps", "-aq", *of_it).split(),
            *self._docker("volume", "ls", "-q", *of_it).split(),
            *self._docker("network", "ls", "-q", *of_it).split(),
        ]

    def volume(self, name: str) -> Path:
        """Where a named volume lies on this machine."""
        return Path(
            self._docker(
                "volume", "inspect", "-f", "{{.Mountpoint}}", f"{self.name}_{name}"
            ).strip()
        )

    def logs(self, service: str) -> str:
        """What a service's container wrote to its output."""
        return self.run("logs", "--no-log-prefix", service).stdout

    def _docker(self, *arguments: object) -> str:
        return docker(*arguments, environment=self.environment)  # DOCKER_HOST may be in it


def checkout(destination: Path) -> Path:
    """A clone of this repository, with what is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_file():  # not deleted in the working tree
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)
    return destination


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that is to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def files_that_name(words: Iterable[str], *places: Path) -> dict[str, list[str]]:
    """Which files below these places hold one of the words; zip archives are looked into.

    Returns:
        path -> the words found in its name or its bytes.
    """
    wanted = {word: word.encode() for word in words}
    found: dict[str, list[str]] = {}
    for name, content in _contents(places):
        hits = [word for word, raw in wanted.items() if word in name or raw in content]
        if hits:
            found[name] = hits
    return found


def _contents(places: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for place in places:
        assert place.exists(), f"{place} is not there to be searched"
        for path in [place, *place.rglob("*")]:
            if path.is_file() and not path.is_symlink():
                yield from _of_file(str(path), path.read_bytes())


def _of_file(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, content
    if content.startswith(b"PK"):
        with (
            contextlib.suppress(zipfile.BadZipFile),
            zipfile.ZipFile(io.BytesIO(content)) as archive,
        ):
            for member in archive.infolist():
                if not member.is_dir():
                    yield from _of_file(f"{name}!{member.filename}", archive.read(member))
