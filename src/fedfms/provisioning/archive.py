"""An archive for sites without internet: image, kits, checkpoints, checksums, a load script.

Its checksums can be signed by the federation's certificate authority, as those of a kit are;
load.sh checks that with openssl alone.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedfms.bounded import open_zip
from fedfms.errors import ConfigError, FederationError, Undecodable
from fedfms.files import whole_folder
from fedfms.flare.internals.state import STATE_FILE, CertificateState
from fedfms.flare.provision import private_files
from fedfms.kits.checksums import SUMS_FILE, list_sums, sign_sums
from fedfms.kits.zips import MAX_BYTES
from fedfms.provisioning.images import last_line, look_at, write_bills
from fedfms.provisioning.render import write_templates

# level 6 makes the CPU image 12 % smaller (365 MB instead of 414) in three times as long
GZIP_LEVEL = 1
BLOCK = 1 << 20
ROOT_FILE = "rootCA.pem"  # of who signed; its fingerprint is told by another way

OnBytes = Callable[[int], None]


def archive(
    output: Path,
    images: Sequence[str],
    kits: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    on_bytes: OnBytes | None = None,
    sign: Path | None = None,
) -> Path:
    """Write an archive into a new folder; whole or not at all.

    Args:
        output: new folder, for this user only: kits hold private keys.
        images: Docker images by name and tag.
        kits: zips of `fedfms provision`.
        checkpoints: SAM checkpoint files.
        on_bytes: told how many bytes of images were read.
        sign: the output folder of `fedfms provision`, whose certificate authority signs; None: the
            archive is not signed.

    Raises:
        FedfmsError: something named is not there, or Docker does not answer.
    """
    if output.exists():
        raise ConfigError(f"{output} is there already", "name a new folder", code="exists")
    _check_files(kits, checkpoints)
    authority = _authority(sign) if sign is not None else None
    known = [look_at(image) for image in images]
    with private_files(), whole_folder(output) as scratch:
        for name in ("images", "kits", "checkpoints"):
            (scratch / name).mkdir()
        for image in known:
            path = scratch / "images" / f"{image.file_name}.tar.gz"
            _save(image.name, path, on_bytes or (lambda count: None))
        write_bills(scratch, known)
        for source in kits:
            shutil.copyfile(source, scratch / "kits" / source.name)
        for source in checkpoints:
            shutil.copyfile(source, scratch / "checkpoints" / source.name)
        listed = ", ".join(f"`{image}`" for image in images)
        write_templates("archive", scratch, images=listed)
        if authority is not None:
            pem = cast("x509.Certificate", authority.root).public_bytes(Encoding.PEM)
            (scratch / ROOT_FILE).write_bytes(pem)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        names = [path.relative_to(scratch).as_posix() for path in files]
        (scratch / SUMS_FILE).write_text(list_sums(scratch, names))
        if authority is not None:
            sign_sums(scratch, authority.root_key)
    return output


def _check_files(kits: Sequence[Path], checkpoints: Sequence[Path]) -> None:
    for path in [*kits, *checkpoints]:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}", "check the path", code="no-file")
    for paths in (kits, checkpoints):
        names = [path.name for path in paths]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"two files are called {name}", "name each once", code="same-name"
                )
    for path in kits:
        if not _is_zip(path):
            raise ConfigError(
                f"{path} is no kit", "name zips that fedfms provision made", code="no-kit"
            )


def _is_zip(path: Path) -> bool:
    try:
        with open_zip(path, str(path), max_bytes=MAX_BYTES):
            return True
    except Undecodable:
        return False


def _authority(output: Path) -> CertificateState:
    found = sorted(output.glob(f"*/{STATE_FILE}"))
    if len(found) != 1:
        raise ConfigError(
            f"{output} holds {len(found) or 'no'} certificate authorities",
            "name the --output folder of fedfms provision, which is private",
            code="no-ca",
        )
    state = CertificateState.read(found[0])
    if state.root is None:
        raise ConfigError(f"{found[0]} holds none", "run fedfms provision first", code="no-ca")
    return state


def _save(image: str, path: Path, on_bytes: OnBytes) -> None:
    process = subprocess.Popen(
        ["docker", "save", image], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        # no name and no time in the header: the same image gives the same bytes
        with path.open("wb") as file, gzip.GzipFile("", "wb", GZIP_LEVEL, file, 0) as packed:
            stream = cast("IO[bytes]", process.stdout)
            while block := stream.read(BLOCK):
                packed.write(block)
                on_bytes(len(block))
        said = cast("IO[bytes]", process.stderr).read()
        if process.wait() != 0:
            raise FederationError(
                f"docker save {image} failed: {last_line(said)}", "try it by hand", code="docker"
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
