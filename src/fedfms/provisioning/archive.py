"""An archive for sites without internet: image, kits, checkpoints, checksums, a load script."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

from fedfms.bounded import decode_json, open_zip
from fedfms.errors import ConfigError, FederationError, Undecodable
from fedfms.files import whole_folder
from fedfms.flare.provision import private_files
from fedfms.kits.checksums import SUMS_FILE, list_sums
from fedfms.kits.zips import MAX_BYTES
from fedfms.provisioning.render import write_templates

# level 6 makes the CPU image 12 % smaller (365 MB instead of 414) in three times as long
GZIP_LEVEL = 1
BLOCK = 1 << 20

OnBytes = Callable[[int], None]


def archive(
    output: Path,
    images: Sequence[str],
    kits: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    on_bytes: OnBytes | None = None,
) -> Path:
    """Write an archive into a new folder; whole or not at all.

    Args:
        output: new folder, for this user only: kits hold private keys.
        images: Docker images by name and tag.
        kits: zips of `fedfms provision`.
        checkpoints: SAM checkpoint files.
        on_bytes: told how many bytes of images were read.

    Raises:
        FedfmsError: something named is not there, or Docker does not answer.
    """
    if output.exists():
        raise ConfigError(f"{output} is there already", "name a new folder", code="exists")
    _check_files(kits, checkpoints)
    for image in images:
        _check_image(image)
    with private_files(), whole_folder(output) as scratch:
        for name in ("images", "kits", "checkpoints"):
            (scratch / name).mkdir()
        for image in images:
            path = scratch / "images" / f"{image.replace('/', '_').replace(':', '-')}.tar.gz"
            _save(image, path, on_bytes or (lambda count: None))
        for source in kits:
            shutil.copyfile(source, scratch / "kits" / source.name)
        for source in checkpoints:
            shutil.copyfile(source, scratch / "checkpoints" / source.name)
        listed = ", ".join(f"`{image}`" for image in images)
        write_templates("archive", scratch, images=listed)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        names = [path.relative_to(scratch).as_posix() for path in files]
        (scratch / SUMS_FILE).write_text(list_sums(scratch, names))
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


def _check_image(image: str) -> None:
    if shutil.which("docker") is None:
        raise FederationError(
            "there is no docker command on this machine",
            "run this where the image was built, with Docker installed",
            code="no-docker",
        )
    engine = _docker("info", "--format", "{{.ServerVersion}}")
    # some versions of the client end with 0 even where no engine answers
    if engine.returncode != 0 or not engine.stdout.strip():
        raise FederationError(
            f"Docker does not answer: {_last_line(engine.stderr)}",
            "start it, or run this as a user who may use it (docker info says why)",
            code="no-docker",
        )
    found = _docker("image", "inspect", image)
    if found.returncode != 0 or not decode_json(found.stdout or "[]", "docker's answer"):
        raise FederationError(
            f"there is no image {image} on this machine",
            "docker images lists those that are; build it first: docker compose build",
            code="no-image",
        )


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
        said = cast("IO[bytes]", process.stderr).read().decode(errors="replace")
        if process.wait() != 0:
            raise FederationError(
                f"docker save {image} failed: {_last_line(said)}", "try it by hand", code="docker"
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it does not say why"])[-1]
