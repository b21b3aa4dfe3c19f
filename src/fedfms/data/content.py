"""A path to its bytes, if it is what its name says. In DICOM an image is a folder of files."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedfms.contracts.site import Reading
from fedfms.errors import SiteDataError

EXTENSIONS = {
    "nifti": (".nii", ".nii.gz"),
    "image": (".png", ".jpg", ".jpeg", ".tif", ".tiff"),
    "npy": (".npy",),
}
# what file systems and file browsers leave in folders, in small letters; hidden ones never count
JUNK = (
    *("thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information"),
    *("@eadir", "__macosx"),
)
# endings of files that viewers, archives and people put beside the slices of a series; none is one
_NO_SLICES = (
    *(".txt", ".csv", ".tsv", ".md", ".xml", ".json", ".htm", ".html", ".css", ".js", ".log"),
    *(".pdf", ".rtf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods"),
    *(".ini", ".inf", ".bat", ".exe", ".url", ".lnk", ".zip"),
    *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".nii", ".nii.gz"),
)
# other kinds of files that people have, and what makes one of them that is read here
_SLICER = "save it as NIfTI (.nii.gz), for example in 3D Slicer (File, Save Data)"
_ITK = (
    'convert it to NIfTI, for example with: python -c "import SimpleITK as s, sys; '
    's.WriteImage(s.ReadImage(sys.argv[1]), sys.argv[2])" FILE FILE.nii.gz'
)
_NIBABEL = (
    'convert it to NIfTI, for example with: python -c "import nibabel as n, sys; '
    'n.save(n.Nifti1Image.from_image(n.load(sys.argv[1])), sys.argv[2])" FILE FILE.nii.gz'
)
_MAGICK = "convert it to PNG, for example with: magick FILE FILE.png"
SLIDE = (
    "save the regions that were drawn on as PNG or TIFF, for example with QuPath (Export images) "
    "or vips; labels alike"
)
_BIOFORMATS = "save each plane as a TIFF, for example with Fiji (Bio-Formats) or bfconvert"
_NUMPY = "save each image as NPY (numpy.save) with format: npy, or as NIfTI or PNG"
_DICOM = "write format: dicom in site.yml; an image is then a folder with one series"
_OUTLINES = "draw its outlines to a PNG with one number for each class"
_CONVERTERS = {
    ending: (kind, fix)
    for endings, kind, fix in (
        (
            ".seg.nrrd",
            "a segmentation of 3D Slicer (.seg.nrrd)",
            "in 3D Slicer export it as NIfTI (Segmentations, Export to files, with the volume as "
            "reference), so that each voxel has one label value",
        ),
        (".nrrd", "an NRRD volume", _SLICER),
        (".nhdr", "the header of an NRRD volume", _SLICER),
        (".mha", "a MetaImage volume", _ITK),
        (".mhd", "the header of a MetaImage volume", _ITK),
        (".raw", "numbers without a header", "convert the header beside it (.mhd, .nhdr) to NIfTI"),
        (
            ".mgz .mgh",
            "a volume of FreeSurfer",
            "convert it to NIfTI with: mri_convert FILE FILE.nii.gz",
        ),
        (".mnc", "a MINC volume", "convert it to NIfTI with: mnc2nii FILE FILE.nii"),
        (
            ".hdr .hdr.gz",
            "the header of an Analyze or NIfTI pair (.hdr and .img)",
            _NIBABEL,
        ),
        (".img .img.gz", "the voxels of an Analyze or NIfTI pair (.hdr and .img)", _NIBABEL),
        (".par", "a volume of Philips (PAR/REC)", "convert it to NIfTI with: parrec2nii FILE"),
        (".rec", "a volume of Philips (PAR/REC)", "convert its .par with: parrec2nii FILE.par"),
        (".dcm", "a DICOM file", _DICOM),
        (".ima", "a DICOM file of Siemens", _DICOM),
        (".bmp", "a BMP picture", _MAGICK),
        (".gif", "a GIF picture", _MAGICK),
        (".webp", "a WebP picture", _MAGICK),
        (".heic", "an HEIC picture", _MAGICK),
        (".avif", "an AVIF picture", _MAGICK),
        (".jp2 .j2k", "a JPEG 2000 picture", _MAGICK),
        (".jxl", "a JPEG XL picture", _MAGICK),
        (".ppm .pgm .pbm", "a Netpbm picture", _MAGICK),
        (".tga", "a TGA picture", _MAGICK),
        (".psd", "a file of Photoshop", _MAGICK),
        (".svg", "a drawing and no picture", _MAGICK),
        (".pdf", "a document and no picture", "save the pictures in it as PNG"),
        (".svs .ndpi .mrxs .scn .bif .vsi", "a whole slide", SLIDE),
        (".czi .lsm", "a file of a Zeiss microscope", _BIOFORMATS),
        (".lif", "a file of a Leica microscope", _BIOFORMATS),
        (".nd2", "a file of a Nikon microscope", _BIOFORMATS),
        (".oib .oif", "a file of an Olympus microscope", _BIOFORMATS),
        (".h5 .hdf5", "an HDF5 file", _NUMPY),
        (".zarr", "a Zarr store", _NUMPY),
        (".mat", "a file of MATLAB", _NUMPY),
        (".npz", "several arrays of NumPy in one file", _NUMPY),
        (".pt", "a file of PyTorch", _NUMPY),
        (".pkl", "a Python pickle", _NUMPY),
        (".json .xml .geojson", "a text and no picture", _OUTLINES),
    )
    for ending in endings.split()
}
# first bytes of kinds of files, their name, and the endings under which they are read here
_KINDS: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG", (".png",)),
    (b"\xff\xd8\xff", "JPEG", (".jpg", ".jpeg")),
    *((magic, "TIFF", (".tif", ".tiff")) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"\x93NUMPY", "NPY", (".npy",)),
    (b"\x1f\x8b", "gzip", (".gz",)),
    (b"GIF8", "GIF", ()),
    (b"RIFF", "WebP", ()),
    (b"BM", "BMP", ()),
    (b"NRRD", "NRRD", ()),
    (b"\x89HDF", "HDF5", ()),
    (b"PK\x03\x04", "ZIP", ()),
    (b"\0\0\0\x0cjP", "JPEG 2000", ()),
    (b"<", "HTML or XML", ()),
)


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a folder with their names, in the order of their content's SHA-256.

    So the same files under other names are the same folder, but for what an error calls them.
    """

    files: tuple[tuple[str, bytes], ...]


Content = bytes | Folder


def read_bytes(path: Path, site: Reading) -> Content:
    """The content of a file, if it is what its name says; in DICOM, of a folder's files too.

    Raises:
        SiteDataError: "wrong-extension", "unreadable-file", "empty-file", "wrong-magic",
            "unreadable-folder", "no-files".
    """
    if site.format == "dicom":
        if path.is_dir():
            return _read_folder(path)
        if not is_nifti(path):  # DICOM files have any name; a label may be NIfTI
            data = _read_file(path)
            is_dicom = data[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")
            if not is_dicom and another_kind(path) is not None:
                raise _wrong_extension(path, site)
            return data
    elif not path.name.lower().endswith(EXTENSIONS[site.format]):
        raise _wrong_extension(path, site)
    data = _read_file(path)
    ending = path.suffix.lower()
    magic = tuple(first for first, _, endings in _KINDS if ending in endings)
    if magic and not data.startswith(magic):
        raise wrong_magic(path, data)
    return data


def _wrong_extension(path: Path, site: Reading) -> SiteDataError:
    """Another kind of file than the format says: what it is, and what makes one of it."""
    name = path.name.lower()
    fix = f"correct the globs or format: {site.format} in site.yml"
    other = another_kind(path)
    if other is not None:
        kind, converter = other
        return SiteDataError(
            f"{path} is {kind}, which is not read here", converter, code="wrong-extension"
        )
    for format, endings in EXTENSIONS.items():
        if name.endswith(endings):
            fix = f"write format: {format} in site.yml, or correct the globs"
            break
    return SiteDataError(
        f"{path} does not end in {', '.join(EXTENSIONS[site.format])}", fix, code="wrong-extension"
    )


def another_kind(path: Path) -> tuple[str, str] | None:
    """What a file that is not read here is by its ending, and what to do to have it read."""
    name = path.name.lower()
    endings = [ending for ending in _CONVERTERS if name.endswith(ending)]
    return _CONVERTERS[max(endings, key=len)] if endings else None


def is_no_slice(path: Path) -> bool:
    """Whether a file beside slices is something else by its name and content: a text, a picture.

    A slice that lost its beginning has no such name, so that it is refused.

    Raises:
        SiteDataError: "unreadable-file".
    """
    if not path.name.lower().endswith(_NO_SLICES):
        return False
    try:
        with opened(path) as file:
            return file.read(132)[128:] != b"DICM"
    except OSError as error:
        raise unreadable_file(path, error) from None


def content_sha256(content: Content) -> str:
    """SHA-256 of a file, or of a folder's files whatever their names, as hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digests = sorted(hashlib.sha256(data).digest() for _, data in content.files)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        with opened(path) as file:
            data = file.read()
    except OSError as error:
        raise unreadable_file(path, error) from None
    if not data:
        raise SiteDataError(
            f"{path} is empty (0 bytes)", "copy the file from its source again", code="empty-file"
        )
    return data


def _read_folder(path: Path) -> Folder:
    names = [entry for entry in files_in(path) if not is_no_slice(entry)]
    if not names:
        raise SiteDataError(
            f"there is no file of a series in the folder {path}",
            "name the folder that directly holds the series' files in images in site.yml",
            code="no-files",
        )
    files = [(entry.name, _read_file(entry)) for entry in names]
    return Folder(tuple(sorted(files, key=lambda file: hashlib.sha256(file[1]).digest())))


def files_in(folder: Path) -> list[Path]:
    """The files in this folder and not below it, in the order of their names; no hidden ones.

    Raises:
        SiteDataError: "unreadable-folder".
    """
    try:
        return sorted(entry for entry in folder.iterdir() if is_plain_file(entry))
    except OSError as error:
        raise unreadable_folder(folder, error) from None


def walk(root: Path, *, links: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, but a folder that cannot be listed or entered is an error and not empty.

    Folders that only systems make are left out, and links to a folder that they lie in.

    Raises:
        SiteDataError: "unreadable-folder".
    """

    def refuse(error: OSError) -> None:
        raise unreadable_folder(Path(error.filename or root), error) from None

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=links):
        if not may_enter(Path(folder)):
            raise unreadable_folder(Path(folder), PermissionError())
        folders[:] = [
            name
            for name in folders
            if name.lower() not in JUNK and not (links and _leads_back(root, Path(folder) / name))
        ]
        yield Path(folder), folders, names


def _leads_back(root: Path, folder: Path) -> bool:
    """Whether a folder below `root` is a link to one that it lies in."""
    try:
        if not folder.is_symlink():
            return False
        here = folder.stat()
        above = [up for up in folder.parents if up == root or root in up.parents]
        return any(os.path.samestat(here, up.stat()) for up in above)
    except OSError:  # it leads nowhere
        return True


def may_enter(folder: Path) -> bool:
    """Whether this process may open what lies in a folder."""
    return os.access(folder, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def is_plain_file(path: Path) -> bool:
    """A file of the person's own, not one that a system or a file browser leaves in folders.

    A pipe, a socket or a device is none; a link that leads nowhere is, whoever reads it says so.
    """
    if path.name.startswith(".") or path.name.lower() in JUNK:
        return False
    return path.is_file() or not path.exists()


def is_nifti(path: Path) -> bool:
    """Whether the name is one of NIfTI."""
    return path.name.lower().endswith(EXTENSIONS["nifti"])


def opened(path: Path) -> BinaryIO:
    """A file, open to be read; a pipe, which would be waited for, is refused.

    Raises:
        SiteDataError: "unreadable-file".
        OSError: as of `open`.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SiteDataError(
            f"{path} is no file but a pipe, a socket or a device",
            "put the file itself there, or move this away",
            code="unreadable-file",
        )
    return path.open("rb")


def unreadable_file(path: Path, error: OSError) -> SiteDataError:
    """The error for a file that cannot be opened or read."""
    return SiteDataError(
        f"{path} cannot be read: {error.strerror}",
        "check with ls -lL that the file is there and that this user may read it",
        code="unreadable-file",
    )


def unreadable_folder(path: Path, error: OSError) -> SiteDataError:
    """The error for a folder that cannot be listed or entered."""
    if not isinstance(error, PermissionError):
        return SiteDataError(
            f"the folder {path} cannot be read: {error.strerror}",
            "check the disk or the network drive that it lies on",
            code="unreadable-folder",
        )
    return SiteDataError(
        f"the folder {path} cannot be read by user {os.geteuid()}:{os.getegid()}",
        f"let this user or group read and enter it (ls -ldn {path} shows whose it is); for a "
        "container set FEDFMS_UID or SITE_DATA_GID in .env to an owner or group that may",
        code="unreadable-folder",
    )


def wrong_magic(path: Path, data: bytes) -> SiteDataError:
    """The error for a file that is not what its name says; where the name is wrong, the right one.

    Args:
        path: of the file.
        data: its content.
    """
    kind, endings = _kind_of(data)
    if kind == "gzip":
        endings = (".nii.gz",) if _has_nifti_magic(_beginning(data)) else ()
    problem = f"{path} is not what its name says: its first bytes are those of {kind}"
    fix = "export the file again from its source; renaming does not convert it"
    if endings and not path.name.lower().endswith(endings[0]):
        fix = f"rename it so that it ends in {endings[0]}, and correct the globs in site.yml"
    return SiteDataError(problem, fix, code="wrong-magic")


def _has_nifti_magic(data: bytes) -> bool:
    return data[344:348] == b"n+1\0" or data[4:8] == b"n+2\0"


def _beginning(data: bytes) -> bytes:
    """What a gzip file begins with, as far as a kind of file shows."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, 512)
    except zlib.error:
        return b""


def _kind_of(data: bytes) -> tuple[str, tuple[str, ...]]:
    """A name for what the bytes are, and the endings under which they are read here."""
    if _has_nifti_magic(data):
        return "NIfTI", (".nii",)
    if data[128:132] == b"DICM":
        return "DICOM", ()
    found = ((kind, endings) for magic, kind, endings in _KINDS if data.startswith(magic))
    return next(found, ("another kind of file", ()))


def cannot_read_here(
    path: Path, reason: str, fix: str = "save the file in a plainer form: PNG, or TIFF with LZW"
) -> SiteDataError:
    """The error for a file that may be whole, but is of a form that nothing here reads rightly."""
    return SiteDataError(f"{path} cannot be read here: {reason}", fix, code="cannot-be-read-here")


def damaged(path: Path, reason: str) -> SiteDataError:
    """The error for a file that ends too early or holds nonsense."""
    return SiteDataError(
        f"{path} is damaged or cut off ({reason})",
        "copy the file from its source again, and compare the file sizes",
        code="damaged-file",
    )
