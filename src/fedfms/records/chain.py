"""The chain of records.jsonl: each line names the hash of the line before it; a seal ends it.

A line that is changed, taken out or put in no longer fits its neighbour. The seal is a line of its
own at the end of a run, signed by the key of the server's certificate: it names the line before it
and the hash of each file of the result. Files of versions before have neither; they are read as
ever. No reader of records needs this: a seal is no record, and `previous` no field of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, StringConstraints

from fedfms.bounded import decode_json
from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.receipt import FIRST, Certificate, CertificateSignature, canonical
from fedfms.contracts.wire import Count, Seconds, Sha256
from fedfms.errors import Undecodable

PREVIOUS = "previous"  # of a line: SHA-256 of the line before it, without its end
SEAL = "seal"  # `record` of the last line
SEALS = b"fedfms records sealed\n"  # signed with it
_BLOCK_BYTES = 1 << 16


class Signer(Protocol):
    """Who signs a seal: the server by its kit."""

    @property
    def certificate(self) -> str:
        """Its certificate, PEM."""

    @property
    def authority(self) -> str:
        """The certificate of the authority that issued it, PEM."""

    def sign(self, data: bytes) -> str:
        """The signature by the certificate's key, as hexadecimal digits."""


FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+/-]{0,255}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What the server signs of a finished run."""

    previous: Sha256
    time: Seconds
    lines: Count  # before it
    files: Annotated[dict[FileName, Sha256], Field(max_length=10_000)]  # beside it, by name
    certificate: Certificate  # the server's, PEM
    authority: Certificate  # of the project, PEM; compare its fingerprint with your kit's
    signature: CertificateSignature

    @property
    def signed(self) -> bytes:
        """What the signature is over: all but itself."""
        return SEALS + canonical(self._values())

    @property
    def line(self) -> bytes:
        """The one way to write it, without the line's end."""
        return canonical({**self._values(), "signature": self.signature})

    def _values(self) -> dict[str, Any]:
        return {
            "record": SEAL,
            PREVIOUS: self.previous,
            "time": self.time,
            "lines": self.lines,
            "files": dict(self.files),
            "certificate": self.certificate,
            "authority": self.authority,
        }


def line_sha256(line: bytes) -> str:
    """The hash of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def previous_of(line: bytes) -> str | None:
    """The hash that a line names; None where it names none, or is none of ours."""
    try:
        found = decode_json(line, "a record")[PREVIOUS]
    except (Undecodable, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def seal_of(line: bytes) -> Seal | None:
    """The seal that a line is; None where it is none, or not written as seals are."""
    try:
        values = decode_json(line, "a record")
        if not isinstance(values, dict) or values.pop("record", None) != SEAL:
            return None
        seal = validate(Seal, values)
    except (Undecodable, Misfits):
        return None
    return seal if seal.line == line else None


def last_line_sha256(path: Path) -> str:
    """What the next line of a file is to name; FIRST where there is no line yet.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            data = b""
            while end > 0 and b"\n" not in data[:-1]:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                data = file.read(end - start) + data
                end = start
    except FileNotFoundError:
        return FIRST
    lines = data.removesuffix(b"\n").rsplit(b"\n", 1)
    return line_sha256(lines[-1]) if data else FIRST


def count_lines(path: Path) -> int:
    """How many lines a file has."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))


def make_seal(
    path: Path, previous: str, files: Mapping[str, str], time: float, signer: Signer
) -> bytes:
    """The line that seals a file of records.

    Args:
        path: the file, all of whose lines are on the disk.
        previous: hash of its last line.
        files: SHA-256 of each file of the result, by its name relative to the file's folder.
        time: seconds since 1970-01-01 UTC.
        signer: the server.
    """
    unsigned = Seal(
        previous=previous,
        time=time,
        lines=count_lines(path),
        files=dict(sorted(files.items())),
        certificate=signer.certificate,
        authority=signer.authority,
        signature="00" * 64,
    )
    signature = signer.sign(unsigned.signed)
    return dataclasses.replace(unsigned, signature=signature).line
