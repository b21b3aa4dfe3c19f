"""Whether a run is what it was: its records line by line, its seal, receipts, models and tables.

Needs nothing but the run's folder and, to know whose signatures they are, a kit of the project.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedfms.bounded import decode_json
from fedfms.contracts.decode import Misfits
from fedfms.contracts.receipt import FIRST, Countersigned, SignedReceipt
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, FedfmsError, Undecodable, unexpected
from fedfms.exchange.receipts import follows, other_report, wrong_signature
from fedfms.exchange.signatures import certificate_of, is_signed_by_certificate
from fedfms.exchange.tensors import fingerprint, load_tensors, to_precision
from fedfms.files import file_sha256
from fedfms.kits.certificates import fingerprint as certificate_fingerprint
from fedfms.kits.certificates import subject_of
from fedfms.kits.kit import Kit
from fedfms.records.chain import Seal, line_sha256, previous_of, seal_of
from fedfms.records.layout import (
    ANSWERS,
    BEST_MODEL,
    GLOBAL_MODEL,
    PICTURES,
    RECIPE,
    RECORDS,
)
from fedfms.records.schema import RECORDS as RECORD
from fedfms.records.schema import ContributionRecord, EvaluationRecord, JobRecord, Record
from fedfms.report.again import DERIVED, check_derived
from fedfms.report.averages import check_averages
from fedfms.report.collect import find_records
from fedfms.report.trainer_keys import check_keys

GROUP = "fedfms.verify"  # entry points: checks of other packages for folders of their own
_MODELS = {"final": GLOBAL_MODEL, "best": BEST_MODEL}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    problems: tuple[str, ...]  # none if it holds
    note: str = ""  # what else a person wants to know of it
    looked: bool = True  # False: it was not looked at, for the reason in the note
    warnings: tuple[str, ...] = ()  # what may be right, and a person has to ask about


class OtherRuns:
    """The check of another package for folders that are no job's results; named in `GROUP`."""

    name: ClassVar[str]

    def is_one(self, folder: Path) -> bool:
        """Whether a folder is one of its kind."""
        raise NotImplementedError

    def verify(self, folder: Path, **options: Any) -> list[Check]:
        """Check it; the options are those of `fedfms verify`."""
        raise NotImplementedError


def verify_run(
    folder: Path,
    kit: Kit | None = None,
    answers: Path | None = None,
    peers: Mapping[str, str] | None = None,
) -> list[Check]:
    """Look at everything that a run's folder claims.

    Args:
        folder: a results folder, or a job's result as it was fetched.
        kit: any of the project's; None: whose signatures these are is left to who reads the
            authority's fingerprint in the answer.
        answers: what the server kept of the run's answers; None: looked for beside the records.
        peers: the key of each site's trainer, as the site said it; None: they are only told.

    Returns:
        one entry for each kind of check.

    Raises:
        FederationError: it holds no records (no-records).
    """
    source = find_records(folder)
    data = (source / RECORDS).read_bytes()
    lines = data.split(b"\n")
    records = [_record(line) for line in lines]
    seal = next((one for line in reversed(lines) if line and (one := seal_of(line))), None)
    recipe_problems, recipe = _recipe(source, records)
    authority = kit.root if kit is not None else _authority(seal)
    known = [one for one in records if one is not None]
    receipts = Check("the receipts of the sites", ("without a seal nobody vouches for a key",))
    if authority is not None:
        receipts = _found("the receipts of the sites", _receipts, lines, records, authority, source)
    keys = check_keys(known, peers)
    ran = next((one.fedfms_version for one in known if isinstance(one, JobRecord)), None)
    tables, report = check_derived(source, ran)
    return [
        _found(f"{RECORDS}, line by line", _chain, data, lines),
        dataclasses.replace(
            _found("the seal of the run", _seal, lines, authority, kit), note=_whose(seal)
        ),
        _found("the files of the result", _files, source, seal),
        Check("the recipe as it ran", recipe_problems),
        receipts,
        Check("the keys of the trainers", keys.problems, keys.note, keys.looked, keys.warnings),
        _found("the models, by what the sites scored", _models, source, known, recipe),
        _averages(source, known, recipe, answers),
        Check("the tables, from the records", tables.problems, tables.note, tables.looked),
        Check("the report, from the records", report.problems, report.note, report.looked),
    ]


def _found(what: str, look: Callable[..., Iterable[str]], *about: object) -> Check:
    """A check; one that cannot read its files has found a problem."""
    try:
        return Check(what, tuple(look(*about)))
    except FedfmsError as error:
        return Check(what, (error.problem,))
    except Exception as error:  # files that were changed are anything
        return Check(
            what, (unexpected(error, "what it reads cannot be used", ConfigError).problem,)
        )


def _averages(
    source: Path, records: Sequence[Record], recipe: Recipe | None, answers: Path | None
) -> Check:
    what = "the averages, from the answers"
    try:
        found = check_averages(source, records, recipe, answers)
    except Exception as error:  # files that were changed are anything
        problem = unexpected(error, "what it reads cannot be used", ConfigError).problem
        return Check(what, (problem,))
    return Check(what, found.problems, found.note, found.looked)


def _chain(data: bytes, lines: Sequence[bytes]) -> Iterator[str]:
    if lines[-1]:
        yield f"line {len(lines)} has no end: it was changed, or the file was cut off"
    whole = lines if lines[-1] else lines[:-1]
    if whole and all(previous_of(line) is None for line in whole):
        yield (
            "no line names the one before it: it was written by a version of fedfms that made no "
            "chain, and cannot be verified"
        )
        return
    before = FIRST
    for number, line in enumerate(whole, start=1):
        named = previous_of(line)
        if named is None:
            yield f"{_where(number, line)} cannot be read, or names no line before it"
        elif named != before and number == 1:
            yield f"{_where(number, line)} was changed, or lines before it were taken out"
        elif named != before:
            yield (
                f"{_where(number, line)} does not follow line {number - 1}: one of the two was "
                "changed, or a line between them was taken out or put in"
            )
        before = line_sha256(line)


def _seal(
    lines: Sequence[bytes], authority: x509.Certificate | None, kit: Kit | None
) -> Iterator[str]:
    whole = [line for line in lines if line]
    number, line = len(whole), whole[-1] if whole else b""
    seal = seal_of(line)
    if seal is None:
        yield (
            f"line {number}, the last, is no seal as it was written: the run has not ended, it was "
            "changed, or lines were cut off"
        )
        return
    named = _pem(seal.authority)
    if authority is None or named is None:
        yield f"line {number}, the seal: the authority in it is no certificate; it was changed"
        return
    if certificate_fingerprint(authority) != certificate_fingerprint(named):
        yield f"line {number}, the seal, names another certificate authority than your kit"
        return
    certificate = certificate_of(seal.certificate, authority)
    if certificate is None:
        yield f"line {number}, the seal: its certificate is not of the project's authority"
        return
    if not is_signed_by_certificate(certificate, seal.signature, seal.signed):
        yield f"line {number}, the seal: its signature does not fit, so it was changed"
    at = _time(seal.time)
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        yield f"line {number}, the seal: its certificate was not valid on {at:%Y-%m-%d}"
    if kit is not None and kit.about.server_host not in _names(certificate):
        yield (
            f"line {number}, the seal: {' and '.join(sorted(_names(certificate)))} signed it, and "
            f"the server is {kit.about.server_host}"
        )
    if seal.lines != number - 1:
        yield f"line {number}, the seal, counts {seal.lines} lines before it"


def _files(source: Path, seal: Seal | None) -> Iterator[str]:
    if seal is None:
        yield "no seal names their hashes"
        return
    for name, sha256 in seal.files.items():
        path = source / name
        if not path.is_file():
            yield f"{name} is missing"
        elif file_sha256(path) != sha256:
            yield f"{name} was changed after the run"
    there = [name for name in (RECIPE, *_MODELS.values()) if (source / name).is_file()]
    there += [f"{PICTURES}/{path.name}" for path in sorted((source / PICTURES).glob("*"))]
    for name in there:
        if name not in seal.files:
            yield f"{name} was not there when the run ended"
    yield from _foreign(source)


def _foreign(source: Path) -> Iterator[str]:
    """Files that nothing of a results folder names; beside a job's result as fetched lies more."""
    if not any((source / name).exists() for name in DERIVED):
        return
    ours = {RECORDS, RECIPE, *_MODELS.values(), *DERIVED}
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            continue
        # the check of the averages looks at the one folder, and the seal names what is in the other
        if place.as_posix() in ours or place.parts[0] == ANSWERS or place.parent == Path(PICTURES):
            continue
        yield f"{place}: nothing of the run names this file; if it is yours, keep it elsewhere"


def _recipe(
    source: Path, records: Sequence[Record | None]
) -> tuple[tuple[str, ...], Recipe | None]:
    try:
        recipe = Recipe.from_json(source / RECIPE)
    except FedfmsError as error:
        return (error.problem,), None
    jobs = [one for one in records if isinstance(one, JobRecord)]
    if not jobs:
        return ("no record says which recipe ran",), recipe
    if jobs[-1].recipe_sha256 != recipe.sha256:
        return (f"{RECIPE} is not the recipe whose hash the records name",), recipe
    return (), recipe


def _receipts(
    lines: Sequence[bytes],
    records: Sequence[Record | None],
    authority: x509.Certificate,
    source: Path,
) -> Iterator[str]:
    job = next((one.job_id for one in records if isinstance(one, JobRecord)), None)
    last: dict[str, SignedReceipt] = {}
    models_in: dict[int, dict[str, str]] = {}  # of each round: site -> model that it began with
    for number, (line, record) in enumerate(zip(lines, records, strict=True), start=1):
        if not isinstance(record, ContributionRecord | EvaluationRecord):
            continue
        if isinstance(record, ContributionRecord):
            if not record.accepted:
                continue
        elif record.reason is not None and record.said is None:  # the site did not answer
            continue
        where = _where(number, line)
        if record.said is None:
            yield f"{where} has no report that can be read"
            continue
        if record.receipt is None:
            yield f"{where} has no receipt"
            continue
        try:
            receipt = Countersigned.from_dict(record.receipt)
        except Misfits:
            yield f"{where} has a receipt that cannot be read"
            continue
        made = receipt.signed.receipt
        at = _time(made.time if record.time is None else record.time)  # the server's clock
        if problem := wrong_signature(receipt, record.site, authority, at):
            yield f"{where}: {problem}"
        if other := other_report(made, record.said, job):
            yield f"{where}: its receipt differs from it in {', '.join(other)}"
        if isinstance(record, ContributionRecord):
            if record.bytes_up is not None and record.bytes_up != made.payload_bytes:
                yield f"{where}: its receipt is of {made.payload_bytes} bytes"
            models_in.setdefault(record.round, {})[record.site] = made.model_in_sha256
        elif len(record.pictures) == len(made.pictures):
            for name, sha256 in zip(record.pictures, made.pictures, strict=True):
                path = source / name
                if path.is_file() and file_sha256(path) != sha256:
                    yield f"{where}: {name} is not the picture of its receipt"
        if (before := last.get(record.site)) and not follows(receipt.signed, before):
            yield (
                f"{where}: receipt {made.number} of {record.site} does not follow its receipt "
                f"{before.receipt.number}"
            )
        last[record.site] = receipt.signed
    for number, by_site in models_in.items():
        if len(set(by_site.values())) > 1:
            yield f"round {number}: the sites began with different models ({', '.join(by_site)})"


def _models(source: Path, records: Sequence[Record], recipe: Recipe | None) -> Iterator[str]:
    if recipe is None:
        yield "without a recipe nobody knows in which precision they travelled"
        return
    if recipe.canary:  # its model is no result and not kept
        return
    scored: dict[str, dict[str, str]] = {}  # model -> site -> fingerprint of what it received
    for one in records:
        if isinstance(one, EvaluationRecord) and one.receipt is not None:
            try:
                receipt = Countersigned.from_dict(one.receipt).signed.receipt
            except Misfits:
                continue
            scored.setdefault(one.model, {})[one.site] = receipt.model_in_sha256
    for model, by_site in sorted(scored.items()):
        path = source / _MODELS.get(model, "")
        if not path.is_file():
            yield f"the {model} model is missing"
            continue
        travelled = fingerprint(to_precision(load_tensors(path), recipe.scored_precision))
        for site, sha256 in sorted(by_site.items()):
            if sha256 != travelled:
                yield f"{path.name} is not the {model} model that {site} scored"


# ---------------------------------------------------------------------------------------- words


def _record(line: bytes) -> Record | None:
    try:
        return RECORD.validate_json(line)
    except ValueError:
        return None


def _where(number: int, line: bytes) -> str:
    """A line by its number and by what it is about, as far as it can be read."""
    try:
        values = decode_json(line, "a record")
        words = [values["record"]]
    except (Undecodable, KeyError, TypeError):
        return f"line {number}"
    words += [f"of {values['site']}"] if isinstance(values.get("site"), str) else []
    words += [f"round {values['round']}"] if isinstance(values.get("round"), int) else []
    return f"line {number} ({', '.join(str(word) for word in words)})"


def _authority(seal: Seal | None) -> x509.Certificate | None:
    return _pem(seal.authority) if seal is not None else None


def _pem(text: str) -> x509.Certificate | None:
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
        subject_of(certificate, NameOID.COMMON_NAME)  # cryptography reads it when it is asked for
    except ValueError:
        return None
    return certificate


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)


def _names(certificate: x509.Certificate) -> set[str]:
    """All names of a server's certificate."""
    found = {subject_of(certificate, NameOID.COMMON_NAME)}
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        found |= set(names.value.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        pass
    return found


def _whose(seal: Seal | None) -> str:
    """By whom and when a run was sealed, for a person to compare."""
    certificate = _pem(seal.certificate) if seal is not None else None
    authority = _pem(seal.authority) if seal is not None else None
    if seal is None or certificate is None or authority is None:
        return ""
    name = subject_of(certificate, NameOID.COMMON_NAME)
    of = certificate_fingerprint(authority)
    return f"by {name} on {_time(seal.time):%Y-%m-%d %H:%M} UTC; certificate authority {of}"
