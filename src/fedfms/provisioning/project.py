"""project.yml: who takes part. FLARE's own format; checked before anything is made of it.

FLARE finds few mistakes in it, late, and in its own words: an organisation with a hyphen, a second
server, a key that nobody reads. Each of these is one clear error here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedfms.contracts.decode import read_text
from fedfms.contracts.yaml_text import parse_yaml
from fedfms.errors import ConfigError
from fedfms.flare.internals.state import ROOT_CERT, ROOT_KEY
from fedfms.kits.about import ParticipantType

ROLES = ("project_admin", "org_admin", "lead", "member")
SUBMITTERS = ("project_admin", "lead")
DEFAULT_PORT = 8002
ZIPS = "kits"  # the folder of the zips, beside the project's own
MIN_ROOT_DAYS = 720  # twice a certificate: what is renewed shall not end with the root

_KEYS = ("api_version", "name", "description", "participants", "builders")
_PARTICIPANT_KEYS: dict[str, tuple[str, ...]] = {
    "server": (
        *("name", "type", "org"),
        *("fed_learn_port", "admin_port", "default_host", "host_names"),
    ),
    "client": ("name", "type", "org", "own_key"),
    "admin": ("name", "type", "org", "role"),
}
_PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_ADMIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+\.[A-Za-z]{2,}")
_HOST_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_HOST_LABEL}(?:\.{_HOST_LABEL})*")
_ORG = re.compile(r"[A-Za-z0-9_]+")
_TAKEN = (ROOT_CERT, ROOT_KEY)  # keys beside the participants' in state/cert.json

_WORKSPACE = "nvflare.lighter.impl.workspace.WorkspaceBuilder"
_STATIC = "nvflare.lighter.impl.static_file.StaticFileBuilder"
_KIT = "fedfms.flare.kit.FedfmsKitBuilder"
_CERT = "fedfms.flare.kit.FedfmsCertBuilder"
_BUILDERS = (_WORKSPACE, _STATIC, _KIT, _CERT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """One entry of `participants`."""

    name: str
    type: ParticipantType
    org: str
    own_key: bool = False  # a site that makes its own key


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project.yml that was checked."""

    name: str
    participants: tuple[Participant, ...]
    server_host: str
    server_port: int
    content: Mapping[str, Any]  # as read, for FLARE

    def find(self, name: str) -> Participant:
        """The participant of this name.

        Raises:
            ConfigError: there is none.
        """
        for participant in self.participants:
            if participant.name == name:
                return participant
        names = [participant.name for participant in self.participants]
        raise ConfigError(
            f"project.yml lists no {name}", _did_you_mean(name, names), code="no-participant"
        )

    def without(self, names: Iterable[str]) -> Project:
        """The project without these participants."""
        out = set(names)
        entries = [entry for entry in self.content["participants"] if entry["name"] not in out]
        return Project(
            name=self.name,
            participants=tuple(p for p in self.participants if p.name not in out),
            server_host=self.server_host,
            server_port=self.server_port,
            content={**self.content, "participants": entries},
        )


def read_project(path: Path) -> Project:
    """Read and check a project.yml.

    Raises:
        ConfigError: the first thing that is wrong with it, and what to write.
    """
    content = _read(path)
    where = path.name
    _known(content, _KEYS, where)
    if content.get("api_version") != 3:
        raise _wrong(
            f"{where}: api_version is {content.get('api_version')!r}", "write: api_version: 3"
        )
    name = check_project_name(content.get("name"), f"{where}: ")
    entries = content.get("participants")
    if not isinstance(entries, list) or not entries:
        raise _wrong(f"{where} lists no participants", "list the server, the sites and the admins")
    participants = tuple(_participant(entry, number, where) for number, entry in enumerate(entries))
    _check_together(participants, entries, where)
    server = next(entry for entry in entries if entry["type"] == "server")
    _check_builders(content.get("builders"), where)
    return Project(
        name=name,
        participants=participants,
        server_host=server.get("default_host") or server["name"],
        server_port=server.get("fed_learn_port", DEFAULT_PORT),
        content=content,
    )


def check_project_name(name: Any, where: str = "") -> str:
    """A name that FLARE and a file system take for a project."""
    if not isinstance(name, str) or not _PROJECT_NAME.fullmatch(name) or name == ZIPS:
        raise _wrong(
            f"{where}the project's name is {name!r}",
            f"use letters, digits, . _ or -, at most 63, such as name: fedfms; and not {ZIPS}",
        )
    return name


def check_org(org: Any, where: str = "") -> str:
    """A name that FLARE takes for an organisation."""
    if not isinstance(org, str) or not _ORG.fullmatch(org):
        raise _wrong(
            f"{where}org is {org!r}",
            "use letters, digits and _ only; FLARE takes no hyphen there, write hospital_1",
        )
    return org


def check_site_name(name: Any) -> str:
    """A name that FLARE, Docker and a file system take for a site."""
    return _check_name(name, "client", "the site")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _wrong(
            f"there is no {path}", "name your project.yml; start from provisioning/project.yml"
        )
    try:
        content = parse_yaml(read_text(path), str(path))
    except ConfigError as error:
        raise _wrong(error.problem, error.fix) from None
    if not isinstance(content, dict):
        raise _wrong(f"{path} holds no keys", "start from provisioning/project.yml")
    return content


def _participant(entry: Any, number: int, where: str) -> Participant:
    if not isinstance(entry, dict):
        raise _wrong(
            f"{where}: participant {number + 1} is {entry!r}", "write name:, type: and org: for it"
        )
    kind = entry.get("type")
    label = f"{where}, {entry.get('name') or f'participant {number + 1}'}"
    if not (isinstance(kind, str) and kind in _PARTICIPANT_KEYS):
        raise _wrong(f"{label}: type is {kind!r}", "write server, client (a site) or admin")
    _known(entry, _PARTICIPANT_KEYS[kind], label)
    name = _check_name(entry.get("name"), kind, label)
    org = check_org(entry.get("org"), f"{label}: ")
    if kind == "admin" and entry.get("role") not in ROLES:
        raise _wrong(f"{label}: role is {entry.get('role')!r}", f"write one of {', '.join(ROLES)}")
    if kind == "server":
        _check_server(entry, label)
    own_key = entry.get("own_key", False)
    if not isinstance(own_key, bool):
        raise _wrong(f"{label}: own_key is {own_key!r}", "write true or false")
    return Participant(name=name, type=cast(ParticipantType, kind), org=org, own_key=own_key)


def _check_name(name: Any, kind: str, label: str) -> str:
    pattern, whose, advice = {
        "server": (
            _HOST_NAME,
            "a server",
            "write the host name that sites connect to: server.example.org",
        ),
        "client": (_SITE_NAME, "a site", "use letters, digits, - and _, at most 63 of them"),
        "admin": (
            _ADMIN_NAME,
            "an admin",
            "write an e-mail address; FLARE takes it as the user's name",
        ),
    }[kind]
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise _wrong(f"{label}: {name!r} cannot be the name of {whose}", advice)
    if len(name) > 64:  # the length of a common name in a certificate
        raise _wrong(
            f"{label}: the name is longer than 64 characters",
            "use a shorter one" + ("; default_host: may be long" if kind == "server" else ""),
        )
    if name in _TAKEN:
        raise _wrong(f"{label}: FLARE's own files use this name", "use another one")
    return name


def _check_server(entry: Mapping[str, Any], label: str) -> None:
    port = entry.get("fed_learn_port", DEFAULT_PORT)
    for key in ("fed_learn_port", "admin_port"):
        value = entry.get(key, port)
        if isinstance(value, bool) or not isinstance(value, int) or not 1024 <= value <= 65535:
            raise _wrong(
                f"{label}: {key} is {value!r}",
                "write a port from 1024 to 65535; the server does not run as root. Another port "
                "towards the outside is set in the server's .env",
            )
    if entry.get("admin_port", port) != port:
        raise _wrong(
            f"{label}: admin_port {entry['admin_port']} is not fed_learn_port {port}",
            "remove admin_port: the server opens one port for sites and admins",
        )
    hosts = entry.get("host_names", [])
    hosts = [hosts] if isinstance(hosts, str) else hosts
    for host in [*(hosts if isinstance(hosts, list) else [hosts]), entry.get("default_host", "x")]:
        if not isinstance(host, str) or not _HOST_NAME.fullmatch(host):
            raise _wrong(f"{label}: {host!r} is no host name", "write such as server.example.org")


def _check_together(
    participants: tuple[Participant, ...], entries: list[dict[str, Any]], where: str
) -> None:
    seen: dict[str, str] = {}
    for participant in participants:
        # kits are folders, and some file systems do not tell capital letters
        other = seen.setdefault(participant.name.lower(), participant.name)
        if other is not participant.name:
            raise _wrong(
                f"{where} lists {participant.name} twice", "give each participant its own name"
            )
    servers = [p.name for p in participants if p.type == "server"]
    if len(servers) != 1:
        problem = f"lists {len(servers)} servers: {', '.join(servers)}" if servers else "no server"
        raise _wrong(
            f"{where} {problem if servers else 'lists no server'}",
            "list exactly one participant with type: server",
        )
    if not any(p.type == "client" for p in participants):
        raise _wrong(f"{where} lists no site", "list the sites, each with type: client")
    if not any(entry.get("role") in SUBMITTERS for entry in entries):
        raise _wrong(
            f"{where} lists nobody who may submit a job",
            "list a participant with type: admin and role: project_admin",
        )


def _check_builders(builders: Any, where: str) -> None:
    if not isinstance(builders, list) or not all(isinstance(b, dict) for b in builders):
        raise _wrong(
            f"{where} lists no builders", "copy builders: from provisioning/project.yml as it is"
        )
    paths = [builder.get("path") for builder in builders]
    for path in _BUILDERS:
        if path not in paths:
            raise _wrong(
                f"{where}: builders lack {path}",
                "copy builders: from provisioning/project.yml as it is",
            )
    order = [paths.index(path) for path in _BUILDERS]
    if order != sorted(order):
        raise _wrong(
            f"{where}: builders are in another order",
            f"list them in this order: {', '.join(p.rpartition('.')[2] for p in _BUILDERS)}",
        )
    scheme = _args(builders[paths.index(_STATIC)]).get("scheme")
    if scheme != "grpc":
        raise _wrong(
            f"{where}: StaticFileBuilder has scheme {scheme!r}",
            "write scheme: grpc under its args; without it FLARE takes http",
        )
    days = _args(builders[paths.index(_CERT)]).get("root_valid_days", MIN_ROOT_DAYS)
    if isinstance(days, bool) or not isinstance(days, int) or days < MIN_ROOT_DAYS:
        raise _wrong(
            f"{where}: root_valid_days is {days!r}",
            f"write {MIN_ROOT_DAYS} days or more, such as 3650; a certificate under it is valid "
            "for 360 days",
        )


def _args(builder: Mapping[str, Any]) -> Mapping[str, Any]:
    args = builder.get("args")
    return args if isinstance(args, dict) else {}


def _known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise _wrong(f"{where}: unknown key {key!r}", _did_you_mean(str(key), known))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"


def _wrong(problem: str, fix: str) -> ConfigError:
    return ConfigError(problem, fix, code="project")
