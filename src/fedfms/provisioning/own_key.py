"""The second way to a kit: the site makes its own key, which never leaves it.

1. `fedfms request` at the site makes a key and a request; the request is sent.
2. `fedfms approve` at the coordinator has the request signed by the project's certificate
   authority, the same that signs all other kits, and makes the site's kit without a key.
3. `fedfms install` at the site checks that kit and puts the key into it.

Both ends tell the other a fingerprint by a second way, such as the telephone, and neither step goes
without it: whoever could exchange a file on its way could otherwise take the site's place.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from fedfms.bounded import read_json_object
from fedfms.errors import ConfigError, Undecodable
from fedfms.files import flush_folder, scratch_folder
from fedfms.flare.internals.state import CertificateState
from fedfms.flare.own_keys import REQUEST_FILE, make_request, read_request, sign_request
from fedfms.flare.provision import private_files
from fedfms.kits.about import read_about
from fedfms.kits.certificates import fingerprint, kit_certificate, read_certificate, spelt
from fedfms.kits.checksums import ROOT_CERTIFICATE, check_sums
from fedfms.kits.zips import unpack_zip
from fedfms.provisioning.project import check_org, check_project_name, check_site_name, read_project
from fedfms.provisioning.provision import Provisioned, make_kits, refuse_revoked, working_folder


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was made at a site."""

    file: Path  # is sent
    folder: Path  # stays, with the key
    key: str  # fingerprint of the public key; is told


def request(name: str, org: str, project: str, folder: Path) -> Request:
    """Make a key and a request for a certificate.

    Args:
        name: the site's name in project.yml.
        org: its organisation there.
        project: the project's name there.
        folder: new folder for the key and the request; for this user only.
    """
    check_site_name(name)
    check_org(org)
    check_project_name(project)
    if folder.exists():
        raise ConfigError(
            f"{folder} is there already",
            "name a new folder; a key that was sent for approval must not be lost",
            code="exists",
        )
    with private_files():
        folder.mkdir(parents=True)
        try:
            file = make_request(name, org, project, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder / ".nvflare", ignore_errors=True)  # FLARE's own record of it
    return Request(file, folder, spelt(read_request(file)["public_key_sha256"]))


def approve(
    request_file: Path,
    project_file: Path,
    key: str,
    output: Path | None = None,
    renew: bool = False,
) -> Provisioned:
    """Sign a site's request and make its kit.

    Args:
        request_file: what the site sent.
        project_file: project.yml, which lists the site with `own_key: true`.
        key: the fingerprint that the site told.
        output: as for provision.
        renew: the site has a certificate already and gets another one for a new key.

    Raises:
        FedfmsError: the request is not the site's own, not for this project, or not listed;
            nothing has been signed then that is kept.
    """
    project = read_project(project_file)
    said = read_request(request_file)
    name = said["name"]
    if _plain(key) != said["public_key_sha256"]:
        raise ConfigError(
            f"the request is for the key {spelt(said['public_key_sha256'])}, not for {key}",
            "ask the site for the fingerprint that fedfms request printed, by telephone; if it is "
            "another one, somebody exchanged the request",
            code="wrong-fingerprint",
        )
    if said["project"] != project.name:
        raise ConfigError(
            f"the request is for the project {said['project']}, not for {project.name}",
            f"let the site make another one: fedfms request {name} --project {project.name}",
            code="other-project",
        )
    site = project.find(name)
    if site.type != "client" or not site.own_key:
        raise ConfigError(
            f"{name} gets its key from here",
            f"if it shall make its own, write own_key: true for {name} into {project_file.name}",
            code="no-own-key",
        )
    if site.org != said["org"]:
        raise ConfigError(
            f"the request of {name} is of the organisation {said['org']}, but "
            f"{project_file.name} says {site.org}",
            "find out who sent it; correct project.yml or let the site make another request",
            code="other-org",
        )
    folder = working_folder(project_file, project, output)
    with private_files(), folder.locked():
        refuse_revoked(name, folder.revoked())
        state = CertificateState.read(folder.state)
        if state.root is None:
            raise ConfigError(
                f"{folder.output} holds no certificate authority yet",
                f"make the kits first: fedfms provision {project_file}",
                code="no-ca",
            )
        before = state.certificate(name)
        if before is not None and not state.has_key(name) and not renew:
            if _key_of(before) == said["public_key_sha256"]:  # a second time
                return make_kits(project_file, project, folder)
            raise ConfigError(
                f"{name} has a certificate for another key",
                "if the site renews its key, run again with --renew",
                code="approved-already",
            )
        with folder.scratch() as scratch:
            pem = sign_request(
                request_file,
                *state.root_pems,
                {
                    "project": project.name,
                    "host": project.server_host,
                    "port": project.server_port,
                },
                scratch,
            )
        certificate = x509.load_pem_x509_certificate(pem)
        return make_kits(project_file, project, folder, approved={name: certificate})


def install(kit_zip: Path, request_folder: Path, authority: str, folder: Path | None) -> Path:
    """Check the kit that came back and put the site's key into it.

    Args:
        kit_zip: what the coordinator sent.
        request_folder: the folder of `request`, with the key.
        authority: the certificate authority's fingerprint that the coordinator told.
        folder: where the kit goes; by default beside the zip, by the site's name. If it is there,
            only its kit/ is replaced: the other files are the site's own.

    Returns:
        the folder with the kit.

    Raises:
        FedfmsError: the kit is not for this key, not of this authority, or was changed; nothing has
            been changed at the site then.
    """
    said = _read_own_request(request_folder)
    name = said["name"]
    folder = folder or kit_zip.absolute().parent / name
    with private_files(), scratch_folder(folder) as scratch:
        fresh = unpack_zip(kit_zip, scratch)
        _check_kit(fresh / "kit", said, authority)
        target = fresh / "kit" / "startup" / "client.key"
        shutil.copyfile(request_folder / f"{name}.key", target)
        target.chmod(0o600)
        check_sums(fresh / "kit")  # with the key in it, as at every start from now on
        flush_folder(fresh)
        if not folder.exists():
            fresh.rename(folder)
        else:
            if (folder / "kit").exists():
                (folder / "kit").rename(scratch / "before")
            (fresh / "kit").rename(folder / "kit")
    return folder


def _read_own_request(folder: Path) -> dict[str, str]:
    path = folder / REQUEST_FILE
    try:
        said = read_json_object(path)
        return {key: str(said[key]) for key in ("name", "project", "public_key_sha256")}
    except (OSError, ValueError, KeyError) as error:
        why = error.problem if isinstance(error, Undecodable) else error
        raise ConfigError(
            f"{folder} is not the folder of a request: {why}",
            "name the folder that fedfms request made, with the key in it",
            code="no-request",
        ) from None


def _check_kit(kit: Path, said: dict[str, str], authority: str) -> None:
    about = read_about(kit)
    if (about.participant, about.project) != (said["name"], said["project"]):
        raise ConfigError(
            f"this kit is for {about.participant} of {about.project}, not for {said['name']} of "
            f"{said['project']}",
            "ask the coordinator for yours",
            code="other-kit",
        )
    root = read_certificate(kit / ROOT_CERTIFICATE)
    if _plain(fingerprint(root)) != _plain(authority):
        raise ConfigError(
            f"the kit is of the certificate authority {fingerprint(root)}, not of {authority}",
            "ask the coordinator for the fingerprint that fedfms provision prints, by telephone; "
            "if it is another one, somebody exchanged the kit",
            code="wrong-fingerprint",
        )
    check_sums(kit)
    certificate = kit_certificate(kit)
    if certificate is None or _key_of(certificate) != said["public_key_sha256"]:
        raise ConfigError(
            "the certificate in the kit is not for the key of this request",
            "use the folder of the request that was approved, or send the coordinator this one",
            code="other-key",
        )
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            "the certificate in the kit was not signed by the kit's own authority",
            "ask the coordinator for a new kit",
            code="wrong-ca",
        ) from None


def _key_of(certificate: x509.Certificate) -> str:
    der = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def _plain(text: str) -> str:
    return text.strip().lower().removeprefix("sha256:").replace(":", "")
