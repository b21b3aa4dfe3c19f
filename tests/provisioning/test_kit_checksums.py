"""A kit that is not as it was made is refused, and the file is named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from project_files import COORDINATOR, NAME, SERVER, Made

from fedfms import __version__
from fedfms.errors import ConfigError
from fedfms.kits.about import read_about
from fedfms.kits.checksums import check_sums, write_sums


@pytest.fixture
def kit(provisioned: Made, tmp_path: Path) -> Path:
    shutil.copytree(provisioned.kit("site-1"), tmp_path / "kit")
    return tmp_path / "kit"


def test_other_programs_find_the_checksums_good(kit: Path, tmp_path: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=kit, check=True)
    files = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    listed = {line.split("  ")[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    assert listed == files - {"SHA256SUMS", "SHA256SUMS.sig"}

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    script = """
        openssl x509 -in startup/rootCA.pem -noout -pubkey > "$0/ca.pub"
        base64 -d SHA256SUMS.sig > "$0/sums.sig"
        openssl dgst -sha256 -verify "$0/ca.pub" -signature "$0/sums.sig" SHA256SUMS
    """
    done = subprocess.run(["sh", "-ec", script, str(tmp_path)], cwd=kit, capture_output=True)
    assert done.stdout.strip() == b"Verified OK"


def test_what_flare_and_people_leave_beside_a_kit_does_no_harm(kit: Path) -> None:
    (kit / "transfer").mkdir()
    (kit / "log.txt").write_text("FLARE writes here\n")
    (kit / ".DS_Store").write_text("")
    check_sums(kit)


def _sign_by_another(kit: Path) -> None:
    write_sums(kit, rsa.generate_private_key(public_exponent=65537, key_size=2048))


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "certificate authority exchanged": (
        lambda kit: (kit / "startup/rootCA.pem").write_text(
            (kit / "startup/client.crt").read_text()
        ),
        "kit-unsigned",
        "SHA256SUMS",
    ),
    "server exchanged": (
        lambda kit: (kit / "startup/fed_client.json").write_text(
            (kit / "startup/fed_client.json").read_text().replace(SERVER, "evil.example.org")
        ),
        "kit-changed",
        "startup/fed_client.json",
    ),
    "allow-list loosened": (
        lambda kit: (kit / "local/resources.json").write_text("{}"),
        "kit-changed",
        "local/resources.json",
    ),
    "file removed": (
        lambda kit: (kit / "local/authorization.json").unlink(),
        "kit-incomplete",
        "local/authorization.json",
    ),
    "file added": (
        lambda kit: (kit / "local/comm_config.json").write_text("{}"),
        "kit-changed",
        "local/comm_config.json",
    ),
    "link added": (
        lambda kit: (kit / "local/x.json").symlink_to("/etc/hostname"),
        "kit-changed",
        "local/x.json",
    ),
    "key of somebody else added": (
        lambda kit: (kit / "startup/server.key").write_text(
            (kit / "startup/client.key").read_text()
        ),
        "kit-changed",
        "startup/server.key",
    ),
    "list changed": (
        lambda kit: (kit / "SHA256SUMS").write_text(""),
        "kit-unsigned",
        "SHA256SUMS",
    ),
    "list signed by another": (_sign_by_another, "kit-unsigned", "SHA256SUMS"),
    "signature damaged": (
        lambda kit: (kit / "SHA256SUMS.sig").write_text("§"),
        "kit-unsigned",
        "SHA256SUMS",
    ),
    "no signature": (
        lambda kit: (kit / "SHA256SUMS.sig").unlink(),
        "kit-unsigned",
        "SHA256SUMS.sig",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_kit_is_refused(kit: Path, change: str) -> None:
    check_sums(kit)
    alter, code, name = CHANGES[change]
    alter(kit)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        check_sums(kit)
    assert caught.value.code == code


def test_a_key_in_no_list_must_fit_the_certificate(provisioned: Made, kit: Path) -> None:
    """As in the kit of a site that made its own key."""
    state = json.loads(provisioned.state.read_text())
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    authority = load_pem_private_key(state["root_pri_key"].encode(), None)
    key = (kit / "startup/client.key").read_bytes()
    (kit / "startup/client.key").unlink()
    write_sums(kit, authority)
    check_sums(kit)  # not there yet

    (kit / "startup/client.key").write_bytes(key)
    check_sums(kit)
    other = (provisioned.kit("site-2") / "startup/client.key").read_bytes()
    (kit / "startup/client.key").write_bytes(other)
    with pytest.raises(ConfigError, match=r"client\.key does not belong"):
        check_sums(kit)


@pytest.mark.parametrize(
    ("name", "kind"), [(SERVER, "server"), ("site-1", "client"), (COORDINATOR, "admin")]
)
def test_a_kit_says_whose_it_is(provisioned: Made, name: str, kind: str) -> None:
    about = read_about(provisioned.kit(name))
    assert (about.participant, about.type, about.project) == (name, kind, NAME)
    assert (about.server_host, about.server_port) == (SERVER, 8002)
    assert (about.version, about.nvflare[:3]) == (__version__, "2.9")


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON", '{"project": 1}'])
def test_a_kit_that_does_not_say_is_none(kit: Path, content: str) -> None:
    (kit / "fedfms.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_about(kit)
    assert caught.value.code == "kit-changed"
    with pytest.raises(ConfigError, match="unzipped kit") as caught:
        read_about(kit / "startup")
    assert caught.value.code == "no-kit"
