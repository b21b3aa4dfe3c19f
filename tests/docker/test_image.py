"""What is in the image and what is not; what the engine holds a site's containers to."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest
from containers import REPOSITORY, Project, docker
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hospitals import HOST, Hospitals, fedfms

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]

BILL = "opt/fedfms/sbom.cdx.json"
_KEPT = re.compile(
    rf"{BILL}|var/lib/dpkg/status|opt/venv/lib/python3[.][0-9]+/site-packages/[^/]+[.]dist-info/METADATA"
)
INSTALLERS = {"apt", "apt-get", "dpkg", "dpkg-deb", "pip", "pip3", "easy_install", "ensurepip"}
COMPILERS = {"gcc", "g++", "cc", "c++", "cpp", "as", "ld", "make", "clang", "tcc", "rustc", "go"}
OTHERS = {"perl", "su", "sudo", "passwd", "mount", "umount", "newgrp", "chsh"}


@dataclass
class Listing:
    """Every file of an image, from `docker export`; nothing of it runs."""

    modes: dict[str, int] = field(default_factory=dict)  # of plain files
    links: set[str] = field(default_factory=set)
    kept: dict[str, bytes] = field(default_factory=dict)

    @property
    def programs(self) -> set[str]:
        """Names of all files that can be run, and of links that may lead to one."""
        runnable = {path for path, mode in self.modes.items() if mode & 0o111}
        return {PurePosixPath(path).name for path in runnable | self.links}


@pytest.fixture(scope="module")
def listing(image: str) -> Listing:
    container = docker("create", "--network", "none", image, "none").strip()
    found = Listing()
    try:
        process = subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE)
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() or member.islnk():
                    found.modes[member.name] = member.mode
                elif member.issym():
                    found.links.add(member.name)
                # not what setuptools carries of others inside itself
                if _KEPT.fullmatch(member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    found.kept[member.name] = file.read()
        assert process.wait() == 0
    finally:
        docker("rm", "-v", container)
    return found


def test_no_program_of_the_image_installs_compiles_or_becomes_root(listing: Listing) -> None:
    assert len(listing.modes) > 10_000 and "python3.11" in listing.programs
    assert listing.programs & (INSTALLERS | COMPILERS | OTHERS) == set()
    special = stat.S_ISUID | stat.S_ISGID
    assert {path for path, mode in listing.modes.items() if mode & special} == set()
    assert not [path for path in listing.modes if path.startswith(("etc/apt", "var/lib/apt"))]


def test_what_was_taken_away_is_in_no_layer(image: str) -> None:
    """The first layer is the whole system as it is, and no layer of the base image is under it."""
    base = docker(
        "image", "inspect", "-f", "{{json .RootFS.Layers}}", "fedfms-base:local", check=False
    )
    own = json.loads(docker("image", "inspect", "-f", "{{json .RootFS.Layers}}", image))
    if not base.strip():
        pytest.skip("the base image is not here")
    assert set(json.loads(base)) & set(own) == set()


def test_the_bill_names_what_the_image_holds(listing: Listing) -> None:
    text = listing.kept[BILL].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    named = {(one["name"], one["version"]) for one in json.loads(text)["components"]}

    def fields(content: bytes, *names: str) -> tuple[str, ...]:
        head = content.decode()
        return tuple(re.search(rf"^{name}: (\S+)", head, re.MULTILINE)[1] for name in names)  # type: ignore[index]

    status = listing.kept["var/lib/dpkg/status"].strip().split(b"\n\n")
    there = {fields(paragraph, "Package", "Version") for paragraph in status}
    assert not {name for name, _ in there} & {"apt", "dpkg", "perl-base", "passwd"}
    for path, content in listing.kept.items():
        if path.endswith("METADATA"):
            name, version = fields(content, "Name", "Version")
            there.add((re.sub(r"[-_.]+", "-", name).lower(), version))
    assert {"libc6", "torch", "nvflare", "fedfms-kit"} <= {name for name, _ in there}
    assert there - named == set()
    assert {name for name, _ in named - there} <= {"python"}  # built from source in Docker's own


# --------------------------------------------------------------------------- what the engine holds


@pytest.fixture(scope="module")
def hospitals(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    folder = tmp_path_factory.mktemp("limits")
    found = Hospitals(folder, image, ["clinic"], name="fedfms-limits")
    found.provision("--image", image)
    data = folder / "images"
    data.mkdir()
    found.install(HOST, SERVER_CPUS="1.5", SERVER_PUBLISH=found.port)
    found.install(
        "clinic", SITE_DATA=data, TRAINER_CPUS="1.5", FLARE_CPUS="0.5", SITE_BRIDGE="fedfms-t0"
    )
    yield found
    found.down()


@pytest.fixture(scope="module")
def clinic(hospitals: Hospitals) -> Project:
    return hospitals.projects["clinic"]


def test_the_engine_shows_the_limits(hospitals: Hospitals, clinic: Project) -> None:
    server = hospitals.projects[HOST]
    for project in (clinic, server):
        project.run("create")
    seen = {**clinic.containers(), **server.containers()}
    cpus = {"clinic-trainer": 1.5, "clinic-flare": 0.5, "server": 1.5}
    memory = {"clinic-trainer": 16, "clinic-flare": 4, "server": 8}
    assert set(seen) == set(cpus)
    for service, container in seen.items():
        host = container["HostConfig"]
        assert host["Memory"] == host["MemorySwap"] == memory[service] << 30, service  # no swap
        assert host["NanoCpus"] == cpus[service] * 1e9, service
        assert host["ReadonlyRootfs"] is True and host["CapDrop"] == ["ALL"], service
        for options in host["Tmpfs"].values():
            assert {"noexec", "nosuid", "nodev"} <= set(options.split(",")), service


def test_nothing_that_a_container_writes_into_memory_can_be_run(clinic: Project) -> None:
    script = """
        for folder in /exchange /tmp /home/fedfms; do
          cp /bin/true $folder/program && chmod +x $folder/program
          $folder/program && echo "$folder/program ran"
          awk -v at=$folder '$5 == at { print $5, $6 }' /proc/self/mountinfo
        done"""
    done = clinic.run(
        *("run", "--rm", "--no-deps", "--entrypoint", "sh", "clinic-trainer", "-c", script),
        check=False,
    )
    assert "ran" not in done.stdout
    assert done.stdout.count("Permission denied") == 3, done.stdout
    for folder in ("/exchange", "/tmp", "/home/fedfms"):
        (options,) = re.findall(rf"^{folder} (\S+)$", done.stdout, re.MULTILINE)
        assert {"noexec", "nosuid", "nodev"} <= set(options.split(",")), done.stdout


def test_a_kit_names_the_image_and_carries_its_bill(
    hospitals: Hospitals, clinic: Project, listing: Listing
) -> None:
    bills = clinic.folder / "kit/bills"
    identity = docker("image", "inspect", "-f", "{{.Id}}", hospitals.image).strip()
    assert f"{identity}  {hospitals.image}" in (bills / "images.txt").read_text().splitlines()
    (of_image,) = set(bills.glob("*.cdx.json")) - {bills / "wheel.cdx.json"}
    assert of_image.read_bytes() == listing.kept[BILL]


@pytest.fixture
def little(engine: None, tmp_path: Path) -> Iterator[str]:
    """An image of one file, so that packing it takes no time."""
    name = "fedfms-little:1"
    (tmp_path / "file").write_text("words")
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.add(tmp_path / "file", "file")
    docker("import", tmp_path / "image.tar", name)
    yield name
    docker("rmi", "-f", name, check=False)


def test_an_archive_is_signed_and_refused_after_one_changed_bit(
    hospitals: Hospitals, little: str, tmp_path: Path
) -> None:
    packed = tmp_path / "usb"
    said = fedfms("archive", packed, "--image", little, "--sign", hospitals.output).stdout
    (authority,) = re.findall(r"SHA256:[0-9A-F:]{95}", said)
    command = ["sh", packed / "load.sh", authority]

    def load() -> subprocess.CompletedProcess[str]:
        docker("rmi", "-f", little, check=False)
        return subprocess.run(command, capture_output=True, text=True)

    done = load()
    assert done.returncode == 0, done.stderr
    assert "its signature is good" in done.stdout and f"Loaded image: {little}" in done.stdout
    for path in sorted(path for path in packed.rglob("*") if path.is_file()):
        right = path.read_bytes()
        if (
            path.name == "load.sh"
        ):  # who changed it decides what it checks; README.md has it by hand
            continue
        middle = len(right) // 2
        path.write_bytes(right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :])
        done = load()
        assert done.returncode == 65, (path, done.stdout)
        assert "nothing was loaded" in done.stderr
        assert docker("images", "-q", little) == ""
        path.write_bytes(right)
    assert load().returncode == 0


# ----------------------------------------------------------------------------------------- egress

OUTSIDE = "10.97.0.2"  # a machine beyond this one, in a network namespace
KNOCK = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 3).close()
        print(port, "reached")
    except OSError as error:
        print(port, type(error).__name__)
"""
LISTEN = """
import socket, time
for port in (8002, 9000):
    server = socket.create_server(("", port), backlog=16)
    globals()[f"server_{port}"] = server
print("listening", flush=True)
time.sleep(300)
"""


@pytest.fixture
def outside() -> Iterator[str]:
    """A machine that this one leads to, with two open ports."""
    commands = f"""
        ip netns add fedfms-out
        ip link add fedfms-o0 type veth peer name fedfms-o1
        ip link set fedfms-o1 netns fedfms-out
        ip addr add 10.97.0.1/24 dev fedfms-o0
        ip link set fedfms-o0 up
        ip netns exec fedfms-out ip addr add {OUTSIDE}/24 dev fedfms-o1
        ip netns exec fedfms-out ip link set fedfms-o1 up
        ip netns exec fedfms-out ip route add default via 10.97.0.1"""
    subprocess.run(["sh", "-ec", commands], check=True)
    command = ["ip", "netns", "exec", "fedfms-out", sys.executable, "-c", LISTEN]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert listener.stdout is not None and listener.stdout.readline() == b"listening\n"
        yield OUTSIDE
    finally:
        listener.kill()
        listener.wait()
        subprocess.run(["ip", "link", "del", "fedfms-o0"], check=False)
        subprocess.run(["ip", "netns", "del", "fedfms-out"], check=False)


def documented_rules(bridge: str, server: str) -> list[str]:
    """The commands of docs/site.md, for this bridge and this server."""
    text = (REPOSITORY / "docs/site.md").read_text()
    rules = re.findall(r"^(?:sudo )?(iptables .*)$", text, re.MULTILINE)
    return [rule.replace("fedfms0", bridge).replace("192.0.2.10", server) for rule in rules]


def test_the_documented_rule_lets_the_flare_container_reach_the_server_alone(
    clinic: Project, outside: str
) -> None:
    def knock() -> list[str]:
        done = clinic.run(
            *("run", "--rm", "--no-deps", "--entrypoint", "python", "clinic-flare"),
            *("-c", KNOCK, outside, 8002, 9000),
        )
        return re.findall(r"^\d+ \w+$", done.stdout, re.MULTILINE)

    assert knock() == ["8002 reached", "9000 reached"]
    rules = documented_rules("fedfms-t0", outside)
    assert len(rules) >= 3
    try:
        for rule in rules:
            subprocess.run(["sh", "-ec", rule], check=True)
        first, second = knock()
        assert first == "8002 reached"
        assert second.startswith("9000 ") and "reached" not in second
    finally:
        for rule in rules:
            undo = re.sub(r" -I (\S+)", r" -D \1", rule)
            subprocess.run(["sh", "-c", undo], check=False)
    assert knock() == ["8002 reached", "9000 reached"]
