"""Kits as a coordinator makes them, and certificates that one cannot have from FLARE's provisioner
today: expired, of another CA, of another name."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

import fedfms
from fedfms.flare.challenge import ask_server
from fedfms.flare.measure_link import measure
from fedfms.flare.simulate import PROJECT, SERVER, provision
from fedfms.kits.about import KitAbout, read_about
from fedfms.kits.checksums import write_sums
from fedfms.preflight import site
from fedfms.preflight.items import Item
from fedfms.preflight.site import FlarePlaces

FEDFMS = [sys.executable, "-c", "from fedfms.cli import main; main()"]


def check_flare_side(places: FlarePlaces) -> list[Item]:
    """The checks with FLARE's own question, as `fedfms check-site` makes them."""
    return site.check_flare_side(places, ask_server, measure)


@dataclass(frozen=True)
class Made:
    """Kits of one project, and the CA key that made them."""

    folder: Path  # with one kit for each participant
    ca_key: rsa.RSAPrivateKey
    port: int

    def kit(self, name: str) -> Path:
        return self.folder / name

    def sign(self, kit: Path) -> None:
        write_sums(kit, self.ca_key)


def make_kits(folder: Path, sites: list[str], port: int) -> Made:
    """Real kits of FLARE's provisioner, with what fedfms adds: fedfms.json and signed checksums."""
    kits = provision(folder, sites, port)
    state = json.loads((folder / PROJECT / "state" / "cert.json").read_text())
    key = serialization.load_pem_private_key(state["root_pri_key"].encode(), password=None)
    made = Made(kits, key, port)
    resources = kits / SERVER / "local" / "resources.json"
    values = json.loads(resources.read_text())
    if all(component["id"] != "greeting" for component in values["components"]):
        greeting = {"id": "greeting", "path": "fedfms.flare.greeting.Greeting", "args": {}}
        values["components"].append(greeting)
        resources.write_text(json.dumps(values))
    for name in (SERVER, *sites):
        KitAbout(
            project=PROJECT,
            participant=name,
            type="server" if name == SERVER else "client",
            server_host=SERVER,
            server_port=port,
            version=fedfms.__version__,
            nvflare="2.9.0",
        ).write(kits / name)
        made.sign(kits / name)
    return made


def change_about(made: Made, kit: Path, **changes: Any) -> None:
    """A kit that says other things of itself, signed by the same CA."""
    replace(read_about(kit), **changes).write(kit)
    made.sign(kit)


def change_certificate(
    made: Made,
    kit: Path,
    *,
    name: str | None = None,
    days: tuple[float, float] = (-1, 100),
    ca_key: rsa.RSAPrivateKey | None = None,
) -> None:
    """Give a site's kit a certificate of another name, other dates or another CA; sign the kit.

    Args:
        days: when it becomes valid and when it ends, from now.
        ca_key: who signs the certificate; the kit's CA by default.
    """
    startup = kit / "startup"
    old = x509.load_pem_x509_certificate((startup / "client.crt").read_bytes())
    now = datetime.datetime.now(datetime.timezone.utc)
    attributes = [
        x509.NameAttribute(NameOID.COMMON_NAME, name)
        if name and attribute.oid == NameOID.COMMON_NAME
        else attribute
        for attribute in old.subject
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(ca_key or made.ca_key, hashes.SHA256())
    (startup / "client.crt").write_bytes(new.public_bytes(serialization.Encoding.PEM))
    made.sign(kit)


def copy_places(made: Made, site: str, folder: Path) -> FlarePlaces:
    places = FlarePlaces(
        kit=folder / "kit",
        policy=folder / "policy",
        workspace=folder / "workspace",
        exchange=folder / "exchange",
    )
    shutil.copytree(made.kit(site), places.kit)
    for path in (places.policy, places.workspace, places.exchange):
        path.mkdir()
    shutil.copy(places.kit / "local" / "authorization.json", places.policy)
    return places


def in_namespace(
    flags: str, commands: list[str], arguments: list[str], **environment: str
) -> list[Item]:
    if subprocess.run(["unshare", flags, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine makes no namespaces for this user")
    script = " && ".join([*commands, 'exec "$@"'])
    done = subprocess.run(
        ["unshare", flags, "sh", "-c", script, "sh", *FEDFMS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    items = [Item(**values) for values in json.loads(done.stdout)]
    assert done.returncode == int(any(item.status == "FAIL" for item in items)), done.stderr
    return items
