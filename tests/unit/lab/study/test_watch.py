from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedfms_lab.study.watch import opened_files, write_watch

# an audit hook stays for good, so each try is a process of its own
PROGRAM = """
import os, sys
from pathlib import Path
from fedfms_lab.study.watch import watch_files
watch_files(Path(sys.argv[1]))
os.chdir(sys.argv[2])
for name in sys.argv[3:]:
    try:
        open(name, "rb").read()
        print("read", name)
    except PermissionError as error:
        print("refused", name, error)
"""


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for name in ("ours/a.nii", "theirs/b.nii", "theirs/series/1.dcm", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "theirs" / "b.nii")
    return tmp_path


def run(sites: Path, *names: str) -> list[str]:
    files = {
        "site-1": [sites / "ours" / "a.nii"],
        "site-2": [sites / "theirs" / "b.nii", sites / "theirs" / "series"],
    }
    write_watch(sites / "watch.json", files, ["site-1"], sites / "opened.log")
    arguments = [sys.executable, "-c", PROGRAM, str(sites / "watch.json"), str(sites / "ours")]
    done = subprocess.run([*arguments, *names], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_other_sites_images_cannot_be_opened_by_any_path(sites: Path) -> None:
    theirs = ["../theirs/b.nii", str(sites / "theirs" / "b.nii"), "../theirs/series/1.dcm"]
    assert all(line.startswith("refused") for line in run(sites, *theirs))
    assert run(sites, "a.nii", "../other.txt") == ["read a.nii", "read ../other.txt"]


def test_the_log_counts_each_file_that_was_opened(sites: Path) -> None:
    run(sites, "a.nii", "../ours/a.nii", "../theirs/b.nii")
    assert opened_files([sites / "opened.log"], ["site-1", "site-2"]) == {"site-1": 2, "site-2": 0}
    assert opened_files([sites / "never.log"], ["site-1"]) == {"site-1": 0}


def test_a_link_that_is_itself_a_sites_file_is_known_by_both_names(sites: Path) -> None:
    write_watch(sites / "watch.json", {"site-2": [sites / "link"]}, [], sites / "opened.log")
    arguments = [sys.executable, "-c", PROGRAM, str(sites / "watch.json"), str(sites)]
    done = subprocess.run(
        [*arguments, "link", "theirs/b.nii"], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused", "refused"]
