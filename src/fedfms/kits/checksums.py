"""Whether a kit is as it was made: `SHA256SUMS` in the kit's folder, signed by the project's CA.

FLARE does not sign startup kits: whoever changes a file in one goes unnoticed. Every kit of ours
therefore lists the SHA-256 of each file of its `startup/`, `local/` and `bills/` and of
`fedfms.json`, in the format of `sha256sum -c`, and `SHA256SUMS.sig` holds the CA's signature of
that list:

    openssl x509 -in startup/rootCA.pem -noout -pubkey > ca.pub
    base64 -d SHA256SUMS.sig > sums.sig
    openssl dgst -sha256 -verify ca.pub -signature sums.sig SHA256SUMS
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from fedfms.bounded import inside_path, read_bytes, short
from fedfms.errors import ConfigError, Undecodable
from fedfms.files import file_sha256, is_file
from fedfms.kits.about import ABOUT_FILE

SUMS_FILE, SIGNATURE_FILE = "SHA256SUMS", "SHA256SUMS.sig"
MAX_SUMS_BYTES = 1 << 20  # of the list, the signature, the certificate; a kit's list has 3 kB
ROOT_CERTIFICATE = "startup/rootCA.pem"
_FOLDERS = ("startup", "local", "bills")

_AGAIN = "unzip the kit again; if that does not help, ask the coordinator for a new one"


def write_sums(kit: Path, ca_key: rsa.RSAPrivateKey) -> None:
    """List the SHA-256 of a kit's files and sign the list.

    Args:
        kit: the folder with startup/ and local/.
        ca_key: private key of the certificate in startup/rootCA.pem.
    """
    (kit / SUMS_FILE).write_bytes(list_sums(kit, kit_files(kit)).encode())
    sign_sums(kit, ca_key)


def sign_sums(folder: Path, ca_key: rsa.RSAPrivateKey) -> None:
    """Sign the list of checksums in a folder; the same list gives the same bytes."""
    content = (folder / SUMS_FILE).read_bytes()
    signature = ca_key.sign(content, padding.PKCS1v15(), hashes.SHA256())
    (folder / SIGNATURE_FILE).write_bytes(base64.encodebytes(signature))


def check_sums(kit: Path) -> None:
    """Check that a kit is what the coordinator made.

    A private key that the site made itself is in no list: it must fit the certificate beside it,
    which is.

    Args:
        kit: the folder with startup/ and local/.

    Raises:
        ConfigError: the list is not there or not signed by the kit's CA (kit-unsigned), a file is
            missing (kit-incomplete), or one was changed or added (kit-changed); the first such file
            is named.
        OSError: this user may not read it.
    """
    try:
        content = read_bytes(kit / SUMS_FILE, MAX_SUMS_BYTES)
        signature = read_bytes(kit / SIGNATURE_FILE, MAX_SUMS_BYTES)
        root = x509.load_pem_x509_certificate(read_bytes(kit / ROOT_CERTIFICATE, MAX_SUMS_BYTES))
    except PermissionError:  # the caller knows which user it is, and what to do
        raise
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else "they cannot be read"
        if isinstance(error, FileNotFoundError):
            why = f"there is no {error.filename}"
        raise ConfigError(
            f"the kit has no signed checksums: {why}", _AGAIN, code="kit-unsigned"
        ) from None
    try:
        decoded = base64.b64decode(b"".join(signature.split()), validate=True)
        key = cast("rsa.RSAPublicKey", root.public_key())
        key.verify(decoded, content, padding.PKCS1v15(), hashes.SHA256())
    # or another kind of key, or one that openssl does not take
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, AttributeError, TypeError):
        raise ConfigError(
            f"{kit / SUMS_FILE} is not signed by the certificate authority of this kit",
            _AGAIN,
            code="kit-unsigned",
        ) from None
    listed = _parse(content, kit)
    for name, expected in listed.items():
        path = kit / name
        if not is_file(path):
            raise ConfigError(f"the kit has no {kit / short(name)}", _AGAIN, code="kit-incomplete")
        if file_sha256(path) != expected:
            raise ConfigError(
                f"{path} is not as the coordinator made it", _AGAIN, code="kit-changed"
            )
    for name in kit_files(kit):
        if name not in listed and not _is_own_key(kit, name, listed):
            raise ConfigError(
                f"{kit / name} does not belong to the kit",
                f"remove it, or {_AGAIN}",
                code="kit-changed",
            )


def list_sums(folder: Path, names: Iterable[str]) -> str:
    """Files of a folder with their SHA-256, in the format of `sha256sum -c`."""
    return "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)


def kit_files(kit: Path) -> list[str]:
    """The files that make a kit, relative to it and sorted; not what FLARE writes beside them."""
    inside = [path for name in _FOLDERS for path in (kit / name).rglob("*")]
    # links too: one that leads out of the kit would be read by FLARE and listed by nobody
    files = [path.relative_to(kit).as_posix() for path in inside if not path.is_dir()]
    return sorted([*files, ABOUT_FILE])


def _parse(content: bytes, kit: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for line in content.decode(errors="replace").splitlines():
        expected, separator, name = line.partition("  ")
        try:
            inside_path(name, SUMS_FILE)
            is_line = separator != "" and name not in listed
        except Undecodable:
            is_line = False
        if not is_line:
            raise ConfigError(
                f"{kit / SUMS_FILE} holds a line that is none", _AGAIN, code="kit-changed"
            )
        listed[name] = expected
    return listed


def _is_own_key(kit: Path, name: str, listed: dict[str, str]) -> bool:
    """Whether an unlisted file is the private key of a certificate that is listed."""
    certificate = name.removesuffix(".key") + ".crt"
    if not name.endswith(".key") or certificate not in listed:
        return False
    try:
        key = serialization.load_pem_private_key((kit / name).read_bytes(), password=None)
        public = x509.load_pem_x509_certificate((kit / certificate).read_bytes()).public_key()
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return bool(key.public_key() == public)
