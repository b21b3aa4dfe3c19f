"""Folders as data sets and hospitals have them, each built from the written specification it names.

A builder writes a folder and returns the pairs that are right: image and label, relative to it.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

Pairs = dict[str, str]
SHAPE = (20, 24, 6)


def volume(path: Path, seed: int, shape=SHAPE, zooms=(1.0, 1.0, 3.0), low=0, high=900) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*zooms, 1.0])), path)


def mask(path: Path, seed: int, values=(1,), shape=SHAPE, zooms=(1.0, 1.0, 3.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(shape, np.uint8)
    for number, value in enumerate(values):
        start = 3 + 4 * number + seed % 2
        labels[start : start + 3, 5:11, 1:4] = value
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([*zooms, 1.0])), path)


def junk(root: Path) -> None:
    """What systems and people leave in folders."""
    (root / "Thumbs.db").write_bytes(b"junk")
    (root / ".DS_Store").write_bytes(b"junk")
    (root / "Lies mich, bitte.txt").write_text("notes")
    (root / "Übersicht.xlsx").write_bytes(b"PK\x03\x04")


def nnunet_raw(root: Path, cases: int = 5) -> Pairs:
    """documentation/dataset_format.md of MIC-DKFZ/nnUNet; a test set without labels beside it."""
    base = root / "nnUNet raw" / "Dataset042_Pröstata"
    pairs = {}
    for n in range(cases):
        image, label = f"imagesTr/prost_{n:03d}_0000.nii.gz", f"labelsTr/prost_{n:03d}.nii.gz"
        volume(base / image, n)
        mask(base / label, n, (1, 2))
        pairs[f"nnUNet raw/Dataset042_Pröstata/{image}"] = f"nnUNet raw/Dataset042_Pröstata/{label}"
    for n in range(2):
        volume(base / f"imagesTs/prost_{90 + n:03d}_0000.nii.gz", 50 + n)
    (base / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T2"},
                "labels": {"background": 0, "central gland": 1, "PZ": 2},
                "numTraining": cases,
                "file_ending": ".nii.gz",
            }
        )
    )
    junk(base)
    return pairs


def decathlon(root: Path, cases: int = 5) -> Pairs:
    """Task folders of medicaldecathlon.com: imagesTr, labelsTr, imagesTs, dataset.json."""
    pairs = {}
    for n in range(cases):
        name = f"hippocampus_{n:03d}.nii.gz"
        volume(root / "imagesTr" / name, n)
        mask(root / "labelsTr" / name, n, (1, 2))
        (root / "imagesTr" / f"._{name}").write_bytes(b"Mac OS X")  # as in the tar files
        pairs[f"imagesTr/{name}"] = f"labelsTr/{name}"
    volume(root / "imagesTs" / "hippocampus_100.nii.gz", 100)
    (root / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
                "training": [
                    {"image": f"./{one}", "label": f"./{two}"} for one, two in pairs.items()
                ],
                "test": ["./imagesTs/hippocampus_100.nii.gz"],
            }
        )
    )
    return pairs


def bids(root: Path, cases: int = 4) -> Pairs:
    """BIDS, raw and derivatives; some subjects have sessions, all a T1w without segmentation."""
    pairs = {}
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    (root / "participants.tsv").write_text("participant_id\n")
    for n in range(cases):
        sessions = ("ses-01/", "ses-02/") if n % 2 else ("",)
        for session in sessions:
            stem = f"sub-{n:02d}" + (f"_{session.rstrip('/')}" if session else "")
            folder = f"sub-{n:02d}/{session}anat"
            image = f"{folder}/{stem}_FLAIR.nii.gz"
            label = f"derivatives/lesions/{folder}/{stem}_space-orig_label-lesion_mask.nii.gz"
            seed = n * 2 + (session == "ses-02/")
            volume(root / image, seed)
            volume(root / f"{folder}/{stem}_T1w.nii.gz", seed + 40, (16, 16, 8), (1, 1, 1))
            (root / f"{folder}/{stem}_FLAIR.json").write_text("{}")
            mask(root / label, seed)
            pairs[image] = label
    (root / "derivatives/lesions/dataset_description.json").write_text("{}")
    return pairs


def folder_a_patient(root: Path, cases: int = 5) -> Pairs:
    """site-review: `Pat 0001/T1w_2024-03-01.nii.gz` beside `mask.nii.gz`, and a second series."""
    pairs = {}
    for n in range(cases):
        folder = f"Pat {n:04d} Müller"
        image = f"{folder}/T1w_2024-{n + 1:02d}-01.nii.gz"
        volume(root / image, n)
        volume(root / f"{folder}/T2w_2024-{n + 1:02d}-01.nii.gz", n + 60, (12, 12, 9), (2, 2, 2))
        mask(root / f"{folder}/mask.nii.gz", n)
        (root / folder / "Befund.pdf").write_bytes(b"%PDF")
        pairs[image] = f"{folder}/mask.nii.gz"
    junk(root)
    return pairs


CONTRASTS = ("flair", "t1", "t1ce", "t2")


def fets(root: Path, cases: int = 5, missing: tuple[int, ...] = ()) -> Pairs:
    """fets-ai.github.io/Challenge/data: a folder a subject, four contrasts, _seg with 1, 2, 4."""
    pairs = {}
    base = root / "MICCAI_FeTS2022_TrainingData"
    for n in range(cases):
        name = f"FeTS2022_{n:05d}"
        for number, contrast in enumerate(CONTRASTS):
            if not (n in missing and contrast == "t1ce"):
                volume(base / name / f"{name}_{contrast}.nii.gz", 10 * n + number)
        mask(base / name / f"{name}_seg.nii.gz", n, (1, 2, 4))
        pairs[f"{base.name}/{name}/{name}_t1.nii.gz"] = f"{base.name}/{name}/{name}_seg.nii.gz"
    (base / "partitioning_1.csv").write_text("Partition_ID,Subject_ID\n")
    return pairs


def brats_2023(root: Path, cases: int = 5) -> Pairs:
    """BraTS from 2023 on (synapse.org, syn51156910): -t1n, -t1c, -t2w, -t2f, -seg; 3 enhances."""
    pairs = {}
    for n in range(cases):
        name = f"BraTS-GLI-{n // 2:05d}-{n % 2:03d}"
        for number, contrast in enumerate(("t1n", "t1c", "t2w", "t2f")):
            volume(root / name / f"{name}-{contrast}.nii.gz", 10 * n + number)
        mask(root / name / f"{name}-seg.nii.gz", n, (1, 2, 3))
        pairs[f"{name}/{name}-t1n.nii.gz"] = f"{name}/{name}-seg.nii.gz"
    return pairs


def totalsegmentator(root: Path, cases: int = 4) -> Pairs:
    """zenodo.org/records/10047292: s0011/ct.nii.gz and s0011/segmentations/<class>.nii.gz."""
    pairs = {}
    for n in range(cases):
        folder = f"s{11 * n + 10:04d}"
        volume(root / folder / "ct.nii.gz", n, low=-1024, high=1400)
        for number, name in enumerate(("heart", "kidney_left", "kidney_right", "liver")):
            path = root / folder / "segmentations" / f"{name}.nii.gz"
            labels = np.zeros(SHAPE, np.uint8)
            labels[2 + 4 * number : 5 + 4 * number, 4:9, 1:4] = 0 if n == number == 1 else 1
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(labels, np.diag([1.0, 1, 3, 1])), path)
        pairs[f"{folder}/ct.nii.gz"] = f"{folder}/segmentations/heart.nii.gz"
    with (root / "meta.csv").open("w") as file:
        csv.writer(file, delimiter=";").writerow(["image_id", "age"])
    return pairs


def picture(path: Path, seed: int, colours: bool = True, size=(40, 56)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if colours else size
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(values).save(path)


def drawn(path: Path, seed: int, value: int = 255, size=(40, 56)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(size, np.uint8)
    values[5 + seed % 7 : 20, 8:30] = value
    Image.fromarray(values).save(path)


def pictures_beside(root: Path, cases: int = 6) -> Pairs:
    """Masks beside the pictures, `x.jpg` and `x_mask.png`, as annotation programs export them."""
    pairs = {}
    for n in range(cases):
        name = f"Aufnahme {chr(97 + n)} größer"
        picture(root / f"{name}.jpg", n)
        drawn(root / f"{name}_mask.png", n)
        pairs[f"{name}.jpg"] = f"{name}_mask.png"
    junk(root)
    return pairs


def pictures_elsewhere(root: Path, cases: int = 6) -> Pairs:
    """challenge.isic-archive.com/data, 2018: ..._Input/x.jpg, ..._GroundTruth/x_segmentation."""
    pairs = {}
    inputs, truth = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
    for n in range(cases):
        name = f"ISIC_{n * 13:07d}"
        picture(root / inputs / f"{name}.jpg", n)
        drawn(root / truth / f"{name}_segmentation.png", n)
        pairs[f"{inputs}/{name}.jpg"] = f"{truth}/{name}_segmentation.png"
    (root / inputs / "ATTRIBUTION.txt").write_text("x")
    (root / inputs / "LICENSE.txt").write_text("x")
    return pairs


def train_val_test(root: Path) -> Pairs:
    """train, val and test, each with images and masks, as Cityscapes and many others have them."""
    pairs = {}
    for part, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        for n in numbers:
            picture(root / part / "images" / f"tile_{n}.png", n, colours=False)
            drawn(root / part / "masks" / f"tile_{n}.png", n, 1)
            if part != "test":
                pairs[f"{part}/images/tile_{n}.png"] = f"{part}/masks/tile_{n}.png"
    return pairs


# ------------------------------------------------ layouts that no line of the code was written for


def lits(root: Path) -> Pairs:
    """competitions.codalab.org/competitions/17094: volume-0.nii beside segmentation-0.nii."""
    pairs = {}
    for n in range(4):
        image, label = (f"Training Batch 1/{what}-{n}.nii" for what in ("volume", "segmentation"))
        volume(root / image, n, low=-1000, high=1000)
        mask(root / label, n, (1, 2))
        pairs[image] = label
    return pairs


def acdc(root: Path) -> Pairs:
    """creatis.insa-lyon.fr/Challenge/acdc: patient001_frame01.nii.gz, _frame01_gt.nii.gz, _4d."""
    pairs = {}
    for n in range(1, 5):
        name = f"patient{n:03d}"
        folder = root / "training" / name
        volume(folder / f"{name}_4d.nii.gz", n)
        (folder / "Info.cfg").write_text("ED: 1\n")
        for frame in (1, 8 + n):
            stem = f"{name}_frame{frame:02d}"
            volume(folder / f"{stem}.nii.gz", 10 * n + frame)
            mask(folder / f"{stem}_gt.nii.gz", n, (1, 2, 3))
            pairs[f"training/{name}/{stem}.nii.gz"] = f"training/{name}/{stem}_gt.nii.gz"
    return pairs


def kits(root: Path) -> Pairs:
    """github.com/neheller/kits21: imaging.nii.gz, segmentation.nii.gz, and instances of raters."""
    pairs = {}
    for n in range(4):
        folder = f"case_{n:05d}"
        volume(root / folder / "imaging.nii.gz", n, low=-1000, high=1000)
        mask(root / folder / "segmentation.nii.gz", n, (1, 2))
        for rater in (1, 2):
            name = f"kidney_instance-1_annotation-{rater}.nii.gz"
            mask(root / folder / "instances" / name, n)
        pairs[f"{folder}/imaging.nii.gz"] = f"{folder}/segmentation.nii.gz"
    return pairs


def drive(root: Path) -> Pairs:
    """drive.grand-challenge.org: images, 1st_manual, and mask, which is the camera's field."""
    pairs = {}
    base = root / "training"
    for n in range(21, 27):
        picture(base / "images" / f"{n}_training.tif", n)
        drawn(base / "1st_manual" / f"{n}_manual1.png", n)
        drawn(base / "mask" / f"{n}_training_mask.png", n + 3)
        pairs[f"training/images/{n}_training.tif"] = f"training/1st_manual/{n}_manual1.png"
    return pairs


def same_names(root: Path) -> Pairs:
    """x.jpg and x.png in one folder, as labelme and PASCAL VOC tools leave them."""
    pairs = {}
    for n in range(5):
        name = f"{chr(97 + n)}nna"
        picture(root / f"{name}.jpg", n)
        drawn(root / f"{name}.png", n)
        pairs[f"{name}.jpg"] = f"{name}.png"
    return pairs


def no_words(root: Path) -> Pairs:
    """Two folders whose names say nothing."""
    pairs = {}
    for n in range(5):
        volume(root / "a" / f"k{n}.nii.gz", n)
        mask(root / "b" / f"k{n}.nii.gz", n)
        pairs[f"a/k{n}.nii.gz"] = f"b/k{n}.nii.gz"
    return pairs


def visits(root: Path) -> Pairs:
    """A folder a patient, and in it a folder a visit."""
    pairs = {}
    for n in range(3):
        for visit in (1, 2):
            folder = f"Müller {n}/Visite {visit}"
            volume(root / folder / "Serie 3.nii.gz", 10 * n + visit)
            mask(root / folder / "Läsion Maske.nii.gz", n)
            pairs[f"{folder}/Serie 3.nii.gz"] = f"{folder}/Läsion Maske.nii.gz"
    return pairs


def folder_a_contrast(root: Path) -> Pairs:
    """A folder a patient, and in it one for each contrast and one for the label."""
    pairs = {}
    for n in range(4):
        for number, name in enumerate(("T1", "FLAIR")):
            volume(root / f"P{n}" / name / "vol.nii.gz", 10 * n + number)
        mask(root / f"P{n}" / "SEG" / "vol.nii.gz", n)
        pairs[f"P{n}/T1/vol.nii.gz"] = f"P{n}/SEG/vol.nii.gz"
    return pairs


def some_unlabelled(root: Path) -> Pairs:
    """Images of which only some were drawn on."""
    pairs = {}
    for n in range(6):
        volume(root / "Bilder" / f"p{n}.nii.gz", n)
        if n < 4:
            mask(root / "Masken" / f"p{n}_tumour.nii.gz", n)
            pairs[f"Bilder/p{n}.nii.gz"] = f"Masken/p{n}_tumour.nii.gz"
    return pairs
