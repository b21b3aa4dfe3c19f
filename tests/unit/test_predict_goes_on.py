"""Whatever is wrong with one image, `fedfms predict` names it and does the others."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from plain_user import a_plain_user

sys.path.insert(0, str(Path(__file__).parent / "data"))  # the DICOM files of the readers' tests
from dicom_files import grid, segmentation, series, stored_values, true_values, write, write_series

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Setup
from fedfms.data.content import read_bytes
from fedfms.errors import SiteDataError
from fedfms.exchange.tensors import save_tensors
from fedfms.export.run import export_model
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling
from fedfms.predict.find import find_items

Run = Callable[..., tuple[int, str, str]]
SHAPE = (20, 18, 6)  # columns, rows, slices


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of a network with random weights whose median logit of noise is about 0."""
    recipe = Recipe(
        method="fedmsa", backbone="vit_demo", backbone_sha256=BACKBONES["vit_demo"].sha256,
        classes=("lesion",), rounds=1, image_size=64, batch_size=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    network = build_model(recipe, find_checkpoint(recipe, None)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        median = torch.sigmoid(network(torch.randn(4, 3, 64, 64, generator=generator))).median()
    save_tensors(folder / "global_model.safetensors", read_travelling(network), "fp32")
    values = {**recipe.to_dict(), "probability_threshold": float(f"{median.item():.4f}")}
    (folder / "recipe.json").write_text(Recipe.from_dict(values).to_json())
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    """Exit code, standard output and standard error of `fedfms predict ARGUMENTS` on the CPU."""
    return lambda *arguments: run("predict", *arguments, "--device", "cpu")


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def volumes(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        image = nibabel.Nifti1Image(noise((12, 10, 4), seed).astype(np.int16), np.eye(4))
        nibabel.save(image, folder / name)


def require_one_sentence(err: str) -> None:
    assert "Traceback" not in err
    assert err.count("error: ") == err.count("  fix: ") == 1


# ------------------------------------------------------------------------------ habits of programs


def words(slice_: pydicom.Dataset) -> None:
    """Words where values belong, as scripts of RSNA's CTP write them."""
    slice_.PatientName = slice_.PatientID = slice_.PatientBirthDate = "ANONYMIZED"
    slice_.PatientSex, slice_.PatientAge = "UNKNOWN", "ANON"
    slice_.AccessionNumber = "REMOVED BY ANONYMIZER"
    slice_.private_block(0x0013, "CTP", create=True).add_new(0x10, "LO", "Secret Trial")


def other_forms(slice_: pydicom.Dataset) -> None:
    """Dates and times as people write them, identifiers of a hash, too long for their place."""
    slice_.StudyDate, slice_.StudyTime, slice_.PatientBirthDate = "2020-01-01", "12:00:00", "1950"
    slice_.PatientSex, slice_.PatientID = "male", "f" * 128
    slice_.StudyInstanceUID, slice_.FrameOfReferenceUID = "1." + "7" * 80, "REMOVED"


def removed(slice_: pydicom.Dataset) -> None:
    """Everything away that is not a picture, as deid's `REMOVE ALL` and simple scripts do."""
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"),
        *("StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyInstanceUID"),
        *("SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID"),
        *("SliceThickness", "SeriesNumber", "Modality"),
    ):
        delattr(slice_, keyword)


def emptied(slice_: pydicom.Dataset) -> None:
    """All that may name somebody is there and empty, and UIDs are new ones with leading zeros."""
    for element in slice_:
        if element.VR in ("PN", "LO", "SH", "DA", "TM") or element.keyword == "SliceThickness":
            element.value = ""
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(slice_, keyword, f"{str(slice_[keyword].value)[:55]}.007")
    slice_.SOPInstanceUID += f"{slice_.InstanceNumber}"
    slice_.FrameOfReferenceUID = ""


def five_series(folder: Path) -> dict[str, list[pydicom.Dataset]]:
    """One with each habit, and one of which a slice is cut off."""
    told = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the values are meant to be odd
        for seed, habit in enumerate((words, other_forms, removed, emptied)):
            slices = series(habit.__name__, grid("oblique", SHAPE), stored_values(seed, SHAPE))
            for slice_ in slices:
                habit(slice_)
                slice_.preamble = b"\0" * 128
            told[habit.__name__] = slices
            (folder / habit.__name__).mkdir(parents=True)
            for number, slice_ in enumerate(slices):
                pydicom.dcmwrite(
                    folder / habit.__name__ / f"{number}", slice_, enforce_file_format=False
                )
    write_series(folder / "n_broken", series("n", grid("oblique", SHAPE), stored_values(9, SHAPE)))
    cut_off = folder / "n_broken/IM0003"
    cut_off.write_bytes(cut_off.read_bytes()[:-100])
    return told


def test_four_anonymized_series_give_segmentations_and_a_broken_one_its_sentence(
    tmp_path, model, run
):
    told = five_series(tmp_path / "in")
    (tmp_path / "nifti").mkdir()
    for seed, name in enumerate(told):
        values = true_values(stored_values(seed, SHAPE))
        twin = nibabel.Nifti1Image(values, grid("oblique", SHAPE).nifti_affine())
        nibabel.save(twin, tmp_path / f"nifti/{name}.nii")
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 1
    require_one_sentence(err)
    assert "error: n_broken: " in err
    assert "IM0003" in err
    assert "4 of 5 images predicted" in out
    assert out.count("  note: in the headers of ") == 4
    assert "ANONYMIZED" not in out + err
    assert run(model, tmp_path / "nifti", tmp_path / "twin")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.dcm" for name in told
    )
    for name, slices in told.items():
        file = tmp_path / f"out/{name}.dcm"
        mask = np.asanyarray(nibabel.load(tmp_path / f"twin/{name}.nii").dataobj)
        assert 0 < mask.sum() < mask.size
        uids = [
            str(s.get("SOPInstanceUID") or s.file_meta.MediaStorageSOPInstanceUID) for s in slices
        ]
        seg = hd.seg.segread(file)
        got = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
        np.testing.assert_array_equal(got[..., 0].transpose(2, 1, 0), mask)
        plain = pydicom.dcmread(file)
        assert plain.NumberOfFrames == np.any(mask, axis=(0, 1)).sum()
        assert pydicom.pixels.pixel_array(plain).sum() == mask.sum()
        assert plain.PatientBirthDate in ("", None)
        sex = {"other_forms": "M", "emptied": "O"}.get(name, "")
        assert (plain.PatientSex or "") == sex
        assert b"Secret Trial" not in file.read_bytes()


def test_the_same_in_json(tmp_path, model, run):
    five_series(tmp_path / "in")
    (tmp_path / "in/notes.txt").write_text("read me")
    code, out, _ = run(model, tmp_path / "in", tmp_path / "out", "--json")
    assert code == 1
    told = json.loads(out)
    images = {image["name"]: image for image in told["images"]}
    assert [name for name, image in images.items() if image["error"]] == ["n_broken"]
    (note,) = images["removed"]["notes"]
    assert note["code"] == "header-repaired"
    assert "FrameOfReferenceUID are missing and made from" in note["problem"]
    assert images["n_broken"]["notes"] == []
    assert told["passed_over"] == ["notes.txt"]
    assert told["ended_by"] is None


@pytest.mark.slow
def test_every_test_file_of_pydicom_is_a_mask_or_a_sentence(tmp_path, model, run):
    files = Path(pydicom.__file__).parent / "data/test_files"
    for file in files.iterdir():
        if file.is_file():
            (tmp_path / "in" / file.name).mkdir(parents=True)
            shutil.copy(file, tmp_path / "in" / file.name)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out", "--json")
    assert code == 1
    assert "Traceback" not in err
    told = json.loads(out)
    assert len(told["images"]) > 40
    for image in told["images"]:
        if image["error"] is None:
            hd.seg.segread(image["outputs"][0])
        else:
            assert image["error"]["code"] != "unexpected"
    done = {image["name"] for image in told["images"] if image["error"] is None}
    assert {"CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm"} <= done


# ------------------------------------------------------------------------------ errors of libraries


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 9.3 TiB for an array"), "Unable to allocate 9.3 TiB"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth"),
        (UserWarning("a warning made an error"), "a warning made an error"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (KeyError("tag"), "tag"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("first line\nsecond line " * 50), "first line"),
        (np.linalg.LinAlgError("Singular matrix"), "Singular matrix"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_any_library_raises_at_one_image_is_that_images_line(
    tmp_path, model, run, monkeypatch, raised, says
):
    volumes(tmp_path / "in", "a.nii", "b.nii", "c.nii")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    to_bytes, calls = nibabel.Nifti1Image.to_bytes, []

    def fails_once(image):
        calls.append(image)
        if len(calls) == 2:
            raise raised
        return to_bytes(image)

    monkeypatch.setattr(nibabel.Nifti1Image, "to_bytes", fails_once)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 1
    require_one_sentence(err)
    assert "error: b.nii: " in err
    assert says in err
    assert "second line" not in err.splitlines()[0][300:]
    assert "2 of 3 images predicted" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii", "c.nii"]
    (details,) = tmp_path.glob("fedfms-error-*.txt")
    assert str(details) in err
    assert "in fails_once" in details.read_text()  # the traceback
    assert details.stat().st_mode & 0o077 == 0


def test_what_a_library_warns_of_while_it_reads_is_a_note_and_no_line_of_code(
    tmp_path, model, run, monkeypatch
):
    volumes(tmp_path / "in", "a.nii", "b.nii")
    from_bytes, calls = nibabel.Nifti1Image.from_bytes, []

    def warns_once(data):
        calls.append(data)
        if len(calls) == 1:
            warnings.warn("pixdim is odd\nand more of it", stacklevel=1)
        return from_bytes(data)

    monkeypatch.setattr(nibabel.Nifti1Image, "from_bytes", warns_once)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 0, err
    assert out.count("note: reading a.nii: pixdim is odd\n") == 1
    assert out.count("note:") == 1
    assert "pixdim" not in err


def test_reading_and_computing_are_behind_the_same_guard(tmp_path, model, run, monkeypatch):
    volumes(tmp_path / "in", "a.nii", "b.nii")
    sigmoid, calls = torch.sigmoid, []

    def fails_once(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return sigmoid(*arguments, **named)

    monkeypatch.setattr(torch, "sigmoid", fails_once)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 1
    require_one_sentence(err)
    assert "close other programs" in err
    assert "1 of 2 images predicted" in out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_ends_the_run_and_what_is_done_is_told(
    tmp_path, model, run, monkeypatch, number
):
    volumes(tmp_path / "in", "a.nii", "b.nii", "c.nii")
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 1
    require_one_sentence(err)
    assert os.strerror(number) in err
    assert len(calls) == 2  # c was not computed for nothing
    assert "a.nii -> " in out
    assert "1 of 3 images predicted" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii"]


def test_ctrl_c_stops_the_run_and_what_is_done_is_told(tmp_path, model, run, monkeypatch):
    volumes(tmp_path / "in", "a.nii", "b.nii")
    to_bytes, calls = nibabel.Nifti1Image.to_bytes, []

    def stopped(image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return to_bytes(image)

    monkeypatch.setattr(nibabel.Nifti1Image, "to_bytes", stopped)
    code, out, err = run(model, tmp_path / "in", tmp_path / "out")
    assert code == 130
    assert "Traceback" not in err
    assert "a.nii -> " in out
    assert "1 of 2 images predicted" in out


# -------------------------------------------------------------------------------- what a folder has


def test_files_that_cannot_be_used_are_named_and_others_passed_over_aloud(tmp_path, model, run):
    folder = tmp_path / "in"
    volumes(folder, "a.nii")
    (folder / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    (folder / "b.nrrd").write_bytes(b"NRRD0004")
    (folder / ".hidden.nrrd").write_bytes(b"NRRD0004")
    (folder / "headless").mkdir()
    (folder / "headless/1.dcm").write_bytes(bytes(500))  # says that it is DICOM
    (folder / "torn").mkdir()
    (folder / "torn/1").write_bytes(bytes(128) + b"DICM\x02\0\0\0UL\4\0\xff\xff\xff\x7f")
    slices = series("a", grid("oblique", SHAPE), stored_values(1, SHAPE))
    label = segmentation(slices, {"x": np.ones(SHAPE, bool)})
    write(folder / "labels/a.dcm", label)
    code, out, err = run(model, folder, tmp_path / "out")
    assert code == 1
    assert "Traceback" not in err
    for name in ("gone.nii.gz", "headless", "torn/1"):  # which could be a picture by itself
        assert f"error: {name}: " in err
    (line,) = [line for line in out.splitlines() if line.startswith("passed over")]
    assert "1 .nrrd" in line
    assert "1 .dcm" in line
    assert "1 of 4 images predicted" in out


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311])
def test_a_folder_that_cannot_be_entered_is_named_as_an_image(open_folder, model, mode):
    recipe = Recipe.from_json(model / "recipe.json")
    for name in ("a", "closed/b", "open/c"):
        (open_folder / name).parent.mkdir(exist_ok=True)
        (open_folder / name).with_suffix(".nii").write_bytes(b"x")
    (open_folder / "closed").chmod(mode)
    site = Setup(format="dicom")
    with a_plain_user():
        items = find_items(open_folder, open_folder / "masks", recipe)
        assert [item.name for item in items] == ["a.nii", "open/c.nii", "closed"]
        with pytest.raises(SiteDataError, match="closed cannot be read") as error:
            read_bytes(items[-1].source, site)
    assert error.value.code == "unreadable-folder"


# ---------------------------------------------------------------------------------------------- NPY


def test_arrays_give_arrays_with_the_masks_of_the_same_pictures(tmp_path, model, run):
    stack = noise((5, 30, 22), 4)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/volume.npy", stack)
    np.save(tmp_path / "in/slice.NPY", stack[2])
    (tmp_path / "in/slice.NPY.npy").rename(tmp_path / "in/slice.NPY")
    for number, picture in enumerate(stack):
        Image.fromarray(picture).save(tmp_path / f"in/{number}.png")
    options = ("--intensity", "range:0:255", "--probabilities", "--separate")
    code, out, err = run(model, tmp_path / "in", tmp_path / "out", *options)
    assert code == 0, err
    assert "volume.npy -> " in out
    assert " ml" not in out  # an array says no size
    pictures = np.stack([np.asarray(Image.open(tmp_path / f"out/{n}.png")) for n in range(5)])
    shares = np.stack(
        [tifffile.imread(tmp_path / f"out/{n}_probability_lesion.tif") for n in range(5)]
    )
    assert 0 < pictures.sum() < pictures.size
    for name, expected in (
        ("volume.npy", pictures),
        ("volume_lesion.npy", pictures),
        ("slice.npy", pictures[2]),
        ("volume_probability_lesion.npy", shares),
        ("slice_probability_lesion.npy", shares[2]),
    ):
        got = np.load(tmp_path / "out" / name)
        assert got.dtype == (np.float32 if "probability" in name else np.uint8)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)  # of masks: equal


def test_coloured_arrays_are_read_as_in_training(tmp_path, model, run):
    colours = noise((26, 31, 3), 1)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", colours)
    Image.fromarray(colours).save(tmp_path / "in/b.png")
    options = ("--intensity", "range:0:255", "--channels", "rgb")
    code, _, err = run(model, tmp_path / "in", tmp_path / "out", *options)
    assert code == 0, err
    mask = np.load(tmp_path / "out/a.npy")
    assert mask.shape == (26, 31)
    np.testing.assert_array_equal(mask, np.asarray(Image.open(tmp_path / "out/b.png")))
    assert 0 < mask.sum() < mask.size


def test_a_folder_of_all_kinds_gives_each_its_own(tmp_path, model, run):
    folder = tmp_path / "in"
    volumes(folder, "a.nii", "b.nii.gz")
    np.save(folder / "c.npy", noise((9, 8), 1))
    Image.fromarray(noise((9, 8), 1)).save(folder / "d.tif")
    write_series(folder / "e", series("e", grid("axial", SHAPE), stored_values(1, SHAPE)))
    code, _, err = run(model, folder, tmp_path / "out")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.nii", "b.nii.gz", "c.npy", "d.png", "e.dcm",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ model's words


def test_a_model_that_says_how_pictures_came_about_is_taken_at_its_word(tmp_path, model, run):
    volumes(tmp_path / "in", "a.nii")
    (tmp_path / "site.yml").write_text(
        "data_root: .\nformat: nifti\nimages: i/*.nii\nlabels: l/*.nii\nclasses: {lesion: [1]}\n"
        "plane: sagittal\nchannels: neighbours\n"
        "intensity: {rule: window, center: 120, width: 170, rounding: truncate}\n"
    )
    one_file = tmp_path / "model.safetensors"
    export_model(model, one_file, "fedfms", site=tmp_path / "site.yml")
    options = (
        "--plane",
        "sagittal",
        "--channels",
        "neighbours",
        "--intensity",
        "window:120:170:truncate",
    )
    assert run(model, tmp_path / "in", tmp_path / "wanted", *options)[0] == 0
    assert run(model, tmp_path / "in", tmp_path / "plain")[0] == 0
    code, out, err = run(one_file, tmp_path / "in", tmp_path / "got")
    assert code == 0, err
    assert (
        "plane sagittal, channels neighbours, intensity window:120:170:truncate (as the model"
        in out
    )
    wanted, plain, got = (
        np.asanyarray(nibabel.load(tmp_path / f"{name}/a.nii").dataobj)
        for name in ("wanted", "plain", "got")
    )
    np.testing.assert_array_equal(got, wanted)
    assert (plain != wanted).any()
    assert run(one_file, tmp_path / "in", tmp_path / "own", "--plane", "axial")[0] == 0
    own = np.asanyarray(nibabel.load(tmp_path / "own/a.nii").dataobj)
    assert (own != wanted).any()
