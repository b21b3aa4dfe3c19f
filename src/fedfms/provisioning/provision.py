"""From project.yml to one zip for each participant, again and again under one CA.

Below the output folder:

    kits/                 NAME.zip for each participant and SHA256SUMS: this is sent
    <project>/            for the coordinator only: FLARE's state/ with the CA's key, the kits
    <project>/kits/NAME/  each kit as it was packed

Everything is made in a scratch folder first and then renamed into its place, so that there is never
half a kit, and never a kit whose certificate the state does not know. A kit that comes out as it
was is not touched.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import fcntl
import filecmp
import json
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedfms.bounded import read_json, read_json_object
from fedfms.errors import ConfigError, FederationError
from fedfms.files import write_whole
from fedfms.flare.internals.state import MAX_STATE_BYTES, STATE_FILE, CertificateState
from fedfms.flare.provision import private_files, run_provisioner
from fedfms.kits.about import ABOUT_FILE
from fedfms.kits.certificates import RENEW_DAYS, fingerprint, kit_certificate, now, subject_of
from fedfms.kits.checksums import SIGNATURE_FILE, SUMS_FILE, list_sums, write_sums
from fedfms.kits.zips import write_zip
from fedfms.provisioning.images import BILLS, Image, digest_settings, named_image, write_bills
from fedfms.provisioning.project import ZIPS, Participant, Project, read_project
from fedfms.provisioning.render import write_templates

_OF_FLARE = ("startup", "local", BILLS, ABOUT_FILE, SUMS_FILE, SIGNATURE_FILE)
_REVOKED_FILE, _RECORD_FILE = "revoked.json", "project.json"
_IMAGES_FILE, _SENT_FILE = "images.json", "sent.json"

State = Literal["new", "changed", "same", "waits", "sent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeKit:
    """One participant's kit after a run."""

    participant: Participant
    state: State
    zip: Path | None  # None where there is nothing to send
    valid_until: datetime.datetime | None


@dataclass(slots=True, kw_only=True)
class Provisioned:
    """What a run made."""

    output: Path
    fingerprint: str  # of the certificate authority; sites compare it
    kits: list[MadeKit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the coordinator should do or know


@dataclass(frozen=True, slots=True)
class WorkingFolder:
    """Where a project's keys and kits are kept."""

    output: Path
    project: str

    @property
    def home(self) -> Path:
        """FLARE's folder of the project; for this user only."""
        return self.output / self.project

    @property
    def state(self) -> Path:
        """FLARE's file with the CA's key and all others."""
        return self.home / STATE_FILE

    @property
    def zips(self) -> Path:
        """What is sent."""
        return self.output / ZIPS

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; what an interrupted one left half made is removed."""
        try:
            for folder in (self.home, self.zips):
                folder.mkdir(parents=True, exist_ok=True)
                if stat.S_IMODE(folder.stat().st_mode) != 0o700:
                    folder.chmod(0o700)
            lock = (self.home / ".lock").open("w")
        except OSError as error:
            raise FederationError(
                f"{self.output} cannot be used: {error}",
                "run this as the user who made the kits, or name another --output",
                code="output",
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FederationError(
                    f"another fedfms works in {self.home}", "wait until it has ended", code="locked"
                ) from None
            for left in self.home.glob(".scratch-*"):
                shutil.rmtree(left)
            yield

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is not finished; gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix=".scratch-", dir=self.home))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def revoked(self) -> dict[str, dict[str, Any]]:
        """What was revoked, by name: serial number and when."""
        path = self.home / _REVOKED_FILE
        return read_json_object(path, MAX_STATE_BYTES) if path.is_file() else {}

    def images(self) -> list[Image]:
        """The images that were named last."""
        path = self.home / _IMAGES_FILE
        found = read_json(path, MAX_STATE_BYTES) if path.is_file() else []
        return [Image.from_dict(values) for values in found]

    def sent(self) -> dict[str, str]:
        """Whose key is not here any more, and since when."""
        path = self.home / _SENT_FILE
        return read_json_object(path, MAX_STATE_BYTES) if path.is_file() else {}

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file into the project's folder, whole or not at all."""
        write_whole(self.home / name, json.dumps(content, indent=2) + "\n")


def working_folder(project_file: Path, project: Project, output: Path | None) -> WorkingFolder:
    """The folder of a project, made only if no other CA would be left behind by that.

    Raises:
        ConfigError: the same project.yml made another project before (project-renamed).
    """
    folder = (output or Path("workspace") / project.name).absolute()
    around = [folder] if output is not None else [folder, *folder.parent.glob("*")]
    for state in (found for place in around for found in place.glob(f"*/{STATE_FILE}")):
        home = state.parent.parent
        if home.name == project.name and home.parent == folder:
            continue
        record = home / _RECORD_FILE
        before = read_json_object(record).get("project_file") if record.is_file() else None
        if home.parent == folder or before == str(project_file.absolute()):
            raise ConfigError(
                f"{project_file.name} is called {project.name} now, but {home.name} before: it "
                "would get another certificate authority, and no kit that was sent would work",
                f"write name: {home.name} again; for another federation use another project.yml "
                "and another --output",
                code="project-renamed",
            )
    return WorkingFolder(folder, project.name)


def provision(
    project_file: Path,
    output: Path | None = None,
    *,
    renew: Sequence[str] = (),
    revoke: Sequence[str] = (),
    unpack: Path | None = None,
    images: Sequence[str] = (),
    sent: Sequence[str] = (),
) -> Provisioned:
    """Make the kits of a project, or bring them up to date.

    Args:
        project_file: project.yml.
        output: the output folder; by default workspace/<project>.
        renew: participants that get a new key and a new certificate under the same CA.
        revoke: sites (or admins) that get no kit any more.
        unpack: folder in which each kit's kit/ is laid out too, in a folder of the participant's
            name; for containers on one machine.
        images: the federation's images, each NAME or NAME=sha256:…, in the place of those named
            before; their digests and bills come into every kit.
        sent: participants that have their kit: their private keys and zips are removed here.

    Raises:
        FedfmsError: whatever keeps the kits from being made; nothing has been changed then.
    """
    project = read_project(project_file)
    folder = working_folder(project_file, project, output)
    looked_at = [named_image(text) for text in images]
    if not folder.home.is_dir() and (renew or revoke or sent):
        raise ConfigError(
            f"{folder.output} holds no kits of {project.name} yet",
            "give --output as when the kits were made",
            code="no-kits",
        )
    with private_files(), folder.locked():
        return make_kits(
            project_file,
            project,
            folder,
            renew=renew,
            revoke=revoke,
            unpack=unpack,
            images=looked_at,
            sent=sent,
        )


def make_kits(
    project_file: Path,
    project: Project,
    folder: WorkingFolder,
    *,
    renew: Sequence[str] = (),
    revoke: Sequence[str] = (),
    approved: Mapping[str, x509.Certificate] | None = None,
    unpack: Path | None = None,
    images: Sequence[Image] = (),
    sent: Sequence[str] = (),
) -> Provisioned:
    """As `provision`, in a folder that is locked.

    Args:
        approved: certificates for keys that sites made themselves.
        images: as they were looked at.
    """
    state = CertificateState.read(folder.state)
    notes: list[str] = []
    revoked = folder.revoked()
    for name in revoke:
        revoked[name] = _revoke(project, state, name, revoked, notes)
    keyless = folder.sent()
    for name in renew:
        _renew(project, state, name, revoked, notes)
    for name in (*renew, *revoke):
        keyless.pop(name, None)
    for name in sent:
        keyless[name] = _sent(project, state, name, keyless, notes)
    for name in sorted(revoked):
        if any(participant.name == name for participant in project.participants):
            notes.append(
                f"{name} is revoked and gets no kit: delete its entry from {project_file.name}"
            )
    project = project.without(revoked)
    for participant in project.participants:
        name = participant.name
        before = state.certificate(name)
        if (
            before is not None
            and participant.own_key == state.has_key(name)
            and (participant.own_key or name not in keyless)
        ):
            state.forget(name)  # it was made the other way: with the site's own key, or with ours
            notes.append(f"the certificate that {name} has now stays valid until {_day(before)}")
    for name, certificate in (approved or {}).items():
        state.set_approved(name, certificate)
    _check_fit(project, state)

    with folder.scratch() as scratch:
        if state.content:  # FLARE takes an empty file for a CA
            (scratch / project.name / STATE_FILE).parent.mkdir(parents=True)
            state.write(scratch / project.name / STATE_FILE)
        named = list(images) or folder.images()
        made = run_provisioner(_without_keys(project, keyless), scratch)
        authority = CertificateState.read(scratch / project.name / STATE_FILE).root_key
        for participant in project.participants:  # of what FLARE made; then the list anew
            write_bills(made / participant.name, named)
            write_sums(made / participant.name, authority)
        fresh = {
            p.name: _assemble(p, project, made / p.name, scratch, named)
            for p in project.participants
        }
        # the state first: a kit whose certificate nobody remembers could not be made again
        folder.state.parent.mkdir(exist_ok=True)
        (scratch / project.name / STATE_FILE).replace(folder.state)
        folder.write(_RECORD_FILE, {"project_file": str(project_file.absolute())})
        if revoke:
            folder.write(_REVOKED_FILE, revoked)
        if images:
            folder.write(_IMAGES_FILE, [image.to_dict() for image in images])
        if keyless != folder.sent():
            folder.write(_SENT_FILE, keyless)
        kits = [
            _publish(p, fresh[p.name], folder, scratch, keyless, just_sent=p.name in sent)
            for p in project.participants
        ]
        _retire(project, folder, scratch, revoked, notes)
        _write_zip_sums(folder)
    if unpack is not None:
        for kit in kits:
            if kit.zip is not None:
                _lay_out(_home(folder, kit.participant.name) / "kit", unpack / kit.participant.name)

    notes += [
        f"{kit.participant.name} makes its own key: let it run fedfms request "
        f"{kit.participant.name} --org {kit.participant.org} --project {project.name}"
        for kit in kits
        if kit.state == "waits"
    ]
    notes += [
        f"the new kit of {kit.participant.name} has no private key, which is not here any more: "
        "the .key file of kit/startup/ there is to be kept when the new kit/ takes its place"
        for kit in kits
        if kit.zip is not None and kit.participant.name in keyless
    ]
    root = CertificateState.read(folder.state).root
    assert root is not None
    notes += _endings(kits, root)
    return Provisioned(output=folder.output, fingerprint=fingerprint(root), kits=kits, notes=notes)


# ------------------------------------------------------------------------------- before FLARE runs


def _revoke(
    project: Project,
    state: CertificateState,
    name: str,
    revoked: dict[str, dict[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    if name in revoked:
        raise ConfigError(
            f"{name} was revoked on {revoked[name]['when']} already",
            f"tell the running server, if that was not done: fedfms revoke {name} --kit ADMINKIT",
            code="revoked",
        )
    certificate = state.certificate(name)
    if certificate is None:
        project.find(name)  # names what it may have meant
        raise ConfigError(
            f"{name} never got a certificate", "delete its entry from project.yml", code="no-kit"
        )
    if name in (p.name for p in project.participants if p.type == "server"):
        raise ConfigError(
            "the server cannot be revoked",
            "stop it; a federation with another server is another project",
            code="server",
        )
    state.forget(name)
    notes.append(
        f"{name} is revoked here. Its certificate is valid until {_day(certificate)}, so the "
        f"running server must refuse it: fedfms revoke {name} --kit ADMINKIT"
    )
    return {"serial": f"{certificate.serial_number:x}", "when": now().date().isoformat()}


def _renew(
    project: Project,
    state: CertificateState,
    name: str,
    revoked: dict[str, dict[str, Any]],
    notes: list[str],
) -> None:
    refuse_revoked(name, revoked)
    if project.find(name).own_key:
        raise ConfigError(
            f"{name} makes its own key",
            f"let the site run fedfms request {name} again and approve its request with --renew",
            code="own-key",
        )
    before = state.certificate(name)
    if before is None:
        raise ConfigError(f"{name} has no certificate yet", "run again without --renew")
    state.forget(name)
    notes.append(
        f"{name} has a new key and a new certificate: send it the new zip. The old certificate "
        f"stays valid until {_day(before)}"
    )


def _sent(
    project: Project,
    state: CertificateState,
    name: str,
    keyless: Mapping[str, str],
    notes: list[str],
) -> str:
    """Take a participant's private key out of the state; since when it is not here."""
    if project.find(name).own_key:
        raise ConfigError(
            f"{name} makes its own key, so there is none here", "leave it out", code="own-key"
        )
    if state.certificate(name) is None:
        raise ConfigError(
            f"{name} has no kit yet", "make it and send it first, without --sent", code="no-kit"
        )
    if name not in keyless:
        state.forget_key(name)
        notes.append(
            f"the private key of {name} and its zip are removed here; copies from before, such "
            f"as backups, still hold them. If {name} loses its kit: --renew {name}"
        )
    return keyless.get(name) or now().date().isoformat()


def _without_keys(project: Project, keyless: Mapping[str, str]) -> dict[str, Any]:
    """The project for FLARE: for whom no key is here, it makes none."""
    content = copy.deepcopy(dict(project.content))
    for entry in content["participants"]:
        if entry["name"] in keyless:
            entry["own_key"] = True
    return content


def refuse_revoked(name: str, revoked: Mapping[str, dict[str, Any]]) -> None:
    """Raise ConfigError (revoked) for a participant that was revoked: see WorkingFolder.revoked."""
    if name in revoked:
        raise ConfigError(
            f"{name} was revoked on {revoked[name]['when']}",
            "take it in again under another name; the server keeps refusing this one",
            code="revoked",
        )


def _check_fit(project: Project, state: CertificateState) -> None:
    """FLARE takes a certificate that it made before as it is, whatever project.yml says now."""
    for entry in project.content["participants"]:
        certificate = state.certificate(entry["name"])
        if certificate is None:
            continue
        said = {
            "org": subject_of(certificate, NameOID.ORGANIZATION_NAME),
            "role": subject_of(certificate, NameOID.UNSTRUCTURED_NAME),
        }
        for key in ("org", "role"):
            if key in entry and entry[key] != said[key]:
                raise _another_certificate(entry["name"], f"{key} {said[key]}", str(entry[key]))
        if entry["type"] == "server":
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            known = {str(name.value) for name in names.value}
            hosts = entry.get("host_names") or []
            hosts = [hosts] if isinstance(hosts, str) else hosts
            for host in [project.server_host, *hosts]:
                if host not in known:
                    raise _another_certificate(entry["name"], ", ".join(sorted(known)), host)


def _another_certificate(name: str, before: str, after: str) -> ConfigError:
    return ConfigError(
        f"project.yml says {after} for {name}, but its certificate says {before}",
        f"undo the change, or give it a new certificate: --renew {name}",
        code="certificate-differs",
    )


# ------------------------------------------------------------------------------------- the kits


def _assemble(
    participant: Participant, project: Project, made: Path, scratch: Path, images: Sequence[Image]
) -> Path:
    """A kit as it is sent: FLARE's files in kit/, and around it what its owner edits and reads."""
    folder = scratch / "kits" / participant.name
    (folder / "kit").mkdir(parents=True)
    for name in _OF_FLARE:
        (made / name).rename(folder / "kit" / name)
    entry = next(e for e in project.content["participants"] if e["name"] == participant.name)
    write_templates(
        "site" if participant.type == "client" else participant.type,
        folder,
        settings=digest_settings(images),
        site=participant.name,
        server_host=project.server_host,
        server_port=project.server_port,
        project=project.name,
        role=entry.get("role", ""),
    )
    return folder


def _home(folder: WorkingFolder, name: str) -> Path:
    return folder.home / "kits" / name


def _publish(
    participant: Participant,
    fresh: Path,
    folder: WorkingFolder,
    scratch: Path,
    keyless: Mapping[str, str],
    *,
    just_sent: bool,
) -> MadeKit:
    """Put a kit and its zip in their place, unless the same are there."""
    certificate = kit_certificate(fresh / "kit")
    if certificate is None:
        _take_away(participant.name, folder, scratch)
        return MadeKit(participant=participant, state="waits", zip=None, valid_until=None)
    packed, target = scratch / f"{participant.name}.zip", folder.zips / f"{participant.name}.zip"
    write_zip(fresh, packed)
    home = _home(folder, participant.name)
    state: State = "changed" if target.is_file() else "new"
    if just_sent or (participant.name in keyless and _same(fresh, home)):
        state = "sent"
    elif target.is_file() and filecmp.cmp(packed, target, shallow=False):
        state = "same"
    if not _same(fresh, home):
        home.parent.mkdir(exist_ok=True)
        if home.exists():
            home.rename(scratch / f"before-{home.name}")
        fresh.rename(home)
    if just_sent:
        target.unlink(missing_ok=True)
    if state in ("new", "changed"):
        packed.replace(target)
    return MadeKit(
        participant=participant,
        state=state,
        zip=target if target.is_file() else None,
        valid_until=certificate.not_valid_after_utc,
    )


def _retire(
    project: Project,
    folder: WorkingFolder,
    scratch: Path,
    revoked: dict[str, dict[str, Any]],
    notes: list[str],
) -> None:
    """Take away the kits of those who take no part any more."""
    listed = {participant.name for participant in project.participants}
    for home in sorted((folder.home / "kits").iterdir()):
        if home.name in listed:
            continue
        if home.name not in revoked:
            certificate = kit_certificate(home / "kit")
            until = f" until {_day(certificate)}" if certificate else ""
            notes.append(
                f"{home.name} is not in project.yml any more, but its certificate is valid{until}: "
                f"to shut it out, run again with --revoke {home.name}"
            )
        _take_away(home.name, folder, scratch)


def _take_away(name: str, folder: WorkingFolder, scratch: Path) -> None:
    (folder.zips / f"{name}.zip").unlink(missing_ok=True)
    home = _home(folder, name)
    if home.exists():
        home.rename(scratch / f"retired-{name}")


def _write_zip_sums(folder: WorkingFolder) -> None:
    content = list_sums(folder.zips, sorted(path.name for path in folder.zips.glob("*.zip")))
    target = folder.zips / SUMS_FILE
    if not target.is_file() or target.read_text() != content:
        write_whole(target, content)


def _lay_out(kit: Path, target: Path) -> None:
    """Copy a kit into a folder that may be a mounted volume, which cannot be renamed itself.

    A container may run as another user of the same group: the group may read. The checksums come
    last, so that half a kit does not pass for a whole one.
    """
    target.mkdir(parents=True, exist_ok=True)
    if all(_same(kit / name, target / name) for name in _OF_FLARE):
        return
    scratch = target / ".unpacking"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(kit, scratch / "new")
    for path in [scratch, *scratch.rglob("*")]:
        mode = path.stat().st_mode
        path.chmod(0o750 if path.is_dir() or mode & stat.S_IXUSR else 0o640)
    for name in _OF_FLARE:
        if (target / name).exists():
            (target / name).rename(scratch / name)
        (scratch / "new" / name).rename(target / name)
    shutil.rmtree(scratch)


def _same(one: Path, other: Path) -> bool:
    """Whether two files or folders hold the same; modes do not count."""
    if one.is_dir() != other.is_dir() or not other.exists():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names = {path.name for path in one.iterdir()}
    others = {path.name for path in other.iterdir()}
    return names == others and all(_same(one / name, other / name) for name in names)


# ------------------------------------------------------------------------------------- what to say


def _endings(kits: Sequence[MadeKit], root: x509.Certificate) -> list[str]:
    notes = []
    for kit in kits:
        if kit.valid_until is None:
            continue
        days = (kit.valid_until - now()).days
        if days < RENEW_DAYS:
            ends = f"ends in {days} days" if days >= 0 else "has ended"
            notes.append(
                f"the certificate of {kit.participant.name} {ends}, on "
                f"{kit.valid_until:%Y-%m-%d}: --renew {kit.participant.name}"
            )
    if (root.not_valid_after_utc - now()).days < 360:
        notes.append(
            f"the certificate authority ends on {_day(root)}; no certificate outlives it. Plan a "
            "new project, with new kits for everybody"
        )
    return notes


def _day(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"
