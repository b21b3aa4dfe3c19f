"""Inputs that nearly are what a parser reads: real ones, changed at places that mean something."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]  # chance, input, all seeds

_TEXTS = (
    *("", "a" * 300, "null", "NaN", "1e400", "-1", "0x10", "no", "../..", "/etc/passwd", "x\0y"),
    *("\ud800", "é" * 40, "*", "**/*", "[", "(", "(a+)+$", "\u202e", "train", "evaluate", "=1+1"),
)
_NUMBERS = (0, 1, -1, 2**31, 2**53, 2**64, 10**70, 10**400, -(10**400), 0.5, 1e308, -0.0)
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"NaN", b"Infinity", b"1e999", b"\\ud800"),
    *(b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b"\xc3\x28"),
    *(b"&a ", b"*a", b"<<: ", b"- ", b"? ", b"!!python/object:os.system ", b"!!float ", b"!!int "),
    *(b"---\n", b"...\n", b"%TAG ! a\n", b"\t", b"\r", b"0o17", b"12:30:45", b"2024-13-40", b"|\n"),
    *(
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"IDAT",
        b"tEXt",
        b"ustar",
        b"\x89PNG\r\n\x1a\n",
    ),
    *(b"\xff" * 8, b"\x00" * 8, b"-----BEGIN CERTIFICATE-----\n", b"../", b"%s", b"\n"),
)


def of_bytes(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Some bytes are others, are gone, are there twice, or come from another input."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed) + 1)
        end = min(len(changed), at + chance.choice((1, 2, 4, 8, 64, 512)))
        kind = chance.randrange(8)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at:at] = chance.choice(_TOKENS)
        elif kind == 2:
            changed[at:end] = chance.choice(_TOKENS)
        elif kind == 3:
            del changed[at:end]
        elif kind == 4:
            changed[at:at] = changed[at:end] * chance.choice((1, 2, 50))
        elif kind == 5:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            changed[at:end] = other[start : start + chance.choice((4, 32, 256))]
        elif kind == 6:
            size, order = chance.choice((2, 4, 8)), chance.choice(("little", "big"))
            number = chance.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63, len(changed)))
            changed[at : at + size] = (number % 256**size).to_bytes(size, order)
        else:
            changed[at:end] = bytes(chance.randrange(256) for _ in range(end - at))
    return bytes(changed[: 1 << 20])


def of_json(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A value of a JSON text is another one, is gone, or stands twice; or bytes are changed."""
    if chance.random() < 0.3:
        return of_bytes(chance, data, seeds)
    try:
        value = json.loads(data)
        other = json.loads(chance.choice(seeds))
    except (ValueError, RecursionError):
        return of_bytes(chance, data, seeds)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        value = _changed(chance, value, other, 0)
    text = _written(value)
    if chance.random() < 0.1:
        text = _twice(chance, text)
    encoding = chance.choice(("utf-8",) * 30 + ("utf-16", "utf-32", "utf-8-sig", "latin-1"))
    return text.encode(encoding, errors="replace")[: 1 << 20]


def of_lines(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Lines of JSON: one of them changed, gone, there twice, or in another's place."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    kind = chance.randrange(6)
    if kind <= 2:
        lines[at] = of_json(chance, lines[at], lines)
    elif kind == 3:
        del lines[at]
    elif kind == 4:
        lines[at:at] = [chance.choice(lines)] * chance.choice((1, 3))
    else:
        return of_bytes(chance, data, seeds)
    return b"\n".join(lines)


def of_tar(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A field of a member's header is another one, and the header's checksum fits."""
    if len(data) < 1024 or chance.random() < 0.2:
        return of_bytes(chance, data, seeds)
    changed = bytearray(data)
    heads = [
        at for at in range(0, len(changed) - 511, 512) if changed[at + 257 : at + 262] == b"ustar"
    ]
    if not heads:
        return of_bytes(chance, data, seeds)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.choice(heads)
        start, size = chance.choice(
            ((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155))
        )
        new = chance.choice(
            (
                *(
                    b"../x",
                    b"/x",
                    b"a" * 200,
                    b"\xff" * 12,
                    b"77777777777",
                    b"-1",
                    b"",
                    b"00000000001",
                ),
                *(
                    b"\x80" + b"\x00" * 10 + b"\xff",
                    b"L",
                    b"x",
                    b"g",
                    b"K",
                    b"S",
                    b"2",
                    b"1",
                    b"5",
                    b"3",
                ),
            )
        )
        changed[at + start : at + start + size] = new[:size].ljust(size, b"\0")
        changed[at + 148 : at + 156] = b" " * 8
        changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def of_safetensors(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """The header is changed as JSON is, with a length that fits; or bytes are changed."""
    if len(data) < 8 or chance.random() < 0.3:
        return of_bytes(chance, data, seeds)
    size = struct.unpack("<Q", data[:8])[0]
    header = of_json(chance, data[8 : 8 + size], [data[8 : 8 + size]])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def of_png(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A chunk has other bytes, another kind or place, and a checksum that fits."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks or chance.random() < 0.2:
        return of_bytes(chance, data, seeds)
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.randrange(len(chunks))
        kind, content = chunks[place]
        what = chance.randrange(5)
        if what == 0:
            chunks[place] = (chance.choice((b"tEXt", b"IDAT", b"IEND", b"IHDR", b"PLTE")), content)
        elif what == 1:
            chunks[place:place] = [chance.choice(chunks)]
        elif what == 2 and len(chunks) > 1:
            del chunks[place]
        elif what == 3:
            zeros = zlib.compress(bytes(chance.choice((0, 1, 500, 1 << 20))))
            chunks[place] = (kind, zeros if kind == b"IDAT" else content[::-1])
        else:
            chunks[place] = (kind, of_bytes(chance, content, [content]))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        made += struct.pack(">I", len(content)) + kind + content + checksum
    return made


def of_text(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Lines and words of a text such as YAML or a list of sums are others."""
    if chance.random() < 0.4:
        return of_bytes(chance, data, seeds)
    lines = data.split(b"\n")
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        key, colon, value = lines[at].partition(b":")
        kind = chance.randrange(7)
        if kind == 0:
            lines[at:at] = [chance.choice(chance.choice(seeds).split(b"\n"))]
        elif kind == 1:
            lines[at] = b"  " * chance.randrange(4) + lines[at].lstrip()
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines[at] = key + colon + b" " + _word(chance)
        elif kind == 4:
            lines[at] = _word(chance) + colon + value
        elif kind == 5:
            lines[at] = key + colon + b" [" + b", ".join([value.strip() or b"1"] * 5) + b"]"
        else:
            lines[at] += b" " + chance.choice(_TOKENS)
    return b"\n".join(lines)[: 1 << 20]


def _word(chance: random.Random) -> bytes:
    value = chance.choice((*_TEXTS, *_NUMBERS))
    return str(value).encode(errors="replace") if not isinstance(value, int) else _number(value)


def _number(value: int) -> bytes:
    return (
        b"%d" % value if abs(value) < 10**100 else (b"-" if value < 0 else b"") + b"1" + b"0" * 400
    )


def _changed(chance: random.Random, value: Any, other: Any, depth: int) -> Any:
    """A copy in which one value, somewhere, is another one."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    places = [key for key, _ in inner]
    if places and chance.random() < 0.85 and depth < 50:
        at = chance.choice(places)
        copied = dict(value) if isinstance(value, dict) else list(value)
        kind = chance.randrange(12)
        if kind == 0:
            del copied[at]
        elif kind == 1 and isinstance(copied, dict):
            copied[chance.choice((*_TEXTS, "\ud800"))] = copied[at]
        elif kind == 2 and isinstance(copied, list):
            copied = copied * chance.choice((2, 3, 40))
        elif kind == 3 and isinstance(other, dict) and isinstance(copied, dict) and other:
            key = chance.choice(list(other))
            copied[key] = other[key]
        else:
            copied[at] = _changed(chance, value[at], other, depth + 1)
        return copied
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice(_TEXTS)
    if kind == 1:
        return chance.choice((None, True, False, [], {}, [None], {"a": 1}))
    if kind == 2:
        return [value]
    if kind == 3:
        return other
    if kind == 4 and isinstance(value, str) and value:
        return value[: chance.randrange(len(value))] + chance.choice(_TEXTS)
    if kind == 5:
        deep: Any = value
        for _ in range(chance.choice((10, 70, 900))):
            deep = [deep]
        return deep
    if kind == 6:
        return chance.choice((float("nan"), float("inf"), -float("inf")))
    return chance.choice(_NUMBERS)


def _written(value: Any) -> str:
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        with contextlib.suppress(RecursionError):
            return str(value).replace("'", '"')
    return "[" * 3000 + "]" * 3000


def _twice(chance: random.Random, text: str) -> str:
    at = text.find('"', chance.randrange(len(text)))
    end = text.find(",", at)
    return text if at < 0 or end < 0 else f"{text[:end]},{text[at:end]}{text[end:]}"
