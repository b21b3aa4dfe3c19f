"""Small DICOM series with their labels, and the same cases as NIfTI, written by other libraries."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RTStructureSetStorage,
    UltrasoundImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat


def ds(values: Sequence[float]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=[str(part) for part in parts]))


@dataclasses.dataclass
class Grid:
    """Where voxel (column, row, slice) lies, in the patient axes of DICOM (LPS), mm."""

    shape: tuple[int, int, int]  # columns, rows, slices
    along_row: np.ndarray  # from one column to the next, length 1
    along_column: np.ndarray
    column_spacing: float = 0.7
    row_spacing: float = 0.9
    slice_spacing: float = 3.5
    origin: tuple[float, float, float] = (-31.5, 12.25, 40.125)

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.along_row, self.along_column)

    def place(self, column: float, row: float, slice_: float) -> np.ndarray:
        return (
            np.array(self.origin)
            + column * self.column_spacing * self.along_row
            + row * self.row_spacing * self.along_column
            + slice_ * self.slice_spacing * self.normal
        )

    def nifti_affine(self) -> np.ndarray:
        """From the places of four voxels alone: x and y of DICOM point the other way in NIfTI."""
        turn = np.array([-1.0, -1.0, 1.0])
        zero = self.place(0, 0, 0)
        affine = np.eye(4)
        for axis, one in enumerate(np.eye(3)):
            affine[:3, axis] = turn * (self.place(*one) - zero)
        affine[:3, 3] = turn * zero
        return affine


def rotation(about_x: float, about_y: float, about_z: float) -> np.ndarray:
    """Degrees about the axes, one after the other."""
    x, y, z = np.radians([about_x, about_y, about_z])
    rx = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return rz @ ry @ rx


def grid(kind: str = "oblique", shape: tuple[int, int, int] = (14, 12, 7)) -> Grid:
    turn = {
        "axial": np.eye(3),
        "flipped": np.array([[-1.0, 0, 0], [0, 1, 0], [0, 0, -1]]),  # feet first, from the left
        "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),  # rows run to the back
        "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
        "oblique": rotation(17, -11, 24),
        "steep": rotation(40, 20, -80),
    }[kind]
    return Grid(shape, turn[:, 0], turn[:, 1])


SLOPES, INTERCEPTS = (0.5, 0.75, 2.0), (-1024.0, 3.0, 0.0)  # of one slice, the next, the next


def stored_values(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(columns, rows, slices) as stored, before slope and intercept."""
    return np.random.default_rng(seed).integers(0, 2000, shape).astype(np.uint16)


def true_values(stored: np.ndarray, slopes=SLOPES, intercepts=INTERCEPTS) -> np.ndarray:
    values = np.empty(stored.shape, np.float32)
    for k in range(stored.shape[2]):
        values[..., k] = stored[..., k] * slopes[k % 3] + intercepts[k % 3]
    return values


def series(
    name: str, g: Grid, stored: np.ndarray, slopes=SLOPES, intercepts=INTERCEPTS
) -> list[Dataset]:
    """One MR series; the same name gives the same UIDs."""
    slices = []
    for k in range(g.shape[2]):
        slice_ = Dataset()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.file_meta.MediaStorageSOPClassUID = MRImageStorage
        slice_.SOPClassUID = MRImageStorage
        slice_.SOPInstanceUID = uid(name, "slice", k)
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.SeriesInstanceUID = uid(name, "series")
        slice_.StudyInstanceUID = uid(name, "study")
        slice_.FrameOfReferenceUID = uid(name, "frame")
        slice_.PatientID, slice_.PatientName = f"ID-{name}", f"Secret^{name}"
        slice_.PatientBirthDate, slice_.PatientSex = "19500102", "O"
        slice_.StudyID, slice_.AccessionNumber = "1", "2"
        slice_.StudyDate = slice_.SeriesDate = slice_.AcquisitionDate = "20260101"
        slice_.StudyTime = slice_.SeriesTime = slice_.AcquisitionTime = "101010"
        slice_.ReferringPhysicianName = ""
        slice_.Modality, slice_.SeriesNumber = "MR", 4
        slice_.SeriesDescription = "t2_tse_tra"
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        slice_.Manufacturer = "Tests"
        slice_.InstanceNumber = g.shape[2] - k  # counts against the normal
        slice_.ImagePositionPatient = ds(g.place(0, 0, k))
        slice_.ImageOrientationPatient = ds([*g.along_row, *g.along_column])
        slice_.PixelSpacing = ds([g.row_spacing, g.column_spacing])
        slice_.SliceThickness = DSfloat(2.0)  # less than the distance: a gap between slices
        slice_.Columns, slice_.Rows = g.shape[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.PixelRepresentation = 0
        slice_.RescaleSlope = DSfloat(slopes[k % 3])
        slice_.RescaleIntercept = DSfloat(intercepts[k % 3])
        slice_.RescaleType = "US"
        slice_.PixelData = np.ascontiguousarray(stored[..., k].T).tobytes()
        slices.append(slice_)
    return slices


def enhanced(name: str, slices: Sequence[Dataset]) -> Dataset:
    """highdicom's enhanced image of a series, its frames in any order."""
    order = np.random.default_rng(1).permutation(len(slices))
    return hd.legacy.LegacyConvertedEnhancedMRImage(
        [slices[k] for k in order],
        series_instance_uid=slices[0].SeriesInstanceUID,
        series_number=1,
        sop_instance_uid=uid(name, "enhanced"),
        instance_number=1,
    )


PICTURES = {
    "DX": DigitalXRayImageStorageForPresentation,
    "MG": DigitalMammographyXRayImageStorageForPresentation,
    "US": UltrasoundImageStorage,
}


def picture(name: str, stored: np.ndarray, modality: str = "DX", **changes: object) -> Dataset:
    """A picture of (rows, columns) or (rows, columns, 3) without a place, 12 bits of 16 in use."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = PICTURES[modality]
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = uid(name, "picture")
    one.SeriesInstanceUID, one.StudyInstanceUID = uid("of all"), uid(name, "study")
    one.PatientID, one.PatientName = f"ID-{name}", f"Secret^{name}"
    one.PatientBirthDate = one.PatientSex = one.StudyID = one.AccessionNumber = ""
    one.StudyDate = one.StudyTime = one.ReferringPhysicianName = ""
    one.Modality, one.SeriesNumber, one.InstanceNumber = modality, 1, 1
    one.Rows, one.Columns = stored.shape[:2]
    colours = stored.ndim == 3
    one.SamplesPerPixel = 3 if colours else 1
    one.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        one.PlanarConfiguration = 0
    bits = 8 if colours else 16
    one.BitsAllocated, one.BitsStored = bits, 8 if colours else 12
    one.HighBit, one.PixelRepresentation = one.BitsStored - 1, 0
    one.PixelData = stored.astype(f"<u{bits // 8}").tobytes()
    for keyword, value in changes.items():
        setattr(one, keyword, value)
    return one


def write_series(folder: Path, slices: Sequence[Dataset], shuffle: int = 1) -> None:
    """Under names whose order has nothing to do with the slices' places."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(shuffle).permutation(len(slices))
    for number, slice_ in zip(order, slices, strict=True):
        write(folder / f"IM{number:04d}", slice_)


def write(path: Path, dataset: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def segmentation(
    slices: Sequence[Dataset],
    masks: dict[str, np.ndarray],
    kind: str = "BINARY",
) -> Dataset:
    """highdicom's SEG of masks (columns, rows, slices) by their segment's name, numbered from 1."""
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks, start=1)
    ]
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hd.seg.Segmentation(
            source_images=slices,
            pixel_array=pixels.astype(np.float32 if kind == "FRACTIONAL" else np.uint8),
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=uid(slices[0].SeriesInstanceUID, "seg"),
            series_number=100,
            sop_instance_uid=uid(slices[0].SeriesInstanceUID, "seg", 1),
            instance_number=1,
            manufacturer="Tests",
            manufacturer_model_name="Tests",
            software_versions="1",
            device_serial_number="1",
        )


Outline = tuple[int, np.ndarray]  # slice, and points (n, 2): columns and rows


def structure_set(
    g: Grid,
    slices: Sequence[Dataset],
    outlines: dict[tuple[int, str], Sequence[Outline]],
    kind: str = "CLOSED_PLANAR",
) -> Dataset:
    """An RTSTRUCT from the outlines of each (ROINumber, ROIName)."""
    first = slices[0]
    rt = Dataset()
    rt.file_meta = FileMetaDataset()
    rt.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    rt.file_meta.MediaStorageSOPClassUID = rt.SOPClassUID = RTStructureSetStorage
    rt.SOPInstanceUID = uid(first.SeriesInstanceUID, "rt")
    rt.file_meta.MediaStorageSOPInstanceUID = UID(rt.SOPInstanceUID)
    rt.SeriesInstanceUID = uid(first.SeriesInstanceUID, "rtseries")
    rt.StudyInstanceUID, rt.Modality = first.StudyInstanceUID, "RTSTRUCT"
    rt.PatientID, rt.PatientName = first.PatientID, first.PatientName
    image_series = Dataset()
    image_series.SeriesInstanceUID = first.SeriesInstanceUID
    image_series.ContourImageSequence = [_reference(slice_) for slice_ in slices]
    study = Dataset()
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [image_series]
    frame = Dataset()
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    rt.ReferencedFrameOfReferenceSequence = [frame]
    rt.StructureSetROISequence, rt.ROIContourSequence = [], []
    for (number, name), drawn in outlines.items():
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        contours.ReferencedROINumber = number
        contours.ContourSequence = []
        for k, points in drawn:
            outline = Dataset()
            outline.ContourGeometricType = kind
            outline.NumberOfContourPoints = len(points)
            outline.ContourData = ds(np.ravel([g.place(i, j, k) for i, j in points]))
            if float(k).is_integer() and 0 <= k < len(slices):
                outline.ContourImageSequence = [_reference(slices[int(k)])]
            contours.ContourSequence.append(outline)
        rt.StructureSetROISequence.append(roi)
        rt.ROIContourSequence.append(contours)
    return rt


def _reference(slice_: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = slice_.SOPClassUID
    reference.ReferencedSOPInstanceUID = slice_.SOPInstanceUID
    return reference


def box(i: tuple[int, int], j: tuple[int, int]) -> np.ndarray:
    """The outline around voxels i[0]..i[1]-1 and j[0]..j[1]-1, along their sides."""
    (a, b), (c, d) = np.array([i, j]) - 0.5
    return np.array([[a, c], [b, c], [b, d], [a, d]])


def drawing(shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[tuple[int, str], list[Outline]]]:
    """Label values (columns, rows, slices), and the outlines that say the same: 1 has a hole."""
    labels = np.zeros(shape, np.int16)
    labels[2:9, 3:10, 1:5] = 1
    labels[4:6, 5:7, 2:4] = 0
    labels[10:13, 1:4, 3:6] = 2
    whole, hole, other = box((2, 9), (3, 10)), box((4, 6), (5, 7)), box((10, 13), (1, 4))
    return labels, {
        (1, "Prostate"): [*((k, whole) for k in range(1, 5)), (2, hole), (3, hole)],
        (2, "Lesion"): [(k, other) for k in range(3, 6)],
    }


def write_case(
    root: Path, name: str, g: Grid, seed: int = 1, label: str = "seg", shuffle: int = 1
) -> list[Dataset]:
    """images/NAME/* and labels/NAME.dcm (seg, rtstruct) or labels/NAME.nii.gz (nifti)."""
    stored = stored_values(seed, g.shape)
    slices = series(name, g, stored)
    write_series(root / "images" / name, slices, shuffle)
    labels, outlines = drawing(g.shape)
    (root / "labels").mkdir(parents=True, exist_ok=True)
    if label == "seg":
        masks = {"Prostate": labels == 1, "Lesion": labels == 2}
        write(root / "labels" / f"{name}.dcm", segmentation(slices, masks))
    elif label == "rtstruct":
        write(root / "labels" / f"{name}.dcm", structure_set(g, slices, outlines))
    else:
        image = nibabel.Nifti1Image(labels, g.nifti_affine())
        nibabel.save(image, root / "labels" / f"{name}.nii.gz")
    return slices


def write_twin(root: Path, name: str, g: Grid, seed: int = 1) -> None:
    """The same case as NIfTI."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    values = true_values(stored_values(seed, g.shape))
    labels, _ = drawing(g.shape)
    for part, array in (("images", values), ("labels", labels)):
        image = nibabel.Nifti1Image(array, g.nifti_affine())
        nibabel.save(image, root / part / f"{name}.nii.gz")
