"""A DICOM object that was drawn on a series, to label values on the series' own grid."""

from __future__ import annotations

from pathlib import Path

from pydicom.uid import UID, RTStructureSetStorage

from fedfms.contracts.site import Labels
from fedfms.data.content import Content
from fedfms.data.dicom.drawn import label_values
from fedfms.data.dicom.references import LABEL_KINDS
from fedfms.data.dicom.segmentation import mask_of_picture, read_segmentation
from fedfms.data.dicom.series import Series, is_picture, parsed_dicom
from fedfms.data.dicom.structures import read_structures
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError


def read_label(path: Path, data: Content, meaning: Labels, series: Series) -> tuple[Array, str]:
    """Label values (I, J, K) whole numbers on the series' own grid, 0 where nothing was drawn.

    In a word it says what the label is, such as "DICOM SEG", too.

    Args:
        path: of a SEG or RTSTRUCT file, or of a folder that holds one.
        data: its content.
        meaning: says which segment has which value, and what happens where two meet.
        series: that the label was drawn on.

    Raises:
        SiteDataError: "not-dicom", "not-a-label", "several-labels", "fractional-seg",
            "other-series", "other-frame-of-reference", "label-of-other-slices", "other-grid",
            "unknown-segments", "segments-overlap", "open-outline", "outline-between-slices",
            "lossy-labels", "damaged-file".
    """
    name, content = _one_file(path, data)
    label = parsed_dicom(name, content)
    kind = label.file_meta.get("MediaStorageSOPClassUID", "")
    if kind == RTStructureSetStorage and series.has_place:
        masks = read_structures(name, label, meaning, series)
    elif kind in LABEL_KINDS and kind != RTStructureSetStorage:
        masks = read_segmentation(name, label, meaning, series)
    elif not series.has_place and is_picture(label):
        return mask_of_picture(name, label), "DICOM mask"
    else:
        raise SiteDataError(
            f"{name} is neither a segmentation (SEG) nor a structure set (RTSTRUCT) of slices but "
            f"{UID(str(kind)).name or 'of no kind'}",
            "let the glob labels in site.yml match the SEG, RTSTRUCT or NIfTI files; labels of "
            "pictures are PNG, TIFF, SEG or masks in DICOM",
            code="not-a-label",
        )
    return label_values(name, masks, meaning), f"DICOM {label.get('Modality') or 'label'}"


def read_mask(path: Path, data: bytes) -> Array:
    """(I, J, 1) numbers as stored of a picture in DICOM, if it may be the label of another one.

    Raises:
        SiteDataError: "not-dicom", "not-a-label" and what `mask_of_picture` raises.
    """
    label = parsed_dicom(path, data)
    if label.file_meta.get("MediaStorageSOPClassUID", "") in LABEL_KINDS or not is_picture(label):
        raise SiteDataError(
            f"{path} is no picture", "name a mask saved as a picture in DICOM", code="not-a-label"
        )
    return mask_of_picture(path, label)


def _one_file(path: Path, data: Content) -> tuple[Path, bytes]:
    if isinstance(data, bytes):
        return path, data
    if len(data.files) != 1:
        raise SiteDataError(
            f"the label folder {path} holds {len(data.files)} files",
            "leave the one SEG or RTSTRUCT in it, or let labels in site.yml match the file",
            code="several-labels",
        )
    name, content = data.files[0]
    return path / name, content
