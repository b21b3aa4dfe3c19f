"""File names that are not UTF-8, as old archives unpack them: read, printed, written, read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfms.contracts.site import SiteConfig
from fedfms.local.sites import Site
from fedfms.local.synthetic import write_phantom_site
from fedfms_lab.study.data import manifest_sha256, read_manifest, read_site, write_manifest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Patients m<FC>ller-001 to -010; the letter is Latin-1, which no UTF-8 has."""
    write_phantom_site(tmp_path / "site", "bright", cases=10, slices=1, seed=3)
    for part in ("images", "labels"):
        for path in (tmp_path / "site" / part).iterdir():
            name = os.fsencode(path.name).replace(b"phantom", b"m\xfcller")
            path.rename(path.with_name(os.fsdecode(name)))
    settings = tmp_path / "site/site.yml"
    settings.write_text(settings.read_text().replace("phantom-", "m.ller-"))
    return tmp_path / "site"


def test_check_data_reads_and_names_them(run: Run, site: Path) -> None:
    code, out, err = run("check-data", site / "site.yml")
    assert code == 0, (out, err)
    next((site / "labels").glob("*-004*")).unlink()
    code, out, _ = run("check-data", site / "site.yml")
    assert code == 1 and r"m\udcfcller-004.nii.gz" in out
    code, out, _ = run("check-data", site / "site.yml", "--json")
    assert code == 1
    said = json.loads(out)
    assert os.fsencode("m\udcfcller-004.nii.gz") in os.fsencode(
        json.dumps(said, ensure_ascii=False)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_they_are_printed_whatever_the_terminal_writes(site: Path, encoding: str) -> None:
    next((site / "labels").glob("*-004*")).unlink()
    done = subprocess.run(
        [sys.executable, "-c", "from fedfms.cli import main; main()", "check-data", "site.yml"],
        cwd=site,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"ller-004.nii.gz" in done.stdout and b"Traceback" not in done.stderr


def test_a_manifest_with_them_comes_back_as_it_was(site: Path, tmp_path: Path) -> None:
    facts, rows = read_site(Site("a", site, None))
    assert {os.fsencode(row.patient) for row in rows} == {
        b"m\xfcller-%03d" % n for n in range(1, 11)
    }
    write_manifest(tmp_path / "manifest.csv", {"a": rows})
    assert b"m\xfcller-001" in (tmp_path / "manifest.csv").read_bytes()
    back = read_manifest(tmp_path / "manifest.csv")["a"]
    assert back == rows
    assert manifest_sha256(back) == facts.manifest_sha256


def test_a_folder_may_be_called_so(site: Path) -> None:
    folder = site.rename(site.with_name(os.fsdecode(b"M\xfcnchen")))
    config = SiteConfig.from_yaml(folder / "site.yml")
    assert os.fsencode(config.data_root).endswith(b"M\xfcnchen")
