"""Bills of material: what is in the wheel and in an image, by CycloneDX's own schema."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedfms

ROOT = Path(__file__).resolve().parents[2]
BILL = ROOT / "src/fedfms/sbom.cdx.json"


def valid(text: str) -> bool:
    """Whether CycloneDX's own validator accepts it as version 1.6."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


@pytest.fixture(scope="module")
def bill() -> ModuleType:
    """tools/bill.py, which is part of no package."""
    spec = importlib.util.spec_from_file_location("bill", ROOT / "tools/bill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def components(text: str) -> dict[str, dict[str, Any]]:
    """By purl; two of one purl are an error."""
    found = json.loads(text)["components"]
    assert len({one["purl"] for one in found}) == len(found)
    return {one["purl"]: one for one in found}


# ------------------------------------------------------------------------------------- the wheel


def test_the_wheels_bill_is_valid_and_a_broken_one_is_not() -> None:
    text = BILL.read_text()
    assert valid(text)
    said = json.loads(text)
    assert (said["bomFormat"], said["specVersion"]) == ("CycloneDX", "1.6")
    assert said["metadata"]["component"]["version"] == fedfms.__version__
    for change in ({"bomFormat": "SPDX"}, {"components": [{"name": "no type"}]}, {"more": 1}):
        assert not valid(json.dumps({**said, **change}))


def test_the_wheels_bill_is_made_of_the_locks_as_they_are(bill: ModuleType, tmp_path: Path) -> None:
    """Else: tools/lock.sh, or .venv/bin/python tools/bill.py wheel."""
    bill.main(["wheel", "--output", str(tmp_path / "bill.json")])
    assert (tmp_path / "bill.json").read_bytes() == BILL.read_bytes()


def pins(lock: Path) -> dict[str, Requirement]:
    """Of a lock, by purl, read by the library that pip uses."""
    text = re.sub(r"\\\n", " ", lock.read_text())
    lines = [re.sub(r" --hash=\S+", "", line) for line in text.splitlines() if line[:1] not in "# "]
    found = {}
    for requirement in map(Requirement, filter(None, lines)):
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        found[f"pkg:pypi/{name}@{specifier.version}"] = requirement
    return found


def test_it_names_every_pinned_package_with_its_version_and_no_other() -> None:
    expected = pins(ROOT / "requirements.lock") | pins(ROOT / "docker/torch-cuda.lock")
    found = components(BILL.read_text())
    assert set(found) == set(expected) and len(found) > 100
    for purl, requirement in expected.items():
        said = [one["value"] for one in found[purl].get("properties", [])]
        want = [] if requirement.marker is None else [requirement.marker]
        assert [Requirement(f"a; {value}").marker for value in said] == want


def test_it_says_which_packages_are_asked_for_directly() -> None:
    said = json.loads(BILL.read_text())
    ours = said["metadata"]["component"]["bom-ref"]
    (direct,) = (one["dependsOn"] for one in said["dependencies"] if one["ref"] == ours)
    names = {ref.removeprefix("pypi:").partition("@")[0] for ref in direct}
    # the first key of pyproject.toml's list; Python 3.10 has no tomllib
    text = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [\n")[1].split("\n]")[0]
    wanted = [Requirement(line.strip().strip('",')) for line in text.splitlines()]
    assert names == {canonicalize_name(one.name) for one in wanted}


# ------------------------------------------------------------------------------------- an image

STATUS = """Package: libssl3
Status: install ok installed
Architecture: amd64
Source: openssl
Version: 3.0.20-1~deb12u2
Depends: libc6 (>= 2.34)
Description: words
 Package: none

Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+b1

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """What an image keeps of dpkg."""
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    return tmp_path


def test_an_images_bill_names_what_is_installed_and_nothing_else(
    bill: ModuleType, system: Path, tmp_path: Path
) -> None:
    folders = [path for path in sys.path if path.endswith("site-packages")]
    output = tmp_path / "image.json"
    options = [word for folder in folders for word in ("--packages", folder)]
    bill.main(["image", "--root", str(system), *options, "--output", str(output)])
    assert valid(output.read_text())
    found = components(output.read_text())

    debian = {purl for purl in found if purl.startswith("pkg:deb/")}
    assert debian == {
        "pkg:deb/debian/libssl3@3.0.20-1~deb12u2?arch=amd64&distro=debian-12&upstream=openssl",
        "pkg:deb/debian/libc6@2.36-9%2Bb1?arch=amd64&distro=debian-12&upstream=glibc%402.36-9",
    }
    installed = {canonicalize_name(one.metadata["Name"]) for one in distributions(path=folders)}
    python = {one["name"] for purl, one in found.items() if purl.startswith("pkg:pypi/")}
    assert python == installed - {"fedfms-kit", "fedfms-lab"} and "torch" in python
    ours = [purl for purl in found if "fedfms" in purl]
    assert all(purl.startswith("pkg:generic/") for purl in ours) and ours  # on no index
    version = "{}.{}.{}".format(*sys.version_info)
    assert f"pkg:generic/python@{version}" in found  # Debian has none here

    edges = {
        one["ref"]: one.get("dependsOn", [])
        for one in json.loads(output.read_text())["dependencies"]
    }
    assert edges["deb:libssl3:amd64"] == ["deb:libc6:amd64"]
    (pydicom,) = (ref for ref in edges if ref.startswith("pypi:highdicom@"))
    assert any(ref.startswith("pypi:pydicom@") for ref in edges[pydicom])


def test_the_same_packages_give_the_same_bytes(
    bill: ModuleType, system: Path, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"

    def install(name: str, version: str) -> None:
        about = packages / f"{name.replace('-', '_')}.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (about / "METADATA").write_text(text)

    for name, version in (("fedfms-kit", "0.1.0"), ("b", "2"), ("a", "1")):
        install(name, version)
    first, again = (bill.image_bill(system, [packages]) for _ in range(2))
    install("a", "9")
    other = bill.image_bill(system, [packages])
    assert first == again
    serials = {json.loads(text)["serialNumber"] for text in (first, again, other)}
    assert len(serials) == 2


def test_an_image_without_our_package_gets_no_bill(
    bill: ModuleType, system: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="fedfms-kit"):
        bill.image_bill(system, [tmp_path])
