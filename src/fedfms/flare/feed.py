"""The records of a running job, piece by piece, for a coordinator who shows its history.

The recorder answers at the server, through FLARE's app commands; what it answers is what sites let
out, since records hold nothing else. A coordinator asks from where it has read to.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedfms.bounded import read_json_object
from fedfms.records.layout import RECIPE, RECORDS
from fedfms.records.read import RecordReader

TOPIC = "fedfms.records"  # of FLARE's app command
RIGHT = "app_command"  # to send one; FLARE puts it into no category
OFFSET = "offset"  # what is asked: the bytes that were read before
PIECE_BYTES = 256 * 1024  # of one answer, or one line where that is longer


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole lines of a job's records."""

    offset: int  # of the first line in the file; 0 where the file is another one than before
    lines: str
    size: int  # of the file now
    recipe: dict[str, Any] = field(default_factory=dict)  # with the first piece only

    @property
    def end(self) -> int:
        """Where the next piece begins."""
        return self.offset + len(self.lines.encode())


_PIECE = TypeAdapter(Piece)


def read_piece(folder: Path, asked: Any) -> dict[str, Any]:
    """Whole lines of records.jsonl, as JSON types; never more than about PIECE_BYTES.

    Args:
        folder: the job's result folder at the server.
        asked: what came over the wire: {"offset": bytes}; anything else counts as 0.
    """
    offset = asked.get(OFFSET) if isinstance(asked, dict) else 0
    offset = offset if type(offset) is int and offset > 0 else 0
    data, size = b"", 0
    with contextlib.suppress(OSError), (folder / RECORDS).open("rb") as file:
        size = file.seek(0, 2)
        offset = 0 if offset > size else offset  # a file that is shorter is another one
        file.seek(offset)
        data = file.read(PIECE_BYTES)
        if b"\n" not in data:  # one long line, as of a site with many classes
            data += file.readline()
    recipe = {}
    if offset == 0:
        with contextlib.suppress(OSError, ValueError):
            recipe = read_json_object(folder / RECIPE)
    lines = data[: data.rfind(b"\n") + 1].decode(errors="replace")
    return {"offset": offset, "lines": lines, "size": size, "recipe": recipe}


def decode_piece(told: Any) -> Piece | None:
    """What a server answered; None where it is none of this version."""
    try:
        piece = _PIECE.validate_python(told)
        piece.lines.encode()  # half a surrogate pair, as JSON may hold, is no text
        return piece
    except ValueError:
        return None


class RemoteRecords(RecordReader):
    """The records of a job at the server, as far as they came over."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.recipe: dict[str, Any] = {}

    @property
    def offset(self) -> int:
        """Where to ask on from."""
        return self._offset

    def take(self, piece: Piece) -> bool:
        """Add a piece; whether there is more to ask for at once."""
        if piece.offset == 0 and self._offset:  # begun anew
            self.records, self.damaged = [], 0
        if piece.offset == 0:
            self.recipe = dict(piece.recipe)
        elif piece.offset != self._offset:
            return False
        self._take(piece.lines.encode())
        self._offset = piece.end
        return bool(piece.lines) and piece.end < piece.size
