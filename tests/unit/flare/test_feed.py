"""A job's records come over in pieces and are the same at the end."""

from __future__ import annotations

import json
from pathlib import Path

from fedfms.flare.feed import PIECE_BYTES, RemoteRecords, decode_piece, read_piece
from fedfms.records.read import RecordReader
from fedfms.records.schema import Note, RoundStarted
from fedfms.records.write import RecordWriter


def take_all(folder: Path, records: RemoteRecords) -> int:
    """Ask as a coordinator does; the number of pieces."""
    for number in range(1, 100):
        told = json.loads(json.dumps(read_piece(folder, {"offset": records.offset})))  # a wire
        piece = decode_piece(told)
        assert piece is not None
        if not records.take(piece):
            return number
    raise AssertionError("it never ends")


def test_pieces_are_bounded_and_add_up_to_the_file(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "records.jsonl")
    (tmp_path / "recipe.json").write_text('{"rounds": 7}')
    for number in range(4000):
        writer.write(Note(kind="waits", text=f"wörter {number} " + "x" * 100))
    records = RemoteRecords()
    assert take_all(tmp_path, records) >= 2
    assert len(read_piece(tmp_path, {"offset": 0})["lines"].encode()) <= PIECE_BYTES
    whole = RecordReader(writer.path)
    assert records.records == whole.read_new() and len(records.records) == 4000
    assert records.recipe == {"rounds": 7} and records.damaged == 0
    writer.write(RoundStarted(round=5))
    assert take_all(tmp_path, records) == 1  # what is new, and that alone
    assert len(records.records) == 4001


def test_a_line_that_is_not_whole_yet_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"record": "round_started", "round": 0}\n{"record": "round_st')
    records = RemoteRecords()
    take_all(tmp_path, records)
    assert len(records.records) == 1
    with path.open("a") as file:
        file.write('arted", "round": 1}\n')
    take_all(tmp_path, records)
    assert [one.round for one in records.records if isinstance(one, RoundStarted)] == [0, 1]


def test_a_line_longer_than_a_piece_comes_whole(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "records.jsonl")
    writer.write(Note(kind="waits", text="x" * (2 * PIECE_BYTES)))
    writer.write(RoundStarted(round=0))
    records = RemoteRecords()
    take_all(tmp_path, records)
    assert len(records.records) == 2


def test_a_file_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "records.jsonl")
    for number in range(3):
        writer.write(RoundStarted(round=number))
    records = RemoteRecords()
    take_all(tmp_path, records)
    writer.path.unlink()
    writer.write(RoundStarted(round=9))
    take_all(tmp_path, records)
    assert [one.round for one in records.records if isinstance(one, RoundStarted)] == [9]


def test_whatever_is_asked_there_is_an_answer_and_whatever_comes_is_checked(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "records.jsonl").write(RoundStarted(round=0))
    first = read_piece(tmp_path, {"offset": 0})
    for asked in (None, {}, {"offset": -5}, {"offset": "7"}, {"offset": True}, [1], 10**9):
        assert read_piece(tmp_path, asked) == first
    assert read_piece(tmp_path / "nowhere", {"offset": 0})["lines"] == ""
    half = {"offset": 0, "lines": "\ud800\n", "size": 4}  # of a surrogate pair, as JSON may hold
    for told in (None, {}, {"offset": 0}, "text", {"offset": 0, "lines": 5, "size": 1}, half):
        assert decode_piece(told) is None
