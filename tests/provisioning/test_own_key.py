"""A site that makes its own key: the key never travels, and nobody can take the site's place."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from project_files import (
    NAME,
    PROJECT,
    Made,
    certificate,
    entry,
    hashes,
    root,
    site,
    write_project,
    zip_names,
)

from fedfms.errors import ConfigError, FederationError
from fedfms.kits.checksums import check_sums
from fedfms.provisioning.own_key import Request, approve, install, request
from fedfms.provisioning.provision import provision


@dataclass(frozen=True)
class OwnKey:
    """One pass through all three steps; tests do not change it."""

    made: Made
    request: Request
    before: dict[str, str]  # of the zips before the approval
    authority: str
    installed: Path


def with_own_key(content: dict) -> None:
    entry(content, "site-4")["own_key"] = True
    content["participants"].append(site("site-6", own_key=True))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnKey:
    folder = tmp_path_factory.mktemp("own-key")
    project = write_project(folder / "project.yml", with_own_key)
    first = provision(project, folder / "out")
    before = hashes(folder / "out" / "kits")
    asked = request("site-4", "hospital_4", NAME, folder / "at-the-site" / "request")
    made = Made(project, folder / "out", approve(asked.file, project, asked.key, folder / "out"))
    kit = folder / "at-the-site" / "site-4.zip"
    shutil.copy(made.zip("site-4"), kit)
    installed = install(kit, asked.folder, first.fingerprint, None)
    return OwnKey(made, asked, before, first.fingerprint, installed)


@pytest.fixture
def made(own: OwnKey, tmp_path: Path) -> Made:
    shutil.copytree(own.made.output, tmp_path / "out", copy_function=shutil.copy2)
    shutil.copy2(own.made.project, tmp_path / "project.yml")
    return Made(tmp_path / "project.yml", tmp_path / "out", own.made.result)


def test_the_key_stays_at_the_site(own: OwnKey) -> None:
    key = own.request.folder / "site-4.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.request.folder.stat().st_mode) == 0o700
    assert zip_names(own.request.file) == {"request.json", "site.yaml", "site-4.csr"}
    secret = key.read_bytes()
    middle = secret.splitlines()[5]
    for path in [own.request.file, own.made.zip("site-4")]:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                assert middle not in content
                assert b"PRIVATE KEY" not in content
    for path in own.made.output.rglob("*"):  # nor is it anywhere at the coordinator
        assert not path.is_file() or middle not in path.read_bytes()


def test_the_certificate_is_of_the_authority_of_all_other_kits(own: OwnKey) -> None:
    mine, authority = certificate(own.installed / "kit"), root(own.made.kit("site-1"))
    mine.verify_directly_issued_by(authority)
    key = serialization.load_pem_private_key(
        (own.installed / "kit/startup/client.key").read_bytes(), None
    )
    assert key.public_key() == mine.public_key()
    names = [attribute.value for attribute in mine.subject]
    assert names[:2] == ["site-4", "hospital_4"]
    assert (mine.not_valid_after_utc - mine.not_valid_before_utc).days == 360


def test_the_installed_kit_is_like_any_other(own: OwnKey) -> None:
    other = own.made.home / "kits" / "site-1"
    files = {path.relative_to(other) for path in other.rglob("*")}
    assert {path.relative_to(own.installed) for path in own.installed.rglob("*")} == files
    check_sums(own.installed / "kit")
    key = own.installed / "kit/startup/client.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (own.installed / "check-site").stat().st_mode & stat.S_IXUSR


def test_an_approval_leaves_all_other_kits_as_they_were(own: OwnKey) -> None:
    after = hashes(own.made.output / "kits")
    assert {name for name in after if after[name] != own.before.get(name)} == {
        "site-4.zip",
        "SHA256SUMS",
    }


def test_a_site_that_has_not_asked_yet_gets_no_kit(own: OwnKey) -> None:
    assert "site-4.zip" not in own.before
    waiting = [kit.participant.name for kit in own.made.result.kits if kit.state == "waits"]
    assert waiting == ["site-6"]
    assert "fedfms request site-6 --org site_6 --project fedfms" in own.made.result.notes[0]
    assert not own.made.zip("site-6").exists()


def test_provisioning_again_and_approving_again_change_nothing(own: OwnKey, made: Made) -> None:
    before = hashes(made.output / "kits")
    provision(made.project, made.output)
    approve(own.request.file, made.project, own.request.key, made.output)
    assert hashes(made.output / "kits") == before


def test_a_site_may_change_the_way(made: Made) -> None:
    others = hashes(made.output / "kits")
    made.change(lambda content: entry(content, "site-1").update(own_key=True))
    result = provision(made.project, made.output)
    assert {kit.participant.name for kit in result.kits if kit.state == "waits"} == {
        "site-1",
        "site-6",
    }
    assert not made.zip("site-1").exists()
    assert "stays valid until" in result.notes[0]
    made.change(lambda content: entry(content, "site-1").update(own_key=False))
    provision(made.project, made.output)
    check_sums(made.kit("site-1"))
    assert (made.kit("site-1") / "startup" / "client.key").is_file()
    after = hashes(made.output / "kits")
    assert {name for name in after if after[name] != others[name]} == {"site-1.zip", "SHA256SUMS"}


# --------------------------------------------------------------------------- what is refused


def test_a_request_with_another_fingerprint_is_refused(own: OwnKey, made: Made) -> None:
    before = hashes(made.output)
    with pytest.raises(ConfigError, match="telephone") as caught:
        approve(own.request.file, made.project, "SHA256:" + "00:" * 31 + "00", made.output)
    assert caught.value.code == "wrong-fingerprint"
    assert hashes(made.output) == before


@pytest.mark.parametrize(
    ("name", "org", "project", "code"),
    [
        ("site-1", "hospital_1", NAME, "no-own-key"),  # another site's place
        ("site-6", "hospital_1", NAME, "other-org"),
        ("site-7", "hospital_7", NAME, "no-participant"),
        ("site-6", "site_6", "another", "other-project"),
    ],
)
def test_a_request_that_project_yml_does_not_know_is_refused(
    made: Made, tmp_path: Path, name: str, org: str, project: str, code: str
) -> None:
    asked = request(name, org, project, tmp_path / "request")
    before = hashes(made.output)
    with pytest.raises(ConfigError) as caught:
        approve(asked.file, made.project, asked.key, made.output)
    assert caught.value.code == code
    assert hashes(made.output) == before


def test_a_request_that_was_changed_is_refused_by_flare(made: Made, tmp_path: Path) -> None:
    asked = request("site-6", "site_6", NAME, tmp_path / "request")
    other = request("site-6", "site_6", NAME, tmp_path / "other")
    with zipfile.ZipFile(asked.file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["site-6.csr"] = (other.folder / "site-6.csr").read_bytes()
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    before = hashes(made.output)
    with pytest.raises(FederationError, match="CSR hash does not match"):
        approve(tmp_path / "mixed.zip", made.project, asked.key, made.output)
    assert hashes(made.output) == before
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(FederationError, match="is no request"):
        approve(tmp_path / "text.zip", made.project, asked.key, made.output)


def test_a_second_key_needs_an_explicit_renewal(own: OwnKey, made: Made, tmp_path: Path) -> None:
    asked = request("site-4", "hospital_4", NAME, tmp_path / "request")
    with pytest.raises(ConfigError, match="--renew"):
        approve(asked.file, made.project, asked.key, made.output)
    with pytest.raises(ConfigError, match="approve its request with --renew"):
        provision(made.project, made.output, renew=["site-4"])
    others = hashes(made.output / "kits")
    approve(asked.file, made.project, asked.key, made.output, renew=True)
    after = hashes(made.output / "kits")
    assert {name for name in after if after[name] != others[name]} == {"site-4.zip", "SHA256SUMS"}

    # at the site only kit/ is replaced
    folder = tmp_path / "site-4"
    shutil.copytree(own.installed, folder)
    (folder / ".env").write_text("SITE_DATA=/mine\n")
    install(made.zip("site-4"), asked.folder, own.authority, folder)
    assert (folder / ".env").read_text() == "SITE_DATA=/mine\n"
    check_sums(folder / "kit")
    assert certificate(folder / "kit") == certificate(made.kit("site-4"))
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_revoked_site_is_not_approved_again(own: OwnKey, made: Made) -> None:
    provision(made.project, made.output, revoke=["site-4"])
    with pytest.raises(ConfigError, match="under another name"):
        approve(own.request.file, made.project, own.request.key, made.output)


def test_there_must_be_an_authority_first(own: OwnKey, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedfms provision"):
        approve(own.request.file, own.made.project, own.request.key, tmp_path / "elsewhere")


def test_a_kit_of_another_authority_is_refused(own: OwnKey, tmp_path: Path) -> None:
    other = provision(PROJECT, tmp_path / "out").fingerprint
    with pytest.raises(ConfigError, match="telephone") as caught:
        install(own.made.zip("site-4"), own.request.folder, other, tmp_path / "kit")
    assert caught.value.code == "wrong-fingerprint"
    assert not (tmp_path / "kit").exists()


def test_a_kit_for_another_key_or_site_is_refused(own: OwnKey, tmp_path: Path) -> None:
    second = request("site-4", "hospital_4", NAME, tmp_path / "second")
    with pytest.raises(ConfigError, match="not for the key of this request"):
        install(own.made.zip("site-4"), second.folder, own.authority, tmp_path / "kit")
    with pytest.raises(ConfigError, match="this kit is for site-1"):
        install(own.made.zip("site-1"), own.request.folder, own.authority, tmp_path / "kit")
    with pytest.raises(ConfigError, match="fedfms request"):
        install(own.made.zip("site-4"), tmp_path, own.authority, tmp_path / "kit")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("site-4/kit/local/resources.json", "kit-changed"),
        ("site-4/../../outside.txt", "bad-zip"),
        ("/outside.txt", "bad-zip"),
        ("other/file.txt", "bad-zip"),
    ],
)
def test_a_kit_that_was_changed_on_its_way_is_refused(
    own: OwnKey, tmp_path: Path, name: str, code: str
) -> None:
    with zipfile.ZipFile(own.made.zip("site-4")) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for info, content in members.items():
            if info.filename != name:
                archive.writestr(info, content)
        archive.writestr(name, "{}")
    with pytest.raises(ConfigError) as caught:
        install(tmp_path / "changed.zip", own.request.folder, own.authority, tmp_path / "kit")
    assert caught.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"changed.zip"}


def test_a_request_never_overwrites_a_key(own: OwnKey) -> None:
    key = hashlib.sha256((own.request.folder / "site-4.key").read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="must not be lost"):
        request("site-4", "hospital_4", NAME, own.request.folder)
    assert hashlib.sha256((own.request.folder / "site-4.key").read_bytes()).hexdigest() == key


@pytest.mark.parametrize(
    ("name", "org", "project", "fix"),
    [
        ("site 4", "hospital_4", NAME, "letters, digits, - and _"),
        ("site-4", "hospital-4", NAME, "hospital_1"),
        ("site-4", "hospital_4", "a b", "such as name: fedfms"),
    ],
)
def test_names_are_checked_before_a_key_is_made(
    tmp_path: Path, name: str, org: str, project: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=fix):
        request(name, org, project, tmp_path / "request")
    assert not (tmp_path / "request").exists()
