"""The six data sets: sites, cases, slices, classes and counts of a small download."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import downloads
import nibabel
import numpy as np
import pytest
import tifffile
import yaml
from downloads import manifest, noise, save_picture, save_volume, tree
from PIL import Image

from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.data.classes import class_masks
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, SiteDataError
from fedfms_lab.prepare import ctlung, fets, fundus, nuclei, prostate
from fedfms_lab.prepare.ctlung import plan_ctlung
from fedfms_lab.prepare.decathlon import plan_decathlon
from fedfms_lab.prepare.fets import plan_fets
from fedfms_lab.prepare.fundus import plan_fundus
from fedfms_lab.prepare.nuclei import plan_nuclei
from fedfms_lab.prepare.pictures import fill, read_numbers
from fedfms_lab.prepare.plan import deal, flare_name
from fedfms_lab.prepare.prostate import plan_prostate
from fedfms_lab.prepare.source import Source
from fedfms_lab.prepare.write import Prepared, prepare


def run(plan, folder: Path, output: Path, **options) -> dict[str, Prepared]:
    source = Source(folder)
    return {site.name: site for site in prepare(plan(source, **options), source, output)}


def site_of(output: Path, name: str) -> SiteConfig:
    return SiteConfig.from_yaml(output / name / "site.yml")


def assert_ready(output: Path, name: str, classes: list[str]) -> SiteConfig:
    """Our own check finds no error, and nothing but a few cases to warn of."""
    site = site_of(output, name)
    found = check_data(site, classes)
    assert {finding.code for finding in found} <= {"few-validation-cases"}, found
    assert list(site.classes) == classes
    assert Policy.from_folder(output / name / "policy").min_cases == 3
    assert {path.name for path in (output / name).iterdir()} == {
        *("images", "labels", "policy", "site.yml", "manifest.csv")
    }
    rows = manifest(output / name)
    assert {row["site"] for row in rows} == {name}
    patients = {case.key: case.patient for case in find_cases(site)}
    assert patients == {row["case"]: row["patient"] for row in rows}
    hashes = tree(output / name)
    for row in rows:
        assert hashes[row["image"]] == row["image_sha256"]
        assert hashes[row["label"]] == row["label_sha256"]
    return site


def label(output: Path, site: str, case: str) -> np.ndarray:
    with Image.open(output / site / "labels" / f"{case}.png") as image:
        return np.asarray(image)


# ---------------------------------------------------------------------------------------- prostate


def test_prostate_is_six_sites_whose_volumes_are_the_downloads_own_bytes(tmp_path):
    downloads.prostate(tmp_path / "src")
    sites = run(plan_prostate, tmp_path / "src", tmp_path / "out")
    assert {name: site.cases for name, site in sites.items()} == {
        "BIDMC": 3,
        "HK": 2,
        "I2CVB": 4,
        "ISBI": 3,
        "ISBI_1-5": 2,
        "UCL": 2,
    }
    for name, result in sites.items():
        site = assert_ready(tmp_path / "out", name, ["prostate"])
        assert (result.slices, result.slices_with_foreground) == (
            5 * result.cases,
            3 * result.cases,
        )
        assert (site.channels, site.keep_empty_every) == ("gray", 1)
        zones = name.startswith("ISBI")
        given = "ISBI_1.5" if name == "ISBI_1-5" else name
        for row in manifest(tmp_path / "out" / name):
            assert row["given_site"] == given
            assert row["voxels_prostate"] == str(3 * (6 + 4 * zones))
            assert row["label_values"] == ("0 1 2" if zones else "0 1")
            assert (row["slices"], row["rows"], row["columns"]) == ("5", "8", "10")
            image, drawn = row["source_files"].split(" ; ")
            for ours, theirs in ((row["image"], image), (row["label"], drawn)):
                mine = (tmp_path / "out" / name / ours).read_bytes()
                assert mine == (tmp_path / "src" / theirs).read_bytes()


def test_prostate_as_the_paper_has_it_is_stored_slices_cut_off_to_8_bits(tmp_path):
    downloads.prostate(tmp_path / "src")
    run(plan_prostate, tmp_path / "src", tmp_path / "out", paper=True, only=["HK"])
    site = site_of(tmp_path / "out", "HK")
    assert site.plane == "stored" and site.intensity.rounding == "truncate"
    rows = manifest(tmp_path / "out" / "HK")
    assert {(row["slices"], row["rows"], row["columns"]) for row in rows} == {("5", "10", "8")}
    for case, row in zip(prepare_cases(find_cases(site), site), rows, strict=True):
        stored = nibabel.load(tmp_path / "out" / "HK" / row["image"]).get_fdata()
        cut = np.clip(stored, None, np.percentile(stored.astype(np.float32), 99))
        levels = (cut - cut.min()) / (cut.max() - cut.min()) * 255
        for index in range(stored.shape[2]):
            np.testing.assert_array_equal(case.images[index], levels[:, :, index].astype(np.uint8))


@pytest.mark.parametrize(
    ("study", "names"),
    [
        ("prostate", tuple(prostate.SITES)),
        ("fundus", fundus.SITES),
        ("nuclei", nuclei.SITES),
        ("fets", fets.PAPER_SITES),
        ("ctlung", ctlung.SITES),
    ],
)
def test_the_studies_have_the_papers_order_of_sites(study, names):
    """As prepare lists them; the last site in it gets the rest of the paper's rounded weights."""
    path = Path(__file__).parents[4] / "studies" / f"paper-{study}.yml"
    said = yaml.safe_load(path.read_text())
    assert said["set"]["site_order"] == [flare_name(name) for name in names]
    training = len(names) - 1  # each site is left out in turn
    assert said["methods"]["fedmsa"]["set"]["start_draws"] == [1] * training
    last = {"prostate": "UCL", "fundus": "Drishti-GS1", "nuclei": "MoNuSAC2018", "fets": "21"}
    assert said["set"]["site_order"][-1] == last.get(study, "5")


def test_prostate_under_the_names_of_the_hospitals(tmp_path):
    downloads.prostate(tmp_path / "src")
    (tmp_path / "src" / "ISBI").rename(tmp_path / "src" / "RUNMC")
    (tmp_path / "src" / "ISBI_1.5").rename(tmp_path / "src" / "BMC")
    sites = run(plan_prostate, tmp_path / "src", tmp_path / "out", only=["ISBI", "ISBI_1.5"])
    assert list(sites) == ["ISBI", "ISBI_1-5"]


def test_a_label_whose_header_is_elsewhere_gets_its_images_header(tmp_path):
    downloads.prostate(tmp_path / "src")
    path = tmp_path / "src" / "HK" / "Case01_segmentation.nii.gz"
    values = np.asanyarray(nibabel.load(path).dataobj)
    save_volume(path, values, np.diag([1.0, 1.0, 1.0, 1.0]))
    sites = run(plan_prostate, tmp_path / "src", tmp_path / "out", only=["HK"])
    assert_ready(tmp_path / "out", "HK", ["prostate"])
    assert any("header copied: 1 in 1 of 2 cases" in notice for notice in sites["HK"].notices)
    ours = nibabel.load(tmp_path / "out" / "HK" / "labels" / "Case01.nii.gz")
    image = nibabel.load(tmp_path / "src" / "HK" / "Case01.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(ours.dataobj), values)
    np.testing.assert_allclose(ours.affine, image.affine)


def test_a_volume_that_is_not_compressed_is_compressed_without_loss(tmp_path):
    downloads.prostate(tmp_path / "src")
    plain = {}
    for path in sorted((tmp_path / "src" / "HK").glob("Case*")):
        plain[path.name] = gzip.decompress(path.read_bytes())
        path.with_suffix("").write_bytes(plain[path.name])
        path.unlink()
    run(plan_prostate, tmp_path / "src", tmp_path / "out", only=["HK"])
    for row in manifest(tmp_path / "out" / "HK"):
        image, drawn = row["source_files"].split(" ; ")
        for ours, theirs in ((row["image"], image), (row["label"], drawn)):
            packed = (tmp_path / "out" / "HK" / ours).read_bytes()
            assert gzip.decompress(packed) == plain[Path(theirs).name + ".gz"]
            assert packed[3:8] == bytes(5)  # no name, and no time


# ------------------------------------------------------------------------------------------ fundus


def test_fundus_is_four_sites_with_disc_and_cup(tmp_path):
    downloads.fundus(tmp_path / "src")
    sites = run(plan_fundus, tmp_path / "src", tmp_path / "out")
    assert {name: site.cases for name, site in sites.items()} == {
        "REFUGE": 4,
        "ORIGA": 3,
        "G1020": 3,
        "Drishti-GS1": 3,
    }
    for name in sites:
        site = assert_ready(tmp_path / "out", name, ["optic_disc", "optic_cup"])
        assert site.classes == {"optic_disc": (1, 2), "optic_cup": (2,)}
    for name in ("REFUGE", "ORIGA", "G1020"):
        for row in manifest(tmp_path / "out" / name):
            counts = int(row["pixels_optic_disc"]), int(row["pixels_optic_cup"])
            assert counts == (downloads.DISC, downloads.CUP)
            np.testing.assert_array_equal(
                label(tmp_path / "out", name, row["case"]), downloads.disc_and_cup()
            )
    keys = [row["case"] for row in manifest(tmp_path / "out" / "G1020")]
    assert keys == ["image_0", "image_1", "image_10"]


def test_soft_maps_count_from_two_of_four_experts_and_a_cup_outside_stays_cup(tmp_path):
    downloads.fundus(tmp_path / "src")
    sites = run(plan_fundus, tmp_path / "src", tmp_path / "out", only=["Drishti-GS1"])
    rows = {row["case"]: row for row in manifest(tmp_path / "out" / "Drishti-GS1")}
    disc, cup = downloads.DISC, downloads.CUP
    expected = {  # cup of 002 has a row of three more pixels, 004 ten outside the disc
        "drishtiGS_001": (disc, cup, 0),
        "drishtiGS_002": (disc, cup + 3, 0),
        "drishtiGS_004": (disc + 10, cup + 10, 10),
    }
    for case, (disc_pixels, cup_pixels, outside) in expected.items():
        assert int(rows[case]["pixels_optic_disc"]) == disc_pixels
        assert int(rows[case]["pixels_optic_cup"]) == cup_pixels
        assert int(rows[case]["cup_outside_disc_pixels"]) == outside
    written = label(tmp_path / "out", "Drishti-GS1", "drishtiGS_004")
    assert set(np.unique(written)) == {0, 1, 2}  # no 0 - 1 = 255
    assert (written[2:4, 0:5] == 2).all()
    notices = sites["Drishti-GS1"].notices
    assert "cup outside disc pixels: 10 in 1 of 3 cases" in notices


def test_the_ring_is_the_disc_without_its_cup(tmp_path):
    downloads.fundus(tmp_path / "src")
    run(plan_fundus, tmp_path / "src", tmp_path / "ring", od_mode="ring")
    run(plan_fundus, tmp_path / "src", tmp_path / "full")
    run(plan_fundus, tmp_path / "src", tmp_path / "paper", paper=True)
    for name in ("REFUGE", "Drishti-GS1"):
        for row in manifest(tmp_path / "ring" / name):
            full = {r["case"]: r for r in manifest(tmp_path / "full" / name)}[row["case"]]
            assert row["label_sha256"] == full["label_sha256"]  # the files are the same
            ring = int(full["pixels_optic_disc"]) - int(full["pixels_optic_cup"])
            assert int(row["pixels_optic_disc"]) == ring
        assert site_of(tmp_path / "paper", name).classes["optic_disc"] == (1,)
        assert site_of(tmp_path / "paper", name).validation_fraction == 0.1
    (case,) = [
        case
        for case in prepare_cases(
            find_cases(site_of(tmp_path / "ring", "REFUGE")), site_of(tmp_path / "ring", "REFUGE")
        )
        if case.case.key == "g0001"
    ]
    recipe = downloads_recipe(("optic_disc", "optic_cup"))
    masks = class_masks(case, site_of(tmp_path / "ring", "REFUGE"), recipe)
    assert not (masks[0] & masks[1]).any()


def downloads_recipe(classes: tuple[str, ...]):
    from fedfms.contracts.recipe import Recipe

    return Recipe(
        method="fedmsa", backbone="vit_demo", backbone_sha256="0" * 64, classes=classes, rounds=1,
        image_size=128,
    )  # fmt: skip


def test_refuge_as_the_challenge_packs_it(tmp_path):
    downloads.refuge_of_the_challenge(tmp_path / "src")
    sites = run(plan_fundus, tmp_path / "src", tmp_path / "out", only=["REFUGE"])
    assert sites["REFUGE"].cases == 3
    for case in ("V0001", "g0001", "n0001"):
        np.testing.assert_array_equal(
            label(tmp_path / "out", "REFUGE", case), downloads.disc_and_cup()
        )


def test_a_soft_map_a_pixel_smaller_than_its_picture_is_stretched_and_reported(tmp_path):
    downloads.fundus(tmp_path / "src")
    (folder,) = (tmp_path / "src").rglob("Test_GT")
    soft = folder / "drishtiGS_001" / "SoftMap"
    (picture,) = (tmp_path / "src").rglob("Images/drishtiGS_001.png")
    save_picture(picture, noise(5, (200, 240, 3)))
    for path in soft.iterdir():
        with Image.open(path) as image:
            big = np.repeat(np.repeat(np.asarray(image), 10, axis=0), 10, axis=1)
        save_picture(path, big[:-1, :-2])
    sites = run(plan_fundus, tmp_path / "src", tmp_path / "out", only=["Drishti-GS1"])
    assert "soft map resized: 1 in 1 of 3 cases" in sites["Drishti-GS1"].notices
    written = label(tmp_path / "out", "Drishti-GS1", "drishtiGS_001")
    assert written.shape == (200, 240)
    true = np.repeat(np.repeat(downloads.disc_and_cup(), 10, axis=0), 10, axis=1)
    assert (written != true).mean() < 0.01


# ------------------------------------------------------------------------------------------ nuclei


def test_nuclei_are_seven_sites(tmp_path):
    downloads.nuclei(tmp_path / "src")
    sites = run(plan_nuclei, tmp_path / "src", tmp_path / "out")
    assert {name: site.cases for name, site in sites.items()} == {
        "PanNuke2Adrenal_gland": 2,
        "PanNuke2Esophagus": 2,
        "PanNuke3Bile-duct": 2,
        "PanNuke3Uterus": 2,
        "MoNuSAC2020": 6,
        "TNBC": 6,
        "MoNuSAC2018": 4,
    }
    pixels = {
        "MoNuSAC2020": downloads.MONUSAC_NUCLEI,
        "TNBC": downloads.TNBC_PIXELS,
        "MoNuSAC2018": downloads.MONUSEG_PIXELS,
    }
    for name in sites:
        site = assert_ready(tmp_path / "out", name, ["nucleus"])
        assert (site.classes, site.channels) == ({"nucleus": (255,)}, "rgb")
        for row in manifest(tmp_path / "out" / name):
            assert int(row["pixels_nucleus"]) == pixels.get(name, downloads.PANNUKE_PIXELS)


def test_pannuke_picks_the_tissue_of_its_fold_and_keeps_nuclei_numbered_256_and_512(tmp_path):
    downloads.pannuke(tmp_path / "src")
    run(plan_nuclei, tmp_path / "src", tmp_path / "out", only=["PanNuke2Adrenal_gland"])
    out = tmp_path / "out"
    rows = manifest(out / "PanNuke2Adrenal_gland")
    assert [row["case"] for row in rows] == ["fold2_0001", "fold2_0003"]
    assert rows[1]["source_files"].endswith("Fold 2/masks/fold2/masks.npy [3]")
    images = np.load(tmp_path / "src" / "Fold 2" / "images" / "fold2" / "images.npy")
    masks = np.load(tmp_path / "src" / "Fold 2" / "masks" / "fold2" / "masks.npy")
    with Image.open(out / "PanNuke2Adrenal_gland" / "images" / "fold2_0003.png") as image:
        np.testing.assert_array_equal(np.asarray(image), images[3])
    written = label(out, "PanNuke2Adrenal_gland", "fold2_0003")
    np.testing.assert_array_equal(written == 255, masks[3, ..., 5] == 0)
    assert set(np.unique(written)) == {0, 255}
    assert (written[10:15, 20:25] == 255).all()  # 256
    assert (written[100:103, 40:44] == 255).all()  # 512


def test_patients_of_the_pictures_are_the_providers(tmp_path):
    downloads.nuclei(tmp_path / "src")
    run(plan_nuclei, tmp_path / "src", tmp_path / "out", only=["MoNuSAC2020", "TNBC"])
    patients = {
        name: {row["case"]: row["patient"] for row in manifest(tmp_path / "out" / name)}
        for name in ("MoNuSAC2020", "TNBC")
    }
    assert set(patients["TNBC"].values()) == {"01", "02", "11"}  # 12 is brain
    assert patients["TNBC"]["11_3"] == "11"
    assert set(patients["MoNuSAC2020"].values()) == {
        *("TCGA-5P-A9K0", "TCGA-55-1594", "TCGA-2Z-A9JG")
    }


def test_what_is_ambiguous_in_monusac_is_no_nucleus_and_can_be_mapped(tmp_path):
    downloads.monusac(tmp_path / "src")
    sites = run(plan_nuclei, tmp_path / "src", tmp_path / "out", only=["MoNuSAC2020"])
    assert site_of(tmp_path / "out", "MoNuSAC2020").background == (0, 128)
    written = label(tmp_path / "out", "MoNuSAC2020", "TCGA-55-1594-01Z-00-DX1_2")
    expected = np.zeros((30, 40), np.uint8)
    expected[9:11, 23:30] = 128
    expected[5:9, 3:9] = 255
    expected[10:13, 20:25] = 255
    np.testing.assert_array_equal(written, expected)
    assert (expected == 128).sum() == downloads.MONUSAC_AMBIGUOUS
    assert "outlines left out: 6 in 6 of 6 cases" in sites["MoNuSAC2020"].notices


def test_an_svs_serves_where_there_is_no_tif(tmp_path):
    downloads.monusac(tmp_path / "src")
    for path in (tmp_path / "src").rglob("TCGA-55*.tif"):
        path.unlink()
    sites = run(plan_nuclei, tmp_path / "src", tmp_path / "out", only=["MoNuSAC2020"])
    assert sites["MoNuSAC2020"].cases == 6


@pytest.mark.parametrize("ending", ["npy", "tif", "png"])
def test_a_given_instance_mask_keeps_object_256(tmp_path, ending):
    downloads.monuseg(tmp_path / "src")
    (xml,) = (tmp_path / "src").rglob("TCGA-18*.xml")
    xml.unlink()
    masks = xml.parents[1] / "Masks"
    masks.mkdir()
    numbers = np.zeros((32, 32), np.uint16)
    numbers[2:4, 2:4], numbers[8:10, 8:12], numbers[20:23, 20:23] = 256, 1, 512
    path = masks / f"{xml.stem}.{ending}"
    if ending == "npy":
        np.save(path, numbers.astype(np.float64))
    elif ending == "tif":
        tifffile.imwrite(path, numbers)
    else:
        Image.fromarray(numbers).save(path)
    run(plan_nuclei, tmp_path / "src", tmp_path / "out", only=["MoNuSAC2018"])
    written = label(tmp_path / "out", "MoNuSAC2018", xml.stem)
    np.testing.assert_array_equal(written == 255, numbers != 0)


def test_outlines_are_filled_as_a_point_by_point_test_says():
    """Against the crossing number, counted by hand for each pixel."""
    random = np.random.default_rng(3)
    outline = random.uniform(-4, 34, (9, 2))
    mask = np.zeros((30, 30), np.uint8)
    fill(mask, [outline], 255)
    for row in range(30):
        for column in range(30):
            crossings = 0
            for (x1, y1), (x2, y2) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
                if (y1 > row) != (y2 > row):
                    crossings += column < x1 + (row - y1) / (y2 - y1) * (x2 - x1)
            assert (mask[row, column] == 255) == (crossings % 2 == 1), (row, column)
    assert 0 < (mask == 255).mean() < 1


def test_a_palette_mask_gives_its_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 3], [7, 0]], np.uint8), "P")
    image.putpalette([200, 10, 10] * 256)  # all colours alike
    image.save(tmp_path / "m.png")
    assert read_numbers(tmp_path / "m.png").tolist() == [[0, 3], [7, 0]]


# -------------------------------------------------------------------------------------------- FeTS


@pytest.mark.parametrize("enhancing", [4, 3])
def test_fets_takes_the_core_of_the_papers_four_partitions(tmp_path, enhancing):
    downloads.fets(tmp_path / "src", enhancing)
    sites = run(plan_fets, tmp_path / "src", tmp_path / "out")
    assert {name: site.cases for name, site in sites.items()} == {"1": 3, "6": 2, "18": 2, "21": 2}
    for name, result in sites.items():
        site = assert_ready(tmp_path / "out", name, ["tumor_core"])
        assert site.classes == {"tumor_core": (1, enhancing)}
        assert site.background == (0, 2)
        assert (site.channels, site.keep_empty_every) == ("neighbours", 5)
        assert not Policy.from_folder(tmp_path / "out" / name / "policy").pictures
        assert result.slices == 10 * result.cases
        assert result.slices_with_foreground == downloads.FETS_SLICES * result.cases
        for row in manifest(tmp_path / "out" / name):
            assert int(row["voxels_tumor_core"]) == downloads.FETS_CORE
            assert f"{row['case']}_t1ce.nii.gz" in row["source_files"]
    site = site_of(tmp_path / "out", "1")
    slices = SliceDataset(
        prepare_cases(find_cases(site), site), site, downloads_recipe(("tumor_core",))
    )
    # 3 with tumour a case; of the 21 without (oedema alone is without) every fifth
    assert len(slices) == 9 + 5


def test_fets_of_other_partitions_and_another_contrast(tmp_path):
    downloads.fets(tmp_path / "src")
    sites = run(
        plan_fets, tmp_path / "src", tmp_path / "out", sites=["4"], modality="flair", paper=True
    )
    assert list(sites) == ["4"]
    row = manifest(tmp_path / "out" / "4")[0]
    ours = (tmp_path / "out" / "4" / row["image"]).read_bytes()
    assert ours == (tmp_path / "src" / row["source_files"].split(" ; ")[0]).read_bytes()
    assert "_flair" in row["source_files"]
    site = site_of(tmp_path / "out", "4")
    assert site.intensity.bounds == (0, 99)
    assert site.validation_fraction == 0.1
    for options, problem in (
        ({"sites": ["2"]}, "no partition 2"),
        ({"sites": []}, "no partition is named"),
        ({"modality": "pet"}, "no modality pet"),
    ):
        with pytest.raises(ConfigError, match=problem):
            plan_fets(Source(tmp_path / "src"), **options)


# ------------------------------------------------------------------------------------------ CTLung


def test_ctlung_is_the_blue_channel_and_five_sites_of_whole_patients(tmp_path):
    downloads.ctlung(tmp_path / "src")
    sites = run(plan_ctlung, tmp_path / "src", tmp_path / "out")
    assert list(sites) == ["1", "2", "3", "4", "5"]
    seen: dict[str, str] = {}
    for name in sites:
        site = assert_ready(tmp_path / "out", name, ["lung"])
        assert site.channels == "gray"
        for row in manifest(tmp_path / "out" / name):
            assert seen.setdefault(row["patient"], name) == name
            assert int(row["pixels_lung"]) == 16 * 16
            written = label(tmp_path / "out", name, row["case"])
            assert (written[8:24, 16:32] == 255).all()
    assert len(seen) == 12
    assert sorted(list(seen.values()).count(name) for name in sites) == [2, 2, 2, 3, 3]


def test_ctlung_by_a_list_of_ones_own_and_from_five_folders(tmp_path):
    downloads.ctlung(tmp_path / "src", patients=4)
    names = [f"ID000{n:02d}637202177411956430" for n in range(4)]
    places = ["north", "north", "St. Mary", "St. Mary"]
    downloads.write_csv(
        tmp_path / "sites.csv", [("patient", "site"), *zip(names, places, strict=True)]
    )
    sites = run(plan_ctlung, tmp_path / "src", tmp_path / "out", sites_from=tmp_path / "sites.csv")
    assert {name: site.cases for name, site in sites.items()} == {"St--Mary": 6, "north": 6}
    assert manifest(tmp_path / "out" / "St--Mary")[0]["given_site"] == "St. Mary"

    for number in range(1, 6):
        for case in range(2):
            folder = tmp_path / "five" / str(number)
            save_picture(folder / "images" / f"a{case}.png", noise(f"{number}{case}", (20, 20)))
            mask = np.zeros((20, 20, 3), np.uint8)
            mask[2:6, 2:6, 2], mask[8, 8, 2] = 150, 149
            save_picture(folder / "labels" / f"a{case}.png", mask)
    sites = run(plan_ctlung, tmp_path / "five", tmp_path / "out5")
    assert {name: site.cases for name, site in sites.items()} == dict.fromkeys("12345", 2)
    assert manifest(tmp_path / "out5" / "3")[1]["pixels_lung"] == "16"  # 150 counts, 149 not


# --------------------------------------------------------------------------------------- Decathlon


def test_a_decathlon_task_is_one_site_or_several(tmp_path):
    downloads.decathlon(tmp_path / "src")
    sites = run(plan_decathlon, tmp_path / "src", tmp_path / "one")
    assert {name: site.cases for name, site in sites.items()} == {"site-1": 7}
    site = assert_ready(tmp_path / "one", "site-1", ["anterior", "posterior"])
    assert site.classes == {"anterior": (1,), "posterior": (2,)}
    row = manifest(tmp_path / "one" / "site-1")[0]
    assert (row["voxels_anterior"], row["voxels_posterior"]) == ("27", "12")
    sites = run(plan_decathlon, tmp_path / "src", tmp_path / "three", sites=3, plane="sagittal")
    assert sorted(site.cases for site in sites.values()) == [2, 2, 3]
    cases = [row["case"] for name in sites for row in manifest(tmp_path / "three" / name)]
    assert sorted(cases) == [f"hippocampus_{n:03d}" for n in range(7)]
    assert site_of(tmp_path / "three", "site-2").plane == "sagittal"
    assert manifest(tmp_path / "three" / "site-1")[0]["slices"] == "8"  # along x


def test_a_channel_of_a_4d_volume_is_taken_without_loss(tmp_path):
    downloads.decathlon_4d(tmp_path / "src")
    with pytest.raises(ConfigError) as caught:
        plan_decathlon(Source(tmp_path / "src"))
    assert "0 T2, 1 ADC" in caught.value.fix
    run(plan_decathlon, tmp_path / "src", tmp_path / "out", channel=1)
    assert_ready(tmp_path / "out", "site-1", ["pz", "tz_zone"])
    for row in manifest(tmp_path / "out" / "site-1"):
        assert row["source_files"].endswith("channel 1")
        theirs = nibabel.load(tmp_path / "src" / row["source_files"].split(" ; ")[0])
        ours = nibabel.load(tmp_path / "out" / "site-1" / row["image"])
        assert ours.shape == (8, 8, 5)
        assert (ours.dataobj.slope, ours.dataobj.inter) == (0.25, 7.0)
        np.testing.assert_array_equal(
            ours.dataobj.get_unscaled(), theirs.dataobj.get_unscaled()[..., 1]
        )
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj)[..., 1])
        np.testing.assert_array_equal(ours.affine, theirs.affine)
        for form in ("sform", "qform"):
            assert (
                getattr(ours, f"get_{form}")(coded=True)[1]
                == (getattr(theirs, f"get_{form}")(coded=True)[1])
            )


def test_a_decathlon_by_a_csv_of_sites(tmp_path):
    downloads.decathlon(tmp_path / "src", cases=4)
    names = [f"hippocampus_{number:03d}" for number in range(4)]
    rows = list(zip(names, ["b", "a", "a", "b"], strict=True))
    downloads.write_csv(tmp_path / "sites.csv", [("case", "site"), *rows])
    sites = run(
        plan_decathlon, tmp_path / "src", tmp_path / "out", sites_from=tmp_path / "sites.csv"
    )
    assert list(sites) == ["a", "b"]
    assert [row["case"] for row in manifest(tmp_path / "out" / "a")] == names[1:3]
    source = Source(tmp_path / "src")
    for bad, problem in (
        (rows[:3], "does not say where hippocampus_003"),
        ([*rows, ("hippocampus_009", "a")], "not in the download"),
        ([*rows, (names[0], "a")], "at two sites"),
        ([(names[0], "***")], "cannot be the name"),
        ([], "no rows"),
    ):
        downloads.write_csv(tmp_path / "sites.csv", [("case", "site"), *bad])
        with pytest.raises(ConfigError, match=problem):
            plan_decathlon(source, sites_from=tmp_path / "sites.csv")
    with pytest.raises(ConfigError, match="no channel 1"):
        plan_decathlon(source, channel=1)
    with pytest.raises(ConfigError, match="9 sites"):
        plan_decathlon(source, sites=9)
    with pytest.raises(SiteDataError, match="1 patients"):
        plan_decathlon(source, sites=4)


def test_real_volumes_as_a_task(tmp_path, shared_data):
    """Volumes of Task04 itself, under its dataset.json."""
    task = tmp_path / "Task04_Hippocampus"
    theirs = shared_data / "hippocampus" / "scanner-a"
    names = sorted(path.name for path in (theirs / "images").iterdir())[:6]
    for ours, kind in (("imagesTr", "images"), ("labelsTr", "labels")):
        (task / ours).mkdir(parents=True)
        for name in names:
            shutil.copy(theirs / kind / name, task / ours / name)
    content = {
        "name": "Hippocampus",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
    }
    (task / "dataset.json").write_text(json.dumps(content))
    sites = run(plan_decathlon, task, tmp_path / "out", sites=2)
    assert [site.cases for site in sites.values()] == [3, 3]
    for name in sites:
        assert_ready(tmp_path / "out", name, ["anterior", "posterior"])
        for row in manifest(tmp_path / "out" / name):
            drawn = np.asanyarray(nibabel.load(theirs / "labels" / f"{row['case']}.nii.gz").dataobj)
            assert int(row["voxels_anterior"]) == (drawn == 1).sum()
            assert int(row["voxels_posterior"]) == (drawn == 2).sum()
            assert int(row["slices"]) == drawn.shape[2]
            assert int(row["slices_with_foreground"]) == drawn.any(axis=(0, 1)).sum()


def test_patients_are_dealt_the_same_whatever_their_order():
    names = [f"patient-{number}" for number in range(23)]
    sites = deal(names, ["a", "b", "c"])
    assert deal(reversed(names), ["a", "b", "c"]) == sites
    assert sorted(list(sites.values()).count(site) for site in "abc") == [7, 8, 8]
    assert [sites[name] for name in names[:6]] == list("cbbaaa")  # by sha256sum and sort
