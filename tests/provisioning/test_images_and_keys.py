"""Kits name the federation's images and carry bills; keys go once their kit is sent."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from project_files import COORDINATOR, NAME, SERVER, Made, certificate, hashes, zip_names

import fedfms
from fedfms.errors import ConfigError, FederationError
from fedfms.kits.checksums import check_sums
from fedfms.provisioning.backup import backup, restore
from fedfms.provisioning.images import look_at
from fedfms.provisioning.provision import Provisioned

sys.path.insert(0, str(Path(__file__).parents[1]))
from memory_peak import forget_peak, peak

Run = Callable[..., Provisioned]
ID = "sha256:" + 32 * "3f"
OTHER = "sha256:" + 32 * "4a"
WHEEL = Path(fedfms.__file__).with_name("sbom.cdx.json")


# --------------------------------------------------------------------------------- bills, digests


@pytest.mark.parametrize("name", [SERVER, "site-1", COORDINATOR])
def test_a_kit_carries_the_bill_of_the_package(provisioned: Made, name: str) -> None:
    bills = provisioned.kit(name) / "bills"
    assert (bills / "wheel.cdx.json").read_bytes() == WHEEL.read_bytes()
    text = (bills / "wheel.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert (bills / "images.txt").read_text() == ""  # nobody named one
    assert f"{name}/kit/bills/wheel.cdx.json" in zip_names(provisioned.zip(name))


def test_a_kit_names_the_images_and_its_authority_signs_them(run: Run, made: Made) -> None:
    before = hashes(made.output / "kits")
    run(images=[f"fedfms:0.1.0={ID}", f"fedfms:0.1.0-cuda={ID}"])
    expected = f"{ID}  fedfms:0.1.0\n{ID}  fedfms:0.1.0-cuda\n"
    for name in (SERVER, "site-1", COORDINATOR):
        assert (made.kit(name) / "bills/images.txt").read_text() == expected
    after = hashes(made.output / "kits")
    assert all(after[name] != before[name] for name in after)

    run()  # they are remembered
    assert hashes(made.output / "kits") == after
    run(images=[f"fedfms:0.2.0={ID}"])
    kit = made.kit("site-1")
    check_sums(kit)
    assert (kit / "bills/images.txt").read_text() == f"{ID}  fedfms:0.2.0\n"
    (kit / "bills/images.txt").write_text(f"{ID.replace('3', '4')}  fedfms:0.2.0\n")
    with pytest.raises(ConfigError, match=r"bills/images\.txt is not as the coordinator"):
        check_sums(kit)


@pytest.mark.parametrize(
    ("images", "plain", "cuda"),
    [
        ([], "", ""),
        ([f"fedfms:0.1.0={ID}"], ID, ""),
        ([f"fedfms:0.1.0={ID}", f"r.example/fedfms:0.1.0-cuda={OTHER}"], ID, OTHER),
        ([f"fedfms:0.1.0={ID}", f"fedfms:0.1.1={OTHER}"], "", ""),  # whichever it starts
    ],
)
def test_a_kit_sets_the_digest_that_receipts_and_records_name(
    run: Run, made: Made, images: list[str], plain: str, cuda: str
) -> None:
    run(images=images)
    for name, expected in (
        ("site-1", {"FEDFMS_IMAGE_DIGEST": plain, "FEDFMS_GPU_IMAGE_DIGEST": cuda}),
        (SERVER, {"FEDFMS_IMAGE_DIGEST": plain}),
    ):
        text = (made.kit(name).parent / ".env").read_text()
        lines = [line for line in text.splitlines() if "IMAGE_DIGEST=" in line]
        assert lines == [
            f"{key}={digest}" if digest else f"# {key}=" for key, digest in expected.items()
        ]
        assert "__" not in text


def test_a_servers_kit_comes_back_from_a_backup_as_it_was_signed(
    provisioned: Made, tmp_path: Path
) -> None:
    (tmp_path / "workspace").mkdir()
    kit = provisioned.kit(SERVER)
    made = backup(tmp_path / "server.tar", tmp_path / "workspace", kit)
    restore(made.file, tmp_path / "new", tmp_path / "kit")
    check_sums(tmp_path / "kit")
    assert hashes(tmp_path / "kit") == hashes(kit)


@pytest.mark.parametrize("text", ["fedfms:0.1.0=sha256:12", "=" + ID, "fedfms=3f", "fedfms="])
def test_what_is_no_digest_is_refused_and_nothing_changes(run: Run, made: Made, text: str) -> None:
    before = hashes(made.output)
    with pytest.raises(ConfigError, match="docker image inspect") as caught:
        run(images=[text])
    assert caught.value.code == "bad-digest"
    assert hashes(made.output) == before


ENGINE = """#!/bin/sh
case "$1" in
  info) echo 27.0 ;;
  image) echo '[{"Id": "%s", "RepoDigests": []}]' ;;
  create) echo abc ;;
  cp) cat %s ;;
esac
"""


def answer_with(folder: Path, member: tarfile.TarInfo, size: int, data: bytes) -> None:
    """An engine that copies this out of any image; what `size` says beyond the data are zeros."""
    member.size = size
    copied = folder / "copied.tar"
    copied.write_bytes(member.tobuf() + data)
    with copied.open("r+b") as file:
        file.truncate(512 + size + 1024)
    engine = folder / "docker"
    engine.write_text(ENGINE % (ID, copied))
    engine.chmod(0o755)


def test_the_bill_of_an_image_is_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    text = WHEEL.read_bytes()
    answer_with(tmp_path, tarfile.TarInfo("sbom.cdx.json"), len(text), text)
    assert look_at("fedfms:0.1.0").bill == text.decode()
    link = tarfile.TarInfo("sbom.cdx.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad = [
        (tarfile.TarInfo("sbom.cdx.json"), 2 << 30, b"{", "cut off|larger"),
        (tarfile.TarInfo("sbom.cdx.json"), 4, b"[1] ", "no JSON object"),
        (link, 0, b"", "no plain file"),
    ]
    before = forget_peak()
    for member, size, data, says in bad:
        answer_with(tmp_path, member, size, data)
        with pytest.raises(FederationError, match=says) as caught:
            look_at("fedfms:0.1.0")
        assert caught.value.code == "bad-bill"
    assert peak() - before < 100 << 20


# -------------------------------------------------------------------------------------------- keys


@pytest.fixture
def keys(made: Made) -> dict[str, bytes]:
    """Every participant's private key, PEM."""
    state = json.loads(made.state.read_text())
    return {n: state[n]["pri_key"].encode() for n in ("site-1", "site-2", SERVER, COORDINATOR)}


def files_with(key: bytes, made: Made) -> list[str]:
    """Where a private key is at the coordinator; in JSON too, which writes its lines in one."""
    return [
        path.relative_to(made.output).as_posix()
        for path in sorted(made.output.rglob("*"))
        if path.is_file() and key in path.read_bytes().replace(b"\\n", b"\n")
    ]


@pytest.mark.parametrize("name", ["site-1", SERVER, COORDINATOR])
def test_the_key_of_a_sent_kit_is_nowhere_at_the_coordinator(
    run: Run, made: Made, keys: dict[str, bytes], name: str
) -> None:
    assert len(files_with(keys[name], made)) == 3  # in state, kit and zip it is found
    others = {other: files_with(key, made) for other, key in keys.items() if other != name}
    own = certificate(made.kit(name)).serial_number
    result = run(sent=[name])
    assert files_with(keys[name], made) == []
    assert not made.zip(name).exists()
    assert {other: files_with(keys[other], made) for other in others} == others
    assert {kit.participant.name: kit.state for kit in result.kits}[name] == "sent"
    assert any(name in note and "backups" in note for note in result.notes)

    result = run()  # nothing comes back
    assert files_with(keys[name], made) == [] and not made.zip(name).exists()
    assert {kit.participant.name: kit.state for kit in result.kits}[name] == "sent"
    assert result.notes == []
    assert certificate(made.kit(name)).serial_number == own


def test_a_new_kit_of_it_has_no_key_and_is_whole_with_the_one_that_was_sent(
    run: Run, made: Made, tmp_path: Path
) -> None:
    sent = tmp_path / "at-the-site"
    shutil.copytree(made.kit("site-1"), sent)
    run(sent=["site-1"])
    result = run(images=[f"fedfms:0.1.0={ID}"])
    (kit,) = (kit for kit in result.kits if kit.participant.name == "site-1")
    assert kit.state == "new" and kit.zip is not None
    assert not [name for name in zip_names(made.zip("site-1")) if name.endswith(".key")]
    assert any("site-1 has no private key" in note for note in result.notes)
    fresh = tmp_path / "fresh"
    shutil.copytree(made.kit("site-1"), fresh)
    shutil.copy(sent / "startup/client.key", fresh / "startup")
    check_sums(fresh)
    shutil.copy(made.kit("site-2") / "startup/client.key", fresh / "startup")
    with pytest.raises(ConfigError, match=r"client\.key does not belong"):
        check_sums(fresh)
    run(sent=["site-1"])  # once more, for the new zip
    assert not made.zip("site-1").exists()


def test_a_lost_kit_is_made_anew_with_a_new_key(run: Run, made: Made) -> None:
    before = certificate(made.kit("site-1")).serial_number
    run(sent=["site-1"])
    run(renew=["site-1"])
    assert certificate(made.kit("site-1")).serial_number != before
    assert [name for name in zip_names(made.zip("site-1")) if name.endswith(".key")]
    assert "site-1" not in json.loads((made.output / NAME / "sent.json").read_text())
    check_sums(made.kit("site-1"))


def test_what_was_not_sent_from_here_is_told(run: Run, made: Made) -> None:
    before = hashes(made.output)
    with pytest.raises(ConfigError):
        run(sent=["nobody"])
    made.change(lambda c: c["participants"][1].update(own_key=True))
    with pytest.raises(ConfigError, match="makes its own key") as caught:
        run(sent=["site-1"])
    assert caught.value.code == "own-key"
    assert hashes(made.output) == before
