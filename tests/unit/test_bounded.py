"""What another party wrote: within bounds it is read, beyond them it is one error with its fix."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fedfms
import fedfms_lab
from fedfms import bounded
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.messages import Done, decode_answer, encode
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.contracts.yaml_text import parse_yaml
from fedfms.errors import (
    CheckpointError,
    ConfigError,
    ContributionRefused,
    FederationError,
    TrainerError,
    Undecodable,
)
from fedfms.exchange.tensors import find_fault, load_tensors, save_tensors, shapes_of
from fedfms.flare.own_keys import REQUEST_FILE, read_request
from fedfms.kits.zips import unpack_zip
from fedfms.records.read import RecordReader
from fedfms.shipped import JOBS
from memory_peak import forget_peak, peak

PACKAGE = Path(fedfms.__file__).parent
SAID = {"name": "site-1", "org": "hospital", "project": "p", "public_key_sha256": "ab" * 32}
HUGE = "1" + "0" * 400  # float() of it is an OverflowError
TOO_LONG = "9" * 5000  # int() of it is a ValueError
DEEP = "[" * 5000 + "]" * 5000


# ------------------------------------------------------------------------------- who may call what

# Whatever decodes what others wrote goes through fedfms.bounded and contracts.yaml_text.
DECODERS = {"json.loads", "json.load", "ast.literal_eval", "yaml.load", "yaml.safe_load"}
DECODERS |= {"zipfile.ZipFile", "zipfile.is_zipfile", "tarfile.open", "tarfile.TarFile"}
DECODERS |= {"safetensors.torch.load", "safetensors.torch.load_file", "safetensors.safe_open"}
ALLOWED = {
    "bounded.py": {"json.loads", "ast.literal_eval", "zipfile.ZipFile", "tarfile.TarFile"},
    "contracts/yaml_text.py": {"yaml.load"},
    "data/cache.py": {"json.loads"},  # the trainer's own file, with the shapes of its own arrays
    "exchange/tensors.py": {"safetensors.torch.load"},  # behind bounded.safetensors_header
    "models/gpu/kernels.py": {"json.loads"},  # beside the code that it describes, of the same build
    "models/sam.py": {"safetensors.torch.load_file"},  # of a checkpoint whose SHA-256 is named
    "export/torchscript.py": {"zipfile.ZipFile"},  # that torch wrote a line before
    "kits/zips.py": {"zipfile.ZipFile"},  # writes
    "provisioning/backup.py": {"tarfile.open"},  # writes
}


def test_nobody_else_decodes_what_others_wrote() -> None:
    assert calls_of_decoders(PACKAGE) == ALLOWED
    # downloads of the laboratory, too
    assert calls_of_decoders(Path(fedfms_lab.__file__).parent / "prepare") == {}


def calls_of_decoders(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                named |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if (whole := named.get(called, called)) in DECODERS:
                    found.setdefault(path.relative_to(folder).as_posix(), set()).add(whole)
    return found


# ---------------------------------------------------------------------------------- JSON, numbers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{{"a": {TOO_LONG}}}', "is no JSON"),
        (f'{{"a": {HUGE}}}', "too many digits"),
        ('{"a": 1e400}', "too large"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "no number of JSON"),
        (DEEP, "64 deep"),
        ("[" * 70 + "]" * 70, "64 deep"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "x: the key c stands twice"),
        (r'["\ud800"]', "no Unicode"),
        (b'{"a": "\xff"}', "no UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
        ("[" + "0," * 600_000 + "0]", "more than 500000 values"),
        (" " * (5 << 20), "larger than 4 MB"),
        ("", "is no JSON"),
    ],
)
def test_json_beyond_a_bound_is_one_error(text: str | bytes, says: str) -> None:
    with pytest.raises(Undecodable, match=r"^x\b") as caught:
        bounded.decode_json(text, "x")
    assert says in caught.value.problem
    assert caught.value.fix


def test_json_within_the_bounds_is_what_python_reads() -> None:
    value = {"a": [1, -2.5, None, True, "é\U0001f600", 10**50], "b": {"c": []}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert bounded.decode_json(text, "x") == value
    assert bounded.decode_json(b"\xef\xbb\xbf[1]", "x") == [1]  # an editor's mark
    assert bounded.decode_json("[" * 60 + "]" * 60, "x")
    assert bounded.decode_json(r'["\ud83d\ude00"]', "x") == ["\U0001f600"]
    assert bounded.decode_json(r'["\udcff"]', "x", any_text=True) == ["\udcff"]


def test_an_endless_file_is_read_up_to_its_bound() -> None:
    with pytest.raises(Undecodable, match="larger than 1 MB"):
        bounded.read_bytes(Path("/dev/zero"), 1 << 20)


@pytest.mark.parametrize("value", ["nan", "1e400", "x", "", "1" * 500, 10**400, None, True, [1]])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(Undecodable, match="is no number"):
        bounded.number(value, "x")


def test_numbers_are_read() -> None:
    assert [bounded.number(one, "x") for one in ("1e-4", " 2 ", 3, 0.5)] == [1e-4, 2.0, 3.0, 0.5]


@pytest.mark.parametrize("text", [DEEP, "-" * 5000 + "1", "f()", TOO_LONG, "{1: 1e999}", "(" * 900])
def test_a_cell_of_a_table_that_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(Undecodable):
        bounded.decode_literal(text, "x")


# -------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),  # a billion laughs
        "a: " + "[" * 500 + "]" * 500,
        "".join(f"{'  ' * depth}a:\n" for depth in range(200)),
        "a: [" + "1, " * 60_000 + "1]",
        f"a: {TOO_LONG}",
        f"a: {HUGE}.0",
        "a: 1" + ":59" * 400,
        "a: &a [*a]",
        "a: !!python/object/apply:os.system ['true']",
        "a: !!float",
        "a: 2024-13-40",
        "? [a]\n: 1",
        "#" * (2 << 20),
    ],
)
def test_yaml_beyond_a_bound_is_an_error_with_its_fix(text: str) -> None:
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "site.yml")
    assert caught.value.problem.startswith("site.yml") and len(caught.value.problem) < 500
    assert caught.value.fix
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - began < 20


def test_yaml_with_an_alias_is_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}", "x") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": [1, 2]},
    }


# ---------------------------------------------------------------------- what escaped from a parser


@pytest.mark.parametrize("value", [HUGE, TOO_LONG, DEEP, "1e400"])
def test_a_recipe_with_an_absurd_value_is_an_error_with_its_fix(tmp_path: Path, value: str) -> None:
    text = (JOBS / "fedmsa/app/config/recipe.json").read_text()
    changed = text.replace('"rounds":', f'"rounds": {value}, "was":', 1)
    assert changed != text
    path = tmp_path / "recipe.json"
    path.write_text(changed)
    with pytest.raises(ConfigError, match=r"recipe\.json") as caught:
        Recipe.from_json(path)
    assert caught.value.fix


@pytest.mark.parametrize("value", [HUGE, TOO_LONG, DEEP[:2000] + DEEP[-2000:]])
def test_a_site_yml_with_an_absurd_value_is_an_error_with_its_fix(
    tmp_path: Path, value: str
) -> None:
    path = tmp_path / "site.yml"
    path.write_text(
        f"data_root: /x\nformat: image\nimages: a/*.png\nlabels: b/*.png\nclasses: {{disc: [1]}}\n"
        f"validation_fraction: {value}\n"
    )
    with pytest.raises(ConfigError, match=r"site\.yml") as caught:
        SiteConfig.from_yaml(path)
    assert caught.value.fix


def test_an_override_with_an_absurd_value_is_an_error_with_its_fix() -> None:
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    for value in (HUGE, TOO_LONG, DEEP, "1e400", "NaN"):
        with pytest.raises(ConfigError, match="--set rounds"):
            recipe.with_overrides([f"rounds={value}"])


@pytest.mark.parametrize("value", [HUGE, TOO_LONG, DEEP, "1e400"])
def test_an_answer_of_a_trainer_with_an_absurd_value_is_nonsense(value: str) -> None:
    line = encode(Done())[:-2] + f', "done": {value}}}\n'.encode()
    with pytest.raises(TrainerError) as caught:
        decode_answer(line)
    assert caught.value.code == "nonsense"
    text = f'{{"type": "progress", "phase": "train", "done": {value}, "total": 1}}'
    with pytest.raises(TrainerError):
        decode_answer(text.encode())


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), "\ud800"])
def test_a_report_with_an_absurd_value_is_malformed(value: object) -> None:
    for values in ({"site": value}, {"loss": value}, value, [value], {"seconds": {"train": value}}):
        with pytest.raises(ContributionRefused) as caught:
            Contribution.from_dict(values)
        assert caught.value.code == "malformed-report"


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\xfa",
        f'{{"record": "round_started", "round": {HUGE}}}'.encode(),
        f'{{"record": "round_started", "round": {TOO_LONG}}}'.encode(),
        f'{{"record": "note", "kind": "waits", "text": {DEEP}}}'.encode(),
        b'{"record": ["note"]}',
        b'{"record": "contribution", "round": 0, "site": null, "accepted": true}',
        b'{"record": "job", "sites": {"a": 1}}',
        b'{"record": "note", "kind": "waits", "text": "' + b"x" * (2 << 20) + b'"}',
        b"[1]",
    ],
)
def test_a_damaged_line_of_records_is_counted_and_the_rest_is_read(
    tmp_path: Path, line: bytes
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"record": "round_started", "round": 0}\n%b\n' % line)
    with path.open("ab") as file:
        file.write(b'{"record": "round_started", "round": 1}')
    reader = RecordReader(path)
    assert len(reader.read_rest()) == 2 and reader.damaged == 1


def test_an_endless_line_of_records_takes_no_more_memory_than_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with path.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(0, 2)
        file.write(b'\n{"record": "round_started", "round": 1}\n')
    reader = RecordReader(path)
    before = forget_peak()
    assert len(reader.read_new()) == 1 and reader.damaged > 0
    assert peak() - before < 40 << 20


def test_the_guard_refuses_what_is_no_named_tensor_in_memory() -> None:
    shapes = shapes_of({"a": torch.ones(2)})
    for nothing in (None, [], 3):
        assert find_fault(shapes, nothing) == ("missing-tensor", "there are no named tensors")
    strange = (None, torch.ones(2, device="meta"), torch.ones(2).to_sparse(), [1.0, 1.0])
    for tensor in strange:
        fault = find_fault(shapes, {"a": tensor})  # type: ignore[dict-item]
        assert fault is not None and fault[0] == "wrong-type"
    assert find_fault(shapes, {"a": torch.ones(2)}) is None


# ----------------------------------------------------------------------------------------- archives


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_request_is_read(tmp_path: Path) -> None:
    text = json.dumps({**SAID, "more": 1}).encode()
    assert read_request(write_zip(tmp_path / "a.zip", {REQUEST_FILE: text})) == SAID


def locked(data: bytes) -> bytes:
    """The same zip, which says that it is encrypted."""
    changed = bytearray(data)
    for at in (6, data.index(b"PK\x01\x02") + 8):
        changed[at] |= 1
    return bytes(changed)


def lying(data: bytes) -> bytes:
    """The same zip, which says that its first file has 4 bytes."""
    changed = bytearray(data)
    struct.pack_into("<I", changed, data.index(b"PK\x01\x02") + 24, 4)
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "data", "method", "change", "says"),
    [
        (REQUEST_FILE, b"{}", zipfile.ZIP_BZIP2, bytes, "packed in a way"),
        (REQUEST_FILE, b"{}", zipfile.ZIP_LZMA, bytes, "packed in a way"),
        (REQUEST_FILE, b"{}", zipfile.ZIP_STORED, locked, "encrypted"),
        (REQUEST_FILE, b"{}  " * 99, zipfile.ZIP_DEFLATED, lying, "damaged"),
        (REQUEST_FILE, b"{}", zipfile.ZIP_STORED, lambda data: data[:60], "no zip"),
        (REQUEST_FILE, b"{}", zipfile.ZIP_STORED, lambda data: b"", "no zip"),
        (REQUEST_FILE, b"{}", zipfile.ZIP_STORED, lambda data: b"x" + data[4:], "damaged"),
        (REQUEST_FILE, b"\0" * (1 << 20), zipfile.ZIP_DEFLATED, bytes, "times its size"),
        (REQUEST_FILE, b"\0" * (2 << 20), zipfile.ZIP_DEFLATED, bytes, "when it is unpacked"),
        (REQUEST_FILE, b"[]", zipfile.ZIP_STORED, bytes, "no JSON object"),
        (REQUEST_FILE, DEEP.encode(), zipfile.ZIP_STORED, bytes, "deep"),
        (REQUEST_FILE, b'{"name": ["x"]}', zipfile.ZIP_STORED, bytes, "no name"),
        ("other.json", b"{}", zipfile.ZIP_STORED, bytes, f"holds no {REQUEST_FILE}"),
        ("../x", b"{}", zipfile.ZIP_STORED, bytes, "would write to"),
    ],
)
def test_a_request_that_cannot_be_used_says_why(
    tmp_path: Path, name: str, data: bytes, method: int, change, says: str
) -> None:
    path = write_zip(tmp_path / "request.zip", {name: data}, method)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FederationError, match="is no request") as caught:
        read_request(path)
    assert caught.value.code == "bad-request"
    assert says in caught.value.problem


_COST = """
import resource, sys
from pathlib import Path
from memory_peak import forget_peak, peak
from fedfms.errors import FederationError
from fedfms.flare.own_keys import read_request
paths = [Path(one) for one in sys.argv[2:]]
try: read_request(Path(sys.argv[1]))
except FederationError: pass
before, cpu = forget_peak(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
for path in paths:
    try: read_request(path)
    except FederationError as error: assert error.code == "bad-request"
print(peak() - before, resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu)
"""


def test_a_request_of_a_megabyte_costs_at_most_fifty(tmp_path: Path) -> None:
    """Bombs of every kind: one file, many, many without content, JSON of a million lists."""
    zero, deflated = b"\0" * (200 << 20), zipfile.ZIP_DEFLATED
    bombs = [write_zip(tmp_path / "one.zip", {REQUEST_FILE: zero}, deflated)]
    many = {f"{number:x}": b"" for number in range(9500)}
    bombs.append(write_zip(tmp_path / "many.zip", many))
    lists = b"[" + b"[]," * 300_000 + b"1]"
    bombs.append(write_zip(tmp_path / "lists.zip", {REQUEST_FILE: lists}, deflated))
    empty = b'{"a":[' + b"{}," * 160_000 + b"1]}"
    bombs.append(write_zip(tmp_path / "json.zip", {REQUEST_FILE: empty}, zipfile.ZIP_STORED))
    bombs.append(tmp_path / "liar.zip")
    bombs[-1].write_bytes(lying(bombs[0].read_bytes()))
    assert max(path.stat().st_size for path in bombs) < 1 << 20
    small = write_zip(tmp_path / "small.zip", {REQUEST_FILE: json.dumps(SAID).encode()})
    done = subprocess.run(
        [sys.executable, "-c", _COST, str(small), *map(str, bombs)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
        capture_output=True,
        text=True,
    )
    grown, seconds = map(float, done.stdout.split())
    assert 0 < grown <= 50e6
    assert seconds < 5


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a/../../x": b""}, "would write to"),
        ({"/a/x": b""}, "would write to"),
        ({"a\\..\\x": b""}, "would write to"),
        ({f"a/{'x' * 300}": b""}, "too long"),
        ({"a/x\x1b[31m": b""}, "no file should have"),
        ({"a/x": b"", "b/x": b""}, "one folder"),
        ({"x": b""}, "in no folder"),
        ({"a/x": b"\0" * (65 << 20)}, "larger than"),
        ({f"a/{number}": b"" for number in range(1001)}, "more than 1000"),
    ],
)
def test_a_kit_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    path = write_zip(tmp_path / "kit.zip", files, zipfile.ZIP_DEFLATED)
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="cannot be unpacked") as caught:
        unpack_zip(path, tmp_path / "new")
    assert caught.value.code == "bad-zip" and says in caught.value.problem
    assert list((tmp_path / "new").iterdir()) == []


def tar_of(*entries: tuple[str, bytes, dict[str, object]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, more in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in more.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def read_tar(path: Path, most: int = 10) -> dict[str, bytes]:
    return {
        one.name: b"".join(one.blocks())
        for one in bounded.tar_members(path, "it", max_entries=most)
    }


def test_a_tar_is_read_and_what_is_no_plain_file_in_it_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(("a/" + "b" * 150, b"1" * 700, {}), ("c", b"", {})))
    assert read_tar(path) == {"a/" + "b" * 150: b"1" * 700, "c": b""}
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    bad = {
        "no plain file": tar_of(("a", b"", link)),
        "would write to": tar_of(("../a", b"", {})),
        "more than 10": tar_of(*[(f"{n}", b"", {}) for n in range(11)]),
        "cut off": tar_of(("a", b"1" * 5000, {}))[:2000],
    }
    for says, data in bad.items():
        path.write_bytes(data)
        with pytest.raises(Undecodable, match=says):
            read_tar(path)


def test_a_packed_tar_is_read_up_to_what_may_come_out_of_it(tmp_path: Path) -> None:
    folder = ("./a", b"", {"type": tarfile.DIRTYPE})
    data = tar_of(folder, ("./a/b", b"1" * 700, {}), ("c", b"2" * 300, {}))

    def read(data: Path | bytes, most: int | None) -> dict[str, bytes]:
        members = bounded.tar_members(data, "it", max_entries=10, max_unpacked=most)
        return {one.name: b"".join(one.blocks()) for one in members}

    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(data))
    for given in (path, path.read_bytes(), data):
        assert read(given, 1000) == {"./a/b": b"1" * 700, "c": b"2" * 300}
        with pytest.raises(Undecodable, match="larger than 1 kB when it is unpacked"):
            read(given, 999)
    bad = {
        "is no tar archive": (path.read_bytes(), None),  # nobody said that it may be packed
        "no plain file": (data, None),
        "damaged|no tar": (path.read_bytes()[:60], 1000),
        "larger than 1 MB": (gzip.compress(tar_of(("a", b"\0" * (64 << 20), {}))), 1 << 20),
    }
    for says, (given, most) in bad.items():
        with pytest.raises(Undecodable, match=says):
            read(given, most)


def test_a_tar_of_words_about_its_files_ends_early() -> None:
    """They are no files, so that what may come out of it says nothing of them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(8):
            entry = tarfile.TarInfo(f"{number}")
            entry.pax_headers = {f"word{n}": "x" * 1000 for n in range(1000)}
            tar.addfile(entry)
    packed, seen = gzip.compress(data.getvalue()), []
    with pytest.raises(Undecodable, match="says more about its files"):
        seen.extend(bounded.tar_members(packed, "it", max_entries=10, max_unpacked=1000))
    assert len(seen) <= 1
    long_names = tar_of(*[(f"{number}/" + "n" * 200, b"", {}) for number in range(10)])
    assert len(list(bounded.tar_members(long_names, "it", max_entries=10, max_unpacked=0))) == 10


def test_a_tar_header_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    head = tarfile.TarInfo("a")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 4 << 30
    path.write_bytes(head.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(5 << 30)  # with no room taken on the disk
    with pytest.raises(Undecodable, match="too large"):
        read_tar(path)


# -------------------------------------------------------------------------------------- safetensors


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 10 << 30) + b"{}",
        with_header({f"t{number}": EMPTY for number in range(20_001)}),
        with_header(b"{" + b" " * (5 << 20) + b"}"),
        with_header(DEEP.encode()),
        with_header({"a": {**EMPTY, "shape": [2**62, 4]}}),
        with_header({"a": {**EMPTY, "shape": [-1]}}),
        with_header({"a": {**EMPTY, "data_offsets": [0, 1 << 40]}}),
        with_header({"a": {**EMPTY, "data_offsets": [8, 4]}}, b"\0" * 8),
        with_header({"a": {**EMPTY, "dtype": "F3"}}),
        with_header({"a": None}),
        with_header([1]),
        with_header(b'{"a": 1, "a": 2}'),
        with_header({"__metadata__": {"a": 1}}),
    ],
)
def test_a_safetensors_file_that_is_none_is_unreadable(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(path)
    assert caught.value.code == "unreadable-tensors"


def test_the_header_says_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}, "fp16")
    header = bounded.safetensors_header(path.read_bytes(), "x")
    assert {name: one["shape"] for name, one in header.items() if name[0] != "_"} == {
        "a": [2, 3],
        "b": [],
    }
    assert load_tensors(path)["a"].shape == (2, 3)
