"""FLARE's `state/cert.json`: what its provisioner remembers. Read in FLARE 2.9.0.

Public API makes kits and says nothing of what it made before. Renewing a certificate, taking a
participant out, and certificates for keys that sites make themselves are only possible in this
file: the provisioner uses a certificate that it finds there (`lighter/impl/cert.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedfms.bounded import read_json_object
from fedfms.errors import FederationError

MAX_STATE_BYTES = 64 << 20  # a key and a certificate for each participant
STATE_FILE = Path("state/cert.json")  # below the project's folder: the CA's key and all others
ROOT_CERT, ROOT_KEY = "root_cert", "root_pri_key"  # keys beside the participants' names


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
            content = read_json_object(path, MAX_STATE_BYTES)
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
        text = self.content.get(ROOT_CERT)
        return x509.load_pem_x509_certificate(text.encode()) if text else None

    @property
    def root_pems(self) -> tuple[bytes, bytes]:
        """Certificate and private key of the certificate authority, as FLARE wrote them."""
        return self.content[ROOT_CERT].encode(), self.content[ROOT_KEY].encode()

    @property
    def root_key(self) -> rsa.RSAPrivateKey:
        """The certificate authority's private key."""
        key = serialization.load_pem_private_key(self.content[ROOT_KEY].encode(), password=None)
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

    def forget_key(self, name: str) -> None:
        """Remove a participant's private key and keep its certificate."""
        self.content.get(name, {}).pop("pri_key", None)

    def set_approved(self, name: str, certificate: x509.Certificate) -> None:
        """Remember the certificate for a key that was made elsewhere."""
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.content[name] = {"cert": pem}
