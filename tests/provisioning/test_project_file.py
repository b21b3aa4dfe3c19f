"""Every mistake in project.yml is one error that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project_files import COORDINATOR, PROJECT, SERVER, entry, site, write_project

from fedfms.errors import ConfigError
from fedfms.provisioning.project import read_project


def test_the_project_files_of_the_repository_can_be_used() -> None:
    project = read_project(PROJECT)
    assert (project.name, project.server_host, project.server_port) == ("fedfms", SERVER, 8002)
    kinds = [participant.type for participant in project.participants]
    assert [kinds.count(kind) for kind in ("server", "client", "admin")] == [1, 4, 3]
    demo = read_project(PROJECT.parent / "demo.yml")
    assert demo.server_host == "server"


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "api version": (lambda c: c.update(api_version=4), "api_version: 3"),
    "no name": (lambda c: c.pop("name"), "such as name: fedfms"),
    "name with a slash": (lambda c: c.update(name="a/b"), "such as name: fedfms"),
    "name of the zips' folder": (lambda c: c.update(name="kits"), "and not kits"),
    "unknown key": (lambda c: c.update(participant=[]), "did you mean participants"),
    "no participants": (lambda c: c.pop("participants"), "list the server"),
    "no type": (lambda c: entry(c, "site-1").pop("type"), "server, client"),
    "relay": (lambda c: entry(c, "site-1").update(type="relay"), "server, client"),
    "misspelt key": (lambda c: entry(c, "site-1").update(orgg="x"), "did you mean org"),
    "connection of its own": (
        lambda c: entry(c, "site-1").update(connect_to="x"),
        "known are: name, type, org, own_key",
    ),
    "org with hyphen": (lambda c: entry(c, "site-1").update(org="a-b"), "hospital_1"),
    "no org": (lambda c: entry(c, "site-1").pop("org"), "hospital_1"),
    "site name": (lambda c: entry(c, "site-1").update(name="site 1"), "letters, digits, - and _"),
    "name that FLARE's state uses": (
        lambda c: entry(c, "site-1").update(name="root_cert"),
        "use another one",
    ),
    "twice": (lambda c: c["participants"].append(site("site-1")), "its own name"),
    "twice but for capitals": (lambda c: c["participants"].append(site("Site-1")), "its own name"),
    "no server": (lambda c: c["participants"].remove(entry(c, SERVER)), "exactly one"),
    "two servers": (
        lambda c: c["participants"].append({**entry(c, SERVER), "name": "other.example.org"}),
        "exactly one",
    ),
    "no site": (
        lambda c: c.update(participants=[p for p in c["participants"] if p["type"] != "client"]),
        "type: client",
    ),
    "server is no host name": (lambda c: entry(c, SERVER).update(name="my_server"), "host name"),
    "server name too long": (
        lambda c: entry(c, SERVER).update(name=f"{'a' * 60}.example.org"),
        "default_host",
    ),
    "port": (lambda c: entry(c, SERVER).update(fed_learn_port=443), "1024 to 65535"),
    "port is text": (lambda c: entry(c, SERVER).update(fed_learn_port="8002"), "1024 to 65535"),
    "two ports": (lambda c: entry(c, SERVER).update(admin_port=8003), "remove admin_port"),
    "role": (lambda c: entry(c, COORDINATOR).update(role="admin"), "project_admin, org_admin"),
    "admin is no address": (lambda c: entry(c, COORDINATOR).update(name="me"), "e-mail"),
    "nobody may submit": (
        lambda c: c.update(
            participants=[p for p in c["participants"] if p.get("role") in (None, "member")]
        ),
        "role: project_admin",
    ),
    "no builders": (lambda c: c.pop("builders"), "as it is"),
    "builder missing": (lambda c: c["builders"].pop(2), "as it is"),
    "order of builders": (lambda c: c["builders"].reverse(), "in this order: WorkspaceBuilder"),
    "http": (lambda c: c["builders"][1]["args"].pop("scheme"), "scheme: grpc"),
    "short-lived CA": (
        lambda c: c["builders"][3].update(args={"root_valid_days": 360}),
        "720 days or more",
    ),
    "args are a text": (lambda c: c["builders"][1].update(args="scheme"), "scheme: grpc"),
    "type is a list": (lambda c: entry(c, "site-1").update(type=["client"]), "write server"),
    "own key is text": (lambda c: entry(c, "site-1").update(own_key="yes"), "true or false"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_fix(tmp_path: Path, mistake: str) -> None:
    change, fix = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        read_project(write_project(tmp_path / "project.yml", change))
    assert fix in caught.value.fix
    assert caught.value.code == "project"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nname: b\n", "line 2: the key name stands twice"),
        ("participants: [", "line 1"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
    ],
)
def test_what_is_no_project_file_at_all(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "project.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_project(path)
    with pytest.raises(ConfigError, match="there is no"):
        read_project(tmp_path / "other.yml")
