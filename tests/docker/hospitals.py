"""A federation of clinical sites: each kit unzipped into its own folder and started alone.

Every participant has a compose project, a network and a folder of its own. The server is reached
through the one port that it publishes on this machine, as from another machine.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from containers import REPOSITORY, Project, docker

HOST = "fl.fedfms.test"  # in no DNS: sites are told the address
COORDINATOR, MEMBER = "coordinator@fedfms.test", "member@fedfms.test"
USER = 1000  # of the containers
EXAMPLES = REPOSITORY / "sites/examples/hippocampus"


def fedfms(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as a coordinator runs it on this machine."""
    command = Path(sys.executable).parent / "fedfms"
    done = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True)
    if check:
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class Hospitals:
    """The participants of one project on this machine."""

    folder: Path
    image: str
    sites: list[str]
    port: int = field(default_factory=free_port)
    name: str = "fedfms-kits"
    projects: dict[str, Project] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in [self.folder, *self.folder.parents][:3]:
            path.chmod(0o755)  # the containers' user is not the tests'
        # this machine's address as seen from a network that no participant is in
        self.outside = f"{self.name}-outside"
        self._remove_outside()
        docker("network", "create", self.outside)
        gateway = "{{(index .IPAM.Config 0).Gateway}}"
        self.address = docker("network", "inspect", "-f", gateway, self.outside).strip()
        self.output = self.folder / "output"
        self.project_file = self.folder / "project.yml"
        self.jobs = self.folder / "jobs"  # what the coordinator submits
        self.jobs.mkdir()

    def write_project(self) -> None:
        """project.yml, from the one in the repository."""
        project = yaml.safe_load((REPOSITORY / "provisioning/project.yml").read_text())
        project["name"] = self.name
        server = {"name": HOST, "type": "server", "org": "coordinator", "fed_learn_port": self.port}
        people = {COORDINATOR: "project_admin", MEMBER: "member"}
        project["participants"] = [
            server,
            *({"name": s, "type": "client", "org": s.replace("-", "_")} for s in self.sites),
            *({"name": p, "type": "admin", "org": "people", "role": r} for p, r in people.items()),
        ]
        self.project_file.write_text(yaml.safe_dump(project, sort_keys=False))

    def provision(self, *arguments: object) -> str:
        """Run `fedfms provision`; what it said."""
        self.write_project()
        done = fedfms("provision", self.project_file, "--output", self.output, *arguments)
        return done.stdout + done.stderr

    def unzip(self, participant: str) -> Path:
        """Unpack a participant's zip into its own folder, as its owner does."""
        folder = self.folder / "at" / participant
        shutil.rmtree(folder, ignore_errors=True)
        zip_file = self.output / "kits" / f"{participant}.zip"
        subprocess.run(["unzip", "-q", zip_file, "-d", folder.parent], check=True)
        # root unpacked it, but the containers' user is to own it
        subprocess.run(["chown", "-R", f"{USER}:{USER}", folder], check=True)
        return folder

    def install(self, participant: str, **settings: object) -> Project:
        """Unzip a kit and edit its .env; nothing is started."""
        folder = self.unzip(participant)
        chosen = {
            "FEDFMS_IMAGE": self.image,
            "SERVER_EXTRA_HOST": f"{HOST}:{self.address}",
            **settings,
        }
        with (folder / ".env").open("a") as env:
            env.writelines(f"{name}={value}\n" for name, value in chosen.items())
        project = Project(folder, f"{self.name}-{participant}".replace(".", "-"))
        project.down()
        self.projects[participant] = project
        return project

    def coordinate(
        self, *arguments: object, user: str = COORDINATOR, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A coordinator's command, in a container with the coordinator's kit."""
        done = subprocess.run(
            [*self.at_the_coordinators(user), self.image, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}"
        return done

    def at_the_coordinators(self, user: str, *options: str) -> list[str]:
        """`docker run` with an admin's kit, up to the image's name."""
        kit = self.folder / "at" / user / "kit"
        return [
            *("docker", "run", "--rm", "--init", "--user", f"{USER}:10001", *options),
            *("--network", self.outside, "--add-host", f"{HOST}:{self.address}"),
            *("-v", f"{kit}:/kit", "-v", f"{self.jobs}:/jobs", "-w", "/jobs"),
            *("-e", "FEDFMS_KIT=/kit"),
        ]

    def down(self) -> None:
        """Leave nothing."""
        for project in self.projects.values():
            project.down()
        self._remove_outside()

    def _remove_outside(self) -> None:
        """The network, and a command in it that was not waited for."""
        left = docker("ps", "-aq", "--filter", f"network={self.outside}").split()
        if left:
            docker("rm", "-f", "-v", *left)
        docker("network", "rm", self.outside, check=False)


def hospital_images(source: Path, destination: Path, first: int, count: int, prefix: str) -> Path:
    """Real volumes under names that nobody else uses, readable and not writable."""
    for kind in ("images", "labels"):
        (destination / kind).mkdir(parents=True)
        files = sorted((source / kind).glob("*.nii.gz"))[first : first + count]
        assert len(files) == count
        for number, path in enumerate(files):
            copy = destination / kind / f"{prefix}-{number:03d}.nii.gz"
            shutil.copyfile(path, copy)
            copy.chmod(0o444)
    return destination


def write_site(folder: Path, scanner: str, policy: Mapping[str, object]) -> None:
    """site.yml and privacy.json of a hospital that has volumes of this scanner."""
    settings = yaml.safe_load((EXAMPLES / scanner / "site.yml").read_text())
    (folder / "site.yml").write_text(yaml.safe_dump({**settings, "threads": 1, "min_cases": 1}))
    (folder / "policy").mkdir(exist_ok=True)
    few = {"min_training_patients": 1, "min_steps": 1}  # a hospital of these tests has
    (folder / "policy" / "privacy.json").write_text(json.dumps({**few, **policy}))
    for path in (folder / "site.yml", folder / "policy" / "privacy.json"):
        path.chmod(0o644)


def zips(output: Path) -> dict[str, bytes]:
    """All zips by name."""
    return {path.name: path.read_bytes() for path in (output / "kits").glob("*.zip")}


def members(zip_file: Path) -> dict[str, bytes]:
    """What a zip holds."""
    with zipfile.ZipFile(zip_file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def digest_tree(folder: Path) -> dict[str, tuple[bytes, int, float]]:
    """Content, mode and time of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            facts = path.stat()
            found[str(path.relative_to(folder))] = path.read_bytes(), facts.st_mode, facts.st_mtime
    return found
