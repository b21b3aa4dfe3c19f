"""Certificates of a kit: until when they are valid, and FLARE's file that remembers them all."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedfms.errors import ConfigError, FederationError

WARN_DAYS = 30


def now() -> datetime.datetime:
    """The time now, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        ConfigError: there is none in the file.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no certificate: {error}", "take it from the kit again"
        ) from None


def kit_certificate(kit: Path) -> x509.Certificate | None:
    """The participant's own certificate in a kit's startup/; None where there is none yet."""
    for name in ("server.crt", "client.crt"):
        if (kit / "startup" / name).is_file():
            return load_certificate(kit / "startup" / name)
    return None


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 fingerprint as openssl and FLARE write it: SHA256:AB:CD:…"""
    digest = certificate.fingerprint(hashes.SHA256()).hex().upper()
    return "SHA256:" + ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


@dataclass
class CertificateState:
    """FLARE's `state/cert.json`: the certificate authority and what it made, all with their keys.

    One private key in it speaks for the whole federation: the file never leaves the coordinator.
    """

    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> CertificateState:
        """Read the file; an absent one is a federation that nothing was made for yet.

        Raises:
            FederationError: the file is damaged. It is never made anew: that would be another CA.
        """
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return cls({})
        except (OSError, ValueError) as error:
            raise FederationError(
                f"{path}, which holds the certificate authority, cannot be read: {error}",
                "put it back from your backup; without it every participant needs a new kit",
                code="ca-damaged",
            ) from None
        return cls(content)

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(self.content))

    @property
    def root(self) -> x509.Certificate | None:
        """The certificate authority's own certificate; None before it was made."""
        text = self.content.get("root_cert")
        return x509.load_pem_x509_certificate(text.encode()) if text else None

    @property
    def root_key(self) -> rsa.RSAPrivateKey:
        """The certificate authority's private key."""
        key = serialization.load_pem_private_key(
            self.content["root_pri_key"].encode(), password=None
        )
        assert isinstance(key, rsa.RSAPrivateKey)  # FLARE makes no other
        return key

    def certificate(self, name: str) -> x509.Certificate | None:
        """A participant's certificate; None where it has none yet."""
        text = self.content.get(name, {}).get("cert")
        return x509.load_pem_x509_certificate(text.encode()) if text else None

    def has_key(self, name: str) -> bool:
        """Whether a participant's private key was made here."""
        return "pri_key" in self.content.get(name, {})

    def forget(self, name: str) -> None:
        """Remove a participant's key and certificate, so that FLARE makes new ones."""
        self.content.pop(name, None)

    def set_approved(self, name: str, certificate: x509.Certificate) -> None:
        """Remember the certificate for a key that was made elsewhere."""
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.content[name] = {"cert": pem}
