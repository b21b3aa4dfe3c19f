"""Certificates of a kit: the one reader of PEM files, and until when a certificate is valid."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from fedfms.bounded import read_bytes
from fedfms.errors import ConfigError

MAX_BYTES = 1 << 20  # of a file of certificates
RENEW_DAYS = 30  # a certificate that ends sooner is worth a word


def now() -> datetime.datetime:
    """The time now, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        ConfigError: code kit-incomplete; there is none in the file.
        PermissionError: this user may not read it; who asks knows which user that is.
    """
    try:
        certificate = x509.load_pem_x509_certificate(read_bytes(path, MAX_BYTES))
        # read now what is otherwise read, and found to be damaged, where somebody asks for it
        _ = (certificate.subject, certificate.issuer, certificate.extensions)
        _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        certificate.public_key()
        return certificate
    except PermissionError:
        raise
    except OSError as error:
        problem = f"the certificate {path} cannot be read ({error.strerror})"
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        problem = f"{path} is no certificate that can be used"
    raise ConfigError(
        problem,
        "unzip the kit again and mount it as it is; if that does not help, ask the coordinator for "
        "a new kit",
        code="kit-incomplete",
    )


def kit_certificate(kit: Path) -> x509.Certificate | None:
    """The participant's own certificate in a kit's startup/; None where there is none yet."""
    for name in ("server.crt", "client.crt"):
        if (kit / "startup" / name).is_file():
            return read_certificate(kit / "startup" / name)
    return None


def subject_of(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    """What a certificate says of its owner; empty where it says nothing."""
    found = certificate.subject.get_attributes_for_oid(oid)
    return str(found[0].value) if found else ""


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 fingerprint as openssl and FLARE write it: SHA256:AB:CD:…"""
    return spelt(certificate.fingerprint(hashes.SHA256()).hex())


def spelt(digest: str) -> str:
    """A SHA-256 in hexadecimal digits in the way of `fingerprint`."""
    digest = digest.upper()
    return "SHA256:" + ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))
