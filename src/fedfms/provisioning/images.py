"""The images of a federation: what tells one from another, and the bill of what is in it.

An image carries its bill of materials (CycloneDX) at `BILL_IN_IMAGE`; tools/bill.py makes it in the
build. Kits and archives carry a copy, and a list of the images with their digests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms.bounded import decode_json, json_object, read_text, tar_members
from fedfms.errors import ConfigError, FederationError, Undecodable

BILL_IN_IMAGE = "/opt/fedfms/sbom.cdx.json"
WHEEL_BILL = Path(__file__).parents[1] / "sbom.cdx.json"  # of the wheel; tools/lock.sh makes it
BILLS, IMAGES_FILE = "bills", "images.txt"  # a folder in a kit and in an archive, and a file in it
MAX_BILL_BYTES = 16 << 20  # ours has 2 MB
GPU_ENDING = "-cuda"  # of the name of an image with CUDA, as FEDFMS_GPU_IMAGE has it
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Image:
    """An image as this machine's engine knows it, or as somebody named it."""

    name: str  # with its tag, such as fedfms:0.1.0
    digests: tuple[str, ...]  # its id, then its digests in registries; sha256:…
    bill: str | None = None  # CycloneDX, JSON; None where it is not known here

    @property
    def file_name(self) -> str:
        """The name without what a file's name may not have."""
        return self.name.replace("/", "_").replace(":", "-").replace("@", "-")

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"name": self.name, "digests": list(self.digests), "bill": self.bill}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Image:
        """From `to_dict`."""
        return cls(values["name"], tuple(values["digests"]), values["bill"])


def named_image(text: str) -> Image:
    """An image from a command line.

    Args:
        text: NAME of an image that this machine's engine has, or NAME=sha256:… for one elsewhere.

    Raises:
        FedfmsError: it is no digest, or the engine does not have the image.
    """
    name, separator, digest = text.partition("=")
    if not separator:
        return look_at(name)
    if not name or _DIGEST.fullmatch(digest) is None:
        raise ConfigError(
            f"{text} is not NAME=sha256: and 64 hexadecimal digits",
            "copy what docker image inspect --format '{{.Id}}' NAME prints",
            code="bad-digest",
        )
    own = Path(BILL_IN_IMAGE)  # where this process itself runs in an image, it is most likely this
    return Image(name, (digest,), read_text(own, MAX_BILL_BYTES) if own.is_file() else None)


def look_at(name: str) -> Image:
    """What the engine of this machine says of an image.

    Raises:
        FederationError: there is no engine (no-docker) or no such image (no-image).
    """
    if shutil.which("docker") is None:
        raise FederationError(
            "there is no docker command on this machine",
            "run this where the image was built, with Docker installed",
            code="no-docker",
        )
    engine = docker("info", "--format", "{{.ServerVersion}}")
    # some versions of the client end with 0 even where no engine answers
    if engine.returncode != 0 or not engine.stdout.strip():
        raise FederationError(
            f"Docker does not answer: {last_line(engine.stderr)}",
            "start it, or run this as a user who may use it (docker info says why)",
            code="no-docker",
        )
    found = docker("image", "inspect", name)
    said = decode_json(found.stdout or b"[]", "docker's answer") if found.returncode == 0 else []
    if not said:
        raise FederationError(
            f"there is no image {name} on this machine",
            "docker images lists those that are; build it first: docker compose build",
            code="no-image",
        )
    of_registries = [text.partition("@")[2] for text in said[0].get("RepoDigests") or []]
    digests = tuple(dict.fromkeys([str(said[0]["Id"]), *of_registries]))
    return Image(name, digests, _bill_in(name))


def _bill_in(name: str) -> str | None:
    """The bill that an image carries; nothing of the image is run for it."""
    made = docker("create", "--network", "none", name, "none")
    if made.returncode != 0:
        raise FederationError(
            f"docker create {name} failed: {last_line(made.stderr)}",
            "try it by hand",
            code="docker",
        )
    container = made.stdout.decode().strip()
    try:
        copied = _copied(f"{container}:{BILL_IN_IMAGE}")
    finally:
        docker("rm", "-v", container)
    if copied is None:
        return None  # an image from before there were bills, or none of ours
    try:
        for member in tar_members(copied, "it", max_entries=1):
            text = member.text(MAX_BILL_BYTES)
            json_object(text, "it", max_bytes=MAX_BILL_BYTES)
            return text
        raise Undecodable("it holds no file", "")
    except Undecodable as error:
        raise FederationError(
            f"what {name} has at {BILL_IN_IMAGE} is no bill of materials: {error.problem}",
            "look who made that image; ours carries the bill that tools/bill.py writes",
            code="bad-bill",
        ) from None


def _copied(path: str) -> bytes | None:
    """A tar archive of a file in a container, cut off a little above what a bill may have."""
    most = MAX_BILL_BYTES + (1 << 20)
    with subprocess.Popen(
        ["docker", "cp", path, "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        data = process.stdout.read(most)
        if len(data) == most:
            process.kill()
            return data
    return data if process.returncode == 0 else None


def digest_settings(images: Iterable[Image]) -> dict[str, str]:
    """What a kit's `.env` says of the image that runs, by name: its id.

    FEDFMS_IMAGE_DIGEST is of the one for processors, FEDFMS_GPU_IMAGE_DIGEST of the one with CUDA;
    nothing of several that could be meant, since nobody can know which one a participant starts.
    """
    plain: set[str] = set()
    cuda: set[str] = set()
    for image in images:
        if image.digests:
            (cuda if image.name.endswith(GPU_ENDING) else plain).add(image.digests[0])
    found = {"FEDFMS_IMAGE_DIGEST": plain, "FEDFMS_GPU_IMAGE_DIGEST": cuda}
    return {name: next(iter(ids)) for name, ids in found.items() if len(ids) == 1}


def write_bills(folder: Path, images: Iterable[Image]) -> None:
    """Write the bill of the wheel, those of the images, and the list of their digests.

    Args:
        folder: gets a folder `bills`.
        images: each with its digests; none: the list is empty.
    """
    bills = folder / BILLS
    bills.mkdir()
    (bills / "wheel.cdx.json").write_bytes(WHEEL_BILL.read_bytes())
    lines = []
    for image in images:
        lines += [f"{digest}  {image.name}\n" for digest in image.digests]
        if image.bill is not None:
            target = bills / f"{image.file_name}.cdx.json"
            target.write_text(image.bill, encoding="utf-8")
    (bills / IMAGES_FILE).write_text("".join(lines), encoding="utf-8")


def docker(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A docker command, run to its end."""
    return subprocess.run(["docker", *arguments], capture_output=True, check=False)


def last_line(said: bytes) -> str:
    """The last line of what a command said."""
    text = said.decode(errors="replace")
    return (text.strip().splitlines() or ["it does not say why"])[-1]
