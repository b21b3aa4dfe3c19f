"""A startup kit before it is used: as it was made, whose it is, and valid now."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from fedfms.errors import ConfigError
from fedfms.kits.about import ParticipantType
from fedfms.kits.certificates import now, subject_of
from fedfms.kits.checksums import check_sums
from fedfms.kits.kit import Kit, read_kit
from fedfms.user import unreadable

_ASK = "ask the coordinator for a new kit"
_ROLES = {"server": "server", "client": "flare"}  # what `fedfms ...` starts from which kit


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
        raise unreadable(Path(error.filename or folder), error, "kit-unreadable") from None


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


def check_names(kit: Kit, site_name: str | None) -> str:
    """Raise ConfigError unless certificate, kit and SITE_NAME have one name (kit-other-name)."""
    name = subject_of(kit.certificate, NameOID.COMMON_NAME)
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
    return f"the certificate is {kit.about.participant}'s"


def check_issuer(kit: Kit) -> str:
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
    return f"the project's CA ({kit.about.project}) signed the certificate"


def check_dates(kit: Kit) -> None:
    """Raise ConfigError (kit-expired, kit-not-yet-valid) unless both certificates are valid now."""
    time = now()
    for certificate, path in (
        (kit.certificate, kit.certificate_file),
        (kit.root, kit.root_file),
    ):
        if time > certificate.not_valid_after_utc:
            raise ConfigError(
                f"the certificate {path} expired on {_day(certificate.not_valid_after_utc)}; "
                f"the clock here says {_day(time)}",
                "ask the coordinator to renew it (fedfms provision --renew), then put the new kit/ "
                "in the place of this one",
                code="kit-expired",
            )
        if time < certificate.not_valid_before_utc:
            raise ConfigError(
                f"the certificate {path} is valid from {_day(certificate.not_valid_before_utc)} "
                f"on; the clock here says {_day(time)}",
                "set this machine's clock; if it is right, ask the coordinator to renew this kit",
                code="kit-not-yet-valid",
            )


def _word(kind: ParticipantType) -> str:
    return {"server": "server", "client": "site", "admin": "coordinator or user"}[kind]


def _day(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")
