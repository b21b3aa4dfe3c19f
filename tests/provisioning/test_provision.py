"""`fedfms provision`: what it makes, and that it changes only what must change."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from project_files import (
    COORDINATOR,
    NAME,
    PROJECT,
    SERVER,
    SITES,
    Made,
    certificate,
    entry,
    root,
    site,
    write_project,
    zip_names,
)
from project_files import (
    hashes as hashes_of,
)

from fedfms.errors import ConfigError, FederationError
from fedfms.kits.checksums import check_sums
from fedfms.provisioning.provision import Provisioned, provision

Run = Callable[..., Provisioned]

KIT = {
    *("kit/SHA256SUMS", "kit/SHA256SUMS.sig", "kit/fedfms.json"),
    *("kit/startup/rootCA.pem", "kit/local/resources.json.default"),
}
POLICIES = {"kit/local/authorization.json", "kit/local/resources.json"}
CONTENT = {
    SERVER: {
        *(*KIT, *POLICIES, "README.md", ".env", "compose.yml"),
        *("kit/startup/server.crt", "kit/startup/server.key", "kit/startup/fed_server.json"),
    },
    "site-1": {
        *(*KIT, *POLICIES, "README.md", ".env", "compose.yml", "compose.gpu.yml"),
        *("site.yml", "check-site", "policy/privacy.json", "policy/authorization.json"),
        *("kit/startup/client.crt", "kit/startup/client.key", "kit/startup/fed_client.json"),
    },
    COORDINATOR: {
        *(*KIT, "README.md", "kit/startup/fl_admin.sh"),
        *("kit/startup/client.crt", "kit/startup/client.key", "kit/startup/fed_admin.json"),
    },
}


# ------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("name", CONTENT)
def test_a_zip_holds_the_participants_kit(provisioned: Made, name: str) -> None:
    names = zip_names(provisioned.zip(name))
    assert {path.partition("/")[0] for path in names} == {name}
    assert {f"{name}/{path}" for path in CONTENT[name]} <= names
    keys = {path for path in names if path.endswith(".key")}
    assert len(keys) == 1  # its own, and no other


def test_there_is_one_zip_for_each_participant_and_their_checksums(provisioned: Made) -> None:
    kits = provisioned.result.kits
    assert [kit.participant.name for kit in kits][:5] == [SERVER, *SITES]
    assert len(kits) == 8
    assert {kit.zip for kit in kits} == set((provisioned.output / "kits").glob("*.zip"))
    subprocess.run(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=provisioned.output / "kits", check=True
    )


def test_unzip_gives_the_kit_with_its_modes(provisioned: Made, tmp_path: Path) -> None:
    with zipfile.ZipFile(provisioned.zip("site-1")) as archive:
        modes = {i.filename.partition("/")[2]: i.external_attr >> 16 for i in archive.infolist()}
        archive.extractall(tmp_path)
    assert stat.S_IMODE(modes["kit/startup/client.key"]) == 0o600
    assert stat.S_IMODE(modes["check-site"]) == 0o755
    assert stat.S_IMODE(modes["kit/startup/start.sh"]) == 0o755
    assert stat.S_IMODE(modes["site.yml"]) == 0o644
    assert hashes_of(tmp_path / "site-1") == hashes_of(provisioned.home / "kits" / "site-1")
    check_sums(tmp_path / "site-1" / "kit")


def test_what_holds_keys_is_for_the_coordinator_only(provisioned: Made) -> None:
    for folder in (provisioned.home, provisioned.output / "kits"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    zips = (provisioned.output / "kits").glob("*.zip")
    secret = [provisioned.state, *provisioned.home.rglob("*.key"), *zips]
    assert len(secret) == 1 + 2 * 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_no_placeholder_is_left(provisioned: Made) -> None:
    for name in CONTENT:
        for path in (provisioned.home / "kits" / name).rglob("*"):
            if path.is_file():
                left = re.findall(r"__[A-Z_]+__", path.read_text())
                assert not left, f"{path.name}: {left}"


def test_certificates_are_valid_for_a_year_under_one_long_lived_authority(
    provisioned: Made,
) -> None:
    authority = root(provisioned.kit(SERVER))
    assert (authority.not_valid_after_utc - authority.not_valid_before_utc).days == 3650
    for kit in provisioned.result.kits:
        own = certificate(provisioned.kit(kit.participant.name))
        own.verify_directly_issued_by(authority)
        assert (own.not_valid_after_utc - own.not_valid_before_utc).days == 360
        assert kit.valid_until == own.not_valid_after_utc
    assert provisioned.result.notes == []
    assert provisioned.result.fingerprint.replace(":", "")[6:].lower() == (
        authority.fingerprint(hashes.SHA256()).hex()
    )


def test_flares_own_command_makes_the_same_kits_of_it(tmp_path: Path) -> None:
    command = ["provision", "-p", str(PROJECT), "-w", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kits = tmp_path / "out" / NAME / "prod_00"
    assert {path.name for path in kits.iterdir()} > {SERVER, *SITES, COORDINATOR}
    for kit in kits.iterdir():
        check_sums(kit)


# ------------------------------------------------------------------------- once more, and changes


def test_once_more_changes_nothing(made: Made, run: Run) -> None:
    before = hashes_of(made.output)
    times = {path: path.stat().st_mtime_ns for path in (made.output / "kits").iterdir()}
    result = run()
    assert {kit.state for kit in result.kits} == {"same"}
    after = hashes_of(made.output)
    record = f"{NAME}/project.json"  # the project file lies elsewhere in this copy
    assert {**after, record: ""} == {**before, record: ""}
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_adding_a_site_leaves_all_others_as_they_were(made: Made, run: Run) -> None:
    zips, kits = hashes_of(made.output / "kits"), hashes_of(made.home / "kits")
    made.change(lambda content: content["participants"].insert(2, site("site-5")))
    result = run()
    assert [kit.participant.name for kit in result.kits if kit.state == "new"] == ["site-5"]
    after = hashes_of(made.output / "kits")
    del zips["SHA256SUMS"], after["SHA256SUMS"]
    assert set(after) - set(zips) == {"site-5.zip"}
    assert zips.items() <= after.items()
    assert kits.items() <= hashes_of(made.home / "kits").items()
    certificate(made.kit("site-5")).verify_directly_issued_by(root(made.kit("site-1")))


def test_renewing_gives_one_participant_a_new_key_under_the_same_authority(
    made: Made, run: Run
) -> None:
    old, zips = certificate(made.kit("site-2")), hashes_of(made.output / "kits")
    result = run(renew=["site-2"])
    new, after = certificate(made.kit("site-2")), hashes_of(made.output / "kits")
    changed = {name for name in zips if after[name] != zips[name]}
    assert changed == {"site-2.zip", "SHA256SUMS"}
    assert new.serial_number != old.serial_number
    assert new.public_key() != old.public_key()
    assert new.subject == old.subject
    new.verify_directly_issued_by(root(made.kit("site-1")))
    check_sums(made.kit("site-2"))
    assert "site-2 has a new key" in result.notes[0]
    assert {kit.state for kit in run().kits} == {"same"}  # once is once


def test_a_certificate_near_its_end_is_named_until_it_is_renewed(made: Made, run: Run) -> None:
    _age(made, "site-1", days_left=29)
    _age(made, "site-2", days_left=31)
    _age(made, "site-3", days_left=-1)
    notes = [note for note in run().notes if "certificate of" in note]
    assert [note.split()[3] for note in notes] == ["site-1", "site-3"]
    assert "ends in 2" in notes[0]
    assert "--renew site-1" in notes[0]
    assert "has ended" in notes[1]
    result = run(renew=["site-1", "site-3"])
    assert not [note for note in result.notes if "certificate of" in note]
    now = datetime.datetime.now(datetime.timezone.utc)
    for name in ("site-1", "site-3"):
        assert (certificate(made.kit(name)).not_valid_after_utc - now).days >= 359


def _age(made: Made, name: str, days_left: int) -> None:
    """Give a participant a certificate for its own key that ends soon, by the project's own CA."""
    state = json.loads(made.state.read_text())
    old = x509.load_pem_x509_certificate(state[name]["cert"].encode())
    authority = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days_left, hours=1)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), 7, ends - datetime.timedelta(360), ends
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    state[name]["cert"] = pem.decode()
    made.state.write_text(json.dumps(state))


def test_a_revoked_site_gets_no_kit_any_more(made: Made, run: Run) -> None:
    zips = hashes_of(made.output / "kits")
    serial = certificate(made.kit("site-3")).serial_number
    result = run(revoke=["site-3"])
    after = hashes_of(made.output / "kits")
    assert {name for name in zips if name not in after} == {"site-3.zip"}
    assert {name for name in after if after[name] != zips[name]} == {"SHA256SUMS"}
    assert not made.kit("site-3").exists()
    notes = " ".join(result.notes)
    assert "fedfms revoke site-3 --kit" in notes
    assert "delete its entry" in notes
    assert json.loads((made.home / "revoked.json").read_text())["site-3"]["serial"] == f"{serial:x}"

    assert "site-3" not in {kit.participant.name for kit in run().kits}  # still in project.yml
    made.change(lambda content: content["participants"].remove(entry(content, "site-3")))
    assert run().notes == []
    with pytest.raises(ConfigError, match="revoked on"):
        run(revoke=["site-3"])
    with pytest.raises(ConfigError, match="under another name"):
        run(renew=["site-3"])


def test_a_site_that_was_only_deleted_is_still_valid_and_that_is_said(made: Made, run: Run) -> None:
    made.change(lambda content: content["participants"].remove(entry(content, "site-3")))
    assert "--revoke site-3" in run().notes[0]
    assert not made.zip("site-3").exists()
    run(revoke=["site-3"])  # although it is not listed
    assert "site-3" in json.loads((made.home / "revoked.json").read_text())


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"revoke": ["site-33"]}, "did you mean site-3"),
        ({"renew": ["site-33"]}, "did you mean site-3"),
        ({"revoke": [SERVER]}, "another project"),
    ],
)
def test_what_cannot_be_renewed_or_revoked(
    made: Made, run: Run, options: dict[str, list[str]], fix: str
) -> None:
    before = hashes_of(made.output)
    with pytest.raises(ConfigError, match=fix):
        run(**options)
    assert hashes_of(made.output) == before


# --------------------------------------------------------------------- what would break the others


def test_another_project_name_is_refused_in_the_same_folder(made: Made, run: Run) -> None:
    before = hashes_of(made.output)
    made.change(lambda content: content.update(name="fedfms-2"))
    with pytest.raises(ConfigError, match="write name: fedfms again") as caught:
        run()
    assert caught.value.code == "project-renamed"
    assert hashes_of(made.output) == before


def test_another_project_name_is_refused_in_the_folder_that_goes_by_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    project = write_project(Path("project.yml"))
    assert provision(project).output == tmp_path / "workspace" / NAME
    write_project(project, lambda content: content.update(name="fedfms-2"))
    with pytest.raises(ConfigError, match="write name: fedfms again"):
        provision(project)
    assert [path.name for path in Path("workspace").iterdir()] == [NAME]
    # another file is another federation
    other = write_project(Path("other.yml"), lambda content: content.update(name="other"))
    assert provision(other).output.name == "other"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("site-1", {"org": "elsewhere"}),
        (COORDINATOR, {"role": "lead"}),
        (SERVER, {"host_names": ["second.example.org"]}),
        (SERVER, {"default_host": "10-0-0-1.example.org"}),
    ],
)
def test_what_contradicts_a_certificate_asks_for_another(
    made: Made, run: Run, name: str, change: dict[str, object]
) -> None:
    made.change(lambda content: entry(content, name).update(change))
    with pytest.raises(ConfigError, match=f"--renew {name}"):
        run()
    run(renew=[name])
    check_sums(made.kit(name))


def test_a_run_that_fails_leaves_everything_as_it_was(made: Made, run: Run) -> None:
    before = hashes_of(made.output)
    made.change(lambda content: content["builders"][3].update(args={"root_valid_days": 4000}))
    made.change(lambda content: content["participants"].append(site("site-5")))
    with pytest.raises(FederationError, match="root_valid_days=4000 does not match"):
        run(renew=["site-1"])
    assert hashes_of(made.output) == before


def test_what_an_interrupted_run_left_is_removed(made: Made, run: Run) -> None:
    before = hashes_of(made.output)
    (made.home / ".scratch-left" / "kits").mkdir(parents=True)
    (made.home / ".scratch-left" / "kits" / "half.key").write_text("")
    made.zip("site-1").unlink()  # the interruption came before the zip
    assert [k.participant.name for k in run().kits if k.state == "new"] == ["site-1"]
    assert hashes_of(made.output / "kits") == {
        name.removeprefix("kits/"): value
        for name, value in before.items()
        if name.startswith("kits/")
    }
    assert not list(made.home.glob(".scratch-*"))


def test_two_runs_at_once_are_refused(made: Made, run: Run) -> None:
    with (made.home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FederationError, match="another fedfms works"):
            run()
    run()


def test_a_damaged_state_is_never_made_anew(made: Made, run: Run) -> None:
    made.state.write_text("{")
    with pytest.raises(FederationError, match="backup"):
        run()
    assert made.state.read_text() == "{"


# --------------------------------------------------------------- containers on the same machine


def test_kits_are_laid_out_for_containers_of_any_user_of_the_group(
    made: Made, run: Run, tmp_path: Path
) -> None:
    kits = tmp_path / "volumes"
    (kits / "site-1").mkdir(parents=True, mode=0o770)  # a mounted volume cannot be renamed
    volume = (kits / "site-1").stat().st_ino
    run(unpack=kits)
    assert (kits / "site-1").stat().st_ino == volume
    for name in (SERVER, *SITES, COORDINATOR):
        check_sums(kits / name)
    assert hashes_of(kits / "site-1") == hashes_of(made.kit("site-1"))
    files = [path for path in (kits / "site-1").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o047 == 0o040 for path in files)

    times = {path: path.stat().st_mtime_ns for path in files}
    run(unpack=kits)
    assert {path: path.stat().st_mtime_ns for path in files} == times
    run(unpack=kits, renew=["site-1"])
    check_sums(kits / "site-1")
    assert certificate(kits / "site-1") == certificate(made.kit("site-1"))
