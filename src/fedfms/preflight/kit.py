"""A startup kit before it is used: whose it is, and whether its certificate still says so."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from fedfms.errors import ConfigError
from fedfms.kits.about import ABOUT_FILE, KitAbout, ParticipantType, read_about
from fedfms.kits.checksums import ROOT_CERTIFICATE, check_sums
from fedfms.user import how_to_read

RENEW_DAYS = 30  # a certificate that ends sooner is worth a word

_ASK = "ask the coordinator for a new kit"
_ROLES = {"server": "server", "client": "flare"}  # what `fedfms ...` starts from which kit


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
        return _subject(self.certificate, NameOID.ORGANIZATION_NAME)


def read_kit(folder: Path) -> Kit:
    """Read what a kit says of itself and its certificates.

    Raises:
        ConfigError: no-kit, kit-changed, or kit-incomplete for a certificate that is not there or
            is none.
    """
    try:
        about = read_about(folder)
    except PermissionError as error:
        raise _unreadable(folder / ABOUT_FILE, error) from None
    startup = folder / "startup"
    return Kit(
        folder,
        about,
        _read_certificate(startup / f"{_key_name(about.type)}.crt"),
        _read_certificate(folder / ROOT_CERTIFICATE),
    )


def check_kit(folder: Path, wanted: ParticipantType, site_name: str | None = None) -> Kit:
    """Check everything about a kit that can be checked without a network.

    Args:
        folder: with startup/ and local/.
        wanted: what is to be started from it.
        site_name: who this site believes it is (SITE_NAME), if it says.

    Raises:
        ConfigError: the kit cannot be used; the problem names the file, date or name.
    """
    kit = read_kit(folder)
    check_files(folder)
    check_role(kit, wanted)
    check_names(kit, site_name)
    check_issuer(kit)
    check_dates(kit)
    return kit


def check_files(folder: Path) -> None:
    """Raise ConfigError unless all files of a kit are as they were made, and can be read.

    Codes: kit-changed, kit-incomplete, kit-unsigned, kit-unreadable.
    """
    try:
        check_sums(folder)
        for path in (folder / "startup").rglob("*.key"):  # also one that the site made itself
            path.read_bytes()
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from None


def check_role(kit: Kit, wanted: ParticipantType) -> None:
    """Raise ConfigError (kit-wrong-role) unless the kit is for what is to be started."""
    if kit.about.type == wanted:
        return
    role = _ROLES.get(kit.about.type)
    raise ConfigError(
        f"{kit.folder} is the kit of {kit.about.participant}, which is the project's "
        f"{_word(kit.about.type)}; this role needs the kit of a {_word(wanted)}",
        f"start it with: fedfms {role}" if role else "mount the kit that belongs to this role",
        code="kit-wrong-role",
    )


def check_names(kit: Kit, site_name: str | None) -> None:
    """Raise ConfigError unless certificate, kit and SITE_NAME have one name (kit-other-name)."""
    name = _subject(kit.certificate, NameOID.COMMON_NAME)
    if name != kit.about.participant:
        raise ConfigError(
            f"the certificate {kit.certificate_file} is {name or 'nobody'}'s, but the kit is "
            f"{kit.about.participant}'s",
            f"use the kit as the coordinator sent it to you, or {_ASK}",
            code="kit-other-name",
        )
    if site_name and site_name != kit.about.participant:
        raise ConfigError(
            f"SITE_NAME is {site_name}, but the kit in {kit.folder} is {kit.about.participant}'s",
            f"set SITE_NAME={kit.about.participant}, or point SITE_KIT at {site_name}'s kit",
            code="site-name",
        )


def check_issuer(kit: Kit) -> None:
    """Raise ConfigError (kit-other-ca) unless the kit's CA signed its certificate."""
    try:
        kit.certificate.verify_directly_issued_by(kit.root)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"the certificate {kit.certificate_file} is not signed by the certificate authority "
            f"in {kit.root_file}",
            f"use the kit as the coordinator sent it to you, or {_ASK}",
            code="kit-other-ca",
        ) from None


def check_dates(kit: Kit, now: datetime.datetime | None = None) -> None:
    """Raise ConfigError (kit-expired, kit-not-yet-valid) unless both certificates are valid now."""
    now = now or datetime.datetime.now(datetime.timezone.utc)
    for certificate, path in (
        (kit.certificate, kit.certificate_file),
        (kit.root, kit.root_file),
    ):
        if now > certificate.not_valid_after_utc:
            raise ConfigError(
                f"the certificate {path} expired on {_day(certificate.not_valid_after_utc)}; "
                f"the clock here says {_day(now)}",
                "ask the coordinator to renew it (fedfms provision --renew), then put the new kit/ "
                "in the place of this one",
                code="kit-expired",
            )
        if now < certificate.not_valid_before_utc:
            raise ConfigError(
                f"the certificate {path} is valid from {_day(certificate.not_valid_before_utc)} "
                f"on; the clock here says {_day(now)}",
                "set this machine's clock; if it is right, ask the coordinator to renew this kit",
                code="kit-not-yet-valid",
            )


def days_left(kit: Kit) -> int:
    """Whole days until the first of the kit's certificates expires."""
    ends = min(kit.certificate.not_valid_after_utc, kit.root.not_valid_after_utc)
    return (ends - datetime.datetime.now(datetime.timezone.utc)).days


def _key_name(kind: ParticipantType) -> str:
    return "server" if kind == "server" else "client"


def _word(kind: ParticipantType) -> str:
    return {"server": "server", "client": "site", "admin": "coordinator or user"}[kind]


def _day(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _subject(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    found = certificate.subject.get_attributes_for_oid(oid)
    return str(found[0].value) if found else ""


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({error.strerror}) by this container's user, "
        f"{os.geteuid()}:{os.getegid()}",
        how_to_read(path),
        code="kit-unreadable",
    )


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except OSError as error:
        problem = f"the certificate {path} cannot be read ({error.strerror})"
    except ValueError:
        problem = f"{path} is no certificate"
    raise ConfigError(
        problem,
        f"unzip the kit again and mount it as it is; if that does not help, {_ASK}",
        code="kit-incomplete",
    )
