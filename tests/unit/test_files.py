"""Files and folders appear whole or not at all, and nothing but a plain file is read."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedfms.files import (
    flush_folder,
    read_whole,
    scratch_folder,
    whole_folder,
    write_together,
    write_whole,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------- writing


def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path):
    write_whole(tmp_path / "new", b"\x00\xff")
    write_whole(tmp_path / "new", b"shorter")
    write_whole(tmp_path / "text", "Größe \udcff")
    assert tree(tmp_path) == {"new": b"shorter", "text": "Größe \\udcff".encode()}


@pytest.mark.parametrize(
    ("mode", "umask", "expected"), [(0o660, 0o002, 0o660), (0o666, 0o077, 0o600)]
)
def test_a_file_gets_its_mode_less_the_umask(tmp_path, mode, umask, expected):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "private").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "private")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "private").read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_keeps_its_place(tmp_path, kind):
    place = tmp_path / "place"
    os.mkfifo(place) if kind == "pipe" else place.mkdir()
    with pytest.raises(OSError, match=r"plain file|directory") as caught:
        write_whole(place, b"new")
    assert caught.value.filename == str(place)
    assert place.is_fifo() if kind == "pipe" else place.is_dir()
    assert list(tmp_path.iterdir()) == [place]


def test_a_place_that_cannot_be_written_is_named_and_not_the_part_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "nowhere" / "file", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")


def test_of_files_that_belong_together_none_is_replaced_where_one_cannot_be_written(tmp_path):
    (tmp_path / "one").write_bytes(b"old")
    (tmp_path / "two").mkdir()
    with pytest.raises(IsADirectoryError):
        write_together({tmp_path / "one": b"new", tmp_path / "two": b"new"})
    assert tree(tmp_path) == {"one": b"old"}


IN_BETWEEN = """
import os, resource, signal, sys
from pathlib import Path
from fedfms.files import write_together
folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
else:
    fsync, calls = os.fsync, []
    def killed(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = killed
write_together({folder / "one": b"new", folder / "two": b"new" * 1000})
"""


@pytest.mark.parametrize("how", ["full", "killed"])
def test_what_was_there_is_there_after_a_full_disk_or_a_kill_in_between(tmp_path, how):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"old")
    ended = subprocess.run(
        [sys.executable, "-c", IN_BETWEEN, str(tmp_path), how], capture_output=True, text=True
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"old"
    left = {path.name for path in tmp_path.iterdir()} - {"one", "two"}
    if how == "full":
        assert f"File too large: '{tmp_path / 'two'}'" in ended.stderr
        assert left == set()
    else:
        assert ended.returncode == -signal.SIGKILL
        # hidden, and named so that whoever owns the folder knows what to clean
        assert all(name.startswith(".") and name.endswith(".part") for name in left)


# ---------------------------------------------------------------------------------------- reading


def test_a_plain_file_of_the_size_that_is_expected_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_whole(tmp_path / "file") == read_whole(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, at most 4 were expected"):
        read_whole(tmp_path / "file", 4)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_nothing_but_a_plain_file_is_read_and_reading_never_waits(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "link":
        (tmp_path / "private").write_bytes(b"mine")
        place.symlink_to(tmp_path / "private")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place = Path("/dev/zero")
    with pytest.raises(OSError):
        read_whole(place)


# ---------------------------------------------------------------------------------------- folders


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    place = tmp_path / "deep" / "results"
    with whole_folder(place) as folder:
        (folder / "one").write_bytes(b"1")
        (folder / "pictures").mkdir()
        (folder / "pictures" / "two").write_bytes(b"2")
        assert not place.exists()
    assert tree(tmp_path) == {"deep/results/one": b"1", "deep/results/pictures/two": b"2"}


def test_a_folder_that_fails_is_not_there_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "results") as folder:
        (folder / "one").write_bytes(b"1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_the_place_of_an_empty_one_and_of_another_only_where_it_is_told_to(tmp_path):
    place = tmp_path / "results"
    place.mkdir()
    for text, replace in ((b"first", False), (b"second", True)):
        with whole_folder(place, replace=replace) as folder:
            (folder / "one").write_bytes(text)
    with pytest.raises(OSError) as caught, whole_folder(place) as folder:
        (folder / "one").write_bytes(b"third")
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert tree(tmp_path) == {"results/one": b"second"}


def test_what_gave_way_comes_back_where_the_new_folder_cannot_take_its_place(tmp_path):
    place = tmp_path / "results"
    place.mkdir()
    (place / "one").write_bytes(b"old")
    with pytest.raises(OSError), whole_folder(place, replace=True) as folder:
        folder.rmdir()  # so that there is nothing to rename
    assert tree(tmp_path) == {"results/one": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_scratch_folder_is_gone_with_what_is_left_in_it(tmp_path):
    with scratch_folder(tmp_path / "place") as folder:
        (folder / "one").write_bytes(b"1")
        (folder / "link").symlink_to(tmp_path / "nowhere")
        flush_folder(folder)
        (folder / "one").rename(tmp_path / "one")
    assert tree(tmp_path) == {"one": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
