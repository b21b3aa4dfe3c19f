"""Masks to the bytes of files that other programs read, and those to disk, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from PIL import Image

from fedfms import __version__
from fedfms.data.formats import nifti_image
from fedfms.data.grid import Array, Cut
from fedfms.errors import ConfigError
from fedfms.files import write_together

if TYPE_CHECKING:
    from fedfms.predict.headers import Sources

# of the classes, in turn; background is black (Okabe and Ito's palette, told apart by all eyes)
_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


# What keeps every later file from being written too.
_FOR_ALL = {errno.ENOSPC: "no-room", errno.EDQUOT: "no-room", errno.EROFS: "read-only"}


@dataclass(frozen=True, slots=True)
class Origin:
    """What made a mask; stands in the files that can say it."""

    name: str  # such as "fedmsa vit_b"
    classes: tuple[str, ...]
    parameters: Mapping[str, str]  # with "model_sha256"

    @property
    def short(self) -> str:
        """In 80 letters, for a NIfTI header."""
        return f"fedfms {__version__} {self.name} {self.parameters['model_sha256'][:12]}"[:79]


def nifti_bytes(values: Array, cut: Cut, path: Path, data: bytes, origin: Origin) -> bytes:
    """(D, H, W) uint8 or float32 as a NIfTI file in the shape and place of another.

    Args:
        values: slices, as `cut` made them.
        cut: of the image.
        path: of the image, for errors; `.gz` packs the result.
        data: the image's own bytes, whose header says where its voxels lie (qform and sform).
    """
    image = nifti_image(path, data)
    header = image.header.copy()
    header.extensions.clear()  # may name the patient
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"], header["aux_file"] = origin.short.encode(), b""
    if values.dtype == np.uint8:
        header.set_intent("label")
    voxels = np.ascontiguousarray(cut.voxels(values)).reshape(image.shape)
    packed: bytes = type(image)(voxels, image.affine, header).to_bytes()
    return gzip.compress(packed, mtime=0) if path.name.lower().endswith(".gz") else packed


def png_bytes(labels: Array) -> bytes:
    """(H, W) uint8 as a PNG with a palette: the values are 0 to K, and the eye sees colours."""
    picture = Image.fromarray(labels, mode="P")
    colours = [0, 0, 0]
    for value in range(1, 256):
        colours.extend(_COLOURS[(value - 1) % len(_COLOURS)])
    picture.putpalette(colours)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def tiff_bytes(probabilities: Array) -> bytes:
    """(H, W) float32 as a TIFF."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, probabilities, compression="zlib")
    return buffer.getvalue()


def npy_bytes(values: Array) -> bytes:
    """uint8 or float32 of any shape as an NPY file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def dicom_bytes(values: Array, cut: Cut, sources: Sources, origin: Origin) -> bytes:
    """(K, D, H, W) masks (bool) or probabilities (float32) as one DICOM segmentation.

    Masks give a BINARY segmentation, in which classes may overlap; probabilities a FRACTIONAL one,
    in steps of 1/255. Patient and study are those of the series, and each frame names its slice.

    Args:
        values: slices, as `cut` made them.
        cut: of the series' volume.
        sources: the images of the series.
        origin: what made the values.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    for name in ("highdicom", "pydicom"):  # their warnings quote names of patients
        logging.getLogger(name).setLevel(logging.ERROR)
    is_binary = values.dtype == bool
    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"FedFMS Kit {origin.name}"[:64],
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        source="FedFMS Kit",
        parameters=dict(origin.parameters),
    )
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.Tissue,  # a class name says no more
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*_COLOURS[(number - 1) % len(_COLOURS)]),
        )
        for number, name in enumerate(origin.classes, start=1)
    ]
    voxels = np.stack([cut.voxels(mask) for mask in values])  # (K, columns, rows, slices)
    with warnings.catch_warnings():  # as above
        warnings.simplefilter("ignore")
        segmentation = hd.seg.Segmentation(
            source_images=sources.headers,
            pixel_array=np.ascontiguousarray(voxels.transpose(3, 2, 1, 0)),
            segmentation_type="BINARY" if is_binary else "FRACTIONAL",
            segment_descriptions=described,
            series_instance_uid=generate_uid(),
            series_number=1000 + sources.series_number,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="FedFMS Kit",
            manufacturer_model_name=origin.name,
            software_versions=__version__,
            device_serial_number=origin.parameters["model_sha256"][:16],
            content_label="FEDFMS" if is_binary else "FEDFMS_PROB",
            content_description=origin.short[:64],
            series_description=f"FedFMS {'masks' if is_binary else 'probabilities'}",
            specific_character_set=sources.character_set,
        )
        _refer(segmentation, sources.classes)
        buffer = io.BytesIO()
        segmentation.save_as(buffer)
    return buffer.getvalue()


def _refer(segmentation: Any, classes: Mapping[str, str]) -> None:
    """Name the true SOPClassUID of each image that is referred to; refer to none if none is known.

    Args:
        segmentation: of highdicom.
        classes: SOPInstanceUID to SOPClassUID.
    """
    if not classes:
        del segmentation.SourceImageSequence, segmentation.ReferencedSeriesSequence
        for frame in segmentation.PerFrameFunctionalGroupsSequence:
            frame.DerivationImageSequence = []
        return
    references = [
        *segmentation.SourceImageSequence,
        *(
            image
            for series in segmentation.ReferencedSeriesSequence
            for image in series.ReferencedInstanceSequence
        ),
        *(
            image
            for frame in segmentation.PerFrameFunctionalGroupsSequence
            for derivation in frame.get("DerivationImageSequence") or []
            for image in derivation.SourceImageSequence
        ),
    ]
    for image in references:
        image.ReferencedSOPClassUID = classes[image.ReferencedSOPInstanceUID]


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all of them, in folders that are made where they are not there, or none.

    Raises:
        ConfigError: a file or its folder cannot be written ("cannot-write"), and neither can any
            other there ("no-room", "read-only").
    """
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_together(files)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written: {error.strerror}",
            "check that OUTPUT may be written and has room",
            code=_FOR_ALL.get(error.errno or 0, "cannot-write"),
        ) from None
