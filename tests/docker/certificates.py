"""Certificates as OpenSSL's library reads them, and ones that FLARE would never make."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedfms.kits.checksums import write_sums


def serial(certificate: bytes) -> int:
    return x509.load_pem_x509_certificate(certificate).serial_number


def not_after(certificate: bytes) -> datetime.datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def public_key_of_ca(certificate: bytes) -> bytes:
    key = x509.load_pem_x509_certificate(certificate).public_key()
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def with_own_certificate(
    project: Path, kit: Path, *, name: str | None = None, expired: bool = False
) -> datetime.datetime | None:
    """Sign a kit again with the project's CA, as only a thief of its key could.

    With a name the kit gets a new key and certificate for it, with `expired` one that ended.
    """
    state = json.loads((project / "state" / "cert.json").read_text())
    ca_key = serialization.load_pem_private_key(state["root_pri_key"].encode(), password=None)
    ca = x509.load_pem_x509_certificate((kit / "startup/rootCA.pem").read_bytes())
    ended = None
    if name is not None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        now = datetime.datetime.now(datetime.timezone.utc)
        ended = now - datetime.timedelta(days=3) if expired else now + datetime.timedelta(days=3)
        old = x509.load_pem_x509_certificate((kit / "startup/client.crt").read_bytes())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(old.subject)
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(ended)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(ca_key, hashes.SHA256())
        )
        assert old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == name
        (kit / "startup/client.crt").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
        (kit / "startup/client.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
    write_sums(kit, ca_key)
    return ended
