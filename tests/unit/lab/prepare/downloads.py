"""Small downloads with the providers' file names, formats and label values.

Written without the code under test. Each function fills a folder and returns nothing; what is in
it is simple enough to be counted by hand in the tests.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import tifffile
from PIL import Image


def noise(seed: int | str, shape: tuple[int, ...]) -> np.ndarray:
    number = int(hashlib.sha256(str(seed).encode()).hexdigest()[:8], 16)
    return np.random.default_rng(number).integers(1, 255, shape).astype(np.uint8)


def save_picture(path: Path, values: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.diag([0.6, 0.6, 3.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(values, grid), path)


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def manifest(site: Path) -> list[dict[str, str]]:
    with (site / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------- prostate

PROSTATE_CASES = {"BIDMC": 3, "HK": 2, "I2CVB": 4, "ISBI": 3, "ISBI_1.5": 2, "UCL": 2}


def prostate(root: Path) -> None:
    """10 x 8 x 5 voxels; slices 1 to 3 hold 6 voxels of prostate, at two sites 4 of zone 2 more."""
    for site, cases in PROSTATE_CASES.items():
        for number in range(cases):
            label = np.zeros((10, 8, 5), np.uint8)
            label[2:4, 3:6, 1:4] = 1
            if site.startswith("ISBI"):
                label[4:6, 3:5, 1:4] = 2
            word = "Segmentation" if site == "ISBI_1.5" else "segmentation"
            name = root / site / f"Case{number:02d}"
            volume = noise(f"{site}{number}", (10, 8, 5)).astype(np.float32) * 3.7
            save_volume(Path(f"{name}.nii.gz"), volume)
            save_volume(Path(f"{name}_{word}.nii.gz"), label)
        for folder in (root / site, root / "__MACOSX" / site):  # what macOS puts into archives
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "._Case00.nii.gz").write_bytes(b"\0\5\x16\7")
        (root / "__MACOSX" / site / "Case00.nii.gz").write_bytes(b"\0")


# ------------------------------------------------------------------------------------------ fundus


def disc_and_cup() -> np.ndarray:
    """20 x 24: a disc of 8 x 8 pixels as 1, in it a cup of 4 x 3 as 2."""
    mask = np.zeros((20, 24), np.uint8)
    mask[5:13, 6:14] = 1
    mask[7:11, 8:11] = 2
    return mask


DISC, CUP = 64, 12


def fundus(root: Path) -> None:
    """Kaggle's glaucoma-datasets, and Drishti-GS1 with one cup that reaches out of its disc."""
    photos = {
        "REFUGE/train": ["g0001", "n0001"],
        "REFUGE/val": ["V0001"],
        "REFUGE/test": ["T0001"],
        "ORIGA": ["001", "002", "003"],
        "G1020": ["image_0", "image_1", "image_10"],
    }
    for folder, names in photos.items():
        for name in names:
            picture = noise(folder + name, (20, 24, 3))
            save_picture(root / folder / "Images" / f"{name}.jpg", picture, quality=95)
            save_picture(root / folder / "Masks" / f"{name}.png", disc_and_cup())
            save_picture(root / folder / "Images_Square" / f"{name}.jpg", picture[:, :20])
    (root / "G1020" / "Images" / "image_0.json").write_text("{}")
    (root / "ORIGA" / "OrigaList.csv").write_text("Eye\n")
    drishti = root / "Drishti-GS1_files" / "Drishti-GS1_files"
    for part, truth, names in (
        ("Training", "GT", ["002", "004"]),
        ("Test", "Test_GT", ["001"]),
    ):
        for number in names:
            name = f"drishtiGS_{number}"
            save_picture(drishti / part / "Images" / f"{name}.png", noise(name, (20, 24, 3)))
            mask = disc_and_cup()
            disc, cup = np.where(mask > 0, 255, 0), np.where(mask == 2, 191, 0)
            disc[4, 6:14] = 64  # one of four experts: not disc
            cup[6, 8:11] = 128 if number == "002" else 64  # two of four: cup
            if number == "004":
                cup[2:4, 0:5] = 255  # ten pixels of cup outside the disc
            soft = drishti / part / truth / name / "SoftMap"
            save_picture(soft / f"{name}_ODsegSoftmap.png", disc.astype(np.uint8))
            save_picture(soft / f"{name}_cupsegSoftmap.png", cup.astype(np.uint8))
            (drishti / part / truth / name / f"{name}_cdrValues.txt").write_text("0.4")


def refuge_of_the_challenge(root: Path) -> None:
    """REFUGE as the challenge packs it: BMP with 255 background, 128 ring, 0 cup."""
    ours = disc_and_cup()
    bmp = np.select([ours == 0, ours == 1], [255, 128], 0).astype(np.uint8)
    training, validation = "REFUGE-Training400/Training400", "REFUGE-Validation400"
    truth = "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks"
    for image, mask in (
        (f"{training}/Glaucoma/g0001", f"{truth}/Glaucoma/g0001"),
        (f"{training}/Non-Glaucoma/n0001", f"{truth}/Non-Glaucoma/n0001"),
        (f"{validation}/{validation}/V0001", f"{validation}-GT/Disc_Cup_Masks/V0001"),
    ):
        save_picture(root / f"{image}.jpg", noise(image, (20, 24, 3)))
        save_picture(root / f"{mask}.bmp", bmp)


# ------------------------------------------------------------------------------------------ nuclei

# number of patches of each tissue in a fold of this test's PanNuke
PANNUKE = {
    2: ["Breast", "Adrenal_gland", "Esophagus", "Adrenal_gland", "Esophagus"],
    3: ["Uterus", "Bile-duct", "Colon", "Uterus", "Bile-duct"],
}


def pannuke(root: Path) -> None:
    """Patches as float64. A nucleus of 5 x 5 has the number 256, one of 3 x 4 the number 512."""
    for fold, tissues in PANNUKE.items():
        images = np.stack([noise(f"{fold}{n}", (256, 256, 3)) for n in range(len(tissues))])
        masks = np.zeros((len(tissues), 256, 256, 6))
        masks[:, 10:15, 20:25, 0] = 256
        masks[:, 100:103, 40:44, 3] = 512
        masks[:, 200:202, 200:202, 4] = 7
        masks[..., 5] = masks[..., :5].sum(axis=-1) == 0
        folder = root / f"Fold {fold}"
        for kind in ("images", "masks"):
            (folder / kind / f"fold{fold}").mkdir(parents=True, exist_ok=True)
        np.save(folder / "images" / f"fold{fold}" / "images.npy", images.astype(np.float64))
        np.save(folder / "images" / f"fold{fold}" / "types.npy", np.array(tissues))
        np.save(folder / "masks" / f"fold{fold}" / "masks.npy", masks)
        (folder / "README.md").write_text("PanNuke")


PANNUKE_PIXELS = 25 + 12 + 4


def aperio(layers: Sequence[tuple[str, Sequence[Sequence[tuple[float, float]]]]]) -> str:
    """Aperio's XML: a layer is a kind of nucleus with its outlines of (x, y)."""
    text = '<?xml version="1.0" encoding="utf-8"?>\n<Annotations MicronsPerPixel="0.252000">\n'
    for number, (name, outlines) in enumerate(layers, 1):
        text += f'<Annotation Id="{number}" Name="" ReadOnly="0">\n<Attributes>'
        text += f'<Attribute Name="{name}" Id="0" Value=""/></Attributes>\n<Regions>\n'
        text += '<RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
        text += "</RegionAttributeHeaders>\n"
        for region, outline in enumerate(outlines, 1):
            text += f'<Region Id="{region}" NegativeROA="0"><Attributes/><Vertices>'
            text += "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
            text += "</Vertices></Region>\n"
        text += "</Regions><Plots/></Annotation>\n"
    return text + "</Annotations>\n"


def box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    """Between pixels: a box of width x height pixels whose upper left one is (x, y)."""
    left, top, right, bottom = x - 0.5, y - 0.5, x + width - 0.5, y + height - 0.5
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


MONUSAC_NUCLEI = 6 * 4 + 5 * 3  # pixels
MONUSAC_AMBIGUOUS = 7 * 2 - 2  # two of its pixels are under a nucleus


def monusac(root: Path) -> None:
    """Two patients with two pictures, one more for testing; .svs beside .tif."""
    layers = [
        ("Epithelial", [box(3, 5, 6, 4), [(1.0, 1.0), (2.0, 2.0)]]),  # the second encloses nothing
        ("Lymphocyte", [box(20, 10, 5, 3)]),
        ("Ambiguous", [box(23, 9, 7, 2)]),  # rows 9 and 10, columns 23 to 29
    ]
    parts = {
        "MoNuSAC_images_and_annotations": ["TCGA-5P-A9K0", "TCGA-55-1594"],
        "MoNuSAC Testing Data and Annotations": ["TCGA-2Z-A9JG"],
    }
    for folder, patients in parts.items():
        for patient in patients:
            for number in (1, 2):
                stem = f"{patient}-01Z-00-DX1_{number}"
                path = root / folder / f"{patient}-01Z-00-DX1" / stem
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(f"{path}.tif", noise(stem, (30, 40, 3)), photometric="rgb")
                tifffile.imwrite(f"{path}.svs", noise(stem, (30, 40, 3)), photometric="rgb")
                Path(f"{path}.xml").write_text(aperio(layers))


MONUSEG_PIXELS = 8 * 8


def monuseg(root: Path) -> None:
    layers = [("Description", [box(4, 4, 8, 8)])]
    train = root / "MoNuSeg 2018 Training Data" / "MoNuSeg 2018 Training Data"
    for stem in ("TCGA-18-5592-01Z-00-DX1", "TCGA-21-5784-01Z-00-DX1", "TCGA-21-5786-01Z-00-DX1"):
        for folder in ("Tissue Images", "Annotations"):
            (train / folder).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            train / "Tissue Images" / f"{stem}.tif", noise(stem, (32, 32, 3)), photometric="rgb"
        )
        (train / "Annotations" / f"{stem}.xml").write_text(aperio(layers))
    test = root / "MoNuSegTestData"
    test.mkdir()
    tifffile.imwrite(
        test / "TCGA-2Z-A9J9-01A-01-TS1.tif", noise("test", (32, 32, 3)), photometric="rgb"
    )
    (test / "TCGA-2Z-A9J9-01A-01-TS1.xml").write_text(aperio(layers))


TNBC_PIXELS = 4 * 6


def tnbc(root: Path) -> None:
    """RGBA slides as in the download; one folder of brain, which the extended set has."""
    base = root / "TNBC_NucleiSegmentation"
    for patient, pictures in ((1, 2), (2, 1), (11, 3), (12, 1)):
        for number in range(1, pictures + 1):
            name = f"{patient:02d}_{number}.png"
            picture = noise(name, (24, 24, 4))
            picture[..., 3] = 255
            mask = np.zeros((24, 24), np.uint8)
            mask[3:7, 5:11] = 255
            save_picture(base / f"Slide_{patient:02d}" / name, picture)
            save_picture(base / f"GT_{patient:02d}" / name, mask)


def nuclei(root: Path) -> None:
    pannuke(root)
    monusac(root)
    monuseg(root)
    tnbc(root)


# -------------------------------------------------------------------------------------------- FeTS

FETS = {"1": 3, "4": 2, "6": 2, "18": 2, "21": 2}


def fets(root: Path, enhancing: int = 4) -> None:
    """12 x 12 x 10 voxels: oedema in slices 2 to 8, the core in 4 to 6."""
    base = root / "MICCAI_FeTS2022_TrainingData"
    rows = [("Partition_ID", "Subject_ID")]
    number = 0
    for partition, subjects in FETS.items():
        for _ in range(subjects):
            subject = f"FeTS2022_{number:05d}"
            number += 1
            rows.append((partition, subject))
            label = np.zeros((12, 12, 10), np.uint8)
            label[2:10, 2:10, 2:9] = 2
            label[4:8, 4:8, 4:7] = 1
            label[5:7, 5:7, 4:7] = enhancing
            for modality in ("flair", "t1", "t1ce", "t2"):
                volume = noise(subject + modality, (12, 12, 10)).astype(np.int16)
                save_volume(base / subject / f"{subject}_{modality}.nii.gz", volume)
            save_volume(base / subject / f"{subject}_seg.nii.gz", label)
    write_csv(base / "partitioning_1.csv", rows)
    write_csv(base / "partitioning_2.csv", rows)


FETS_CORE = 4 * 4 * 3  # voxels, enhancing tumour included
FETS_SLICES = 3


# ------------------------------------------------------------------------------------------ CTLung


def ctlung(root: Path, patients: int = 12) -> None:
    """JPEG slices and masks: blue is the lung (16 x 16), green the heart, red the trachea."""
    for patient in range(patients):
        for number in (0, 1, 11):
            stem = f"ID000{patient:02d}637202177411956430"
            gray = np.repeat(noise(f"{stem}{number}", (48, 48, 1)), 3, axis=2)
            mask = np.zeros((48, 48, 3), np.uint8)
            mask[8:24, 16:32, 2] = 255
            mask[32:40, 16:32, 1] = 255
            mask[0:8, 0:8, 0] = 255
            save_picture(root / "images" / "images" / f"{stem}_{number}.jpg", gray, quality=95)
            masks = root / "masks" / "masks"
            save_picture(masks / f"{stem}_mask_{number}.jpg", mask, quality=95, subsampling=0)


# --------------------------------------------------------------------------------------- Decathlon


def decathlon(root: Path, cases: int = 7) -> None:
    """A task with one modality, as Task04_Hippocampus; macOS's ._ files are there as well."""
    task = root / "Task04_Hippocampus"
    training = []
    for number in range(cases):
        name = f"hippocampus_{number:03d}.nii.gz"
        label = np.zeros((8, 9, 7), np.uint8)
        label[1:4, 2:5, 2:5] = 1
        label[4:6, 2:5, 2:4] = 2
        save_volume(task / "imagesTr" / name, noise(name, (8, 9, 7)).astype(np.float32))
        save_volume(task / "labelsTr" / name, label)
        (task / "imagesTr" / f"._{name}").write_bytes(b"\0\5\x16\7")
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    _dataset_json(
        task, "Hippocampus", {"0": "MRI"}, ["background", "Anterior", "Posterior"], training
    )


def decathlon_4d(root: Path) -> None:
    """Two modalities in one file; stored as int16 with a slope, so that stored is not meant."""
    task = root / "Task05_Prostate"
    training = []
    for number in range(3):
        name = f"prostate_{number:02d}.nii.gz"
        stored = np.random.default_rng(number).integers(-500, 500, (8, 8, 5, 2)).astype(np.int16)
        image = nibabel.Nifti1Image(stored, np.diag([0.6, -0.6, 4.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        path = task / "imagesTr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = bytearray(image.to_bytes())
        plain[112:120] = np.array([0.25, 7.0], "<f4").tobytes()  # scl_slope, scl_inter
        path.write_bytes(gzip.compress(bytes(plain)))
        label = np.zeros((8, 8, 5), np.uint8)
        label[2:5, 2:5, 1:3] = 1
        label[5:8, 2:5, 1:3] = 2
        save_volume(task / "labelsTr" / name, label, np.diag([0.6, -0.6, 4.0, 1.0]))
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    _dataset_json(
        task, "Prostate", {"0": "T2", "1": "ADC"}, ["background", "PZ", "TZ zone!"], training
    )


def _dataset_json(
    task: Path,
    name: str,
    modality: dict[str, str],
    labels: list[str],
    training: list[dict[str, str]],
) -> None:
    content = {
        "name": name,
        "licence": "CC-BY-SA 4.0",
        "modality": modality,
        "labels": {str(value): label for value, label in enumerate(labels)},
        "numTraining": len(training),
        "training": training,
        "test": ["./imagesTs/other_001.nii.gz"],
    }
    (task / "dataset.json").write_text(json.dumps(content))
