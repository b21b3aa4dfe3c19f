"""Folders as public specifications describe them, each built from its own, with what must be read.

Every builder cites what it follows. None was written with the code of `fedfms adopt` at hand, and
none is to be changed to suit it. Images are 16 to 32 pixels wide and carry a number that shows in
their label too: where class k lies, the image is 50 k + 3 n, and elsewhere 10 j plus noise below
10, so that from the values alone one reads which classes lie where, that the image is the n-th,
and that it is the j-th kind of image of its patient (contrast, phase, second series). Volumes hold
eight times these numbers plus noise below 8, so that they have hundreds of values as scans do.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import dicom_files as dicom
import nibabel
import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTDoseStorage, RTPlanStorage

SHAPE = (24, 20, 6)  # columns, rows, slices


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is in a folder.

    cases: of each labelled image's number its patient; two images of a patient share the name.
    classes: of each class that a file of the folder names, which k are it. Without names (None),
        each k is a class of its own, whatever it is called.
    count: how many classes there are.
    kinds: of each contrast which kind of image it is; "" where a case has one image.
    also: classes that may be there besides, such as regions that contain others.
    words: in what is printed where the folder cannot be used as it is; each one of them.
    test: numbers of labelled images that the folder itself leaves for a test; they are no cases.
    validation: those that it leaves to validate, where it says so.
    void: label values that teach nothing.
    """

    cases: dict[int, str]
    classes: dict[str, frozenset[int]] | None = None
    count: int = 1
    kinds: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"": 0})
    also: dict[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    test: frozenset[int] = frozenset()
    validation: frozenset[int] = frozenset()
    void: tuple[int, ...] = ()


def named(**classes: int | Sequence[int]) -> dict[str, frozenset[int]]:
    """Classes by their k."""
    return {name: frozenset([k] if isinstance(k, int) else k) for name, k in classes.items()}


# ----------------------------------------------------------------------------- images and labels


def label_of(
    number: int, count: int = 1, shape: tuple[int, ...] = SHAPE, empty: Sequence[int] = ()
) -> np.ndarray:
    """Class k at places that no other number has; in the bands of columns of its own."""
    random = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    width = shape[0] // count
    for k in range(1, count + 1):
        if k in empty:
            continue
        places = []
        for axis, length in enumerate(shape):
            start = (k - 1) * width if axis == 0 else 0
            room = width if axis == 0 else length
            size = int(random.integers(max(2, room // 3), max(3, room - 1)))
            first = start + int(random.integers(0, room - size + 1))
            places.append(slice(first, first + size))
        label[tuple(places)] = k
    return label


def image_of(number: int, label: np.ndarray, kind: int = 0) -> np.ndarray:
    random = np.random.default_rng((number, kind))
    image = 10 * kind + random.integers(0, 10, label.shape)
    image = np.where(label > 0, 50 * label.astype(np.int16) + 3 * number, image)
    if label.ndim == 3:
        image = 8 * image + random.integers(0, 8, label.shape)
    return image.astype(np.int16)


AFFINE = np.diag([0.8, 0.8, 3.0, 1.0])


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = nibabel.Nifti1Image(array, affine)
    volume.header.set_xyzt_units("mm")
    nibabel.save(volume, path)


def write_picture(path: Path, array: np.ndarray, colours: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = array.astype(np.uint8)
    if colours:
        values = np.stack([values] * 3, axis=-1)
    if path.suffix == ".jpg":
        Image.fromarray(values).save(path, quality=95, subsampling=0)
    else:
        Image.fromarray(values).save(path)


def blocks(number: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An image and label of 32 pixels; edges lie where JPEG's blocks end, so that it is exact."""
    label = np.kron(label_of(number, count, (4, 4)), np.ones((8, 8), np.uint8)).astype(np.uint8)
    return np.where(label > 0, 50 * label.astype(np.int16) + 3 * number, 5), label


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 99) -> np.ndarray:
    """An image without a number: nothing in it is bright."""
    most = 320 if len(shape) == 3 else 40
    return np.random.default_rng(seed).integers(0, most, shape).astype(np.int16)


def junk(*folders: Path) -> None:
    """What Windows, macOS and people leave in folders of images."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(508))
        (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1" + bytes(100))
        (folder / "README.txt").write_text("Please ask Zoë before you use these.\n")
        for file in [f for f in sorted(folder.iterdir()) if f.is_file() and f.name[0] not in "._"]:
            if file.name.endswith((".nii.gz", ".nii", ".png", ".jpg", ".tif", ".dcm")):
                # AppleDouble, as macOS writes it to disks of others
                (folder / f"._{file.name}").write_bytes(
                    b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4000)
                )
                break


def clinical(
    path: Path, rows: Sequence[str] = ("P1;64;f;2024-03-01", "P2;71;m;2024-05-17")
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["patient;age;sex;date", *rows]) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------- the ten of the issue


def nnunet(root: Path) -> Truth:
    """nnU-Net raw data, version 2.

    MIC-DKFZ/nnUNet, documentation/dataset_format.md: `Dataset001_BrainTumour/` holds
    `dataset.json`, `imagesTr`, `imagesTs` (optional, without labels) and `labelsTr`; images are
    `case_identifier_XXXX.SUFFIX` with the channel in four digits, segmentations
    `case_identifier.SUFFIX`. `channel_names` maps the channel's number to its name and `labels`
    the name to its value, 0 being the background; the example there is the Decathlon's prostate.
    """
    folder = root / "nnUNet_raw" / "Dataset501_Prostata für Größe"
    cases = {number: f"prostate_{number:02d}" for number in range(1, 8)}
    for number, name in cases.items():
        label = label_of(number, 2)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
        for channel in range(2):
            image = image_of(number, label, channel)
            write_nifti(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image)
    for number in (11, 12):
        for channel in range(2):
            write_nifti(folder / "imagesTs" / f"prostate_{number}_{channel:04d}.nii.gz", noise())
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "T2", "1": "ADC"},
                "labels": {"background": 0, "PZ": 1, "TZ": 2},
                "numTraining": len(cases),
                "file_ending": ".nii.gz",
            }
        )
    )
    junk(folder, folder / "imagesTr", folder / "labelsTr")
    clinical(folder / "klinische Daten.csv")
    return Truth(cases, named(PZ=1, TZ=2), 2, {"T2": 0, "ADC": 1})


def decathlon(root: Path) -> Truth:
    """A task of the Medical Segmentation Decathlon.

    medicaldecathlon.com and Simpson et al. 2019 (arXiv 1902.09063): `imagesTr`, `labelsTr`,
    `imagesTs`, an image and its label of one name, and `dataset.json` with `modality`, `labels`
    (the value to its name), `training` (pairs of paths) and `test`. The archives were packed on a
    Mac and hold a `._NAME` beside each file.
    """
    folder = root / "Task04_Hippocampus"
    cases = {number: f"hippocampus_{number:03d}" for number in (1, 3, 4, 6, 7, 8)}
    for number, name in cases.items():
        label = label_of(number, 2)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", image_of(number, label))
        for part in ("imagesTr", "labelsTr"):
            (folder / part / f"._{name}.nii.gz").write_bytes(b"\x00\x05\x16\x07" + bytes(200))
    for number in (2, 5):
        write_nifti(folder / "imagesTs" / f"hippocampus_{number:03d}.nii.gz", noise())
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Hippocampus",
                "description": "Left and right hippocampus segmentation",
                "reference": "Vanderbilt University Medical Center",
                "licence": "CC-BY-SA 4.0",
                "release": "1.0 04/05/2018",
                "tensorImageSize": "3D",
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
                "numTraining": len(cases),
                "numTest": 2,
                "training": [
                    {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
                    for name in cases.values()
                ],
                "test": ["./imagesTs/hippocampus_002.nii.gz", "./imagesTs/hippocampus_005.nii.gz"],
            }
        )
    )
    (folder / "._dataset.json").write_bytes(b"\x00\x05\x16\x07" + bytes(200))
    junk(folder)
    return Truth(cases, named(Anterior=1, Posterior=2), 2)


def bids(root: Path) -> Truth:
    """BIDS with sessions, and manual segmentations as a derivative.

    bids-specification, src/derivatives/imaging.md: `<pipeline>/sub-<label>/ses-<label>/anat/
    <source_entities>[_space-<space>]_dseg.nii.gz`, and a `dseg.tsv` at the top of the pipeline
    with the columns index, name and abbreviation, for all segmentations below it; each derivative
    data set has its `dataset_description.json`. Raw data: `sub-01/ses-01/anat/
    sub-01_ses-01_T1w.nii.gz` with a JSON beside it (modality-specific-files/
    magnetic-resonance-imaging-data.md), `participants.tsv`, `README`, `CHANGES`.
    """
    folder = root / "Étude MS"
    where = folder / "derivatives" / "manual_masks"
    for place, kind in ((folder, "raw"), (where, "derivative")):
        place.mkdir(parents=True, exist_ok=True)
        (place / "dataset_description.json").write_text(
            json.dumps({"Name": "MS", "BIDSVersion": "1.9.0", "DatasetType": kind})
        )
    (where / "dseg.tsv").write_text(
        "index\tname\tabbreviation\n0\tBackground\tBG\n1\tLesion\tL\n2\tGray Matter\tGM\n"
    )
    (folder / "README").write_text("Two visits a year apart.\n")
    (folder / "CHANGES").write_text("1.0.0 2024-01-01\n")
    cases: dict[int, str] = {}
    people = ["participant_id\tage"]
    number = 0
    for subject in range(1, 6):
        people.append(f"sub-{subject:02d}\t{40 + subject}")
        for session in ("01", "02") if subject != 3 else ("01",):
            number += 1
            stem = f"sub-{subject:02d}_ses-{session}"
            anat = Path(f"sub-{subject:02d}") / f"ses-{session}" / "anat"
            label = label_of(number, 2)
            write_nifti(folder / anat / f"{stem}_FLAIR.nii.gz", image_of(number, label, 1))
            # on a grid of its own: thicker slices
            write_nifti(
                folder / anat / f"{stem}_T1w.nii.gz", noise((32, 32, 4)), np.diag([1, 1, 5, 1])
            )
            for suffix in ("FLAIR", "T1w"):
                (folder / anat / f"{stem}_{suffix}.json").write_text('{"Modality": "MR"}')
            write_nifti(where / anat / f"{stem}_space-orig_dseg.nii.gz", label)
            cases[number] = f"sub-{subject:02d}"
    # scanned and not yet segmented
    write_nifti(folder / "sub-06/ses-01/anat/sub-06_ses-01_FLAIR.nii.gz", noise())
    (folder / "participants.tsv").write_text("\n".join(people) + "\n")
    junk(folder, folder / "sub-01" / "ses-01" / "anat", where)
    return Truth(cases, {"Lesion": frozenset([1]), "Gray Matter": frozenset([2])}, 2, {"": 1})


def patient_folders(root: Path) -> Truth:
    """A folder a patient, a folder a visit, the image beside its mask.

    The layout of the issue, "one folder a patient (image beside mask/seg/label)"; the names are
    as in docs/site.md (`Pat 0001/T1w_2024-03-01.nii.gz`, `Pat 0001/mask.nii.gz`), with a second
    series that nobody segmented in each visit.
    """
    cases: dict[int, str] = {}
    number = 0
    for patient in ("Pat 0001 Åsa", "Pat 0002 Jörg", "Pat 0003 Renée", "Pat 0004 Ann-Kathrin"):
        visits = ("2023-11-30", "2024-03-01") if patient.startswith("Pat 0002") else ("2024-03-01",)
        for visit in visits:
            number += 1
            label = label_of(number, 1)
            place = root / patient / f"visit {visit}"
            write_nifti(place / f"T1w_{visit}.nii.gz", image_of(number, label, 0))
            write_nifti(place / f"T2w_{visit}.nii.gz", noise((32, 32, 5)), np.diag([1, 1, 4, 1]))
            write_nifti(place / "mask.nii.gz", label)
            cases[number] = patient
            junk(place)
    clinical(root / "Patientenliste.csv")
    junk(root)
    return Truth(cases)


def fets(root: Path) -> Truth:
    """FeTS 2022: four contrasts and a segmentation in each subject's folder.

    fets-ai.github.io/Challenge/data and med.upenn.edu/cbica/brats2020/data.html:
    `FeTS2022_00000/FeTS2022_00000_flair.nii.gz`, `_t1`, `_t1ce`, `_t2`, `_seg`; labels 1 NCR, 2 ED,
    4 ET and 0 for everything else; the scored regions are ET (4), the tumour core (1, 4) and the
    whole tumour (1, 2, 4). `partitioning_1.csv` (Partition_ID, Subject_ID) lies beside the folders.
    """
    folder = root / "MICCAI_FeTS2022_TrainingData"
    cases: dict[int, str] = {}
    for number in range(1, 7):
        name = f"FeTS2022_{number:05d}"
        label = label_of(number, 3)
        for kind, contrast in enumerate(("t1", "t1ce", "t2", "flair")):
            path = folder / name / f"{name}_{contrast}.nii.gz"
            write_nifti(path, image_of(number, label, kind))
        stored = np.where(label == 3, 4, label).astype(np.uint8)
        write_nifti(folder / name / f"{name}_seg.nii.gz", stored)
        cases[number] = name
    lines = [f"{1 + number % 3},{name}" for number, name in cases.items()]
    for file in ("partitioning_1.csv", "partitioning_2.csv"):
        (folder / file).write_text("\n".join(["Partition_ID,Subject_ID", *lines]) + "\n")
    junk(folder, folder / "FeTS2022_00001")
    kinds = {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3}
    return Truth(cases, None, 3, kinds, REGIONS)


# NCR, ED and ET are k = 1, 2, 3 here; the regions that BraTS scores are unions of them.
REGIONS = named(tumor_core=(1, 3), whole_tumor=(1, 2, 3))


def brats(root: Path) -> Truth:
    """BraTS 2023: as FeTS, with other names, label 3 for ET, and time points.

    Synapse syn51156910 and arXiv 2305.09011: `BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz`,
    `-t1c`, `-t2w`, `-t2f` (the T1, T1ce, T2 and FLAIR of the years before) and `-seg`; the last
    three digits are the time point of that patient.
    """
    folder = root / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    cases: dict[int, str] = {}
    number = 0
    for patient in range(5):
        for point in range(2 if patient in (1, 3) else 1):
            number += 1
            name = f"BraTS-GLI-{patient:05d}-{point:03d}"
            label = label_of(number, 3)
            for kind, contrast in enumerate(("t1n", "t1c", "t2w", "t2f")):
                path = folder / name / f"{name}-{contrast}.nii.gz"
                write_nifti(path, image_of(number, label, kind))
            write_nifti(folder / name / f"{name}-seg.nii.gz", label)
            cases[number] = f"BraTS-GLI-{patient:05d}"
    clinical(folder / "BraTS2023_2017_GLI_Mapping.csv")
    junk(folder, folder / "BraTS-GLI-00000-000")
    return Truth(cases, None, 3, {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3}, REGIONS)


def _series(
    name: str,
    patient: str,
    study: str,
    number: int,
    label: np.ndarray,
    kind: int,
    description: str,
    modality: str = "MR",
) -> list[Dataset]:
    """Slices of one series; of a patient, in a study, and described as scanners do."""
    g = dicom.grid("axial", label.shape)
    stored = image_of(number, label, kind).astype(np.uint16)
    slices = dicom.series(name, g, stored, (1.0,) * 3, (0.0,) * 3)
    for slice_ in slices:
        slice_.PatientID, slice_.PatientName = patient, f"{patient}^Anna"
        slice_.StudyInstanceUID = dicom.uid(study, "study")
        slice_.FrameOfReferenceUID = dicom.uid(study, "frame")
        slice_.SeriesDescription, slice_.SeriesNumber = description, 4 + kind
        slice_.Modality = modality
        if modality == "CT":
            slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
            slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            slice_.RescaleType = "HU"
    return slices


def _write_by_uid(root: Path, patient: str, datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    folder = root / patient / first.StudyInstanceUID / first.SeriesInstanceUID
    for one in datasets:
        dicom.write(folder / f"{one.SOPInstanceUID}.dcm", one)


def pacs(root: Path) -> Truth:
    """An archive's export: a folder a patient, a study, a series, named by UIDs; SEG in another.

    Imaging Data Commons, learn.canceridc.dev/data/organization-of-data:
    `<StudyInstanceUID>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm`, and the NBIA Data Retriever puts
    a folder a patient before it and writes `metadata.csv` and `LICENSE`. A segmentation is a series
    of its own and says by ReferencedSeriesSequence to which it belongs (DICOM PS3.3, C.8.20.2 and
    C.7.6.16). Two studies of a patient share the PatientID.
    """
    folder = root / "Export 2024-06 (Röntgen)"
    cases: dict[int, str] = {}
    number = 0
    for patient in ("0004711", "0004712", "0004713", "0004714"):
        for visit in range(2 if patient == "0004712" else 1):
            number += 1
            study = f"{patient}-{visit}"
            label = label_of(number, 2)
            t2 = _series(f"{study}-t2", patient, study, number, label, 0, "t2_tse_tra")
            blank = np.zeros_like(label)
            t1 = _series(f"{study}-t1", patient, study, number, blank, 2, "t1_vibe_dyn")
            seg = dicom.segmentation(t2, {"Prostate": label == 1, "Lesion": label == 2})
            seg.SeriesDescription = "Segmentation"
            for datasets in (t2, t1, [seg]):
                _write_by_uid(folder, patient, datasets)
            cases[number] = patient
    clinical(folder / "metadata.csv")
    (folder / "LICENSE").write_text("Creative Commons Attribution 4.0\n")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    junk(folder, folder / "0004711")
    return Truth(cases, named(Prostate=1, Lesion=2), 2)


def eclipse(root: Path) -> Truth:
    """Eclipse's file export: a folder a patient with CT.*, RS.*, RP.* and RD.*.

    Varian, DICOM Import and Export Reference Guide (ARIA 16.0, P1034778-002-B); files are called
    by modality and SOP Instance UID, as `CT.1.2.840.113704.1.111.5956.1407919894.5141.dcm` beside
    `RS.1.2.246.352.71.4.482169467.88444.20140818133058.dcm`. DICOM PS3.3, C.8.8.5 and C.8.8.6:
    ROINumber is arbitrary in each structure set, ROIName is what people gave. Planners outline the
    body, which contains the organs.
    """
    cases: dict[int, str] = {}
    for number in range(1, 6):
        patient = f"Müller, Hans {number:03d}"
        label = label_of(number, 2)
        label[[0, -1]] = label[:, [0, -1]] = 0  # the body's outline goes around
        g = dicom.grid("axial", label.shape)
        study = f"plan-{number}"
        slices = _series(study, f"RT{number:05d}", study, number, label, 0, "Planungs-CT", "CT")
        names = ["Prostata", "Blase"]
        order = [2, 1, 3] if number % 2 else [1, 3, 2]  # ROINumbers of body, prostate, bladder
        body = dicom.box((0, label.shape[0]), (0, label.shape[1]))
        outlines = {(order[0], "BODY"): [(k, body) for k in range(label.shape[2])]}
        for k, name in enumerate(names, start=1):
            i, j, z = (np.unique(axis) for axis in np.nonzero(label == k))
            box = dicom.box((int(i[0]), int(i[-1]) + 1), (int(j[0]), int(j[-1]) + 1))
            outlines[(order[k], name)] = [(int(s), box) for s in z]
        rt = dicom.structure_set(g, slices, outlines)
        folder = root / patient
        for slice_ in slices:
            dicom.write(folder / f"CT.{slice_.SOPInstanceUID}.dcm", slice_)
        dicom.write(folder / f"RS.{rt.SOPInstanceUID}.dcm", rt)
        for kind, storage in (("RP", RTPlanStorage), ("RD", RTDoseStorage)):
            other = Dataset()
            other.file_meta = FileMetaDataset()
            other.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = storage
            other.SOPInstanceUID = dicom.uid(study, kind)
            other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
            other.Modality = {"RP": "RTPLAN", "RD": "RTDOSE"}[kind]
            other.PatientID, other.PatientName = f"RT{number:05d}", "Mueller^Hans"
            other.StudyInstanceUID = slices[0].StudyInstanceUID
            other.SeriesInstanceUID = dicom.uid(study, kind, "series")
            dicom.write(folder / f"{kind}.{other.SOPInstanceUID}.dcm", other)
        cases[number] = patient
        junk(folder)
    return Truth(cases, named(Prostata=1, Blase=2), 2, also={"BODY": frozenset([-1])})


def pictures_beside(root: Path) -> Truth:
    """Slices as pictures, the mask beside each, a folder a patient.

    LGG MRI segmentation (kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation; Buda et al. 2019):
    110 folders called by the case, `TCGA_<institution>_<patient>_<date>/
    TCGA_<institution>_<patient>_<date>_<slice>.tif`, RGB with three sequences, each with a mask of
    one channel (0 and 255) called the same with `_mask`; `README.md` and `data.csv` beside them.
    """
    folder = root / "kaggle_3m"
    cases: dict[int, str] = {}
    number = 0
    for name in ("TCGA_CS_4941_19960909", "TCGA_CS_4942_19970222", "TCGA_DU_5849_19950405"):
        for slice_ in range(1, 5):
            number += 1
            label = label_of(number, 1, (24, 20)).T
            picture = image_of(number, label)
            write_picture(folder / name / f"{name}_{slice_}.tif", picture, colours=True)
            write_picture(folder / name / f"{name}_{slice_}_mask.tif", 255 * label)
            cases[number] = name
        junk(folder / name)
    clinical(folder / "data.csv")
    (folder / "README.md").write_text("# LGG Segmentation Dataset\n")
    return Truth(cases)


def pictures_apart(root: Path) -> Truth:
    """Photographs in a folder, their masks in another.

    ISIC 2018, task 1 (challenge.isic-archive.com/landing/2018/45, /data): JPEG
    `ISIC_<image_id>.jpg` with seven digits in `ISIC2018_Task1-2_Training_Input`; PNG
    `ISIC_<image_id>_segmentation.png` of 0 and 255 in `ISIC2018_Task1_Training_GroundTruth`; the
    inputs of validation and test have no masks. ATTRIBUTION.txt and LICENSE.txt in each folder.
    """
    cases: dict[int, str] = {}
    folders = ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth")
    for number in range(1, 9):
        name = f"ISIC_{number * 37:07d}"
        picture, label = blocks(number)
        write_picture(root / folders[0] / f"{name}.jpg", picture, colours=True)
        write_picture(root / folders[1] / f"{name}_segmentation.png", 255 * label)
        cases[number] = name
    for number in (101, 102, 103):
        path = root / "ISIC2018_Task1-2_Validation_Input" / f"ISIC_{number:07d}.jpg"
        write_picture(path, noise((32, 32), number), colours=True)
    for folder in folders:
        (root / folder / "ATTRIBUTION.txt").write_text("HAM10000, MSK, UDA\n")
        (root / folder / "LICENSE.txt").write_text("CC-0 and CC-BY-NC\n")
        junk(root / folder)
    return Truth(cases)


def totalsegmentator(root: Path) -> Truth:
    """One file a class.

    TotalSegmentator, zenodo.org/records/10047292: `s0011/ct.nii.gz`, `s0011/segmentations/
    liver.nii.gz` and a file for each other structure, all zero where the scan does not show it;
    `meta.csv` with image_id and split.
    """
    folder = root / "Totalsegmentator_dataset_v201"
    organs = ("aorta", "liver", "kidney_left", "spleen")
    cases: dict[int, str] = {}
    lines = ["image_id;age;gender;institute;study_type;split;manufacturer"]
    for number, subject in enumerate((11, 58, 105, 216, 310, 419), start=1):
        name = f"s{subject:04d}"
        label = label_of(number, 4, empty=(4,) if number == 2 else ())
        write_nifti(folder / name / "ct.nii.gz", image_of(number, label))
        for k, organ in enumerate(organs, start=1):
            path = folder / name / "segmentations" / f"{organ}.nii.gz"
            write_nifti(path, (label == k).astype(np.uint8))
        cases[number] = name
        lines.append(f"{name};{50 + number};m;A;ct abdomen;train;siemens")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    junk(folder, folder / "s0011", folder / "s0011" / "segmentations")
    classes = {organ: frozenset([k]) for k, organ in enumerate(organs, start=1)}
    return Truth(cases, classes, 4)


# ------------------------------------------------------------------------------- not in the list


def kits(root: Path) -> Truth:
    """KiTS 2023.

    github.com/neheller/kits23: `dataset/case_00000/imaging.nii.gz` and `segmentation.nii.gz`
    (1 kidney, 2 tumour, 3 cyst), `instances/` with each annotator's drawing of each instance
    (`kidney_instance-1_annotation-1.nii.gz`), and `dataset/kits23.json` with clinical data.
    """
    folder = root / "kits23" / "dataset"
    cases: dict[int, str] = {}
    for number in range(1, 7):
        name = f"case_{number:05d}"
        label = label_of(number, 3, empty=(3,) if number % 2 else ())
        write_nifti(folder / name / "imaging.nii.gz", image_of(number, label))
        write_nifti(folder / name / "segmentation.nii.gz", label)
        for annotation in (1, 2, 3):
            for k, what in ((1, "kidney_instance-1"), (2, "tumor_instance-1")):
                path = folder / name / "instances" / f"{what}_annotation-{annotation}.nii.gz"
                write_nifti(path, (label == k).astype(np.uint8))
        cases[number] = name
    (folder / "kits23.json").write_text(json.dumps([{"case_id": n} for n in cases.values()]))
    junk(folder, folder / "case_00001")
    return Truth(cases, None, 3)


def acdc(root: Path) -> Truth:
    """ACDC: two frames of a patient's cine MR.

    creatis.insa-lyon.fr/Challenge/acdc (databases, evaluation): `database/training/patient001/`
    holds `Info.cfg`, `patient001_4d.nii.gz` (all frames), `patient001_frame01.nii.gz` and another
    frame, each with its `_gt`; 1 RV, 2 myocardium, 3 LV; `testing/` is alike, from 101 on, and
    `MANDATORY_CITATION.md` lies in each patient's folder of the later release.
    """
    cases: dict[int, str] = {}
    test: set[int] = set()
    number = 0
    for part, patients in (("training", (1, 2, 3, 4, 5)), ("testing", (101, 102))):
        for patient in patients:
            name = f"patient{patient:03d}"
            place = root / "ACDC" / "database" / part / name
            frames = [1, 8 + patient % 7]
            volumes = []
            for frame in frames:
                number += 1
                label = label_of(number, 3)
                volumes.append(image_of(number, label))
                write_nifti(place / f"{name}_frame{frame:02d}.nii.gz", volumes[-1])
                write_nifti(place / f"{name}_frame{frame:02d}_gt.nii.gz", label)
                if part == "testing":
                    test.add(number)
                else:
                    cases[number] = name
            write_nifti(place / f"{name}_4d.nii.gz", np.stack([*volumes, *volumes], axis=-1))
            (place / "Info.cfg").write_text(f"ED: 1\nES: {frames[1]}\nGroup: DCM\nNbFrame: 30\n")
            (place / "MANDATORY_CITATION.md").write_text("# ACDC\n")
    junk(root / "ACDC" / "database" / "training" / "patient001")
    return Truth(cases, None, 3, test=frozenset(test))


def busi(root: Path) -> Truth:
    """BUSI, breast ultrasound: several masks of one image.

    Al-Dhabyani et al. 2020, Data in Brief 28, 104863: `Dataset_BUSI_with_GT/{benign,malignant,
    normal}/benign (1).png` and `benign (1)_mask.png`, of 0 and 255; seventeen images have a second
    lesion in `benign (100)_mask_1.png`, and the masks of normal images are black. An image's
    lesions are all of its masks together; that a part of them is left out must be said.
    """
    folder = root / "Dataset_BUSI_with_GT"
    cases: dict[int, str] = {}
    number = 0
    for kind in ("benign", "malignant", "normal"):
        for count in range(1, 5):
            number += 1
            name = f"{kind} ({count})"
            label = label_of(number, 2, (24, 20)).T
            if kind == "normal":
                label = np.zeros_like(label)
            place = folder / kind
            has_two = name == "benign (2)"
            first = (label == 1) if has_two else (label > 0)
            write_picture(place / f"{name}.png", image_of(number, label), colours=True)
            write_picture(place / f"{name}_mask.png", 255 * first)
            if has_two:
                write_picture(place / f"{name}_mask_1.png", 255 * (label == 2))
            cases[number] = name
        junk(folder / kind)
    return Truth(cases, words=("benign (2)_mask_1.png",))


# ------------------------------------------------------- more of both, each with a trap of its own


def nnunet_regions(root: Path) -> Truth:
    """nnU-Net whose labels are regions, in two dimensions.

    MIC-DKFZ/nnUNet, documentation/region_based_training.md: `"labels": {"background": 0,
    "whole_tumor": [1, 2, 3], ...}` with `regions_class_order`; dataset_format.md: PNG of 2-D data
    with three colours is one channel, `_0000` all the same.
    """
    folder = root / "Dataset077_Regions"
    cases: dict[int, str] = {}
    for number in range(1, 7):
        label = label_of(number, 3, (24, 20)).T
        picture = image_of(number, label)
        write_picture(folder / "imagesTr" / f"img_{number}_0000.png", picture, colours=True)
        write_picture(folder / "labelsTr" / f"img_{number}.png", label)
        cases[number] = f"img_{number}"
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "rgb"},
                "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
                "regions_class_order": [1, 2, 3],
                "numTraining": len(cases),
                "file_ending": ".png",
            }
        )
    )
    return Truth(cases, named(whole=(1, 2, 3), core=(2, 3), enhancing=3), 3)


def bids_masks(root: Path) -> Truth:
    """BIDS without sessions: a mask a structure, beside a pipeline's own masks of the brain.

    bids-specification, src/derivatives/imaging.md, Masks: `manual_masks/sub-001/anat/
    sub-001_label-tumor_mask.nii.gz`; fMRIPrep writes `derivatives/fmriprep/sub-001/anat/
    sub-001_desc-preproc_T1w.nii.gz` and `sub-001_desc-brain_mask.nii.gz`
    (fmriprep.org/en/stable/outputs.html). Which of the two masks is wanted no file says.
    """
    cases: dict[int, str] = {}
    for number in range(1, 6):
        name = f"sub-{number:03d}"
        label = label_of(number, 1)
        image = image_of(number, label)
        write_nifti(root / name / "anat" / f"{name}_T1w.nii.gz", image)
        manual = root / "derivatives" / "manual_masks" / name / "anat"
        write_nifti(manual / f"{name}_label-tumor_mask.nii.gz", label)
        pipeline = root / "derivatives" / "fmriprep" / name / "anat"
        write_nifti(pipeline / f"{name}_desc-preproc_T1w.nii.gz", noise())
        write_nifti(pipeline / f"{name}_desc-brain_mask.nii.gz", np.ones(SHAPE, np.uint8))
        cases[number] = name
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    return Truth(cases, words=("label-tumor", "brain"))


def isic_parts(root: Path) -> Truth:
    """All of ISIC 2018, task 1: training, validation and test with their masks.

    As `pictures_apart`; since the challenge has ended challenge.isic-archive.com/data also has
    `ISIC2018_Task1_Validation_GroundTruth` and `ISIC2018_Task1_Test_GroundTruth`.
    """
    cases: dict[int, str] = {}
    sides: dict[str, set[int]] = {"Training": set(), "Validation": set(), "Test": set()}
    number = 0
    for part, count in (("Training", 6), ("Validation", 3), ("Test", 2)):
        for _ in range(count):
            number += 1
            name = f"ISIC_{number * 37:07d}"
            picture, label = blocks(number)
            images = root / f"ISIC2018_Task1-2_{part}_Input"
            labels = root / f"ISIC2018_Task1_{part}_GroundTruth"
            write_picture(images / f"{name}.jpg", picture, colours=True)
            write_picture(labels / f"{name}_segmentation.png", 255 * label)
            sides[part].add(number)
            if part != "Test":
                cases[number] = name
    return Truth(cases, test=frozenset(sides["Test"]), validation=frozenset(sides["Validation"]))


def hospitals(root: Path) -> Truth:
    """A folder a hospital, and patients' folders in it.

    White matter hyperintensities, wmh.isi.uu.nl/data: `Utrecht/0/pre/FLAIR.nii.gz`,
    `Utrecht/0/pre/T1.nii.gz`, `Utrecht/0/wmh.nii.gz`; 0 background, 1 hyperintensities, 2 other
    pathology, and the numbers go on in the next hospital. `orig/` holds the scans before they were
    corrected and aligned.
    """
    cases: dict[int, str] = {}
    number = 0
    for hospital, first in (("Utrecht", 0), ("Singapore", 50), ("Amsterdam GE3T", 100)):
        for subject in range(first, first + 4):
            number += 1
            place = root / "training" / hospital / str(subject)
            label = label_of(number, 2)
            write_nifti(place / "pre" / "FLAIR.nii.gz", image_of(number, label, 0))
            write_nifti(place / "pre" / "T1.nii.gz", image_of(number, label, 1))
            write_nifti(place / "orig" / "3DT1.nii.gz", noise((32, 32, 8)), np.eye(4))
            write_nifti(place / "wmh.nii.gz", label)
            cases[number] = f"{hospital} {subject}"
    return Truth(cases, None, 2, {"flair": 0, "t1": 1})


def kits21(root: Path) -> Truth:
    """KiTS 2021: three segmentations of each case, made from many annotators' in three ways.

    github.com/neheller/kits21, README.md: `data/case_00000/imaging.nii.gz`,
    `aggregated_OR_seg.nii.gz`, `aggregated_AND_seg.nii.gz`, `aggregated_MAJ_seg.nii.gz`, with
    folders `raw` and `segmentations`. Which is wanted no file says.
    """
    cases: dict[int, str] = {}
    for number in range(1, 6):
        name = f"case_{number:05d}"
        place = root / "data" / name
        label = label_of(number, 2)
        write_nifti(place / "imaging.nii.gz", image_of(number, label))
        for how in ("OR", "AND", "MAJ"):
            write_nifti(place / f"aggregated_{how}_seg.nii.gz", label)
        path = place / "segmentations" / "kidney_instance-1_annotation-1.nii.gz"
        write_nifti(path, (label == 1).astype(np.uint8))
        cases[number] = name
    return Truth(cases, words=("aggregated_OR", "aggregated_AND", "aggregated_MAJ"))


def drive(root: Path) -> Truth:
    """DRIVE: the vessels in GIF, and masks that say where the picture is.

    Staal et al. 2004 and drive.grand-challenge.org: `training/images/21_training.tif`,
    `training/1st_manual/21_manual1.gif` (the vessels), `training/mask/21_training_mask.gif` (the
    field of view); `test/` with images and masks. GIF is not read here.
    """
    cases: dict[int, str] = {}
    for number in range(1, 6):
        label = label_of(number, 1, (24, 20)).T
        place = root / "DRIVE" / "training"
        stem = f"{20 + number}"
        picture = image_of(number, label)
        write_picture(place / "images" / f"{stem}_training.tif", picture, colours=True)
        write_picture(place / "1st_manual" / f"{stem}_manual1.gif", 255 * label)
        write_picture(place / "mask" / f"{stem}_training_mask.gif", np.full((20, 24), 255))
        write_picture(
            root / "DRIVE" / "test" / "images" / f"{number:02d}_test.tif", noise((20, 24)), True
        )
        cases[number] = stem
    return Truth(cases, words=("GIF",))


def promise12(root: Path) -> Truth:
    """PROMISE12: MetaImage, the header apart from its bytes.

    promise12.grand-challenge.org/Details: `Case00.mhd`, `Case00.raw`, `Case00_segmentation.mhd`,
    `Case00_segmentation.raw` (itk.org/Wiki/ITK/MetaIO). MetaImage is not read here.
    """
    cases: dict[int, str] = {}
    place = root / "TrainingData_Part1"
    place.mkdir(parents=True)
    for number in range(1, 4):
        label = label_of(number, 1)
        for suffix, array in (("", image_of(number, label)), ("_segmentation", label)):
            name = f"Case{number:02d}{suffix}"
            kind = {1: "MET_UCHAR", 2: "MET_SHORT"}[array.dtype.itemsize]
            size = " ".join(map(str, array.shape))
            (place / f"{name}.mhd").write_text(
                f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = {kind}\n"
                f"ElementSpacing = 0.6 0.6 3.6\nElementDataFile = {name}.raw\n"
            )
            (place / f"{name}.raw").write_bytes(array.tobytes(order="F"))
        cases[number] = f"Case{number:02d}"
    return Truth(cases, words=("MetaImage",))


def chaos(root: Path) -> Truth:
    """CHAOS, MR: DICOM images, labels as PNG a slice.

    chaos.grand-challenge.org/Data: `Train_Sets/MR/1/T1DUAL/DICOM_anon/{InPhase,OutPhase}/
    IMG-0004-00001.dcm`, `T1DUAL/Ground/IMG-0004-00002.png`, `T2SPIR/DICOM_anon`, `T2SPIR/Ground`;
    63 liver, 126 right kidney, 189 left kidney, 252 spleen. A label of pictures for a series in
    DICOM is not read here.
    """
    cases: dict[int, str] = {}
    for number in range(1, 4):
        label = label_of(number, 4)
        place = root / "Train_Sets" / "MR" / str(number) / "T2SPIR"
        slices = _series(f"{number}-t2", f"{number}", f"{number}", number, label, 0, "T2SPIR")
        for k, slice_ in enumerate(slices, start=1):
            dicom.write(place / "DICOM_anon" / f"IMG-0002-{k:05d}.dcm", slice_)
            write_picture(place / "Ground" / f"IMG-0002-{k:05d}.png", 63 * label[..., k - 1].T)
        cases[number] = str(number)
    return Truth(cases, words=("PNG", "NIfTI"))


def kvasir(root: Path) -> Truth:
    """Kvasir-SEG: JPEG, the masks too.

    Jha et al. 2020 (arXiv 1911.07069), datasets.simula.no/kvasir-seg: `images/NAME.jpg`,
    `masks/NAME.jpg`, `kavsir_bboxes.json`. JPEG changes a label's values: it is refused here.
    """
    cases: dict[int, str] = {}
    folder = root / "Kvasir-SEG"
    for number in range(1, 6):
        name = f"cju{number}qkwl35piu0993l0dewei2"
        picture, label = blocks(number)
        write_picture(folder / "images" / f"{name}.jpg", picture, colours=True)
        write_picture(folder / "masks" / f"{name}.jpg", 255 * label, colours=True)
        cases[number] = name
    (folder / "kavsir_bboxes.json").write_text("{}")
    return Truth(cases, words=("jp",))


def pacs_structures(root: Path) -> Truth:
    """An archive's export whose labels are structure sets in a series folder of their own.

    As `pacs`; DICOM PS3.3, C.8.8.5: RTReferencedSeriesSequence names the series that was outlined.
    Files have no ending, as many archives export them (PS3.10, 8.2, File IDs such as `IM0001`).
    """
    cases: dict[int, str] = {}
    for number in range(1, 5):
        patient = f"PAT{number:03d}"
        label = label_of(number, 2)
        g = dicom.grid("axial", label.shape)
        ct = _series(f"{patient}-ct", patient, patient, number, label, 0, "Abdomen 3.0", "CT")
        blank = np.zeros_like(label)
        scout = _series(f"{patient}-b", patient, patient, number, blank, 2, "Lunge 1.0", "CT")
        outlines = {}
        for k, name in enumerate(("Leber", "Tumor"), start=1):
            i, j, z = (np.unique(axis) for axis in np.nonzero(label == k))
            box = dicom.box((int(i[0]), int(i[-1]) + 1), (int(j[0]), int(j[-1]) + 1))
            outlines[(number + k, name)] = [(int(s), box) for s in z]
        rt = dicom.structure_set(g, ct, outlines)
        for folder, datasets in (("SE000001", ct), ("SE000002", scout), ("SE000003", [rt])):
            for file, one in enumerate(datasets):
                dicom.write(root / patient / "ST000001" / folder / f"IM{file:06d}", one)
        cases[number] = patient
    return Truth(cases, named(Leber=1, Tumor=2), 2)


def nnunet_ignore(root: Path) -> Truth:
    """nnU-Net with a label to be ignored, some files packed and others not.

    MIC-DKFZ/nnUNet, documentation/ignore_label.md: the label `ignore` has the highest value, and
    its pixels have no part in training. That is `void` here, and no background.
    """
    cases: dict[int, str] = {}
    for number in range(1, 6):
        label = label_of(number, 2)
        ending = ".nii" if number == 2 else ".nii.gz"
        write_nifti(root / "labelsTr" / f"c{number}{ending}", label)
        write_nifti(root / "imagesTr" / f"c{number}_0000{ending}", image_of(number, label))
        cases[number] = f"c{number}"
    labels = {"background": 0, "organ": 1, "ignore": 2}
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T2"}, "labels": labels, "file_ending": ".nii.gz"})
    )
    return Truth(cases, named(organ=1), void=(2,))


def endings(root: Path) -> Truth:
    """Pictures as several machines save them: .JPG, .jpg and .png, accents in two spellings.

    Unicode Standard Annex 15: ü is one character (NFC), as Linux and Windows write it, or u and a
    mark (NFD), as macOS does.
    """
    cases: dict[int, str] = {}
    names = ("Müller", "Jörg", "Zoë", "André", "Åsa", "Øyvind")
    for number, name in enumerate(names, start=1):
        picture, label = blocks(number)
        path = root / "Bilder" / f"{unicodedata.normalize('NFD', name)}.jpg"
        if number == 5:
            path = path.with_suffix(".png")
        write_picture(path, picture, colours=True)
        if number == 3:
            path.rename(path.with_suffix(".JPG"))
        masks = root / "Masken" / f"{unicodedata.normalize('NFC', name)}_Maske.png"
        write_picture(masks, 255 * label)
        cases[number] = name
    return Truth(cases)


def pacs_apart(root: Path) -> Truth:
    """Segmentations all in one folder, apart from the series, two of which are called alike.

    DICOM PS3.3, C.7.6.16 (Derivation Image, Referenced Series): what a segmentation belongs to
    stands in it alone; SeriesDescription is free text and often the same.
    """
    cases: dict[int, str] = {}
    for number in range(1, 5):
        patient = f"P{number}"
        label = label_of(number, 1)
        t2 = _series(f"{patient}-a", patient, patient, number, label, 0, "t2_tse_tra")
        blank = np.zeros_like(label)
        again = _series(f"{patient}-b", patient, patient, number, blank, 2, "t2_tse_tra")
        for datasets in (t2, again):
            _write_by_uid(root / "Bilder", patient, datasets)
        seg = dicom.segmentation(t2, {"Läsion": label == 1})
        dicom.write(root / "Segmentierungen" / f"{seg.SOPInstanceUID}.dcm", seg)
        cases[number] = patient
    return Truth(cases, named(lasion=1))


def eclipse_plans(root: Path) -> Truth:
    """Two plans of a patient in one folder, both scans described alike.

    As `eclipse`. A folder is one series here; which slices belong to which only their UIDs say.
    """
    cases: dict[int, str] = {}
    for number in range(1, 5):
        patient = f"P{(number + 1) // 2}"
        label = label_of(number, 1)
        g = dicom.grid("axial", label.shape)
        slices = _series(f"{number}", patient, f"{number}", number, label, 0, "Planungs-CT", "CT")
        body = dicom.box((2, 20), (2, 18))
        rt = dicom.structure_set(g, slices, {(1, "Prostata"): [(2, body), (3, body)]})
        for slice_ in slices:
            dicom.write(root / patient / f"CT.{slice_.SOPInstanceUID}.dcm", slice_)
        dicom.write(root / patient / f"RS.{rt.SOPInstanceUID}.dcm", rt)
        cases[number] = patient
    return Truth(cases, words=("2 folders hold slices of several series", "folder of its own"))


def lits(root: Path) -> Truth:
    """LiTS: volumes in parts that are only how they were packed.

    Bilic et al. 2023 (arXiv 1901.04056), competitions.codalab.org/competitions/17094: `Training
    Batch 1/volume-0.nii`, `Training Batch 1/segmentation-0.nii`, numbered on in `Training Batch 2`;
    1 liver, 2 tumour.
    """
    cases: dict[int, str] = {}
    for number in range(1, 7):
        label = label_of(number, 2)
        place = root / ("Training Batch 1" if number < 4 else "Training Batch 2")
        write_nifti(place / f"volume-{number}.nii", image_of(number, label))
        write_nifti(place / f"segmentation-{number}.nii", label)
        cases[number] = f"{number}"
    return Truth(cases, None, 2)


def brats_grades(root: Path) -> Truth:
    """BraTS 2018: patients' folders sorted by the grade of their tumour.

    med.upenn.edu/sbia/brats2018/data.html: `HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz`,
    `LGG/Brats18_TCIA09_312_1/...`, `survival_data.csv`; labels 1, 2 and 4 as in `fets`.
    """
    cases: dict[int, str] = {}
    kinds = {"t1": 0, "t1ce": 1, "t2": 2, "flair": 3}
    for number in range(1, 9):
        label = label_of(number, 3)
        name = f"Brats18_{'TCIA' if number % 2 else 'CBICA'}{number:02d}_{100 + number}_1"
        place = root / ("HGG" if number < 5 else "LGG") / name
        for contrast, kind in kinds.items():
            write_nifti(place / f"{name}_{contrast}.nii.gz", image_of(number, label, kind))
        write_nifti(place / f"{name}_seg.nii.gz", np.where(label == 3, 4, label).astype(np.uint8))
        cases[number] = name
    clinical(root / "survival_data.csv")
    return Truth(cases, None, 3, kinds, REGIONS)


def verse(root: Path) -> Truth:
    """VerSe 2020, subject based: BIDS in its names, and not wholly in its folders.

    osf.io/4skx2/wiki: `training/rawdata/sub-verse000/sub-verse000_dir-orient_ct.nii.gz` and
    `training/derivatives/sub-verse000/sub-verse000_dir-orient_seg-vert_msk.nii.gz`, with centroids
    (JSON) and a snapshot (PNG) beside the mask.
    """
    cases: dict[int, str] = {}
    for number in range(1, 7):
        label = label_of(number, 2)
        name = f"sub-verse{number:03d}"
        raw, derived = (root / "training" / part / name for part in ("rawdata", "derivatives"))
        write_nifti(raw / f"{name}_dir-ax_ct.nii.gz", image_of(number, label))
        write_nifti(derived / f"{name}_dir-ax_seg-vert_msk.nii.gz", label)
        (derived / f"{name}_dir-ax_seg-subreg_ctd.json").write_text("[]")
        write_picture(derived / f"{name}_dir-ax_seg-vert_snp.png", noise((20, 24), number))
        cases[number] = name
    return Truth(cases, None, 2)


def montgomery(root: Path) -> Truth:
    """Chest X-rays of Montgomery County: a folder of masks for each lung.

    Jaeger et al. 2014, Quant Imaging Med Surg 4(6), NLM-MontgomeryCXRSet-ReadMe: `CXR_png/
    MCUCXR_0001_0.png`, `ManualMask/leftMask/` and `ManualMask/rightMask/` with the same names,
    `ClinicalReadings/*.txt`.
    """
    cases: dict[int, str] = {}
    folder = root / "MontgomerySet"
    for number in range(1, 7):
        label = label_of(number, 2, (24, 20)).T
        name = f"MCUCXR_{number:04d}_{number % 2}"
        write_picture(folder / "CXR_png" / f"{name}.png", image_of(number, label))
        for k, side in enumerate(("leftMask", "rightMask"), start=1):
            write_picture(folder / "ManualMask" / side / f"{name}.png", 255 * (label == k))
        (folder / "ClinicalReadings").mkdir(exist_ok=True)
        (folder / "ClinicalReadings" / f"{name}.txt").write_text("Patient's Sex: F\n")
        cases[number] = name
    return Truth(cases, named(left=1, right=2), 2)


def chase(root: Path) -> Truth:
    """CHASE_DB1: both eyes of a child, drawn by two people, all in one folder.

    Fraz et al. 2012, IEEE Trans Biomed Eng 59(9), blogs.kingston.ac.uk/retinal/chasedb1:
    `Image_01L.jpg`, `Image_01L_1stHO.png`, `Image_01L_2ndHO.png`. One of the two is taken.
    """
    cases: dict[int, str] = {}
    number = 0
    for child in range(1, 5):
        for eye in "LR":
            number += 1
            picture, label = blocks(number)
            name = f"Image_{child:02d}{eye}"
            write_picture(root / f"{name}.jpg", picture, colours=True)
            for drawn in ("1stHO", "2ndHO"):
                write_picture(root / f"{name}_{drawn}.png", 255 * label)
            cases[number] = f"{child:02d}"
    return Truth(cases)


def hrf(root: Path) -> Truth:
    """HRF: vessels, and masks that say where the picture is.

    Budai et al. 2013, www5.cs.fau.de/research/data/fundus-images: `images/01_h.jpg`,
    `manual1/01_h.tif`, `mask/01_h_mask.tif`; the mask is the field of view and no label.
    """
    cases: dict[int, str] = {}
    for number in range(1, 7):
        picture, label = blocks(number)
        name = f"{number:02d}_h"
        write_picture(root / "images" / f"{name}.jpg", picture, colours=True)
        write_picture(root / "manual1" / f"{name}.tif", 255 * label)
        write_picture(root / "mask" / f"{name}_mask.tif", np.full((32, 32), 255))
        cases[number] = name
    return Truth(cases)


def glas(root: Path) -> Truth:
    """GlaS: training and test told apart by names alone, in one folder.

    Sirinukunwattana et al. 2017 (arXiv 1603.00275), warwick.ac.uk/fac/cross_fac/tia/data/
    glascontest: `train_1.bmp`, `train_1_anno.bmp`, `testA_1.bmp`, `Grade.csv`; PNG here, since BMP
    is not read.
    """
    cases: dict[int, str] = {}
    for number in range(1, 9):
        picture, label = blocks(number)
        name = f"train_{number}" if number < 7 else f"testA_{number - 6}"
        write_picture(root / f"{name}.png", picture, colours=True)
        write_picture(root / f"{name}_anno.png", label)
        cases[number] = name
    clinical(root / "Grade.csv")
    return Truth(cases)


LISTED = (
    nnunet,
    decathlon,
    bids,
    patient_folders,
    fets,
    pacs,
    eclipse,
    pictures_beside,
    pictures_apart,
    totalsegmentator,
)
UNLISTED = (kits, acdc, busi)
MORE = (
    brats,
    isic_parts,
    hospitals,
    nnunet_regions,
    bids_masks,
    kits21,
    drive,
    promise12,
    chaos,
    kvasir,
    pacs_structures,
    nnunet_ignore,
    endings,
    pacs_apart,
    eclipse_plans,
    lits,
    brats_grades,
    verse,
    montgomery,
    chase,
    hrf,
    glas,
)
