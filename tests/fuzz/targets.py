"""Every parser of something that another party wrote: its seeds, its errors, and how it is called.

The seeds are made by the product itself, as it makes what the parser reads at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from PIL import Image

import fedfms
from fedfms.contracts import messages
from fedfms.contracts.announcement import Announcement
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.decode import Misfits
from fedfms.contracts.now import SiteNow, SiteProgress
from fedfms.contracts.pause import Pause, read_pause
from fedfms.contracts.policy import POLICY_FILE, Policy
from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.data.manifest import find_cases
from fedfms.errors import (
    ConfigError,
    ContributionRefused,
    DoorClosed,
    FederationError,
    FedfmsError,
)
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.pictures import is_plain_png
from fedfms.exchange.secure_sum import ServerRound, SiteRound
from fedfms.exchange.signatures import TrainerSigner, new_key
from fedfms.exchange.tensors import (
    from_wire,
    load_tensors,
    read_metadata,
    save_tensors,
    shapes_of,
    to_precision,
)
from fedfms.flare.announce import read_announcement
from fedfms.flare.feed import RemoteRecords, decode_piece, read_piece
from fedfms.flare.lint import read_json as read_meta
from fedfms.flare.own_keys import REQUEST_FILE, read_request
from fedfms.flare.progress import Event, FinishedRound
from fedfms.flare.run_about import About
from fedfms.flare.runs import RunInfo
from fedfms.kits.about import ABOUT_FILE, KitAbout, read_about
from fedfms.kits.certificates import fingerprint, read_certificate, subject_of
from fedfms.kits.checksums import check_sums, write_sums
from fedfms.kits.zips import unpack_zip, write_zip
from fedfms.preflight.policy import AUTHORIZATION_FILE, check_authorization
from fedfms.provisioning.backup import backup, restore
from fedfms.provisioning.project import read_project
from fedfms.report.collect import collect, load_result
from fedfms_lab.study.plan import Study

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "unit" / "report"))
from fuzz_keys import make_authority  # noqa: E402
from job_writer import Job  # noqa: E402
from mutators import (  # noqa: E402
    Mutator,
    of_bytes,
    of_json,
    of_lines,
    of_png,
    of_safetensors,
    of_tar,
    of_text,
)

Parse = Callable[[bytes], object]  # what was accepted; None for what was passed over
TEMPLATES = REPOSITORY / "src/fedfms/provisioning/templates"
RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_demo",
    backbone_sha256=BACKBONES["vit_demo"].sha256,
    classes=("disc", "cup"),
    rounds=5,
    holdout=("site-9",),
)
TASK = messages.Task(
    kind="train", site="site-1", job="0f6c3a52", round=0, model="round", recipe=RECIPE
)


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    seeds: tuple[bytes, ...]
    parse: Parse
    errors: tuple[type[BaseException], ...]  # that it says it raises
    mutate: Mutator
    from_whom: str  # whose words it reads


Make = Callable[[Path], tuple[tuple[bytes, ...], Parse]]
_MAKERS: dict[str, tuple[Make, tuple[type[BaseException], ...], Mutator, str]] = {}


def _target(
    name: str, from_whom: str, mutate: Mutator, *errors: type[BaseException]
) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        _MAKERS[name] = (make, errors, mutate, from_whom)
        return make

    return keep


def names() -> list[str]:
    """All parsers, in the order of the table in results/fuzzing.md."""
    return list(_MAKERS)


@contextlib.contextmanager
def opened(name: str, base: Path | None = None) -> Iterator[Target]:
    """A target with a folder of its own below `base`, or in memory where the machine can."""
    make, errors, mutate, from_whom = _MAKERS[name]
    if base is None and Path("/dev/shm").is_dir():
        base = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as folder:
        seeds, parse = make(Path(folder))
        yield Target(name, seeds, parse, errors, mutate, from_whom)


# ------------------------------------------------------------------------- between two processes


@_target("request", "FLARE client -> trainer", of_json, FedfmsError)
def _request(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    said: tuple[messages.Request, ...] = (
        messages.TaskRequest("0" * 16, TASK),
        messages.AbortRequest(),
        messages.Ping(),
        messages.Forget("0f6c3a52"),
        messages.Release(),
    )
    return tuple(messages.encode(one) for one in said), messages.decode_request


@_target("answer", "trainer -> FLARE client", of_json, FedfmsError)
def _answer(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    said: tuple[messages.Answer, ...] = (
        _announcement(),
        messages.Progress("train", 3, 10),
        messages.Reply(Job().contribution("site-1", 0), True, 2),
        messages.Failure("TrainerError", "out-of-memory", "RuntimeError"),
        messages.Done(),
    )
    return tuple(messages.encode(one) for one in said), messages.decode_answer


# --------------------------------------------------------------------------------- site to server


@_target("contribution", "site -> server", of_json, ContributionRefused)
def _contribution(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    said = [Job().contribution(site, 1).to_dict() for site in ("site-1", "site-3", "site-4")]
    return tuple(_json(one) for one in said), lambda data: Contribution.from_dict(_any(data))


@_target("announcement", "site -> coordinator", of_json)
def _announced(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    told = {"fedfms": _announcement().to_dict()}
    seeds = (str(told).encode(), _json(told), b"{'fedfms': {'ready': False, 'fault': 'paused'}}")

    def parse(data: bytes) -> object:
        said = read_announcement("site-1", data.decode(errors="replace"))
        said.to_dict()
        return None if said.fault == "not-told" else said

    return seeds, parse


@_target("progress", "site -> server", of_json, Misfits)
def _progress(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    said = SiteProgress(kind="train", round=3, phase="train", done=7, total=40, gpu="present")
    seed = _json(dataclasses.asdict(said))
    return (seed,), lambda data: SiteProgress.from_dict(_any(data))


@_target("pause", "site -> server", of_json)
def _pause(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "pause.json"
    seeds = (
        _json(Pause(since=1.8e9).to_dict()),
        _json(Pause(since=1.8e9, until=9e10, offset=-330).to_dict()),
    )

    def parse(data: bytes) -> object:
        place.write_bytes(data)
        found = read_pause(folder)
        return found.words if found is not None else None

    return seeds, parse


@_target("guard", "site -> server", of_bytes, ContributionRefused)
def _guard(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    right = {"a": torch.ones(3, 4), "b": torch.zeros(2), "c": torch.full((5,), 0.25)}
    report = dataclasses.replace(
        Job().contribution("site-1", 0),
        recipe_sha256=RECIPE.sha256,
        backbone_sha256=RECIPE.backbone_sha256,
        package_version=fedfms.__version__,
    )
    seeds = tuple(bytes(np.random.default_rng(n).integers(0, 256, 64, np.uint8)) for n in range(8))

    def parse(data: bytes) -> object:
        said = _bent(right, report, data)
        if not isinstance(said[1], Contribution):
            return None
        return check_contribution(shapes_of(right), RECIPE, fedfms.__version__, *said)

    return (b"\0" * 16, *seeds), parse


@_target("guard of eight bits", "site -> server", of_bytes, ContributionRefused)
def _guard_of_eight_bits(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    recipe = dataclasses.replace(RECIPE, transfer_precision="int8")
    whole = {"a": torch.ones(3, 64), "b": torch.zeros(2), "c": torch.full((4, 2, 40), 0.25)}
    right = to_precision(whole, "int8")
    report = dataclasses.replace(
        Job().contribution("site-1", 0),
        recipe_sha256=recipe.sha256,
        backbone_sha256=recipe.backbone_sha256,
        package_version=fedfms.__version__,
    )
    seeds = tuple(bytes(np.random.default_rng(n).integers(0, 256, 64, np.uint8)) for n in range(8))

    def parse(data: bytes) -> object:
        tensors, said = _bent(right, report, data)
        if not isinstance(said, Contribution):
            return None
        for name, one in right.items():  # values that the bytes choose
            chosen = len(data) > 8 and data[8] & 1
            if chosen and isinstance(tensors, dict) and name in tensors:
                value = torch.frombuffer(bytearray(data[4:8]), dtype=one.dtype)[0]
                tensors[name] = one.flatten().clone()
                tensors[name][data[9 % len(data)] % one.numel()] = value
                tensors[name] = tensors[name].reshape(one.shape)
        taken = check_contribution(shapes_of(whole), recipe, fedfms.__version__, tensors, said)
        for name, tensor in taken.items():
            assert tensor.shape == whole[name].shape and bool(tensor.isfinite().all())
        return taken

    return (b"\0" * 16, *seeds), parse


@_target("safetensors", "site -> server, coordinator -> site", of_safetensors, FedfmsError)
def _safetensors(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place, seeds = folder / "x.safetensors", []
    tensors = {
        "block.0.weight": torch.randn(4, 3),
        "bias": torch.arange(5.0),
        "none": torch.ones(0),
    }
    for precision in ("fp32", "fp16", "int8"):
        for checksum in (True, False):
            save_tensors(place, tensors, precision, checksum=checksum)
            seeds.append(place.read_bytes())
    save_tensors(place, {"n": torch.tensor(3), "m": torch.ones(2, dtype=torch.bool)}, None)
    seeds.append(place.read_bytes())

    def parse(data: bytes) -> object:
        place.write_bytes(data)
        tensors = load_tensors(place, max_bytes=1 << 22)
        return from_wire(tensors), read_metadata(place)

    return tuple(seeds), parse


@_target("picture", "site -> server", of_png)
def _picture(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    seeds = []
    for mode in ("L", "RGB", "P"):
        data = io.BytesIO()
        Image.new(mode, (24, 16), 7).save(data, "PNG")
        seeds.append(data.getvalue())
    return tuple(seeds), lambda data: is_plain_png(data) or None


@_target("secure sum, at the server", "site -> server", of_json, Misfits, FederationError)
def _sums_answer(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    """What sites answer to the four steps of a round; the first byte says to which."""
    sum_ = _Sum()
    seeds = tuple(
        bytes([step]) + _json({name: answers[name].to_dict() for name in answers})
        for step, answers in enumerate((sum_.keys, sum_.shares, sum_.pieces))
    )

    def parse(data: bytes) -> object:
        said = _any(data[1:])
        if not isinstance(said, dict):
            return SumsAnswer.from_dict(said)
        answers = {name: SumsAnswer.from_dict(one) for name, one in said.items()}
        step, server = (data[0] if data else 0) % 3, ServerRound(sum_.job, 0)
        server.ask_shares(sum_.keys | (answers if step == 0 else {}))
        server.ask_take(sum_.shares | (answers if step == 1 else {}))
        for site in sum_.arrived:
            server.add(sum_.masked[site])
        if step < 2:
            return server.ask_unmask(sum_.arrived).to_dict()
        return server.unmask(sum_.arrived, 2, sum_.pieces | answers).mean()

    return seeds, parse


# -------------------------------------------------------------------------- server to coordinator


@_target("records.jsonl", "server -> coordinator", of_lines, FedfmsError)
def _records(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    jobs = (Job(), Job(rounds=2, models=("final",)), Job(status="aborted", no_best={"site-2": "x"}))
    seeds = tuple(b"\n".join(_json(one) for one in job.records()) + b"\n" for job in jobs)
    source, result = folder / "job", folder / "result"
    source.mkdir()
    (source / "recipe.json").write_text(RECIPE.to_json())

    def parse(data: bytes) -> object:
        (source / "records.jsonl").write_bytes(data)
        shutil.rmtree(result, ignore_errors=True)
        return collect(source, result)

    return seeds, parse


@_target("results folder", "coordinator -> anybody", of_json, FedfmsError)
def _results(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    source, result = folder / "job", folder / "result"
    source.mkdir()
    lines = [_json(one) for one in Job().records()]
    (source / "records.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    collect(source, result)
    kinds = ("summary.json", "rounds.csv", "evaluation.csv", "recipe.json")
    whole = {name: (result / name).read_bytes() for name in kinds if (result / name).is_file()}
    seeds = tuple(bytes([at]) + data for at, data in enumerate(whole.values()))

    def parse(data: bytes) -> object:
        name = list(whole)[data[0] % len(whole)] if data else kinds[0]
        (result / name).write_bytes(data[1:])
        try:
            return load_result(result)
        finally:
            (result / name).write_bytes(whole[name])

    return seeds, parse


@_target("event", "server -> coordinator", of_json, ValueError)
def _event(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    event = Event(
        phase="train",
        round=1,
        rounds=5,
        sites=("site-1",),
        finished=(FinishedRound(0, 1, 0.5, True, 1, 1),),
        now=(SiteNow(name="site-1", phase="train", done=3, total=9, pace={"train": 4.0}),),
        time=1.8e9,
        left=(10.0, 20.0),
    )

    def parse(data: bytes) -> object:
        made = Event.from_dict(_any(data))
        made.to_dict()
        return made.worst_first

    return (_json(event.to_dict()),), parse


@_target("piece of records", "server -> coordinator", of_json)
def _piece(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    text = "".join(json.dumps(one) + "\n" for one in Job(rounds=1).records())
    (folder / "records.jsonl").write_text(text)
    (folder / "recipe.json").write_text(RECIPE.to_json())
    seeds = (_json(read_piece(folder, {"offset": 0})), _json(read_piece(folder, {"offset": 300})))

    def parse(data: bytes) -> object:
        piece = decode_piece(_any(data))
        if piece is None:
            return None
        records = RemoteRecords()
        return records.take(piece), records.records

    return seeds, parse


@_target("list of runs", "server -> coordinator", of_json, ValueError)
def _runs(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    info = RunInfo(
        job_id="0f6c3a52",
        name="fedmsa",
        submitter="a@b.org",
        state="running",
        rounds=4,
        since=1.8e9,
        sites=("a",),
    )
    return (_json(info.to_dict()),), lambda data: RunInfo.from_dict(_any(data)).to_dict()


# ------------------------------------------------------------------------- coordinator to a site


@_target("recipe.json", "coordinator -> site", of_json, ConfigError)
def _recipe(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "recipe.json"
    found = sorted((REPOSITORY / "jobs").rglob("recipe*.json")) or [place]
    seeds = (RECIPE.to_json().encode(), *(one.read_bytes() for one in found if one.is_file()))
    return seeds, _of_file(place, lambda: Recipe.from_json(place).sha256)


@_target("meta.json", "coordinator -> site", of_json, ConfigError)
def _meta(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "meta.json"
    seeds = tuple(one.read_bytes() for one in sorted((REPOSITORY / "jobs").glob("*/meta.json")))
    return seeds, _of_file(place, lambda: read_meta(place))


@_target("kit.zip", "coordinator -> site", of_bytes, ConfigError)
def _kit(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    kit = folder / "site-1"
    _write_kit(kit / "kit")
    write_zip(kit, folder / "kit.zip")
    seed = (folder / "kit.zip").read_bytes()
    place, target = folder / "x.zip", folder / "unpacked"

    def parse(data: bytes) -> object:
        place.write_bytes(data)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            return unpack_zip(place, target)
        finally:
            assert not (folder / "x").exists() and not Path("/x").exists()

    return (seed, *_zips("site-1/kit/a.txt")), parse


@_target("fedfms.json", "coordinator -> site", of_json, ConfigError)
def _about(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    _write_kit(folder)
    place = folder / ABOUT_FILE
    return (place.read_bytes(),), _of_file(place, lambda: read_about(folder))


@_target("SHA256SUMS", "coordinator -> site", of_text, ConfigError)
def _sums(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    key = _write_kit(folder)
    seed = (folder / "SHA256SUMS").read_bytes()

    def parse(data: bytes) -> object:
        _sign(folder, key, data)
        check_sums(folder)
        return True

    return (seed,), parse


@_target("SHA256SUMS.sig", "coordinator -> site", of_text, ConfigError)
def _signature(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    _write_kit(folder)
    place = folder / "SHA256SUMS.sig"
    return (place.read_bytes(),), _of_file(place, lambda: check_sums(folder) or True)


@_target("certificate", "coordinator -> site", of_text, ConfigError)
def _certificate(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    _write_kit(folder)
    place = folder / "x.pem"
    seed = (folder / "startup/rootCA.pem").read_bytes()
    return (seed, seed * 2), _of_file(place, lambda: _looked_at(read_certificate(place)))


# ------------------------------------------------------------------------- site to coordinator


@_target("request.zip", "site -> coordinator", of_bytes, FedfmsError)
def _request_zip(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "request.zip"
    said = {"name": "site-1", "org": "hospital", "project": "p", "public_key_sha256": "a" * 64}
    seeds = _zips(REQUEST_FILE, json.dumps(said))
    return seeds, _of_file(place, lambda: read_request(place))


@_target("secure sum, at a site", "server -> site", of_json, Misfits, DoorClosed)
def _sums_ask(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    """What a server asks a trainer in each step of a round: the site is before that step."""
    sum_ = _Sum()
    site, before = "site-1", sum_.before
    seeds = tuple(_json(one.to_dict()) for one in sum_.asks)

    def parse(data: bytes) -> object:
        ask = SumsAsk.from_dict(_any(data))
        if ask.step == "shares":
            return before["shares"].seal(ask.keys, sum_.peers[site]).sealed
        if ask.step == "take":
            return before["take"].take(ask.sealed).masked(sum_.difference, 1, 32)
        return before["unmask"].unmask(ask.arrived) if ask.step == "unmask" else ask.to_dict()

    return seeds, parse


# ----------------------------------------------------------------------------- a party's own files


@_target("site.yml", "hospital", of_text, ConfigError)
def _site(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "site.yml"
    found = (TEMPLATES / "site/site.yml", *sorted((REPOSITORY / "sites").glob("*/site.yml")))
    return (
        tuple(one.read_bytes() for one in found),
        _of_file(place, lambda: SiteConfig.from_yaml(place, folder)),
    )


@_target("privacy.json", "hospital", of_json, ConfigError)
def _privacy(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / POLICY_FILE
    seed = (TEMPLATES / "site/policy/privacy.json").read_bytes()
    return (seed,), _of_file(place, lambda: Policy.from_folder(folder))


@_target("authorization.json", "hospital", of_json, ConfigError)
def _authorization(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / AUTHORIZATION_FILE
    seed = (TEMPLATES / "site/policy/authorization.json").read_bytes()
    return (seed,), _of_file(place, lambda: check_authorization(folder, "hospital"))


@_target("globs and patient", "hospital", of_text, FedfmsError)
def _manifest(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    for name in ("images/p1_a.png", "images/p2_a.png", "labels/p1_a.png", "labels/p2_a.png"):
        place = folder / "data" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")
    seeds = (
        b"images/*.png\nlabels/*.png\n^(p\\d+)_\nwildcards",
        b"**/p?_a.png\nlabels/[!x]*.png\n(p[0-9])\npatient",
        b"*/*.png\nlabels/**/*\n\nfolder",
    )
    place = folder / "site.yml"

    def parse(data: bytes) -> object:
        lines = [*data.decode("utf-8", errors="surrogateescape").split("\n"), "", "", "", ""]
        values: dict[str, Any] = {
            "format": "image",
            "data_root": str(folder / "data"),
            "classes": {"disc": [255]},
            "images": lines[0],
            "labels": lines[1],
            **({"patient": lines[2]} if lines[2] else {}),
            **({"pair_by": lines[3]} if lines[3] else {}),
        }
        place.write_text(yaml.safe_dump(values))
        return find_cases(SiteConfig.from_yaml(place))

    return seeds, parse


@_target("project.yml", "coordinator", of_text, FedfmsError)
def _project(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "project.yml"
    seed = (REPOSITORY / "provisioning/project.yml").read_bytes()
    return (seed,), _of_file(place, lambda: read_project(place))


@_target("study file", "researcher", of_text, ConfigError)
def _study(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    place = folder / "studies/study.yml"
    place.parent.mkdir()
    for name in ("jobs", "workspace"):
        (folder / name).symlink_to(REPOSITORY / name)
    found = sorted((REPOSITORY / "studies").glob("*.yml"))
    return (
        tuple(one.read_bytes() for one in found),
        _of_file(place, lambda: Study.from_yaml(place)),
    )


@_target("backup.tar", "server -> server", of_tar, FedfmsError)
def _backup(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    workspace = folder / "workspace"
    for name in ("runs/a/job.json", "storage/jobs/a/meta", "storage/jobs/a/data", "audit.log"):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text("{}" * 20)
    backup(folder / "server.tar", workspace)
    seeds = [(folder / "server.tar").read_bytes()]
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=format_) as tar:
            for name in ("workspace/" + "a" * 200, "workspace/é", "SHA256SUMS"):
                entry = tarfile.TarInfo(name)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"12345"))
        seeds.append(data.getvalue())
    place, target = folder / "x.tar", folder / "new"

    def parse(data: bytes) -> object:
        place.write_bytes(data)
        shutil.rmtree(target, ignore_errors=True)
        return restore(place, target / "workspace", target / "kit")

    return tuple(seeds), parse


@_target("job.json", "server", of_json)
def _job(folder: Path) -> tuple[tuple[bytes, ...], Parse]:
    About(sites=["site-1"], min_sites=1, starts=[0, 2]).write(folder)
    place = next(folder.glob("*.json"))
    return (place.read_bytes(),), _of_file(place, lambda: About.read(folder))


# ----------------------------------------------------------------------------------------- pieces


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _any(data: bytes) -> Any:
    """What FLARE's own decoder may hand over: any Python value that the bytes can spell."""
    sys.set_int_max_str_digits(0)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    finally:
        sys.set_int_max_str_digits(4300)
    return value


def _looked_at(certificate: x509.Certificate) -> object:
    names = [subject_of(certificate, oid) for oid in (NameOID.COMMON_NAME, NameOID.USER_ID)]
    return names, fingerprint(certificate), certificate.not_valid_after_utc


def _of_file(place: Path, read: Callable[[], object]) -> Parse:
    def parse(data: bytes) -> object:
        place.write_bytes(data)
        return read()

    return parse


def _announcement() -> Announcement:
    return Announcement(
        "site-1",
        version="0.1.0",
        classes=("disc", "cup"),
        methods=("fedmsa",),
        max_rounds=100,
        device="cpu",
        overlapping=(("disc", "cup"),),
        certificate_ends=1.9e9,
    )


def _bent(right: dict[str, torch.Tensor], report: Contribution, data: bytes) -> tuple[Any, Any]:
    """The right answer, with changes that the bytes choose."""
    chance = random.Random(data)
    tensors: Any = {name: tensor.clone() for name, tensor in right.items()}
    values = report.to_dict()
    for byte in data[:4]:
        name = chance.choice(sorted(right))
        if byte < 40:
            tensors[name] = chance.choice(
                (
                    None,
                    3,
                    [1.0],
                    torch.ones(3, 4, device="meta"),
                    torch.ones(3, 4).to_sparse(),
                    torch.ones(3, 4, dtype=torch.float64),
                    torch.ones(3, 4, dtype=torch.complex64),
                    torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
                    torch.ones(3, 4).half(),
                    torch.ones(1).expand(3, 4),
                    torch.full((3, 4), float("nan")),
                    torch.full((3, 4), 3e38),
                    torch.ones(3, 4, requires_grad=True),
                    np.ones((3, 4)),
                    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                )
            )
        elif byte < 60:
            tensors.pop(name, None)
        elif byte < 80:
            tensors[chance.choice((None, 3, "x", ("a",), "a\0"))] = torch.ones(2)
        elif byte < 140:
            key = chance.choice(sorted(values))
            values[key] = chance.choice(
                (None, -1, 10**400, 2**53, float("nan"), [], {}, "x", True, 1e308)
            )
    if data[:1] == b"\xff":
        tensors = chance.choice((None, [], 3, {}, {"a": None}, [("a", 1)]))
    return tensors, Contribution.from_dict(values)


class _Sum:
    """A round of a secure sum of three sites, of which one drops out: all that is said in it."""

    job = "0f6c3a52"
    arrived = ("site-1", "site-2")

    def __init__(self) -> None:
        names = ("site-1", "site-2", "site-3")
        self.difference = {"w": torch.linspace(-1e-3, 1e-3, 9)}
        signers = {name: TrainerSigner(new_key()) for name in names}
        self.peers = {
            name: {other: signers[other].public for other in names if other != name}
            for name in names
        }
        rounds = {name: SiteRound.begin(name, self.job, 0) for name in names}
        server = ServerRound(self.job, 0)
        asks = [server.ask_keys()]
        self.keys = {
            name: SumsAnswer(keys=rounds[name].own_keys(signers[name].public, signers[name].sign))
            for name in names
        }
        asks.append(server.ask_shares(self.keys))
        self.before = {"shares": rounds["site-1"]}
        for name in names:
            rounds[name] = rounds[name].seal(asks[-1].keys, self.peers[name])
        self.shares = {name: SumsAnswer(sealed=rounds[name].sealed) for name in names}
        take = server.ask_take(self.shares)
        asks.append(take["site-1"])
        self.before["take"] = rounds["site-1"]
        for name in names:
            rounds[name] = rounds[name].take(take[name].sealed)
        self.before["unmask"] = rounds["site-1"]
        self.masked = {name: rounds[name].masked(self.difference, 1)[1] for name in self.arrived}
        asks.append(server.ask_unmask(self.arrived))
        self.asks = tuple(asks)
        self.pieces = {
            name: SumsAnswer(pieces=rounds[name].unmask(self.arrived)[1]) for name in self.arrived
        }


def _write_kit(kit: Path) -> rsa.RSAPrivateKey:
    """A small kit as a site gets one, signed by an authority of its own."""
    key, pem = make_authority()
    for name in ("startup", "local"):
        (kit / name).mkdir(parents=True)
    (kit / "startup/rootCA.pem").write_bytes(pem)
    (kit / "startup/fed_client.json").write_text("{}")
    (kit / "local/a.json").write_text("{}")
    KitAbout(
        project="p",
        participant="site-1",
        type="client",
        server_host="server.example.org",
        server_port=8002,
        version=fedfms.__version__,
        nvflare="2.9.0",
    ).write(kit)
    write_sums(kit, key)
    return key


def _sign(kit: Path, key: rsa.RSAPrivateKey, content: bytes) -> None:
    from base64 import encodebytes

    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    (kit / "SHA256SUMS").write_bytes(content)
    signature = key.sign(content, padding.PKCS1v15(), hashes.SHA256())
    (kit / "SHA256SUMS.sig").write_bytes(encodebytes(signature))


def _zips(name: str, text: str = "text") -> tuple[bytes, ...]:
    """Archives with this file: stored, deflated, and in the ways that are refused."""
    made = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", method) as archive:
            archive.writestr(name, text)
            archive.writestr("site-1/kit/b", b"\0" * 2000)
        made.append(data.getvalue())
    # the bit that says it is encrypted, in both places; and a size that is a lie
    locked = bytearray(made[1])
    for at in (6, locked.index(b"PK\x01\x02") + 8):
        locked[at] |= 1
    lying = bytearray(made[1])
    struct.pack_into("<I", lying, lying.index(b"PK\x01\x02") + 24, 4)
    return (*made, bytes(locked), bytes(lying))
