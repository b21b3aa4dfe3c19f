"""A path to its bytes, if it is what its name says. In DICOM an image is a folder of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedfms.config import SiteConfig
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
_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    ".tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    ".npy": (b"\x93NUMPY",),
}


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a folder with their names, in the order of their content's SHA-256.

    So the same files under other names are the same folder, but for what an error calls them.
    """

    files: tuple[tuple[str, bytes], ...]


Content = bytes | Folder


def read_bytes(path: Path, site: SiteConfig) -> Content:
    """The content of a file, if it is what its name says; in DICOM, of a folder's files too.

    Raises:
        SiteDataError: "wrong-extension", "unreadable-file", "empty-file", "wrong-magic",
            "unreadable-folder", "no-files".
    """
    if site.format == "dicom":
        if path.is_dir():
            return _read_folder(path)
        if not is_nifti(path):  # DICOM files have any name; a label may be NIfTI
            return _read_file(path)
    elif not path.name.lower().endswith(EXTENSIONS[site.format]):
        raise SiteDataError(
            f"{path} does not end in {', '.join(EXTENSIONS[site.format])}",
            f"correct the globs or format: {site.format} in site.yml",
            code="wrong-extension",
        )
    data = _read_file(path)
    magic = _MAGIC.get(path.suffix.lower())
    if magic is not None and not data.startswith(magic):
        raise wrong_magic(path)
    return data


def content_sha256(content: Content) -> str:
    """SHA-256 of a file, or of a folder's files whatever their names, as hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digests = sorted(hashlib.sha256(data).digest() for _, data in content.files)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SiteDataError(
            f"{path} cannot be read: {error.strerror}",
            "check with ls -lL that the file is there and that this user may read it",
            code="unreadable-file",
        ) from None
    if not data:
        raise SiteDataError(
            f"{path} is empty (0 bytes)", "copy the file from its source again", code="empty-file"
        )
    return data


def _read_folder(path: Path) -> Folder:
    """The files in this folder and not below it; hidden ones do not count."""
    try:
        names = [entry for entry in path.iterdir() if is_plain_file(entry)]
    except OSError as error:
        raise unreadable_folder(path, error) from None
    if not names:
        raise SiteDataError(
            f"there is no file in the folder {path}",
            "name the folder that directly holds the series' files in images in site.yml",
            code="no-files",
        )
    files = [(entry.name, _read_file(entry)) for entry in sorted(names)]
    return Folder(tuple(sorted(files, key=lambda file: hashlib.sha256(file[1]).digest())))


def walk(root: Path, *, links: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, but a folder that cannot be listed or entered is an error and not empty.

    Folders that only systems make are left out.

    Raises:
        SiteDataError: "unreadable-folder".
    """

    def refuse(error: OSError) -> None:
        raise unreadable_folder(Path(error.filename or root), error) from None

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=links):
        if not may_enter(Path(folder)):
            raise unreadable_folder(Path(folder), PermissionError())
        folders[:] = [name for name in folders if name.lower() not in JUNK]
        yield Path(folder), folders, names


def may_enter(folder: Path) -> bool:
    """Whether this process may open what lies in a folder."""
    return os.access(folder, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def is_plain_file(path: Path) -> bool:
    """A file of the person's own, not one that a system or a file browser leaves in folders."""
    junk = path.name.startswith(".") or path.name.lower() in JUNK
    return not junk and not path.is_dir()


def is_nifti(path: Path) -> bool:
    """Whether the name is one of NIfTI."""
    return path.name.lower().endswith(EXTENSIONS["nifti"])


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


def wrong_magic(path: Path) -> SiteDataError:
    """The error for a file that is not what its name says."""
    return SiteDataError(
        f"{path} is not what its name says: its first bytes belong to another kind of file",
        "export the file again from its source; renaming does not convert it",
        code="wrong-magic",
    )


def damaged(path: Path, reason: str) -> SiteDataError:
    """The error for a file that ends too early or holds nonsense."""
    return SiteDataError(
        f"{path} is damaged or cut off ({reason})",
        "copy the file from its source again, and compare the file sizes",
        code="damaged-file",
    )
