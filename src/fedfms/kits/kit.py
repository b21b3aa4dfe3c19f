"""A startup kit in a folder: whose it is, and its certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedfms.kits.about import KitAbout, ParticipantType, read_about
from fedfms.kits.certificates import now, read_certificate, subject_of
from fedfms.kits.checksums import ROOT_CERTIFICATE
from fedfms.kits.turned import refuse_turned
from fedfms.user import unreadable


@dataclass(frozen=True, slots=True)
class Kit:
    """A kit that has been read; nothing of it is checked by that."""

    folder: Path  # with startup/ and local/
    about: KitAbout
    certificate: x509.Certificate
    root: x509.Certificate  # the project's CA

    @property
    def certificate_file(self) -> Path:
        """The participant's certificate, PEM."""
        return self.folder / "startup" / f"{_key_name(self.about.type)}.crt"

    @property
    def key_file(self) -> Path:
        """The participant's private key, PEM."""
        return self.folder / "startup" / f"{_key_name(self.about.type)}.key"

    @property
    def root_file(self) -> Path:
        """The CA's certificate, PEM."""
        return self.folder / ROOT_CERTIFICATE

    @property
    def organisation(self) -> str:
        """The participant's organisation, as the CA signed it; authorization compares with it."""
        return subject_of(self.certificate, NameOID.ORGANIZATION_NAME)

    @property
    def days_left(self) -> int:
        """Whole days until the first of the kit's certificates expires."""
        ends = min(self.certificate.not_valid_after_utc, self.root.not_valid_after_utc)
        return (ends - now()).days


def read_kit(folder: Path) -> Kit:
    """Read what a kit says of itself and its certificates.

    Raises:
        ConfigError: no-kit, kit-changed, kit-format, kit-turned, kit-unreadable, or kit-incomplete
            for a certificate that is not there or is none.
    """
    try:
        refuse_turned(folder)
        about = read_about(folder)
        own = folder / "startup" / f"{_key_name(about.type)}.crt"
        return Kit(
            folder, about, read_certificate(own), read_certificate(folder / ROOT_CERTIFICATE)
        )
    except PermissionError as error:
        raise unreadable(Path(error.filename or folder), error, "kit-unreadable") from None


def _key_name(kind: ParticipantType) -> str:
    return "server" if kind == "server" else "client"
