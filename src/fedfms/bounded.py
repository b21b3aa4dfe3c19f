"""What comes from another party, decoded within bounds: JSON, text, numbers, archives, headers.

Python's own decoders raise a dozen kinds of errors, and follow what a file says of its own size
and depth. Here a bound stands before each of them, so that a megabyte costs some megabytes
whatever is in it, and what cannot be decoded is one error, `Undecodable`. YAML has its own place,
`contracts/yaml_text.py`, with the bounds of here; values become contracts in `contracts/decode.py`.
A test holds the package to it: nobody else calls `json.loads`, `yaml.load`, `zipfile` or `tarfile`.

The bounds are far above what the package itself writes: a recipe has 2 kB, a kit 100 kB, a line of
records.jsonl less than 200 kB.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import math
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from fedfms.errors import Undecodable

MAX_TEXT_BYTES = 16 << 20  # of a text in whole, unless a reader says less
MAX_JSON_BYTES = 4 << 20
MAX_DEPTH = 64  # of objects and lists in each other
MAX_VALUES = 500_000  # in one JSON text, each comma and bracket counted
LARGEST = 10**64  # of whole numbers; a certificate's serial number has at most 49 digits
MAX_HEADER_BYTES = 4 << 20  # of a safetensors file; SAM's own have 60 kB
MAX_TENSORS = 20_000
MAX_ENTRIES = 10_000  # of an archive
MAX_NAME = 1024  # characters of a name in an archive
_BLOCK = 1 << 16
_LARGEST_READ = 16 << 20  # of one piece of a tar file: of what stands before a member
_HALF_PAIR = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # bits of a zip's flags: traditional, strong, hidden names


def _refuse(
    source: str, problem: str, fix: str = "ask whoever made it for it again"
) -> Undecodable:
    return Undecodable(f"{source} {problem}", fix)


# ------------------------------------------------------------------------------------------- text


def read_bytes(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a file; of what grows for ever, such as a device, no more than the bound.

    Raises:
        OSError: it is not there or cannot be read.
        Undecodable: it is larger than `max_bytes`.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise _refuse(str(path), f"is larger than {_size(max_bytes)}", "look what file that is")
    return data


def decode_text(data: bytes, source: str) -> str:
    """UTF-8 text; the mark that some editors put before it is left out.

    Raises:
        Undecodable: it is no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refuse(
            source,
            f"is no UTF-8 text (at byte {error.start})",
            "save it again as UTF-8 in your editor",
        ) from None


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 text file with lines of any system; raises as `read_bytes` and `decode_text`."""
    text = decode_text(read_bytes(path, max_bytes), str(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------- JSON


def decode_json(
    text: str | bytes,
    source: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    any_text: bool = False,
) -> Any:
    """What a JSON text holds.

    Every number in it is finite and below 1e65, so that `float` takes it; keys stand once; objects
    and lists lie at most `MAX_DEPTH` deep; every text can be written as UTF-8.

    Args:
        text: bytes are UTF-8, with or without the mark before it.
        source: says in an error what it is; its first words, such as "recipe.json".
        max_bytes: of a `str` as many characters.
        any_text: half a surrogate pair is allowed, as Python writes file names of any bytes.

    Raises:
        Undecodable: it is none, or beyond a bound.
    """
    if len(text) > max_bytes:
        raise _refuse(source, f"is larger than {_size(max_bytes)}")
    if isinstance(text, bytes):
        text = decode_text(text, source)
    _refuse_many(text, source)
    try:
        value = json.loads(text, object_pairs_hook=_Once(text), parse_constant=_constant)
    except _Twice as error:
        raise Undecodable(
            f"{source}: {error.problem}",
            "leave one of them; the second would silently replace the first",
        ) from None
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:  # more digits than Python takes, too
        raise _refuse(source, f"is no JSON: {error}", "correct it at that place") from None
    _check_values(value, source)
    if not any_text and _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _refuse(
                source, "holds a text that is no Unicode", "write that text anew"
            ) from None
    return value


def json_object(
    text: str | bytes, source: str, *, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The same, of a text that holds an object."""
    value = decode_json(text, source, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise _refuse(source, "holds no JSON object", "write { … } with its keys")
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file; raises as `read_bytes` and `decode_json`."""
    return decode_json(read_bytes(path, max_bytes), str(path), max_bytes=max_bytes)


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file; raises as `read_bytes` and `json_object`."""
    return json_object(read_bytes(path, max_bytes), str(path), max_bytes=max_bytes)


def decode_literal(text: str, source: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a Python literal holds, such as FLARE writes into cells of its tables.

    Raises:
        Undecodable: it is none, or beyond a bound of `decode_json`.
    """
    if len(text) > max_bytes:
        raise _refuse(source, f"is larger than {_size(max_bytes)}")
    _refuse_many(text, source)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise _refuse(source, "is no value") from None
    _check_values(value, source)
    return value


class _Twice(Exception):
    """A key stands twice."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class _Once:
    """Makes a dict of an object's pairs, if each key is there once."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        place = re.compile(rf"{re.escape(json.dumps(twice))}\s*:")
        lines = [
            str(number)
            for number, line in enumerate(self._text.split("\n"), start=1)
            if place.search(line)
        ]
        at = f" (lines {' and '.join(lines[:5])})" if len(lines) > 1 else ""
        raise _Twice(f"the key {short(twice)[1:-1]} stands twice{at}")


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_many(text: str, source: str) -> None:
    """Before a parser makes objects of them: what stands in a text is counted, not built."""
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise _refuse(source, f"holds more than {MAX_VALUES} values")


def _check_values(value: Any, source: str) -> None:
    """Depth and numbers, without recursion."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 2):
        below: list[Any] = []
        for outer in level:
            for one in outer.values() if isinstance(outer, dict) else outer:
                kind = type(one)
                if kind in (dict, list, tuple, set):
                    below.append(one)
                elif kind is int and not -LARGEST < one < LARGEST:
                    raise _refuse(source, "holds a number of too many digits", "correct it")
                elif kind is float and not math.isfinite(one):
                    raise _refuse(source, "holds a number that is too large", "correct it")
        if not below:
            return
        level = below
    raise _too_deep(source)


def _too_deep(source: str) -> Undecodable:
    return _refuse(source, f"holds lists or objects more than {MAX_DEPTH} deep")


def short(text: object) -> str:
    """A value as it is written, of a long one the beginning."""
    written = repr(text)
    return written if len(written) <= 80 else f"{written[:80]} …"


def number(value: Any, source: str) -> float:
    """A finite number, of a text or of a number of any size.

    Raises:
        Undecodable: it is none, or none that `float` can hold.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, str) and len(value) > 400):
            raise ValueError
        made = float(value)
        if math.isfinite(made):
            return made
    except (TypeError, ValueError, OverflowError):
        pass
    raise _refuse(source, "is no number", "write a number, such as 0.5")


# --------------------------------------------------------------------------------------- archives

_ZIP_ERRORS = (  # what the zip reader raises of damaged bytes, one time or another
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError),
    *(zlib.error, struct.error, OSError, ValueError, OverflowError, KeyError, IndexError),
)


class ZipReader:
    """The files in a zip archive; from `open_zip`."""

    def __init__(self, archive: zipfile.ZipFile, source: str) -> None:
        self._archive, self._source = archive, source
        self.members = {one.filename: one for one in archive.infolist() if not one.is_dir()}

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            Undecodable: there is no such file, or it is damaged.
        """
        return b"".join(self.blocks(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """The same, piece by piece."""
        if name not in self.members:
            raise _refuse(self._source, f"holds no {name}")
        try:
            # in pieces: at once, zipfile would unpack all there is and then look at the size
            with self._archive.open(self.members[name]) as file:
                while block := file.read(_BLOCK):
                    yield block
        except _ZIP_ERRORS as error:
            raise _refuse(self._source, f"is damaged: {_words(error)}") from None

    @staticmethod
    def mode(member: zipfile.ZipInfo) -> int:
        """Mode of a member on Unix; 0 where it has none."""
        return member.external_attr >> 16


@contextlib.contextmanager
def open_zip(
    file: Path | bytes,
    source: str,
    *,
    max_bytes: int,
    max_archive: int | None = None,
    max_entries: int = MAX_ENTRIES,
    max_ratio: int | None = None,
) -> Iterator[ZipReader]:
    """A zip archive whose directory was looked at: nothing is unpacked yet.

    Args:
        file: a path, or the archive itself.
        source: says in an error what it is.
        max_bytes: of all files together, unpacked.
        max_archive: bytes of the archive itself; None: as many as `max_bytes`.
        max_entries: files and folders.
        max_ratio: bytes unpacked for each that is packed; None: no bound of its own.

    Raises:
        OSError: `file` is not there or cannot be read.
        Undecodable: it is no zip, damaged, encrypted, packed in another way than stored or
            deflated, larger than a bound, or names a file twice, outside, or that is none.
    """
    limit = max_bytes if max_archive is None else max_archive
    with contextlib.ExitStack() as stack:
        opened: IO[bytes] = io.BytesIO(file) if isinstance(file, bytes) else file.open("rb")
        stack.enter_context(opened)
        if opened.seek(0, io.SEEK_END) > limit:
            raise _refuse(source, f"is larger than {_size(limit)}")
        try:
            archive = stack.enter_context(zipfile.ZipFile(opened))
        except _ZIP_ERRORS as error:
            raise _refuse(source, f"is no zip archive: {_words(error)}") from None
        _check_directory(archive.infolist(), source, max_bytes, max_entries, max_ratio)
        yield ZipReader(archive, source)


def _check_directory(
    members: list[zipfile.ZipInfo],
    source: str,
    max_bytes: int,
    max_entries: int,
    max_ratio: int | None,
) -> None:
    if len(members) > max_entries:
        raise _refuse(source, f"holds more than {max_entries} files")
    if len({one.filename for one in members}) != len(members):
        raise _refuse(source, "names a file twice")
    size = packed = 0
    for one in members:
        name = one.filename
        inside_path(name, source)
        if one.flag_bits & _ENCRYPTED:
            raise _refuse(source, f"is encrypted ({short(name)})", "ask for it without a password")
        if one.compress_type not in _METHODS:
            raise _refuse(source, f"is packed in a way that is not read here ({short(name)})")
        if (kind := stat.S_IFMT(one.external_attr >> 16)) and not (
            stat.S_ISREG(kind) or (one.is_dir() and stat.S_ISDIR(kind))
        ):
            raise _refuse(source, f"holds {short(name)}, which is no plain file")
        size, packed = size + one.file_size, packed + one.compress_size
    if size > max_bytes:
        raise _refuse(source, f"is larger than {_size(max_bytes)} when it is unpacked")
    if max_ratio is not None and size > max_ratio * max(packed, 1024):
        raise _refuse(source, f"unpacks to more than {max_ratio} times its size")


def inside_path(name: str, source: str) -> PurePosixPath:
    """The name of a member of an archive, if it stays in the folder that it is unpacked into.

    Raises:
        Undecodable: it is absolute, leads upwards, is too long, or no system has such a name.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise _refuse(source, f"would write to {short(name)}")
    if len(name) > MAX_NAME or any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        raise _refuse(source, f"holds a name that is too long ({short(name)})")
    if not name.isprintable():
        raise _refuse(source, f"holds a name that no file should have ({short(name)})")
    return path


class TarMember:
    """One file of a tar archive, to be read before the next one; from `tar_members`."""

    def __init__(self, name: str, mode: int, size: int, file: IO[bytes], source: str) -> None:
        self.name, self.mode, self.size = name, mode, size
        self._file, self._source = file, source

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, piece by piece; raises Undecodable."""
        left = self.size
        while left > 0:
            try:
                block = self._file.read(min(_BLOCK, left))
            except (*_TAR_ERRORS, OSError) as error:
                raise _refuse(self._source, f"is damaged: {_words(error)}") from None
            if not block:
                raise _refuse(self._source, f"is damaged: {short(self.name)} is cut off")
            left -= len(block)
            yield block

    def text(self, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """All of it as UTF-8; raises Undecodable."""
        if self.size > max_bytes:
            raise _refuse(self._source, f"holds a {self.name} that is larger than expected")
        return decode_text(b"".join(self.blocks()), f"{self.name} in {self._source}")


_TAR_ERRORS = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError),
    *(struct.error, KeyError, IndexError, TypeError, AttributeError, zlib.error),
)
_GZIP = b"\x1f\x8b"  # RFC 1952
_TAR_HEADERS, _TAR_HEADER = 2**20, 2**12  # bytes of headers that an archive, and a file in it, has


def tar_members(
    file: Path | bytes, source: str, *, max_entries: int, max_unpacked: int | None = None
) -> Iterator[TarMember]:
    """The plain files in a tar archive, in its order.

    Args:
        file: a path, or the archive itself; uncompressed, or packed with gzip where `max_unpacked`
            says how much may come out of it.
        source: says in an error what it is.
        max_entries: how many there may be.
        max_unpacked: bytes of all files together; folders are passed over. None: of an uncompressed
            archive, whose files hold no more than it has bytes, and which has no folders.

    Raises:
        OSError: it is not there or cannot be opened.
        Undecodable: it is none, damaged, beyond a bound, or holds something that is no plain file
            or that would be written outside.
    """
    with contextlib.ExitStack() as stack:
        opened: IO[bytes] = io.BytesIO(file) if isinstance(file, bytes) else file.open("rb")
        stack.enter_context(opened)
        left = opened.seek(0, io.SEEK_END) if max_unpacked is None else max_unpacked
        end = left + _TAR_HEADERS + max_entries * _TAR_HEADER  # of all, with names and padding
        opened.seek(0)
        if max_unpacked is not None and opened.read(2) == _GZIP:
            opened.seek(0)
            opened = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=opened)))
        opened.seek(0)
        try:
            archive = tarfile.TarFile(fileobj=cast("IO[bytes]", _Pieces(opened)))
        except (*_TAR_ERRORS, OSError) as error:
            raise _refuse(source, f"is no tar archive: {_words(error)}") from None
        with archive:
            for count in range(max_entries + 1):
                try:
                    member = archive.next()
                    archive.members = []  # type: ignore[attr-defined]  # it would keep all
                    plain = member is not None and member.isreg() and not member.issparse()
                    inside = archive.extractfile(member) if member is not None and plain else None
                except (*_TAR_ERRORS, OSError) as error:
                    raise _refuse(source, f"is damaged: {_words(error)}") from None
                if member is None:
                    return
                if count == max_entries:
                    break
                if member.offset_data > end:
                    raise _refuse(source, "says more about its files than they may have in them")
                if max_unpacked is not None and member.isdir():
                    continue
                if inside is None:
                    raise _refuse(source, f"holds {short(member.name)}, which is no plain file")
                if max_unpacked is not None and member.size > left:
                    raise _refuse(
                        source, f"is larger than {_size(max_unpacked)} when it is unpacked"
                    )
                if not 0 <= member.size <= left:
                    raise _refuse(source, f"is damaged: {short(member.name)} is cut off")
                left -= member.size
                inside_path(member.name, source)
                yield TarMember(member.name, member.mode, member.size, inside, source)
    raise _refuse(source, f"holds more than {max_entries} files")


class _Pieces:
    """A file that is read in pieces: what a tar file says of its headers' size is no order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.name = file.seek, file.tell, ""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ValueError("a header is too large")
        return self._file.read(size)


# ------------------------------------------------------------------------------------ safetensors


def safetensors_header(data: bytes, source: str, size: int | None = None) -> dict[str, Any]:
    """The header of a safetensors file: by name its type, shape and place, and its metadata.

    What the library itself looks at (that the places fit the shapes and leave no gap) is left to
    it; that it is asked to do no more work than the bounds allow is seen to here.

    Args:
        data: the file, or its beginning with the whole header.
        source: says in an error what it is.
        size: of the file in bytes, where `data` is its beginning.

    Returns:
        `__metadata__`, texts by text, where there are any, and for each tensor a dictionary with
        dtype (text), shape (numbers) and data_offsets (two numbers, in bytes).

    Raises:
        Undecodable: it is none, or beyond a bound.
    """
    end = header_end(data, source)
    if end > len(data):
        raise _refuse(source, "is cut off, or no safetensors file")
    room = (len(data) if size is None else size) - end
    header = json_object(data[8:end], f"the header of {source}", max_bytes=MAX_HEADER_BYTES)
    if len(header) > MAX_TENSORS:
        raise _refuse(source, f"holds more than {MAX_TENSORS} tensors")
    for name, entry in header.items():
        if name == "__metadata__":
            fits = isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
        else:
            fits = _is_tensor(entry, room)
        if not fits:
            raise _refuse(source, f"has a header in which {short(name)} cannot be used")
    return header


def header_end(data: bytes, source: str) -> int:
    """Where the header of a safetensors file ends, by its first 8 bytes; raises Undecodable."""
    if len(data) < 8:
        raise _refuse(source, "is cut off, or no safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise _refuse(source, f"has a header larger than {_size(MAX_HEADER_BYTES)}, or is none")
    return 8 + size


def _is_tensor(entry: Any, room: int) -> bool:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(entry["dtype"], str) and isinstance(shape, list)):
        return False
    if not (len(shape) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in shape)):
        return False
    if not (isinstance(offsets, list) and len(offsets) == 2):
        return False
    begin, end = offsets
    return type(begin) is int and type(end) is int and 0 <= begin <= end <= room


def _words(error: BaseException) -> str:
    """An exception of a library in a few plain words."""
    said = str(error).strip().splitlines()
    words = said[0][:200] if said else ""
    return words if words.isprintable() and words else type(error).__name__


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{max(1, count >> 10)} kB"
