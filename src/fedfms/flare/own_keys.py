"""FLARE's `nvflare cert`: a site makes its key and a request, the coordinator signs the request.

FLARE signs with a CA folder of its own kind. The one it gets here is made of the provisioner's CA
(`state/cert.json`), for the moment of signing: so both kinds of kits work with one server.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedfms.bounded import json_object, open_zip
from fedfms.errors import FederationError, Undecodable
from fedfms.flare.internals.console import nvflare_cert, write_authority

VALID_DAYS = 360  # as FLARE's provisioner
REQUEST_FILE = "request.json"
MAX_REQUEST_BYTES = 1 << 20  # packed and unpacked; FLARE's has 3 kB
_MAX_RATIO = 100
_LARGEST_TEXT = 1024  # characters of what a request says of the site


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
        with open_zip(
            request,
            "it",
            max_bytes=MAX_REQUEST_BYTES,
            max_entries=100,
            max_ratio=_MAX_RATIO,
        ) as archive:
            said = json_object(archive.read(REQUEST_FILE), f"its {REQUEST_FILE}")
    except FileNotFoundError:
        raise FederationError(f"there is no {request}", "check the path") from None
    except Undecodable as error:
        raise _no_request(request, error.problem) from None
    except OSError as error:
        raise _no_request(request, error.strerror or str(error)) from None
    found: dict[str, Any] = {}
    for key in ("name", "org", "project", "public_key_sha256"):
        value = said.get(key)
        if not isinstance(value, str) or len(value) > _LARGEST_TEXT or not value.isprintable():
            raise _no_request(request, f"its {REQUEST_FILE} has no {key} that can be used")
        found[key] = value
    return found


def _no_request(request: Path, why: str) -> FederationError:
    return FederationError(
        f"{request} is no request: {why}",
        "let the site send the SITE.request.zip that fedfms request made",
        code="bad-request",
    )


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
    with open_zip(signed, "FLARE's answer", max_bytes=MAX_REQUEST_BYTES) as archive:
        return archive.read(f"{said['name']}.crt")
