"""Bills of material in CycloneDX 1.6: what the wheel asks for, and what an image holds.

    python tools/bill.py wheel               writes src/fedfms/sbom.cdx.json, from the locks
    python tools/bill.py image --root DIR …  of an image's Debian and Python packages (Dockerfile)

Each is checked against CycloneDX's own schema before it is written. The same packages give the
same bytes: a bill has no time, and its serial number follows from what it says. Not in it: what a
package holds of others without saying so, such as a library inside a wheel.

It needs requirements-build.lock (requirements-dev.lock has the same), and nothing of fedfms.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.exceptions import InvalidLicenseExpressionException
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parents[1]
WHEEL_BILL = Path("src/fedfms/sbom.cdx.json")
# torch as PyPI has it, with what it brings for CUDA; a build for processors has the same version
LOCKS = ("requirements.lock", "docker/torch-cuda.lock")
OURS = ("fedfms-kit", "fedfms-lab")
_SERIALS = uuid.UUID("c1a6ba34-63c5-4b5c-9b39-6f1f3e3b8f0a")


# ------------------------------------------------------------------------------------- the wheel


def wheel_bill(root: Path) -> str:
    """The bill of the wheel: every package that the locks allow, for any Python and machine.

    Args:
        root: the repository.

    Returns:
        JSON text. A package of which Pythons or machines have different versions is in it once for
        each; the property `fedfms:marker` says where which counts (PEP 508).
    """
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    licence = _found(r'^license = "([^"]+)"$', project, "a license in pyproject.toml")
    needed = _found(r"^dependencies = \[\n(.*?)^\]", project, "dependencies in pyproject.toml")
    ours = _our_component("fedfms-kit", version_of(root), [licence], ComponentType.LIBRARY)
    bill = Bom(components=[])
    bill.metadata.component = ours
    for lock in LOCKS:
        for name, version, marker in locked(root / lock):
            properties = [Property(name="fedfms:marker", value=marker)] if marker else []
            bill.components.add(_python_component(name, version, (), properties))
    direct = {canonical(name) for name in re.findall(r'^ *"([\w.-]+)', needed, re.MULTILINE)}
    bill.register_dependency(ours, [c for c in bill.components if c.name in direct])
    return to_json(bill)


def locked(lock: Path) -> Iterator[tuple[str, str, str]]:
    """Name, version (without the part that names a build) and marker of each line of a lock."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not line or line[0] in " #":
            continue
        pin, _, marker = line.rstrip("\\ ").partition(";")
        name, separator, version = pin.strip().partition("==")
        if not separator:
            raise SystemExit(f"bill: {lock.name} holds a line that pins nothing: {line}")
        yield canonical(name), version.partition("+")[0], marker.strip()


def version_of(root: Path) -> str:
    """The version of fedfms."""
    text = (root / "src/fedfms/__init__.py").read_text(encoding="utf-8")
    return _found(r'^__version__ = "([^"]+)"$', text, "a version in src/fedfms/__init__.py")


# ------------------------------------------------------------------------------------- an image


def image_bill(root: Path, packages: Iterable[Path]) -> str:
    """The bill of an image: its Debian packages, its Python, and the Python packages in it.

    Args:
        root: a folder with `var/lib/dpkg/status` and `etc/os-release` of the image.
        packages: folders of Python packages (site-packages); fedfms-kit is in one of them.

    Returns:
        JSON text.
    """
    system = os_release(root / "etc/os-release")
    stanzas = list(debian_packages(root / "var/lib/dpkg/status"))
    debian = {stanza["Package"]: _debian_component(stanza, system) for stanza in stanzas}
    found = {
        canonical(d.metadata["Name"]): d for d in distributions(path=[str(p) for p in packages])
    }
    if "fedfms-kit" not in found:
        raise SystemExit("bill: fedfms-kit is in none of the folders of packages")
    python = {name: _of_distribution(name, one) for name, one in found.items()}

    version = found["fedfms-kit"].version
    image = _our_component("fedfms", version, ["Apache-2.0"], ComponentType.CONTAINER)
    bill = Bom(components=[*debian.values(), *python.values()])
    bill.metadata.component = image
    if not any(re.fullmatch(r"python3(\.\d+)?", name) for name in debian):
        bill.components.add(  # built from source, as in Docker's own image python
            Component(
                name="python",
                version=platform.python_version(),
                type=ComponentType.PLATFORM,
                bom_ref="python",
                purl=PackageURL("generic", name="python", version=platform.python_version()),
            )
        )
    for name, one in found.items():
        needs = {canonical(r) for r in _required(one.requires or [])} - {name}
        bill.register_dependency(python[name], [python[n] for n in sorted(needs & set(python))])
    for stanza in stanzas:
        said = ",".join(stanza.get(field, "") for field in ("Pre-Depends", "Depends"))
        named = {
            word.strip().partition(" ")[0].partition(":")[0] for word in re.split("[,|]", said)
        }
        needs = named & set(debian) - {stanza["Package"]}
        bill.register_dependency(debian[stanza["Package"]], [debian[n] for n in sorted(needs)])
    bill.register_dependency(image, bill.components)
    return to_json(bill)


def debian_packages(status: Path) -> Iterator[Mapping[str, str]]:
    """The installed packages of dpkg's status file, each as field -> first line of its value."""
    for paragraph in status.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): *(.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            yield fields


def os_release(path: Path) -> dict[str, str]:
    """`ID`, `VERSION_ID` and the rest of /etc/os-release."""
    pairs = re.findall(r'^(\w+)="?(.*?)"?$', path.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(pairs)


def _debian_component(stanza: Mapping[str, str], system: Mapping[str, str]) -> Component:
    name, version = stanza["Package"], stanza["Version"]
    qualifiers = {
        "arch": stanza["Architecture"],
        "distro": f"{system['ID']}-{system['VERSION_ID']}",
    }
    source = re.fullmatch(r"(\S+)(?: \((.+)\))?", stanza.get("Source", ""))
    if source is not None:  # advisories name the source package
        qualifiers["upstream"] = source[1] + (f"@{source[2]}" if source[2] else "")
    purl = PackageURL("deb", system["ID"], name, version, qualifiers)
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"deb:{name}:{stanza['Architecture']}",
        purl=purl,
    )


def _of_distribution(name: str, one: Distribution) -> Component:
    said = one.metadata
    expression = said.get("License-Expression")
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in said.get_all("Classifier") or []
        if text.startswith("License :: ") and not text.endswith(":: OSI Approved")
    ]
    licences = [expression] if expression else classifiers
    if name in OURS:
        return _our_component(name, one.version, licences, ComponentType.LIBRARY)
    return _python_component(name, one.version, licences)


def _required(requirements: Iterable[str]) -> Iterator[str]:
    """Names of what a distribution needs; not what only an extra of it does."""
    for text in requirements:
        name = re.match(r"[\w.-]+", text)
        if name is not None and "extra ==" not in text:
            yield name[0]


# ---------------------------------------------------------------------------------------- of both


def _python_component(
    name: str, version: str, licences: Iterable[str], properties: Iterable[Property] = ()
) -> Component:
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"pypi:{name}@{version}",
        purl=PackageURL("pypi", name=name, version=version),
        licenses=_licences(licences),
        properties=properties,
    )


def _our_component(
    name: str, version: str, licences: Iterable[str], kind: ComponentType
) -> Component:
    # generic: nobody owns our name on PyPI, so nobody is to look for it there
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=f"{name}@{version}",
        purl=PackageURL("generic", name=name, version=version),
        licenses=_licences(licences),
    )


def _licences(texts: Iterable[str]) -> list[License]:
    """Expressions of SPDX as such (one has to stand alone), anything else by its name."""
    found: list[License] = []
    for text in texts:
        try:
            found.append(LicenseFactory().make_with_expression(text))
        except InvalidLicenseExpressionException:
            found.append(DisjunctiveLicense(name=text))
    return found if len(found) == 1 else [DisjunctiveLicense(name=text) for text in texts]


def canonical(name: str) -> str:
    """A package's name as PyPI writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def to_json(bill: Bom) -> str:
    """The bill as JSON, the same for the same content, valid by CycloneDX's schema."""
    said = json.loads(JsonV1Dot6(bill).output_as_string())
    del said["metadata"]["timestamp"], said["serialNumber"]
    content = json.dumps(said, sort_keys=True)
    said["serialNumber"] = f"urn:uuid:{uuid.uuid5(_SERIALS, content)}"
    text = json.dumps(said, indent=1, sort_keys=True) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise SystemExit(f"bill: CycloneDX's schema refuses it: {wrong}")
    return text


def _found(pattern: str, text: str, what: str) -> str:
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"bill: there is no {what}")
    return found[1]


def main(arguments: list[str]) -> None:
    """Write one bill."""
    parser = argparse.ArgumentParser(description="Bills of material in CycloneDX 1.6.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    wheel = kinds.add_parser("wheel", help="what the wheel asks for, from the locks")
    wheel.add_argument("--output", type=Path, default=ROOT / WHEEL_BILL)
    image = kinds.add_parser("image", help="what an image holds")
    image.add_argument("--root", type=Path, required=True, help="has var/lib/dpkg, etc/os-release")
    image.add_argument("--packages", type=Path, action="append", required=True)
    image.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    text = wheel_bill(ROOT) if chosen.kind == "wheel" else image_bill(chosen.root, chosen.packages)
    chosen.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
