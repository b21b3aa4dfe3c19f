"""Files that `fedfms predict` writes, read by other libraries, against what evaluation scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "data"))  # the DICOM files of the readers' tests
from dicom_files import (
    enhanced,
    grid,
    picture,
    rotation,
    segmentation,
    series,
    stored_values,
    true_values,
    write,
    write_series,
)

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.control import Control
from fedfms.data.content import read_bytes
from fedfms.data.dicom.images import read_series
from fedfms.data.dicom.labels import read_label
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import ConfigError
from fedfms.exchange.tensors import save_tensors
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_travelling
from fedfms.predict.find import find_items
from fedfms.predict.write import write_files
from fedfms.training.evaluate import evaluate, foreground, predict

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256=BACKBONES["vit_demo"].sha256,
    classes=("disc", "cup"),
    rounds=1,
    image_size=64,
    batch_size=4,
    probability_threshold=0.5,
)


ONE_CLASS = dataclasses.replace(RECIPE, classes=("disc",))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of a network that finds something of both classes, and where they overlap.

    Weights are random; the last layers are shifted so that the median logit of noise is about 0.
    """
    folder = tmp_path_factory.mktemp("model")
    network = build_model(RECIPE, find_checkpoint(RECIPE, None)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_tensors(folder / "global_model.safetensors", read_travelling(network), "fp32")
    pictures = torch.randn(4, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        median = torch.sigmoid(network(pictures)).median().item()
    threshold = float(f"{median:.4f}")
    values = {**RECIPE.to_dict(), "probability_threshold": threshold}
    (folder / "recipe.json").write_text(Recipe.from_dict(values).to_json())
    return folder


def with_recipe(model: Path, folder: Path, **values: object) -> Path:
    """The same network with another recipe."""
    folder.mkdir()
    recipe = {**Recipe.from_json(model / "recipe.json").to_dict(), **values}
    (folder / "recipe.json").write_text(Recipe.from_dict(recipe).to_json())
    (folder / "model.safetensors").write_bytes((model / "global_model.safetensors").read_bytes())
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """Exit code, standard output and standard error of `fedfms predict ARGUMENTS`."""
    return lambda *arguments: run("predict", *arguments)


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise with something in it, float32."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    distance = np.sqrt(sum((axis - 0.1 * seed) ** 2 for axis in axes))
    return (200 * (distance < 0.6) + rng.normal(0, 30, shape) + 300).astype(np.float32)


def crooked_affine() -> np.ndarray:
    """Rotated, flipped twice, three voxel sizes, axes in another order."""
    affine = np.eye(4)
    turn = rotation(14, -9, 31)[:, [2, 0, 1]] @ np.diag([-1.0, 1, -1])
    affine[:3, :3] = turn @ np.diag([0.8, 3.1, 1.3])
    affine[:3, 3] = (12, -40, 7)
    return affine


def write_volume(path: Path, values: np.ndarray, affine: np.ndarray, **codes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, codes.get("qform", 1))
    image.set_sform(affine, codes.get("sform", 4))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"Secret^Name"
    extension = nibabel.nifti1.Nifti1Extension("comment", b"Secret^Name")
    image.header.extensions.append(extension)
    nibabel.save(image, path)


def dice_of(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def evaluated(model: Path, site: SiteConfig) -> tuple[dict[tuple[str, str], float], dict]:
    """Dice and masks (K, D, H, W) of all cases, as training and the report have them."""
    trained = load_trained(model, None)
    cases = prepare_cases(find_cases(site), site)
    scores = evaluate(trained.model, cases, trained.recipe, site, Control())
    masks = {}
    for case in cases:
        slices = [(case, index) for index in range(len(case.images))]
        logits = torch.stack(list(predict(trained.model, slices, trained.recipe, site, Control())))
        masks[case.case.key] = foreground(logits, case, trained.recipe)
    return {(score.key, score.class_name): score.dice for score in scores}, masks


# -------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_nifti_mask_scores_what_the_evaluation_of_its_case_says(tmp_path, model, run, plane):
    affine, shape = crooked_affine(), (17, 8, 13)
    for name, seed in (("a", 1), ("b", 2)):
        values = blob(shape, seed)
        truth = np.zeros(shape, np.uint8)
        truth[3:13, 2:7, 3:10], truth[5:9, 3:6, 5:8] = 1, 2
        write_volume(tmp_path / f"site/images/{name}.nii.gz", values, affine)
        write_volume(tmp_path / f"site/labels/{name}.nii.gz", truth, affine)
    (tmp_path / "site.yml").write_text(
        "data_root: site\nformat: nifti\nimages: images/*.nii.gz\nlabels: labels/*.nii.gz\n"
        f"classes: {{disc: [1, 2], cup: [2]}}\nplane: {plane}\nchannels: neighbours\n"
        "intensity: {rule: percentile, low: 2, high: 98}\ndevice: cpu\n"
    )
    images = tmp_path / "site/images"
    before = {path: path.read_bytes() for path in images.iterdir()}
    code, out, err = run(
        *(model, images, tmp_path / "out", "--site", tmp_path / "site.yml"),
        "--probabilities",
    )
    assert code == 0, err
    assert f"plane {plane}, channels neighbours, intensity percentile:2:98" in out
    assert {path: path.read_bytes() for path in images.iterdir()} == before
    wanted, masks = evaluated(model, SiteConfig.from_yaml(tmp_path / "site.yml"))
    names = ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}{part}.nii.gz"
        for name in names
        for part in ("_disc", "_cup", "_probability_disc", "_probability_cup")
    )
    threshold = Recipe.from_json(model / "recipe.json").probability_threshold
    for name in names:
        truth = np.asanyarray(nibabel.load(tmp_path / f"site/labels/{name}.nii.gz").dataobj)
        source = nibabel.load(images / f"{name}.nii.gz")
        found, likely = {}, []
        for number, class_name in enumerate(("disc", "cup")):
            image = nibabel.load(tmp_path / f"out/{name}_{class_name}.nii.gz")
            found[class_name] = np.asanyarray(image.dataobj)
            assert found[class_name].dtype == np.uint8
            drawn = truth > number  # disc: 1 and 2, cup: 2
            dice = dice_of(found[class_name] == 1, drawn)
            assert dice == pytest.approx(wanted[name, class_name], abs=1e-6)
            assert 0.02 < dice < 0.98
            assert int(found[class_name].sum()) == int(masks[name][number].sum())
            likely.append(
                nibabel.load(tmp_path / f"out/{name}_probability_{class_name}.nii.gz").get_fdata()
            )
            np.testing.assert_array_equal(found[class_name], likely[-1] >= np.float32(threshold))
        assert (found["disc"] & found["cup"]).any()  # they do overlap
        labels = nibabel.load(tmp_path / f"out/{name}_disc.nii.gz")
        assert labels.shape == source.shape
        np.testing.assert_array_equal(labels.affine, source.affine)
        for key in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            np.testing.assert_array_equal(labels.header[key], source.header[key])
        assert labels.get_data_dtype() == np.uint8
        assert not labels.header.extensions
        assert b"Secret" not in labels.to_bytes()


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_label_map_of_exclusive_classes_scores_what_the_evaluation_says(
    tmp_path, model, run, plane
):
    exclusive = with_recipe(model, tmp_path / "exclusive", exclusive_classes=True)
    affine, shape = crooked_affine(), (17, 8, 13)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        truth = np.zeros(shape, np.uint8)
        truth[3:13, 2:7, 3:10], truth[5:9, 3:6, 5:8] = 1, 2
        write_volume(tmp_path / f"site/images/{name}.nii.gz", blob(shape, seed), affine)
        write_volume(tmp_path / f"site/labels/{name}.nii.gz", truth, affine)
    (tmp_path / "site.yml").write_text(
        "data_root: site\nformat: nifti\nimages: images/*.nii.gz\nlabels: labels/*.nii.gz\n"
        f"classes: {{disc: [1], cup: [2]}}\nplane: {plane}\ndevice: cpu\n"
    )
    code, _, err = run(
        *(exclusive, tmp_path / "site/images", tmp_path / "out", "--separate", "--probabilities"),
        *("--site", tmp_path / "site.yml"),
    )
    assert code == 0, err
    wanted, _ = evaluated(exclusive, SiteConfig.from_yaml(tmp_path / "site.yml"))
    threshold = np.float32(Recipe.from_json(exclusive / "recipe.json").probability_threshold)
    overlapping = 0
    for name in ("a", "b", "c"):
        truth = np.asanyarray(nibabel.load(tmp_path / f"site/labels/{name}.nii.gz").dataobj)
        found = np.asanyarray(nibabel.load(tmp_path / f"out/{name}.nii.gz").dataobj)
        maps = np.stack([
            nibabel.load(tmp_path / f"out/{name}_probability_{one}.nii.gz").get_fdata()
            for one in ("disc", "cup")
        ])  # fmt: skip
        overlapping += (maps >= threshold).all(axis=0).sum()
        expected = np.where((maps >= threshold).any(axis=0), maps.argmax(axis=0) + 1, 0)
        np.testing.assert_array_equal(found, expected)
        for number, class_name in enumerate(("disc", "cup"), 1):
            separate = nibabel.load(tmp_path / f"out/{name}_{class_name}.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(separate.dataobj), found == number)
            dice = dice_of(found == number, truth == number)
            assert dice == pytest.approx(wanted[name, class_name], abs=1e-6)
    assert overlapping  # otherwise nothing was excluded


@pytest.mark.parametrize(
    ("shape", "ending"), [((12, 16), ".nii"), ((12, 16, 1), ".nii.gz"), ((12, 16, 5, 1), ".nii")]
)
def test_a_volume_keeps_its_shape_and_ending(tmp_path, model, run, shape, ending):
    source = tmp_path / f"in{ending}"
    write_volume(source, blob(shape, 1), np.diag([1.5, 1, 2, 1]), qform=0, sform=2)
    code, _, err = run(model, source, tmp_path / f"mask{ending}", "--device", "cpu")
    assert code == 0, err
    mask = nibabel.load(tmp_path / f"mask_disc{ending}")
    assert mask.shape == shape
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (0, 2)
    assert set(np.unique(mask.dataobj)) <= {0, 1}
    assert np.asanyarray(mask.dataobj).any()


def test_a_volume_in_micrometres_is_so_many_millilitres(tmp_path, model, run):
    values = blob((12, 16, 5), 1)
    image = nibabel.Nifti1Image(values, np.diag([2.0, 3.0, 5.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    code, out, err = run(model, tmp_path / "a.nii", tmp_path / "m", "--device", "cpu", "--json")
    assert code == 0, err
    (told,) = json.loads(out)["images"]
    assert told["pixels"][0] > 0
    assert told["millilitres"] == pytest.approx([n * 30 * 1e-9 / 1000 for n in told["pixels"]])
    mask = nibabel.load(tmp_path / "m/a_disc.nii")
    np.testing.assert_array_equal(mask.affine, image.affine)  # the file's own numbers
    assert mask.header.get_xyzt_units()[0] == "micron"
    code, out, _ = run(
        *(model, tmp_path / "a.nii", tmp_path / "m", "--device", "cpu", "--overwrite")
    )
    assert re.search(r"disc \d\.?\d*e-0\d ml", out)


# -------------------------------------------------------------------------------------------- DICOM


@pytest.mark.parametrize("kind", ["oblique", "sagittal", "flipped"])
def test_a_series_gives_a_segmentation_like_its_nifti_twin(tmp_path, model, run, kind):
    g = grid(kind, (20, 18, 6))
    stored = stored_values(3, g.shape)
    stored[4:14, 5:12, 1:5] += 1500
    slices = series("a", g, stored)
    labels = np.zeros(g.shape, bool)
    write(tmp_path / "in/p1/SEG/1.dcm", segmentation(slices, {"x": ~labels}))  # is no image
    for slice_ in slices:  # as programs for removing names leave it
        del slice_.PatientBirthDate, slice_.AccessionNumber
    write_series(tmp_path / "in/p1/T2", slices, shuffle=4)
    twin = nibabel.Nifti1Image(true_values(stored), g.nifti_affine())
    (tmp_path / "nifti").mkdir()
    nibabel.save(twin, tmp_path / "nifti/a.nii")
    options = ("--separate", "--probabilities", "--device", "cpu", "--channels", "neighbours")
    options += ("--intensity", "percentile:10:90")
    model = with_recipe(model, tmp_path / "both", probability_threshold=0.57)  # some of each class
    code, out, err = run(model, tmp_path / "in", tmp_path / "out", *options)
    assert code == 0, err
    assert "1 of 1 images predicted" in out
    assert run(model, tmp_path / "nifti", tmp_path / "twin", *options)[0] == 0

    seg = hd.seg.segread(tmp_path / "out/p1/T2.dcm")
    uids = [slice_.SOPInstanceUID for slice_ in slices]
    read = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, name in enumerate(("disc", "cup")):
        mask = np.asanyarray(nibabel.load(tmp_path / f"twin/a_{name}.nii").dataobj)
        assert 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(read[..., number].transpose(2, 1, 0), mask)
        shares = nibabel.load(tmp_path / f"twin/a_probability_{name}.nii").get_fdata()
        maps = hd.seg.segread(tmp_path / "out/p1/T2_probabilities.dcm")
        got = maps.get_pixels_by_source_instance(
            uids, segment_numbers=[number + 1], assert_missing_frames_are_empty=True
        )
        np.testing.assert_allclose(got[..., 0].transpose(2, 1, 0), shares, atol=0.5 / 255 + 1e-6)
    described = seg.get_segment_description(2)
    assert described.segment_label == "cup"
    assert described.algorithm_type.value == "AUTOMATIC"
    algorithm = described.algorithm_identification
    assert algorithm.name == "FedFMS Kit fedmsa vit_demo"
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert algorithm.parameters["model_sha256"] == digest
    assert seg.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert seg.StudyInstanceUID == slices[0].StudyInstanceUID
    assert seg.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert seg.PatientID == "ID-a"

    # and it is a label like any other: back onto the same grid by the reader for training
    site = SiteConfig(
        data_root=tmp_path, format="dicom", images="images/*", labels="labels/*",
        classes={"disc": (1,), "cup": (2,)},
    )  # fmt: skip
    folder, whole = tmp_path / "in/p1/T2", tmp_path / "out/p1/T2.dcm"
    source = read_series(folder, read_bytes(folder, site), site)
    masks = [
        np.asanyarray(nibabel.load(tmp_path / f"twin/a_{name}.nii").dataobj) == 1
        for name in ("disc", "cup")
    ]
    for name, mask in zip(("disc", "cup"), masks, strict=True):
        one = tmp_path / f"out/p1/T2_{name}.dcm"
        np.testing.assert_array_equal(
            read_label(one, read_bytes(one, site), site, source)[0] == 1, mask
        )
    assert (masks[0] & masks[1]).any()
    higher = dataclasses.replace(site, overlap="highest")
    back, _ = read_label(whole, read_bytes(whole, higher), higher, source)
    np.testing.assert_array_equal(back, np.where(masks[1], 2, np.where(masks[0], 1, 0)))


def test_pictures_and_enhanced_images_in_dicom_get_segmentations(tmp_path, model, run):
    """Two X-rays in one folder are two images; frames of one file are the slices of one."""
    g = grid("axial", (24, 20, 3))
    slices = series("a", g, stored_values(5, g.shape))
    for number in range(2):
        one = picture(f"p{number}", stored_values(number, (24, 20, 1))[..., 0].T)
        write(tmp_path / f"in/xray/p{number}.dcm", one)
    write(tmp_path / "in/mr/whole.dcm", enhanced("a", slices))
    write_series(tmp_path / "plain/a", slices)
    code, _, err = run(model, tmp_path / "in", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    written = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.dcm")
    )
    assert written == ["mr/whole.dcm", "xray/p0.dcm", "xray/p1.dcm"]
    assert run(model, tmp_path / "plain/a", tmp_path / "plain.dcm", "--device", "cpu")[0] == 0
    whole, plain = (
        hd.seg.segread(path) for path in (tmp_path / "out/mr/whole.dcm", tmp_path / "plain.dcm")
    )
    np.testing.assert_array_equal(whole.pixel_array, plain.pixel_array)

    site = SiteConfig(
        data_root=tmp_path, format="dicom", images="in/xray/*.dcm", labels="out/xray/*.dcm",
        classes={"disc": (1,), "cup": (2,)}, overlap="highest",
    )  # fmt: skip
    for number in range(2):
        image, mask = (tmp_path / part / f"xray/p{number}.dcm" for part in ("in", "out"))
        seg = hd.seg.segread(mask)
        assert "FrameOfReferenceUID" not in seg
        assert seg.PatientID == f"ID-p{number}"
        source = read_series(image, read_bytes(image, site), site)
        back, _ = read_label(mask, read_bytes(mask, site), site, source)
        assert back.shape == (24, 20, 1)
        frames = seg.pixel_array.reshape(-1, 20, 24)
        np.testing.assert_array_equal(back[..., 0].T > 0, frames.any(axis=0))


def test_nothing_found_is_an_empty_segmentation_that_can_be_read(tmp_path, model, run):
    never = with_recipe(model, tmp_path / "never", probability_threshold=0.999999)
    g = grid("oblique", (12, 10, 3))
    slices = series("a", g, stored_values(3, g.shape))
    write_series(tmp_path / "T2", slices)
    code, out, err = run(never, tmp_path / "T2", tmp_path / "mask.dcm", "--device", "cpu")
    assert code == 0, err
    assert "disc 0.00 ml, cup 0.00 ml" in out
    seg = hd.seg.segread(tmp_path / "mask.dcm")
    read = seg.get_pixels_by_source_instance(
        [s.SOPInstanceUID for s in slices], assert_missing_frames_are_empty=True
    )
    assert read.shape == (3, 10, 12, 2)
    assert not read.any()


# ----------------------------------------------------------------------------------------- pictures


def test_pictures_give_pictures_of_their_size_with_label_values(tmp_path, model, run):
    (tmp_path / "in/deep").mkdir(parents=True)
    sizes = {"a.png": (30, 41), "b.jpg": (50, 22), "deep/c.tif": (33, 33)}
    for name, size in sizes.items():
        grey = np.clip(blob(size, 2) / 3, 0, 255).astype(np.uint8)
        Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=-1)).save(
            tmp_path / "in" / name
        )
    model = with_recipe(model, tmp_path / "exclusive", exclusive_classes=True)
    options = ("--channels", "rgb", "--intensity", "range:0:255", "--device", "cpu")
    code, out, err = run(model, tmp_path / "in", tmp_path / "out", *options, "--probabilities")
    assert code == 0, err
    assert "channels rgb, intensity range:0:255 (defaults; --site takes a site.yml)" in out
    for name, size in sizes.items():
        stem = (tmp_path / "out" / name).with_suffix("")
        with Image.open(f"{stem}.png") as picture:
            assert picture.mode == "P"  # the eye sees colours, a program the values 0, 1, 2
            labels = np.asarray(picture)
        assert labels.shape == size
        maps = np.stack([
            tifffile.imread(f"{stem}_probability_{class_name}.tif")
            for class_name in ("disc", "cup")
        ])  # fmt: skip
        threshold = np.float32(Recipe.from_json(model / "recipe.json").probability_threshold)
        expected = np.where((maps >= threshold).any(axis=0), maps.argmax(axis=0) + 1, 0)
        np.testing.assert_array_equal(labels, expected)
        assert labels.any()


def test_a_palette_mask_is_a_label_file_that_training_reads(tmp_path, model, run):
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        grey = np.clip(blob((40, 40), ord(name) % 5) / 3, 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / f"images/{name}.png")
    model = with_recipe(model, tmp_path / "exclusive", exclusive_classes=True)
    assert run(model, tmp_path / "images", tmp_path / "labels", "--device", "cpu")[0] == 0
    site = SiteConfig(
        data_root=tmp_path, format="image", images="images/*.png", labels="labels/*.png",
        classes={"disc": (1,), "cup": (2,)}, device="cpu",
    )  # fmt: skip
    for case in prepare_cases(find_cases(site), site):
        with Image.open(case.case.label) as picture:
            np.testing.assert_array_equal(case.labels[0], np.asarray(picture))


# ------------------------------------------------------------------------------- folders and errors


def test_one_bad_file_is_named_and_the_others_are_done(tmp_path, model, run):
    for name in ("a", "b", "c"):
        write_volume(tmp_path / f"in/{name}.nii", blob((10, 12, 4), 1), np.eye(4))
    bad = tmp_path / "in/b.nii"
    bad.write_bytes(bad.read_bytes()[:700])
    (tmp_path / "in/notes.txt").write_text("not an image")
    code, out, err = run(model, tmp_path / "in", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert "2 of 3 images predicted" in out
    assert "1 failed: b.nii" in err
    assert "damaged or cut off" in err
    assert "fix: copy the file from its source again" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("a_cup.nii", "a_disc.nii", "c_cup.nii", "c_disc.nii")
    ]


def test_volumes_and_places_are_right_in_a_file_with_another_unit_of_length(tmp_path, model, run):
    values, affine = blob((10, 12, 4), 1), np.diag([2.0, 3.0, 5.0, 1.0])
    write_volume(tmp_path / "mm.nii", values, affine)
    micron = nibabel.Nifti1Image(values, np.diag([1000, 1000, 1000, 1]) @ affine)
    micron.header.set_xyzt_units("micron")
    nibabel.save(micron, tmp_path / "micron.nii")
    said = []
    for name in ("mm", "micron"):
        source, target = tmp_path / f"{name}.nii", tmp_path / f"mask-{name}.nii"
        code, out, err = run(model, source, target, "--device", "cpu")
        assert code == 0, err
        said.append(re.findall(r"(\w+) ([\d.]+) ml", out))
    assert said[0] == said[1]
    count = int((nibabel.load(tmp_path / "mask-mm_disc.nii").get_fdata() == 1).sum())
    volume = float(dict(said[0])["disc"])
    assert volume == pytest.approx(count * 30 / 1000, abs=0.005)  # 2 x 3 x 5 mm a voxel
    mask = nibabel.load(tmp_path / "mask-micron_disc.nii")
    np.testing.assert_array_equal(mask.affine, micron.affine)
    assert mask.header.get_xyzt_units()[0] == "micron"


def test_masks_that_are_there_stay_unless_they_may_be_overwritten(tmp_path, model, run):
    for name in ("a", "b"):
        write_volume(tmp_path / f"in/{name}.nii", blob((10, 12, 4), 1), np.eye(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a_cup.nii").write_bytes(b"mine")
    code, _, err = run(model, tmp_path / "in", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert "add --overwrite" in err
    assert (tmp_path / "out/a_cup.nii").read_bytes() == b"mine"
    assert not (tmp_path / "out/a_disc.nii").exists()
    assert (tmp_path / "out/b_disc.nii").exists()
    assert run(model, tmp_path / "in", tmp_path / "out", "--overwrite", "--device", "cpu")[0] == 0
    assert nibabel.load(tmp_path / "out/a_cup.nii").shape == (10, 12, 4)


@pytest.mark.parametrize("where", ["in", "in/deep/..", "linked"])
def test_images_are_never_written_over(tmp_path, model, run, where):
    write_volume(tmp_path / "in/a.nii", blob((10, 12, 4), 1), np.eye(4))
    (tmp_path / "in/deep").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    before = (tmp_path / "in/a.nii").read_bytes()
    model = with_recipe(model, tmp_path / "exclusive", exclusive_classes=True)
    code, _, err = run(model, tmp_path / "in", tmp_path / where, "--overwrite")
    assert code == 1
    assert "name another OUTPUT" in err
    assert (tmp_path / "in/a.nii").read_bytes() == before
    code, _, err = run(model, tmp_path / "in/a.nii", tmp_path / "in/a.nii", "--overwrite")
    assert code == 1
    assert (tmp_path / "in/a.nii").read_bytes() == before


def test_a_mask_never_lies_among_the_slices(tmp_path, model, run):
    g = grid("axial", (12, 10, 3))
    write_series(tmp_path / "T2", series("a", g, stored_values(3, g.shape)))
    code, _, err = run(model, tmp_path / "T2", tmp_path / "T2/mask.dcm")
    assert code == 1
    assert "among the images" in err
    assert len(list((tmp_path / "T2").iterdir())) == 3


@pytest.mark.parametrize(
    ("files", "output", "expected"),
    [
        (["a.nii.gz"], "out", ["out/a.nii.gz"]),
        (["a.nii.gz", "p/b.NII", "p/.hidden.nii"], "out", ["out/a.nii.gz", "out/p/b.nii"]),
        (["a.jpg", "b.tiff"], "out", ["out/a.png", "out/b.png"]),
        (["a.png"], "in/out", ["in/out/a.png"]),
    ],
)
def test_where_masks_go(tmp_path, files, output, expected):
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    items = find_items(tmp_path / "in", tmp_path / output, ONE_CLASS)
    got = [item.labels.relative_to(tmp_path).as_posix() for item in items]
    assert [name.lower() for name in got] == expected


def test_one_file_goes_to_the_file_that_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    options = {"probabilities": True, "separate": True}
    (item,) = find_items(tmp_path / "a.jpg", tmp_path / "x/mask.png", ONE_CLASS, **options)
    assert [path.relative_to(tmp_path).as_posix() for path in item.outputs] == [
        *("x/mask.png", "x/mask_probability_disc.tif", "x/mask_disc.png")
    ]


def test_classes_that_may_overlap_have_a_file_each(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (item,) = find_items(tmp_path / "a.jpg", tmp_path / "x/mask.png", RECIPE)
    assert [path.relative_to(tmp_path).as_posix() for path in item.outputs] == [
        *("x/mask_disc.png", "x/mask_cup.png")
    ]


def test_masks_made_before_below_the_input_are_no_input(tmp_path):
    for name in ("a.png", "out/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [item.name for item in find_items(tmp_path, tmp_path / "out", ONE_CLASS)] == ["a.png"]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([], "no-input"),
        (["in/x.txt"], "nothing-to-predict"),
        (["in/a.png", "in/a.jpg"], "outputs-collide"),
        (["in/a.nii", "in/a_disc.nii"], "outputs-collide"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_done(tmp_path, files, code):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError) as error:
        find_items(tmp_path / "in", tmp_path / "out", ONE_CLASS, separate=True)
    assert error.value.code == code
    assert error.value.fix


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "folder.nii").mkdir()  # a rename onto it fails
    (tmp_path / "a.nii").write_bytes(b"old")
    with pytest.raises(ConfigError, match="OUTPUT may be written") as error:
        write_files({tmp_path / "new/b.nii": b"b", tmp_path / "folder.nii": b"x"})
    assert error.value.code == "cannot-write"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--plane", "oblique", "--plane is 'oblique'"),
        ("--channels", "blue", "use one of gray, rgb, neighbours"),
        ("--intensity", "window", "needs center and width"),
        ("--intensity", "range:5", "percentile:0.5:99.5"),
        ("--intensity", "range:9:5", "set low below high"),
        ("--device", "gpu", "device is 'gpu'"),
        ("--device", "cuda:7", "no CUDA device here|CUDA device\\(s\\) here"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_done(tmp_path, model, run, option, value, says):
    write_volume(tmp_path / "in/a.nii", blob((10, 12, 4), 1), np.eye(4))
    code, _, err = run(model, tmp_path / "in", tmp_path / "out", option, value)
    assert code == 1
    assert re.search(says, err)
    assert not (tmp_path / "out").exists()


def test_help_says_what_goes_in_and_out(run):
    code, out, _ = run("--help")
    assert code == 0
    for word in ("INPUT", "DICOM", "--site", "--probabilities", "never"):
        assert word in out


def test_intensity_as_a_command_line_gives_it():
    assert Intensity.from_text("window:40:400") == Intensity(rule="window", center=40, width=400)
    assert Intensity.from_text("percentile") == Intensity()
    assert Intensity.from_text("range:-100:5e2") == Intensity(rule="range", low=-100, high=500)


def test_json_says_what_was_used_and_what_became_of_each_image(tmp_path, model, run):
    for name in ("a", "b"):
        write_volume(tmp_path / f"in/{name}.nii", blob((10, 12, 4), 1), np.diag([2, 2, 5, 1.0]))
    (tmp_path / "in/b.nii").write_bytes(b"")
    code, out, _ = run(model, tmp_path / "in", tmp_path / "out", "--json", "--device", "cpu")
    assert code == 1
    told = json.loads(out)
    assert told["used"]["plane"] == "axial"
    assert told["classes"] == ["disc", "cup"]
    first, second = told["images"]
    disc, cup = (
        np.asanyarray(nibabel.load(tmp_path / f"out/a_{name}.nii").dataobj)
        for name in ("disc", "cup")
    )
    assert first["pixels"] == [disc.sum(), cup.sum()]
    assert first["overlap"] == (disc & cup).sum()
    assert first["millilitres"] == pytest.approx([n * 20 / 1000 for n in first["pixels"]])
    assert second["error"]["code"] == "empty-file"
    assert second["outputs"] == []


# ------------------------------------------------------------ the masks of each case and its scores


def written(folder: Path, name: str, ending: str, classes: tuple[str, ...]) -> dict:
    """Masks by class of one image, read by other libraries, from a label map or a file each."""

    def read(path: Path) -> np.ndarray:
        if ending == ".npy":
            return np.load(path)
        if ending == ".png":
            return np.asarray(Image.open(path))
        return np.asanyarray(nibabel.load(path).dataobj)

    whole = folder / f"{name}{ending}"
    if whole.exists():
        values = read(whole)
        return {one: values == number for number, one in enumerate(classes, 1)}
    return {one: read(folder / f"{name}_{one}{ending}") == 1 for one in classes}


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("npy", {"precision": "bf16", "batch_size": 3}),
        ("image", {"paper_compat": True, "resize": "stretch"}),
        ("nifti", {"precision": "bf16", "batch_size": 4}),
    ],
)
def test_each_cases_masks_score_what_the_site_says(tmp_path, run, kind, more, exclusive):
    """Three classes, one of which nobody drew here, at a threshold that is not a half."""
    classes = ("disc", "cup", "rim")
    recipe = dataclasses.replace(RECIPE, classes=classes, exclusive_classes=exclusive, **more)
    network = build_model(recipe, find_checkpoint(recipe, None)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    (tmp_path / "model").mkdir()
    save_tensors(tmp_path / "model/global_model.safetensors", read_travelling(network), "fp32")
    with torch.inference_mode():
        median = torch.sigmoid(network(torch.randn(2, 3, 64, 64, generator=generator))).median()
    recipe = dataclasses.replace(recipe, probability_threshold=round(float(median), 3))
    (tmp_path / "model/recipe.json").write_text(recipe.to_json())

    ending = {"npy": ".npy", "image": ".png", "nifti": ".nii"}[kind]
    shape = (37, 26) if kind == "image" else (17, 9, 6)
    truths = {}
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)):
        values = blob(shape, seed)
        truth = np.zeros(shape, np.uint8)
        truth[3:13, 2:8], truth[5:9, 3:6] = 1, 2
        truths[name] = truth
        for what, array in (("images", values), ("labels", truth)):
            path = tmp_path / f"site/{what}/{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "npy":
                np.save(path, array)
            elif kind == "image":
                top = 1 if what == "labels" else 255 / values.max()
                Image.fromarray((array * top).astype(np.uint8)).save(path)
            else:
                write_volume(path, array, np.diag([0.7, 1.9, 3.0, 1.0]))
    plane = "plane: sagittal\n" if kind == "nifti" else ""
    (tmp_path / "site.yml").write_text(
        f"data_root: site\nformat: {kind}\nimages: images/*{ending}\nlabels: labels/*{ending}\n"
        f"classes: {{disc: [1], cup: [2]}}\nnot_annotated: [rim]\ndevice: cpu\n{plane}"
    )
    code, _, err = run(
        *(tmp_path / "model", tmp_path / "site/images", tmp_path / "out"),
        *("--site", tmp_path / "site.yml"),
    )
    assert code == 0, err
    site = SiteConfig.from_yaml(tmp_path / "site.yml")
    scores, _ = evaluated(tmp_path / "model", site)
    assert {name for _, name in scores} == {"disc", "cup"}
    assert len(scores) == 10
    for (key, class_name), dice in scores.items():
        found = written(tmp_path / "out", key, ending, classes)[class_name]
        expected = dice_of(found, truths[key] == classes.index(class_name) + 1)
        assert dice == pytest.approx(expected, abs=1e-6)
    assert len({round(dice, 3) for dice in scores.values()}) > 3
