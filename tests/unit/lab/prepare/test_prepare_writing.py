"""What holds for every data set: repeatable, resumable, whole or not there, originals untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import downloads
import numpy as np
import pytest
from downloads import cut, manifest, noise, save_picture, save_volume, tree
from PIL import Image

from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.errors import ConfigError, FedfmsError, SiteDataError
from fedfms_lab.prepare.ctlung import plan_ctlung
from fedfms_lab.prepare.decathlon import plan_decathlon
from fedfms_lab.prepare.fets import plan_fets
from fedfms_lab.prepare.fundus import plan_fundus
from fedfms_lab.prepare.nuclei import plan_nuclei
from fedfms_lab.prepare.pictures import read_numbers
from fedfms_lab.prepare.plan import flare_name
from fedfms_lab.prepare.prostate import plan_prostate
from fedfms_lab.prepare.source import Source, open_source
from fedfms_lab.prepare.write import UNFINISHED, Prepared, prepare

DATA_SETS: dict[str, tuple[Callable[[Path], None], Callable[..., list]]] = {
    "prostate": (downloads.prostate, plan_prostate),
    "fundus": (downloads.fundus, plan_fundus),
    "nuclei": (downloads.nuclei, plan_nuclei),
    "fets": (downloads.fets, plan_fets),
    "ctlung": (downloads.ctlung, plan_ctlung),
    "decathlon": (downloads.decathlon, plan_decathlon),
}


def run(name: str, folder: Path, output: Path, on_progress=None, **options) -> list[Prepared]:
    source = Source(folder)
    return prepare(DATA_SETS[name][1](source, **options), source, output, on_progress)


def make(name: str, folder: Path) -> Path:
    folder.mkdir()
    DATA_SETS[name][0](folder)
    return folder


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_second_run_changes_nothing_and_says_so(tmp_path, name):
    source = make(name, tmp_path / "src")
    before = tree(source)
    first = run(name, source, tmp_path / "out")
    assert {site.state for site in first} == {"prepared"}
    made, stamps = tree(tmp_path / "out"), times(tmp_path / "out")
    second = run(name, source, tmp_path / "out")
    assert {site.state for site in second} == {"unchanged"}
    assert (tree(tmp_path / "out"), times(tmp_path / "out")) == (made, stamps)
    assert [(s.name, s.cases, s.slices, s.notices) for s in first] == [
        (s.name, s.cases, s.slices, s.notices) for s in second
    ]
    assert tree(source) == before


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prepare_writing import DATA_SETS, run
for name in DATA_SETS:
    run(name, Path({source!r}) / name, Path({output!r}) / name)
"""


def test_another_machine_makes_the_same_bytes(tmp_path):
    """Another order of files, other times, another locale, time zone and hash seed."""
    other = tmp_path / "elsewhere"
    for name in DATA_SETS:
        source = make(name, tmp_path / name)
        for path in sorted(source.rglob("*"), reverse=True):
            if path.is_file():
                target = other / path.relative_to(tmp_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                os.utime(target, (1, 1))
        run(name, source, tmp_path / "here" / name)
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), source=str(other), output=str(tmp_path / "there")
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    here = tree(tmp_path / "here")
    assert here == tree(tmp_path / "there")
    assert {path.split("/")[0] for path in here} == set(DATA_SETS)


# ---------------------------------------------------------------------------- broken downloads

Break = Callable[[Path], None]


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


def gone(pattern: str) -> Break:
    return lambda folder: one(folder, pattern).unlink()


def half(pattern: str) -> Break:
    return lambda folder: cut(one(folder, pattern))


def nothing(pattern: str) -> Break:
    return lambda folder: one(folder, pattern).write_bytes(b"")


def web_page(pattern: str) -> Break:
    return lambda folder: one(folder, pattern).write_text("<html>please sign in</html>" * 40)


def volume(pattern: str, shape: tuple[int, ...], value: int = 1) -> Break:
    def change(folder: Path) -> None:
        values = np.zeros(shape, np.uint8)
        values[:3, :3, :3] = value
        save_volume(one(folder, pattern), values)

    return change


def picture(pattern: str, shape: tuple[int, ...], value: int | None = None) -> Break:
    def change(folder: Path) -> None:
        values = noise(9, shape) if value is None else np.full(shape, value, np.uint8)
        save_picture(one(folder, pattern), values)

    return change


def array(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Break:
    def break_it(folder: Path) -> None:
        path = one(folder, pattern)
        np.save(path, change(np.load(path)))

    return break_it


def text(pattern: str, old: str, new: str) -> Break:
    def change(folder: Path) -> None:
        path = one(folder, pattern)
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return change


def twice(pattern: str) -> Break:
    def change(folder: Path) -> None:
        path = one(folder, pattern)
        (folder / "copy" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "copy" / path.parent.name / path.name)

    return change


BROKEN: list[tuple[str, Break, str, str]] = [
    ("prostate", gone("HK/Case01.nii.gz"), "missing-download-file", "HK/Case01_seg"),
    ("prostate", gone("HK/Case01_seg*"), "missing-download-file", "HK/Case01.nii.gz"),
    ("prostate", lambda f: shutil.rmtree(f / "UCL"), "missing-download-file", "site UCL"),
    ("prostate", half("UCL/Case01.nii.gz"), "truncated-file", "UCL/Case01.nii.gz"),
    ("prostate", half("UCL/Case01_seg*"), "truncated-file", "UCL/Case01_segmentation"),
    ("prostate", nothing("UCL/Case01.nii.gz"), "truncated-file", "0 bytes"),
    ("prostate", web_page("UCL/Case01.nii.gz"), "truncated-file", "UCL/Case01.nii.gz"),
    ("prostate", volume("HK/Case00_seg*", (10, 8, 6)), "unexpected-shape", "6 x 8 x 10"),
    ("prostate", volume("HK/Case00_seg*", (10, 8, 5), 3), "unexpected-label-values", "0, 3"),
    (
        "prostate",
        lambda f: (one(f, "HK/Case00.nii.gz")).rename(f / "HK" / "patient7.nii.gz"),
        "unexpected-file",
        "HK/patient7.nii.gz",
    ),
    ("prostate", twice("UCL/Case00.nii.gz"), "ambiguous-download", "Case00"),
    ("fundus", gone("ORIGA/Masks/002.png"), "missing-download-file", "ORIGA/Images/002.jpg"),
    ("fundus", gone("REFUGE/val/Images/V0001.jpg"), "missing-download-file", "V0001.png"),
    ("fundus", lambda f: shutil.rmtree(f / "G1020"), "missing-download-file", "G1020"),
    ("fundus", gone("*_001_cupsegSoftmap.png"), "missing-download-file", "drishtiGS_001.png"),
    ("fundus", half("G1020/Images/image_1.jpg"), "truncated-file", "G1020/Images/image_1.jpg"),
    ("fundus", half("G1020/Masks/image_1.png"), "truncated-file", "G1020/Masks/image_1.png"),
    ("fundus", web_page("ORIGA/Images/001.jpg"), "unexpected-format", "ORIGA/Images/001.jpg"),
    ("fundus", picture("ORIGA/Masks/001.png", (21, 24), 1), "unexpected-shape", "21 x 24"),
    ("fundus", picture("*_001_ODsegSoft*", (10, 12), 255), "unexpected-shape", "10 x 12"),
    ("fundus", picture("ORIGA/Masks/001.png", (20, 24), 3), "unexpected-label-values", "3"),
    ("fundus", picture("ORIGA/Masks/001.png", (20, 24, 3)), "unexpected-shape", "3"),
    ("nuclei", gone("Fold 3/masks/fold3/masks.npy"), "missing-download-file", "fold 3"),
    ("nuclei", half("Fold 2/images/fold2/images.npy"), "truncated-file", "images.npy"),
    ("nuclei", array("fold2/masks.npy", lambda m: m[:-1]), "unexpected-shape", "4 x 256"),
    ("nuclei", array("fold2/masks.npy", lambda m: m[..., :5]), "unexpected-shape", "x 5"),
    ("nuclei", array("fold2/types.npy", lambda t: np.full(5, "Lung")), "missing-download-file",
     "no patch of Adrenal_gland"),
    ("nuclei", array("fold2/images.npy", lambda i: i * 2), "unexpected-format", "0 to 255"),
    ("nuclei", gone("TCGA-55*_1.xml"), "missing-download-file", "TCGA-55-1594-01Z-00-DX1_1.tif"),
    ("nuclei", half("TCGA-55*_1.xml"), "truncated-file", "TCGA-55-1594-01Z-00-DX1_1.xml"),
    ("nuclei", half("TCGA-18*.tif"), "truncated-file", "TCGA-18"),
    ("nuclei", text("TCGA-55*_1.xml", "Lymphocyte", "Fibroblast"), "unexpected-label-values",
     "Fibroblast"),
    ("nuclei", text("TCGA-18*.xml", 'X="', 'X="9'), "unexpected-shape", "32 x 32"),
    ("nuclei", gone("GT_01/01_2.png"), "missing-download-file", "Slide_01/01_2.png"),
    ("nuclei", half("GT_11/11_3.png"), "truncated-file", "GT_11/11_3.png"),
    ("nuclei", picture("GT_02/02_1.png", (25, 24), 255), "unexpected-shape", "25 x 24"),
    ("fets", gone("partitioning_1.csv"), "missing-download-file", "partitioning_1.csv"),
    ("fets", gone("FeTS2022_00006_seg*"), "missing-download-file", "FeTS2022_00006_seg"),
    ("fets", gone("FeTS2022_00007_t1ce*"), "missing-download-file", "FeTS2022_00007_t1ce"),
    ("fets", half("FeTS2022_00009_t1ce*"), "truncated-file", "FeTS2022_00009_t1ce"),
    ("fets", volume("FeTS2022_00009_seg*", (12, 12, 9)), "unexpected-shape", "9 x 12 x 12"),
    ("fets", volume("FeTS2022_00009_seg*", (12, 12, 10), 3), "unexpected-label-values", "3"),
    ("fets", text("partitioning_1.csv", "Subject_ID", "Name"), "unexpected-file", "Subject_ID"),
    ("ctlung", gone("*_mask_11.jpg"), "missing-download-file", "_11.jpg"),
    ("ctlung", half("*_mask_11.jpg"), "truncated-file", "_mask_11.jpg"),
    ("ctlung", picture("*_mask_11.jpg", (50, 48, 3)), "unexpected-shape", "50 x 48"),
    ("ctlung", picture("images/ID*_11.jpg", (48, 48, 3)), "unexpected-format", "colours"),
    ("ctlung", picture("*_mask_11.jpg", (48, 48), 255), "unexpected-format", "RGB"),
    ("decathlon", gone("dataset.json"), "missing-download-file", "dataset.json"),
    ("decathlon", gone("labelsTr/hippocampus_003*"), "missing-download-file", "labelsTr/hippo"),
    ("decathlon", half("imagesTr/hippocampus_003*"), "truncated-file", "hippocampus_003"),
    ("decathlon", volume("labelsTr/*_003*", (8, 9, 6)), "unexpected-shape", "6 x 9 x 8"),
    ("decathlon", volume("labelsTr/*_003*", (8, 9, 7), 5), "unexpected-label-values", "0, 5"),
    ("decathlon", text("dataset.json", '"labels"', '"lables"'), "unexpected-file", "labels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "break_it", "code", "says"),
    BROKEN,
    ids=[f"{name}-{code}-{number}" for number, (name, _, code, _) in enumerate(BROKEN)],
)
def test_a_broken_download_gives_the_error_meant_and_stays_as_it_is(
    tmp_path, caplog, name, break_it, code, says
):
    source = make(name, tmp_path / "src")
    break_it(source)
    before, output = tree(source), tmp_path / "out"
    with caplog.at_level("INFO"), pytest.raises(SiteDataError) as caught:
        run(name, source, output)
    assert caught.value.code == code
    assert says in caught.value.problem
    assert len(caught.value.fix) > 20
    assert tree(source) == before
    for site in output.glob("[!.]*"):  # those before the broken one are whole
        assert check_data(SiteConfig.from_yaml(site / "site.yml"))[1:] == []
        assert {path.name for path in site.iterdir()} >= {"site.yml", "manifest.csv"}
    for word in ("Case0", "TCGA", "FeTS2022", "hippocampus", "nii", "png", str(tmp_path)):
        assert word not in caught.value.public
        assert word not in caplog.text


def test_an_error_before_the_first_case_leaves_nothing_at_all(tmp_path):
    source = make("decathlon", tmp_path / "src")
    cut(one(source, "imagesTr/hippocampus_000*"))
    with pytest.raises(SiteDataError):
        run("decathlon", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_a_mended_file_the_finished_cases_are_kept(tmp_path):
    source = make("decathlon", tmp_path / "src")
    whole = one(source, "imagesTr/hippocampus_005*").read_bytes()
    cut(one(source, "imagesTr/hippocampus_005*"))
    with pytest.raises(SiteDataError, match="hippocampus_005"):
        run("decathlon", source, tmp_path / "out")
    kept = times(tmp_path / "out" / UNFINISHED / "site-1" / "images")
    assert len(kept) == 5
    one(source, "imagesTr/hippocampus_005*").write_bytes(whole)
    run("decathlon", source, tmp_path / "out")
    after = times(tmp_path / "out" / "site-1" / "images")
    assert {Path(path).name: stamp for path, stamp in kept.items()}.items() <= {
        Path(path).name: stamp for path, stamp in after.items()
    }.items()
    assert not (tmp_path / "out" / UNFINISHED).exists()
    run("decathlon", source, tmp_path / "fresh")
    assert tree(tmp_path / "fresh") == tree(tmp_path / "out")


# ------------------------------------------------------------------------------------ interrupted

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prepare_writing import run
seen = 0
def stop(site, done, total):
    global seen
    seen += 1
    if seen == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
run({name!r}, Path({source!r}), Path({output!r}), stop)
"""


@pytest.mark.parametrize(("name", "after"), [("fundus", 8), ("prostate", 3)])
def test_a_run_that_was_killed_is_taken_up(tmp_path, name, after):
    source, output = make(name, tmp_path / "src"), tmp_path / "out"
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        name=name,
        source=str(source),
        output=str(output),
        after=after,
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    visible = sorted(path.name for path in output.glob("[!.]*"))
    for site in visible:
        assert (output / site / "manifest.csv").is_file()
    unfinished = list((output / UNFINISHED).glob("*/images/*"))
    assert unfinished
    stamps = {path.parts[-3:]: path.stat().st_mtime_ns for path in unfinished}
    (half_written, *_) = (output / UNFINISHED).glob("*/labels")
    (half_written / ".x.part").write_bytes(b"half")  # as a kill in the middle of a file leaves
    sites = run(name, source, output)
    assert [s.name for s in sites if s.state == "unchanged"] == [
        s.name for s in sites if s.name in visible
    ]
    assert not (output / UNFINISHED).exists()
    kept = {path.parts[-3:]: path.stat().st_mtime_ns for path in output.glob("*/images/*")}
    assert stamps.items() <= kept.items()  # not made again
    run(name, source, tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")


def test_a_finished_case_that_was_damaged_since_is_made_again(tmp_path):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"

    def stop(_site: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("decathlon", source, output, stop)
    cut(output / UNFINISHED / "site-1" / "images" / "hippocampus_001.nii.gz")
    (output / UNFINISHED / "site-1.records" / "hippocampus_002.json").write_text("{")
    run("decathlon", source, output)
    run("decathlon", source, tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")


def test_an_interrupted_run_may_go_on_with_other_options(tmp_path):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"

    def stop(_site: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("decathlon", source, output, stop)
    run("decathlon", source, output, sites=2, paper=True)
    run("decathlon", source, tmp_path / "fresh", sites=2, paper=True)
    assert tree(output) == tree(tmp_path / "fresh")


def test_an_interrupted_run_does_not_trust_cases_of_a_download_that_has_changed(tmp_path):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"

    def stop(_site: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("decathlon", source, output, stop)
    save_volume(one(source, "imagesTr/hippocampus_001*"), noise("other", (8, 9, 7)))
    run("decathlon", source, output)
    run("decathlon", source, tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")


# ----------------------------------------------------------------------------- sites that are there


def edited(site: Path) -> None:
    (site / "site.yml").write_text((site / "site.yml").read_text() + "workers: 2\n")


def label_gone(site: Path) -> None:
    one(site, "labels/*").unlink()


def image_changed(site: Path) -> None:
    path = one(site, "images/*")
    path.write_bytes(path.read_bytes() + b"\0")


def one_more(site: Path) -> None:
    shutil.copy(one(site, "images/*"), site / "images" / "mine.nii.gz")


def no_manifest(site: Path) -> None:
    (site / "manifest.csv").unlink()


@pytest.mark.parametrize("change", [edited, label_gone, image_changed, one_more, no_manifest])
def test_a_site_that_was_changed_is_refused_and_left_alone(tmp_path, change):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"
    run("decathlon", source, output)
    change(output / "site-1")
    before = tree(output)
    with pytest.raises(ConfigError) as caught:
        run("decathlon", source, output)
    assert caught.value.code == "output-differs"
    assert tree(output) == before


def test_other_options_or_another_download_are_refused(tmp_path):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"
    run("decathlon", source, output)
    with pytest.raises(ConfigError, match="other options"):
        run("decathlon", source, output, paper=True)
    path = one(source, "imagesTr/hippocampus_002*")
    save_volume(path, noise(4, (8, 9, 7)))
    with pytest.raises(ConfigError, match="hippocampus_002 was made from other files"):
        run("decathlon", source, output)


def test_a_folder_of_somebody_else_is_never_taken_for_a_site(tmp_path):
    source = make("prostate", tmp_path / "src")
    (tmp_path / "out" / "HK").mkdir(parents=True)
    (tmp_path / "out" / "HK" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"no manifest\.csv"):
        run("prostate", source, tmp_path / "out")
    assert (tmp_path / "out" / "HK" / "thesis.txt").read_text() == "mine"
    assert len(tree(tmp_path / "out")) == 1
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "HK"]


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    source = make("decathlon", tmp_path / "src")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        run("decathlon", source, tmp_path / "out")
    assert caught.value.code == "output-not-writable"
    assert (tmp_path / "out").read_text() == "a file"


def test_the_output_may_not_lie_in_the_download(tmp_path):
    source = make("prostate", tmp_path / "src")
    (tmp_path / "link").symlink_to(source)
    before = tree(source)
    for output in (source, source / "sites", tmp_path / "link" / "x"):
        with pytest.raises(ConfigError) as caught:
            run("prostate", source, output)
        assert caught.value.code == "output-inside-source"
    assert tree(source) == before
    assert not (source / "sites").exists()


# ------------------------------------------------------------------------ copies, blank pictures


def test_copies_and_blank_pictures_are_left_out_with_their_reason(tmp_path):
    source = make("nuclei", tmp_path / "src")
    base = source / "TNBC_NucleiSegmentation"
    shutil.copy(base / "Slide_01" / "01_1.png", base / "Slide_11" / "11_2.png")
    save_picture(base / "Slide_02" / "02_1.png", np.full((24, 24, 3), 255, np.uint8))
    for _ in range(2):
        (site,) = run("nuclei", source, tmp_path / "out", only=["TNBC"])
        assert (site.cases, site.left_out) == (4, 2)
        assert "1 left out (every pixel has the same value); left-out.csv names them" in (
            site.notices
        )
    folder = tmp_path / "out" / "TNBC"
    with (folder / "left-out.csv").open() as file:
        lines = [line.strip().split(",") for line in file]
    assert {(line[2], line[-1]) for line in lines[1:]} == {
        ("02_1", "every pixel has the same value"),
        ("11_2", "the same image as case 01_1 of another patient"),
    }
    cases = [row["case"] for row in manifest(folder)]
    assert cases == ["01_1", "01_2", "11_1", "11_3"]
    assert sorted(path.stem for path in (folder / "images").iterdir()) == cases
    found = check_data(SiteConfig.from_yaml(folder / "site.yml"))
    assert [finding.code for finding in found] == ["few-validation-cases"]


def test_a_set_without_any_foreground_is_no_site(tmp_path):
    source = make("nuclei", tmp_path / "src")
    for path in (source / "TNBC_NucleiSegmentation").glob("GT_*/*.png"):
        save_picture(path, np.zeros((24, 24), np.uint8))
    with pytest.raises(SiteDataError) as caught:
        run("nuclei", source, tmp_path / "out", only=["TNBC"])
    assert caught.value.code == "empty-masks"
    assert not (tmp_path / "out" / "TNBC").exists()


# ---------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "link"])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, name):
    archive = tmp_path / "Task04.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    output = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SiteDataError), open_source(archive, output / UNFINISHED) as download:
        plan_decathlon(download)
    assert [path for path in tmp_path.rglob("*") if path.name in ("out.txt", "link")] == []
    assert set(before) <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_an_archive_gives_what_its_folder_gives(tmp_path, ending):
    source = make("decathlon", tmp_path / "src")
    archive = tmp_path / f"Task04.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in source.rglob("*"):
                file.write(path, path.relative_to(source))
    else:
        with tarfile.open(archive, "w:gz" if ending.endswith("gz") else "w") as tar:
            tar.add(source, ".")
    output = tmp_path / "out"
    for state in ("prepared", "unchanged"):
        with open_source(archive, output / UNFINISHED) as download:
            (site,) = prepare(plan_decathlon(download), download, output)
        assert site.state == state
    run("decathlon", source, tmp_path / "fresh")
    for path in output.glob("[!.]*"):
        assert tree(path) == tree(tmp_path / "fresh" / path.name)
    cut(archive)
    with (
        pytest.raises(SiteDataError) as caught,
        open_source(archive, output / UNFINISHED) as download,
    ):
        plan_decathlon(download)
    assert caught.value.code in ("truncated-file", "missing-download-file")


def test_an_archive_that_says_more_than_a_disk_holds_is_not_unpacked(tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.nii", b"\0" * 1000)
    data = bytearray(archive.read_bytes())
    entry = data.index(b"PK\x01\x02")  # its directory: 4 bytes of size at 24
    data[entry + 24 : entry + 28] = b"\xf0\xff\xff\xff"
    many = bytes(data[entry : data.index(b"PK\x05\x06")])
    whole = b"".join(many.replace(b"a.nii", b"%05d" % number) for number in range(300))
    end = data[data.index(b"PK\x05\x06") :]
    end[8:12] = (300).to_bytes(2, "little") * 2
    end[12:16] = len(whole).to_bytes(4, "little")
    archive.write_bytes(bytes(data[:entry]) + whole + bytes(end))
    with (
        pytest.raises(SiteDataError, match="larger than 1048576 MB") as caught,
        open_source(archive, tmp_path / "scratch"),
    ):
        pass
    assert caught.value.code == "truncated-file"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_archive_that_still_lies_packed_is_named(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "fold_2.zip").write_bytes(b"PK")
    with pytest.raises(SiteDataError) as caught:
        run("nuclei", tmp_path / "src", tmp_path / "out")
    assert "unpack fold_2.zip" in caught.value.fix
    for wrong in (tmp_path / "nowhere", tmp_path / "src" / "x.rar"):
        (tmp_path / "src" / "x.rar").write_bytes(b"Rar!")
        with (
            pytest.raises(SiteDataError) as caught,
            open_source(wrong, tmp_path / "scratch"),
        ):
            pass
        assert caught.value.code == "no-source"


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def fedfms(run):
    """The command; `run` is a helper's name here."""
    return run


def test_the_command_prepares_checks_and_says_that_nothing_is_to_do(fedfms, tmp_path):
    source, output = make("decathlon", tmp_path / "src"), tmp_path / "out"
    code, out, _ = fedfms("prepare", "decathlon", source, output, "--sites", 2)
    assert code == 0
    assert "site-1: 4 cases, 28 slices, 12 of them with foreground" in out
    assert f"fedfms check-data {output}/site-1/site.yml" in out
    code, checked, _ = fedfms("check-data", output / "site-1" / "site.yml")
    assert (code, "PASS" in checked) == (0, True)
    code, out, _ = fedfms("prepare", "decathlon", source, output, "--sites", 2)
    assert (code, "nothing to do: all 2 sites" in out) == (0, True)
    code, out, _ = fedfms("prepare", "decathlon", source, output, "--sites", 2, "--json")
    assert [(site["name"], site["state"]) for site in json.loads(out)] == [
        ("site-1", "unchanged"),
        ("site-2", "unchanged"),
    ]
    code, _, err = fedfms("prepare", "decathlon", source, output, "--paper", "--sites", 2)
    assert code == 1
    assert "other options" in err
    assert "fix:" in err


@pytest.mark.parametrize(
    ("name", "options", "sites"),
    [
        ("prostate", ["--only", "HK,ISBI_1.5"], ["HK", "ISBI_1-5"]),
        ("fundus", ["--od-mode", "ring", "--only", "ORIGA"], ["ORIGA"]),
        ("nuclei", ["--only", "TNBC", "--paper"], ["TNBC"]),
        ("fets", ["--sites", "4,21", "--modality", "t2"], ["21", "4"]),
        ("ctlung", ["--paper"], ["1", "2", "3", "4", "5"]),
        ("decathlon", ["--plane", "coronal"], ["site-1"]),
    ],
)
def test_every_data_set_has_its_command(fedfms, tmp_path, name, options, sites):
    source = make(name, tmp_path / "src")
    code, out, err = fedfms("prepare", name, source, tmp_path / "out", *options)
    assert (code, err.count("error")) == (0, 0)
    assert (f"--set site_order={','.join(sites)}" in out) == ("--paper" in options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sites


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["prostate", "--only", "ISBI_2"], "no site ISBI_2"),
        (["fundus", "--od-mode", "half"], "no od_mode half"),
        (["fets", "--sites", "99"], "no partition 99"),
        (["decathlon", "--plane", "oblique"], "no plane oblique"),
        (["decathlon", "--sites", "0"], "0 sites"),
    ],
)
def test_a_mistake_ends_with_its_fix_and_writes_nothing(fedfms, tmp_path, arguments, problem):
    name, *options = arguments
    source = make(name, tmp_path / "src")
    code, _, err = fedfms("prepare", name, source, tmp_path / "out", *options)
    assert code == 1
    assert problem in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_names_that_flare_takes():
    assert flare_name("ISBI_1.5") == "ISBI_1-5"
    assert flare_name("St. Mary") == "St--Mary"
    assert flare_name("PanNuke3Bile-duct") == "PanNuke3Bile-duct"
    for bad in ("", "...", "-x", "a" * 64):
        with pytest.raises(FedfmsError):
            flare_name(bad)


def test_pictures_are_plain_8_bit_png(tmp_path):
    source = make("nuclei", tmp_path / "src")
    run("nuclei", source, tmp_path / "out", only=["TNBC"])
    for path in (tmp_path / "out" / "TNBC").rglob("*.png"):
        with Image.open(path) as image:
            assert image.mode == ("RGB" if path.parent.name == "images" else "L")
            assert image.info == {}
    with Image.open(one(source, "Slide_01/01_1.png")) as image:
        theirs = np.asarray(image)
    assert theirs.shape == (24, 24, 4)
    with Image.open(tmp_path / "out" / "TNBC" / "images" / "01_1.png") as image:
        np.testing.assert_array_equal(np.asarray(image), theirs[..., :3])


def test_masks_of_a_download_are_read_as_a_sites_labels_are(tmp_path):
    numbers = np.arange(600, dtype=np.uint16).reshape(20, 30)  # object 256 stays 256
    Image.fromarray(numbers).save(tmp_path / "m.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_numbers(tmp_path / "m.tif"), numbers)
    Image.fromarray(numbers).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_numbers(tmp_path / "m.png"), numbers)
    white = np.full((20, 30), 255, np.uint8)
    alpha = np.where(numbers > 300, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([white, white, white, alpha])).save(tmp_path / "a.png")
    with pytest.raises(SiteDataError, match="alpha channel") as caught:
        read_numbers(tmp_path / "a.png")
    assert caught.value.code == "label-in-alpha"
