"""FLARE's `nvflare cert`: a site makes its key and a request, the coordinator signs the request.

FLARE signs with a CA folder of its own kind. The one it gets here is made of the provisioner's CA
(`state/cert.json`), for the moment of signing: so both kinds of kits work with one server.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedfms.errors import FederationError
from fedfms.flare.internals.console import nvflare_cert, write_authority

VALID_DAYS = 360  # as FLARE's provisioner
REQUEST_FILE = "request.json"


def make_request(name: str, org: str, project: str, folder: Path) -> Path:
    """Make a private key and a request for a certificate, in a new folder.

    Returns:
        the file to send; the key stays in the folder, as `<name>.key`, mode 0600.
    """
    participant = {"name": name, "type": "client", "org": org}
    definition = folder / "participant.yml"
    definition.write_text(yaml.safe_dump({"name": project, "participants": [participant]}))
    said = nvflare_cert("request", "-p", str(definition), "--out", str(folder), home=folder)
    definition.unlink()
    return Path(said["request_zip"])


def read_request(request: Path) -> dict[str, Any]:
    """What a request says; nothing of it is verified yet.

    Raises:
        FederationError: it is no request.
    """
    try:
        with zipfile.ZipFile(request) as archive:
            said = json.loads(archive.read(REQUEST_FILE))
        return {key: str(said[key]) for key in ("name", "org", "project", "public_key_sha256")}
    except FileNotFoundError:
        raise FederationError(f"there is no {request}", "check the path") from None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise FederationError(
            f"{request} is no request: {error}",
            "let the site send the SITE.request.zip that fedfms request made",
            code="bad-request",
        ) from None


def sign_request(
    request: Path, root: bytes, root_key: bytes, server: Mapping[str, Any], scratch: Path
) -> bytes:
    """Let FLARE check a request and sign it.

    Args:
        request: the request's zip.
        root: the CA's certificate, PEM.
        root_key: its private key, PEM.
        server: `project`, `host` and `port`.
        scratch: private folder; the CA's key lies in it until this returns.

    Returns:
        the certificate, PEM.

    Raises:
        FederationError: FLARE refuses the request, with its reason.
    """
    authority, profile = scratch / "ca", scratch / "profile.yml"
    key_file = write_authority(authority, root, root_key, server["project"])
    content = {
        "name": server["project"],
        "scheme": "grpc",
        "connection_security": "mtls",
        "server": {"host": server["host"], "fed_learn_port": server["port"]},
    }
    profile.write_text(yaml.safe_dump(content))
    signed = scratch / "signed.zip"
    try:
        said = nvflare_cert(
            *("approve", str(request.absolute()), "--ca-dir", str(authority)),
            *("--profile", str(profile), "--valid-days", str(VALID_DAYS), "--out", str(signed)),
            home=scratch,
        )
    finally:
        key_file.unlink()
    with zipfile.ZipFile(signed) as archive:
        return archive.read(f"{said['name']}.crt")
