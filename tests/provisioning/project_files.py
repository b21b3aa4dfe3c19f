"""Project files for tests, and what a run left."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509

from fedfms.provisioning.provision import Provisioned

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = REPOSITORY / "provisioning" / "project.yml"
NAME, SERVER, COORDINATOR = "fedfms", "server.example.org", "coordinator@example.org"
SITES = ("site-1", "site-2", "site-3", "site-4")


@dataclass(frozen=True)
class Made:
    """A project file and what was made of it."""

    project: Path
    output: Path
    result: Provisioned

    @property
    def home(self) -> Path:
        return self.output / NAME

    @property
    def state(self) -> Path:
        return self.home / "state" / "cert.json"

    def zip(self, name: str) -> Path:
        return self.output / "kits" / f"{name}.zip"

    def kit(self, name: str) -> Path:
        return self.home / "kits" / name / "kit"

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        write_project(self.project, change, self.project)


def write_project(
    path: Path, change: Callable[[dict[str, Any]], object] | None = None, start: Path = PROJECT
) -> Path:
    """A project.yml with one thing changed."""
    content = yaml.safe_load(start.read_text())
    if change is not None:
        change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(e for e in content["participants"] if e["name"] == name)


def site(name: str, **more: object) -> dict[str, Any]:
    return {"name": name, "type": "client", "org": name.replace("-", "_"), **more}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def certificate(kit: Path) -> x509.Certificate:
    path = next(kit.glob("startup/*.crt"))
    return x509.load_pem_x509_certificate(path.read_bytes())


def root(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "startup" / "rootCA.pem").read_bytes())


def zip_names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())
