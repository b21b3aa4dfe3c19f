"""An archive for a site without internet; the real engine packs one in tests/docker."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from project_files import Made, hashes

from fedfms.errors import ConfigError, FederationError
from fedfms.provisioning.archive import archive

IMAGE = b"the image" * 500_000

# A program called docker: knows one image, saves it, and writes down what it is told to load.
DOCKER = """#!/bin/sh
case "$1 $2" in
  "info "*) [ -z "$NO_ENGINE" ] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }
    echo 26.1 ;;
  "image inspect") [ "$3" = registry/fedfms:0.1.0 ] && echo '[{}]' || { echo '[]'; exit 1; } ;;
  "save "*) [ -z "$NO_SPACE" ] || { echo "no space left" >&2; exit 1; }
    cat "$(dirname "$0")/image" ;;
  "load -i") echo "$3" >> "$(dirname "$0")/loaded" ;;
  *) exit 2 ;;
esac
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "image").write_bytes(IMAGE)
    (folder / "docker").write_text(DOCKER)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("NO_ENGINE", "NO_SPACE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def packed(engine: Path, provisioned: Made, tmp_path: Path) -> Path:
    (tmp_path / "sam.pth").write_bytes(b"weights")
    return archive(
        tmp_path / "usb",
        ["registry/fedfms:0.1.0"],
        [provisioned.zip("site-1")],
        [tmp_path / "sam.pth"],
    )


def load(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(folder / "load.sh")], cwd="/", capture_output=True, text=True, check=False
    )


def test_an_archive_holds_everything_and_its_checksums(packed: Path, provisioned: Made) -> None:
    assert set(hashes(packed)) == {
        *("README.md", "load.sh", "SHA256SUMS", "images/registry_fedfms-0.1.0.tar.gz"),
        *("kits/site-1.zip", "checkpoints/sam.pth"),
    }
    image = packed / "images" / "registry_fedfms-0.1.0.tar.gz"
    assert gzip.decompress(image.read_bytes()) == IMAGE
    assert (packed / "kits/site-1.zip").read_bytes() == provisioned.zip("site-1").read_bytes()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=packed, check=True)
    listed = {line.split("  ")[1] for line in (packed / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(hashes(packed)) - {"SHA256SUMS"}
    assert stat.S_IMODE(packed.stat().st_mode) == 0o700  # a kit has a private key
    assert "registry/fedfms:0.1.0" in (packed / "README.md").read_text()


def test_the_load_script_loads_the_image_and_says_what_next(packed: Path, engine: Path) -> None:
    done = load(packed)
    assert done.returncode == 0, done.stderr
    assert (engine / "loaded").read_text() == "images/registry_fedfms-0.1.0.tar.gz\n"
    assert "unzip kits/site-1.zip" in done.stdout
    assert "checkpoints/sam.pth" in done.stdout


@pytest.mark.parametrize("name", ["kits/site-1.zip", "images/registry_fedfms-0.1.0.tar.gz"])
def test_the_load_script_loads_nothing_of_a_damaged_archive(
    packed: Path, engine: Path, name: str
) -> None:
    with (packed / name).open("ab") as file:
        file.write(b"x")
    done = load(packed)
    assert done.returncode == 65
    assert "copy it again" in done.stderr
    assert not (engine / "loaded").exists()


def test_the_load_script_needs_an_engine(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_ENGINE", "1")
    done = load(packed)
    assert done.returncode == 69
    assert "Docker does not answer" in done.stderr


def test_what_is_missing_is_named_and_nothing_is_left(
    engine: Path, provisioned: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usb, images = tmp_path / "usb", ["registry/fedfms:0.1.0"]
    kit = provisioned.zip("site-1")
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "again").mkdir()
    shutil.copy(kit, tmp_path / "again")
    for kits, fix in (
        ([tmp_path / "no.zip"], "check the path"),
        ([tmp_path / "text.zip"], "fedfms provision"),
        ([kit, tmp_path / "again" / kit.name], "name each once"),
    ):
        with pytest.raises(ConfigError, match=fix):
            archive(usb, images, kits)
    with pytest.raises(FederationError, match="docker images"):
        archive(usb, ["other:1"])
    monkeypatch.setenv("NO_SPACE", "1")
    with pytest.raises(FederationError, match="no space left"):
        archive(usb, images)
    monkeypatch.setenv("NO_ENGINE", "1")
    with pytest.raises(FederationError, match="Cannot connect to the Docker daemon") as caught:
        archive(usb, images)
    assert "start it" in caught.value.fix
    monkeypatch.setenv("PATH", str(tmp_path / "again"))
    with pytest.raises(FederationError, match="no docker command"):
        archive(usb, images)
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "text.zip", "again"}
    usb.mkdir()
    with pytest.raises(ConfigError, match="new folder"):
        archive(usb, images)
