"""An archive for a site without internet; the real engine packs one in tests/docker."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from project_files import Made, hashes, write_project

import fedfms
from fedfms.errors import ConfigError, FederationError
from fedfms.provisioning.archive import archive
from fedfms.provisioning.provision import provision

IMAGE = b"the image" * 500_000

BILL = '{"bomFormat": "CycloneDX"}'
ID = "sha256:" + 32 * "3f"

# A program called docker: knows one image and the file in it, saves it, and writes down what it is
# told to load.
DOCKER = """#!/bin/sh
case "$1 $2" in
  "info "*) [ -z "$NO_ENGINE" ] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }
    echo 26.1 ;;
  "image inspect") [ "$3" = registry/fedfms:0.1.0 ] || { echo '[]'; exit 1; }
    printf '[{"Id": "sha256:%s", "RepoDigests": ["registry/fedfms@sha256:%s"]}]' "$ID" "$OTHER" ;;
  "create "*) echo container ;;
  "cp container:/opt/fedfms/sbom.cdx.json")
    [ -z "$NO_BILL" ] && tar -cf - -C "$(dirname "$0")" sbom.cdx.json ;;
  "rm -v") [ "$3" = container ] ;;
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
    (folder / "sbom.cdx.json").write_text(BILL)
    (folder / "docker").write_text(DOCKER)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("ID", ID.removeprefix("sha256:"))
    monkeypatch.setenv("OTHER", 32 * "a1")
    for name in ("NO_ENGINE", "NO_SPACE", "NO_BILL"):
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


@pytest.fixture
def signed(engine: Path, provisioned: Made, tmp_path: Path) -> Path:
    kits = [provisioned.zip("site-1")]
    return archive(tmp_path / "signed", ["registry/fedfms:0.1.0"], kits, sign=provisioned.output)


def load(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(folder / "load.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_an_archive_holds_everything_and_its_checksums(packed: Path, provisioned: Made) -> None:
    assert set(hashes(packed)) == {
        *("README.md", "load.sh", "SHA256SUMS", "images/registry_fedfms-0.1.0.tar.gz"),
        *("kits/site-1.zip", "checkpoints/sam.pth", "bills/images.txt", "bills/wheel.cdx.json"),
        "bills/registry_fedfms-0.1.0.cdx.json",
    }
    image = packed / "images" / "registry_fedfms-0.1.0.tar.gz"
    assert gzip.decompress(image.read_bytes()) == IMAGE
    assert (packed / "kits/site-1.zip").read_bytes() == provisioned.zip("site-1").read_bytes()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=packed, check=True)
    listed = {line.split("  ")[1] for line in (packed / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(hashes(packed)) - {"SHA256SUMS"}
    assert stat.S_IMODE(packed.stat().st_mode) == 0o700  # a kit has a private key
    assert "registry/fedfms:0.1.0" in (packed / "README.md").read_text()


def test_an_archive_holds_bills_and_the_digests_of_its_images(packed: Path) -> None:
    bills = packed / "bills"
    assert (bills / "registry_fedfms-0.1.0.cdx.json").read_text() == BILL
    of_package = Path(fedfms.__file__).with_name("sbom.cdx.json")
    assert (bills / "wheel.cdx.json").read_bytes() == of_package.read_bytes()
    assert (bills / "images.txt").read_text().splitlines() == [
        f"{ID}  registry/fedfms:0.1.0",
        f"sha256:{32 * 'a1'}  registry/fedfms:0.1.0",
    ]


def test_an_image_from_before_there_were_bills_is_packed_without_one(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_BILL", "1")
    packed = archive(tmp_path / "old", ["registry/fedfms:0.1.0"])
    assert {path.name for path in (packed / "bills").iterdir()} == {"images.txt", "wheel.cdx.json"}
    assert load(packed).returncode == 0


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


@pytest.mark.parametrize("folder", ["images", "kits", "checkpoints", "bills"])
def test_the_load_script_loads_nothing_beside_what_the_checksums_do_not_name(
    packed: Path, engine: Path, folder: str
) -> None:
    (packed / folder / "added.tar.gz").write_bytes(b"not ours")
    done = load(packed)
    assert done.returncode == 65
    assert f"{folder}/added.tar.gz" in done.stderr and "fix:" in done.stderr
    assert not (engine / "loaded").exists()


def sum_of(folder: Path) -> str:
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()


def test_an_archive_tells_its_own_sum_and_knows_it_when_it_is_told(
    packed: Path, engine: Path
) -> None:
    said = load(packed).stdout
    assert sum_of(packed) in said and "compare this" in said
    assert "it is the one that you were told" in load(packed, sum_of(packed).upper()).stdout
    (engine / "loaded").unlink()
    done = load(packed, 64 * "0")
    assert done.returncode == 65 and "another than you were told" in done.stderr
    assert not (engine / "loaded").exists()


def trust(how: str, provisioned: Made) -> str:
    """What a site gives to the script."""
    if how == "fingerprint":
        return provisioned.result.fingerprint
    if how == "bare fingerprint":
        return provisioned.result.fingerprint.removeprefix("SHA256:").replace(":", "").lower()
    return str({"kit": provisioned.kit("site-1"), "site": provisioned.kit("site-1").parent}[how])


HOW = ["fingerprint", "bare fingerprint", "kit", "site"]


@pytest.mark.parametrize("how", HOW)
def test_a_signed_archive_loads_for_who_knows_the_signer(
    signed: Path, engine: Path, provisioned: Made, how: str
) -> None:
    done = load(signed, trust(how, provisioned))
    assert done.returncode == 0, done.stderr
    assert "its signature is good" in done.stdout
    assert (engine / "loaded").is_file()


def test_a_signed_archive_does_not_load_for_who_knows_nobody(signed: Path, engine: Path) -> None:
    done = load(signed)
    assert done.returncode == 64
    assert "load.sh SHA256:" in done.stderr
    assert not (engine / "loaded").exists()
    assert load(signed, sum_of(signed)).returncode == 0  # who was told the sum needs no signer


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name",
    ["SHA256SUMS", "SHA256SUMS.sig", "rootCA.pem", "kits/site-1.zip", "bills/wheel.cdx.json"],
)
def test_one_changed_bit_is_refused(
    signed: Path, engine: Path, provisioned: Made, how: str, name: str
) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    done = load(signed, trust(how, provisioned))
    assert done.returncode == 65, done.stdout
    assert "nothing was loaded" in done.stderr and "fix:" in done.stderr
    assert not (engine / "loaded").exists()


def test_an_archive_that_another_signed_is_refused(
    signed: Path, engine: Path, provisioned: Made, tmp_path: Path
) -> None:
    """Whole and consistent, by somebody with a certificate authority of his own."""
    project = write_project(tmp_path / "project.yml")
    provision(project, tmp_path / "theirs")
    kits = [provisioned.zip("site-1")]
    forged = archive(tmp_path / "forged", ["registry/fedfms:0.1.0"], kits, sign=tmp_path / "theirs")

    def refused() -> None:
        for how in HOW:
            assert load(forged, trust(how, provisioned)).returncode == 65
        assert not (engine / "loaded").exists()

    refused()
    # with the real certificate in the place of his
    shutil.copy(signed / "rootCA.pem", forged / "rootCA.pem")
    sums = [
        line for line in (forged / "SHA256SUMS").read_text().splitlines() if "rootCA" not in line
    ]
    (forged / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums))
    refused()
    # and with no signature at all
    (forged / "SHA256SUMS.sig").unlink()
    (forged / "rootCA.pem").unlink()
    refused()


def test_nobody_signs_with_what_is_no_authority(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedfms provision") as caught:
        archive(tmp_path / "usb", ["registry/fedfms:0.1.0"], sign=tmp_path)
    assert caught.value.code == "no-ca"
    assert not (tmp_path / "usb").exists()


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
