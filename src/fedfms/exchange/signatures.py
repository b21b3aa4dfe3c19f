"""Signatures: of a trainer by its own Ed25519 key, of a kit by the RSA key of its certificate.

All by `cryptography`. Private keys come and go as PEM; what is signed is bytes, and whoever signs
puts before them what kind of thing they are, so that no signature fits another.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from fedfms.errors import ConfigError

_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)  # RFC 8017


def new_key() -> bytes:
    """A new Ed25519 private key (RFC 8032), PKCS 8 in PEM without a password."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class TrainerSigner:
    """Signs with an Ed25519 key."""

    def __init__(self, pem: bytes) -> None:
        """Read the key.

        Raises:
            ConfigError: code trainer-key; it is none.
        """
        try:
            key = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                "the trainer's own key is no Ed25519 key",
                "put trainer.key back from a copy; or delete it, and the trainer makes another and "
                "begins a new chain of receipts",
                code="trainer-key",
            )
        self._key = key

    @property
    def public(self) -> str:
        """The public key, 64 hexadecimal digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> str:
        """128 hexadecimal digits."""
        return self._key.sign(data).hex()


def is_signed_by_trainer(key: str, signature: str, data: bytes) -> bool:
    """Whether this is the signature of the holder of an Ed25519 key; both in hexadecimal digits."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(
            bytes.fromhex(signature), data
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def sign_by_certificate(key_pem: bytes, data: bytes) -> str:
    """The signature by the private key of a kit's certificate, RSASSA-PSS with SHA-256, as hex.

    Raises:
        ConfigError: code kit-unreadable; it is no RSA key.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ConfigError(
            "the kit's key is no RSA key, as FLARE makes them",
            "unzip the kit again and mount it as it is",
            code="kit-unreadable",
        )
    return key.sign(data, _PSS, hashes.SHA256()).hex()


def is_signed_by_certificate(certificate: x509.Certificate, signature: str, data: bytes) -> bool:
    """Whether this is the signature of the holder of a certificate."""
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return False
    try:
        key.verify(bytes.fromhex(signature), data, _PSS, hashes.SHA256())
    except (InvalidSignature, ValueError):
        return False
    return True


def certificate_of(
    pem: str, authority: x509.Certificate, name: str | None = None
) -> x509.Certificate | None:
    """The certificate in a PEM, if the authority issued it, for this name where one is given.

    Whether it is valid at a time, the caller asks.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(authority)
        found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, TypeError, InvalidSignature):
        return None
    if name is not None and [str(one.value) for one in found] != [name]:
        return None
    return certificate
