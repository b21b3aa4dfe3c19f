"""Prepared cases on disk: whole or not there, shared by processes, and bounded."""

import dataclasses
import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from site_files import disk, picture, recipe, site_config, write_site, write_volume

from fedfms.data import cache as cache_module
from fedfms.data.cache import CacheFolder, StoredCase
from fedfms.data.check import examine
from fedfms.data.manifest import find_cases
from fedfms.data.memory import CACHE_FOLDER
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import SiteDataError
from fedfms.local.sites import images_forgotten

DAY = 86400


def folder_of(root: Path, cases: int = 5):
    write_site(root / "site", cases=cases)
    return site_config(root / "site", cache=root / "cache")


def records(folder: Path) -> set[Path]:
    return set(folder.glob("*.case"))


def asked_for(path: Path, seconds_ago: float) -> None:
    """As if the record had been asked for so long ago."""
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def test_arrays_are_read_only_maps_and_labels_take_a_byte_where_they_fit(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    values = picture(3, (12, 10, 6)).astype(np.int16)
    for name, low in (("a", 0), ("b", -3)):
        label = np.zeros(values.shape, np.int16)
        label[2:5, 3:7, 2] = 1
        label[0, 0, 0] = low
        write_volume(tmp_path / "images" / f"{name}.nii.gz", values + ord(name))
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", label)
        values = values[::-1]
    site = site_config(tmp_path, background=(0, -3), cache=tmp_path / "cache")
    small, large = prepare_cases(find_cases(site), site)
    assert (small.labels.dtype, large.labels.dtype) == (np.uint8, np.int16)
    for case, low in ((small, 0), (large, -3)):
        assert case.images.shape == case.labels.shape == (6, 10, 12)
        assert not case.images.flags.writeable
        assert set(np.unique(case.labels)) == {0, 1} | {low}
        assert case.slice_values() == [
            [int(value) for value in np.unique(picture)] for picture in case.labels
        ]


def test_what_nobody_asked_for_the_longest_goes_first_and_never_what_is_in_use(tmp_path):
    site = folder_of(tmp_path)
    prepare_cases(find_cases(site), site)
    one, two, three, *young = sorted(records(site.cache))
    for path, days in ((one, 2), (two, 3), (three, 1)):
        asked_for(path, days * DAY)
    size = one.stat().st_size
    folder = CacheFolder(site.cache, limit=4 * size + size // 2)
    folder.remove_unused()
    assert records(site.cache) == {one, three, *young}
    folder.remove_unused(limit=0)
    assert records(site.cache) == set(young)  # asked for within the hour


def test_a_site_larger_than_the_limit_keeps_its_own_cases(tmp_path):
    site = folder_of(tmp_path)
    prepare_cases(find_cases(site), site)
    folder = CacheFolder(site.cache, limit=1)
    kept, *others = sorted(records(site.cache))
    assert folder.get(find_cases(site)[0], kept.stem) is not None
    for path in (kept, *others):
        asked_for(path, DAY)  # preparing the others took a day
    folder.remove_unused()
    assert records(site.cache) == {kept}


def test_another_process_that_uses_the_folder_loses_nothing(tmp_path):
    site = folder_of(tmp_path)
    prepare_cases(find_cases(site), site)
    for path in records(site.cache):
        asked_for(path, DAY)
    before = records(site.cache)
    program = (
        "import sys, time; from pathlib import Path; from fedfms.data.cache import CacheFolder\n"
        "folder = CacheFolder(Path(sys.argv[1])); print('ready', flush=True); time.sleep(600)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(site.cache)], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"ready\n"
        CacheFolder(site.cache).remove_unused(limit=0)
        assert records(site.cache) == before
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    CacheFolder(site.cache).remove_unused(limit=0)
    assert records(site.cache) == set()


def test_leftovers_and_records_of_an_older_version_go_and_other_files_stay(tmp_path):
    site = folder_of(tmp_path)
    site.cache.mkdir()
    (site.cache / "tmpabc123.part").write_bytes(b"half a case")
    (site.cache / f"{'0' * 64}.npz").write_bytes(b"of another version")
    own = site.cache / "notes.txt"
    own.write_text("a person's own")
    prepare_cases(find_cases(site), site)
    assert {path.suffix for path in site.cache.iterdir()} == {".case", ".txt"}
    assert own.read_text() == "a person's own"


def test_a_full_disk_gives_room_by_old_records_and_is_else_one_error_with_a_fix(
    tmp_path, monkeypatch
):
    site = folder_of(tmp_path)
    cases = find_cases(site)
    prepare_cases(cases[:1], site)
    (old,) = records(site.cache)
    asked_for(old, DAY)
    write = cache_module._write_record

    def full(file, header, parts):
        if old.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, header, parts)

    monkeypatch.setattr(cache_module, "_write_record", full)
    assert len(prepare_cases(cases[1:], site)) == 4
    assert not old.exists()

    def always_full(file, header, parts):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(site.cache)
    monkeypatch.setattr(cache_module, "_write_record", always_full)
    with pytest.raises(SiteDataError) as caught:
        prepare_cases(cases, site)
    assert caught.value.code == "no-room"
    assert str(site.cache) in caught.value.problem
    assert "cache in site.yml" in caught.value.fix
    assert list(site.cache.iterdir()) == []  # nothing half written


def test_without_a_folder_cases_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    site = dataclasses.replace(folder_of(tmp_path), cache=None)
    before = set(tmp_path.iterdir())
    plain = prepare_cases(find_cases(site), site)
    assert set(tmp_path.iterdir()) == before
    named = prepare_cases(find_cases(site), site, folder=tmp_path / "work")
    assert len(records(tmp_path / "work")) == 5
    for one, other in zip(plain, named, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_two_processes_that_prepare_at_once_give_the_same_cases(tmp_path):
    site = folder_of(tmp_path, cases=8)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        digests = pool.map(_digests, [site, site])
    assert digests[0] == digests[1]
    assert len(records(site.cache)) == 8
    assert all(path.suffix == ".case" for path in site.cache.iterdir())


def _digests(site) -> list[bytes]:
    return [case.record.digest for case in prepare_cases(find_cases(site), site)]


def test_a_record_that_somebody_removed_is_an_error_that_says_so(tmp_path):
    site = folder_of(tmp_path)
    cases = prepare_cases(find_cases(site), site)
    shutil.rmtree(site.cache)
    with pytest.raises(SiteDataError) as caught:
        _ = cases[0].images
    assert caught.value.code == "cache-gone"
    assert len(prepare_cases(find_cases(site), site)) == 5


@pytest.mark.parametrize("named", [True, False])
def test_a_stored_case_is_the_same_in_a_process_that_was_not_forked(tmp_path, named):
    site = folder_of(tmp_path, cases=3)
    site = site if named else dataclasses.replace(site, cache=None)
    for case in prepare_cases(find_cases(site), site):
        other = pickle.loads(pickle.dumps(case))
        assert isinstance(other, StoredCase) is named
        np.testing.assert_array_equal(other.images, case.images)
        np.testing.assert_array_equal(other.labels, case.labels)
        assert (other.spacing, other.is_volume, other.case) == (
            case.spacing,
            case.is_volume,
            case.case,
        )


@pytest.mark.parametrize("channels", ["gray", "neighbours"])
def test_what_workers_resized_in_one_round_is_read_in_the_next(tmp_path, monkeypatch, channels):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    volume = np.stack([disk((40, 30), 9)] * 4, axis=-1)
    for number in range(2):
        write_volume(tmp_path / "images" / f"c{number}.nii", picture(number, volume.shape))
        write_volume(tmp_path / "labels" / f"c{number}.nii", volume)
    site = site_config(
        tmp_path,
        images="images/*.nii",
        labels="labels/*.nii",
        channels=channels,
        cache=tmp_path / "cache",
    )
    data = SliceDataset(prepare_cases(find_cases(site), site), site, recipe())

    def a_round(workers: int) -> list[dict[str, torch.Tensor]]:
        return list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers))

    first = a_round(2)

    def refuse(*arguments):
        raise AssertionError("resized again")

    monkeypatch.setattr("fedfms.data.slices.resized_slice", refuse)
    for again in (a_round(2), a_round(0)):
        for one, other in zip(first, again, strict=True):
            for name in ("image", "target", "annotated"):
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    assert {path.suffix for path in site.cache.iterdir()} == {".case"}  # the slices have no name


def test_a_run_on_one_machine_leaves_no_prepared_images(tmp_path):
    (tmp_path / "site-1" / "scores").mkdir(parents=True)
    with pytest.raises(SiteDataError), images_forgotten(tmp_path):
        site = dataclasses.replace(folder_of(tmp_path / "data"), cache=None)
        prepare_cases(find_cases(site), site, folder=tmp_path / "site-1" / CACHE_FOLDER)
        assert len(records(tmp_path / "site-1" / CACHE_FOLDER)) == 5
        raise SiteDataError("a run", "that failed")
    assert [path.name for path in (tmp_path / "site-1").iterdir()] == ["scores"]


def test_what_is_there_already_needs_no_more_room(tmp_path):
    site = folder_of(tmp_path)
    need = examine(site).summary.disk
    assert need.cases == 5 * 8 * 6 * 3 * 2  # grey levels and labels, a byte each
    assert need.missing(site.cache) == need.cases + need.slices
    prepare_cases(find_cases(site), site)
    assert need.missing(site.cache) == need.slices
