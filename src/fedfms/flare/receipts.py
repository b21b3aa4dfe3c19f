"""Receipts on their way: countersigned by a site's FLARE client, checked by the server's guard.

The client signs with the key of its certificate. The server knows that certificate's authority, so
a receipt says which trainer gave it and which site passed it on, also to who reads the records
later without this server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.decode import Misfits
from fedfms.contracts.receipt import CLIENTS, Countersigned, SignedReceipt
from fedfms.errors import ConfigError, ContributionRefused
from fedfms.exchange.receipts import follows, other_payload, other_report, wrong_signature
from fedfms.exchange.signatures import sign_by_certificate
from fedfms.files import file_sha256
from fedfms.flare.job import result_folder
from fedfms.kits.certificates import now, read_certificate
from fedfms.kits.checksums import ROOT_CERTIFICATE
from fedfms.records import layout
from fedfms.records.read import RecordReader
from fedfms.records.schema import ContributionRecord, EvaluationRecord

log = logging.getLogger(__name__)

RECEIPT = "fedfms_receipt"  # header of an answer: a Countersigned as JSON types


class KitSigner:
    """Signs by the certificate of the kit that this process runs from.

    Args:
        root: FLARE's workspace, with the kit's startup/.
        name: of the kit's own files there, "client" or "server".
    """

    def __init__(self, root: Path, name: str) -> None:
        self._key = root / "startup" / f"{name}.key"
        self._certificate = root / "startup" / f"{name}.crt"
        self._authority = root / ROOT_CERTIFICATE

    @property
    def is_there(self) -> bool:
        """Whether there is a kit; a component that a test runs alone has none."""
        return all(path.is_file() for path in (self._key, self._certificate, self._authority))

    @property
    def certificate(self) -> str:
        """PEM."""
        return _pem(self._certificate)

    @property
    def authority(self) -> str:
        """PEM."""
        return _pem(self._authority)

    def sign(self, data: bytes) -> str:
        """Hexadecimal digits.

        Raises:
            ConfigError: code kit-unreadable.
        """
        try:
            return sign_by_certificate(self._key.read_bytes(), data)
        except OSError as error:
            raise ConfigError(
                f"the kit's key cannot be read: {error.strerror}",
                "let this container's user read the kit",
                code="kit-unreadable",
            ) from None


def countersign(answer: Shareable, signed: SignedReceipt, signer: KitSigner) -> None:
    """Put a receipt into an answer, signed by the site's certificate.

    Raises:
        ConfigError: code kit-unreadable.
    """
    if signer.is_there:
        signature = signer.sign(CLIENTS + signed.canonical)
        receipt = Countersigned(signed=signed, certificate=signer.certificate, signature=signature)
        answer.set_header(RECEIPT, receipt.to_dict())


def receipt_of(answer: Shareable) -> dict[str, Any] | None:
    """The receipt in an answer as JSON types; None where there is none that can be read."""
    try:
        return Countersigned.from_dict(answer.get_header(RECEIPT)).to_dict()
    except Misfits:
        return None


class ReceiptCheck:
    """What the server asks of the receipts of one run; knows the last one of each site.

    Without a kit, as where a test runs the guard alone, nothing is asked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._authority: x509.Certificate | None = None
        self._last: dict[str, SignedReceipt] | None = None  # by site, as soon as they were read

    def check(
        self,
        site: str,
        answer: Shareable,
        report: Contribution,
        tensors: Mapping[str, Tensor],
        pictures: Sequence[bytes],
        fl_ctx: FLContext,
    ) -> None:
        """Whether an answer is what its receipt says, and the receipt the site's next one.

        Args:
            site: whose certificate the answer came with.
            answer: with the receipt.
            report: the site's, as it came.
            tensors: as they came; none of an evaluation or a holdout.
            pictures: as they came.
            fl_ctx: of the server's job.

        Raises:
            ContributionRefused: code no-receipt, receipt-signature, other-receipt, receipt-chain.
        """
        root = Path(fl_ctx.get_engine().get_workspace().get_root_dir()) / ROOT_CERTIFICATE
        if not root.is_file():
            return
        with self._lock:
            if self._authority is None:
                self._authority = read_certificate(root)
            if self._last is None:
                self._last = last_receipts(result_folder(fl_ctx) / layout.RECORDS)
        said = answer.get_header(RECEIPT)
        if said is None:
            raise _refused(f"{site} sent no receipt of its answer", "no-receipt")
        try:
            receipt = Countersigned.from_dict(said)
        except Misfits:
            raise _refused(f"{site} sent a receipt that cannot be read", "no-receipt") from None
        if problem := wrong_signature(receipt, site, self._authority, now()):
            raise _refused(f"{site} sent a receipt, and {problem}", "receipt-signature")
        made = receipt.signed.receipt
        other = other_report(made, report, fl_ctx.get_job_id())
        if other := other or other_payload(made, tensors, pictures):
            raise _refused(
                f"{site} sent a receipt of something else: {', '.join(other)}", "other-receipt"
            )
        with self._lock:
            before = self._last.get(site)
            if before is not None and not follows(receipt.signed, before):
                raise _refused(
                    f"{site} sent receipt {made.number}, which does not follow its receipt "
                    f"{before.receipt.number}",
                    "receipt-chain",
                )
            if before is not None and before.key != receipt.signed.key:
                log.warning("%s signs with another key of its trainer than before", site)
            self._last[site] = receipt.signed


def last_receipts(records: Path) -> dict[str, SignedReceipt]:
    """The last receipt of each site whose answer was taken, by the records of a run."""
    found: dict[str, SignedReceipt] = {}
    for one in RecordReader(records).read_rest():
        if not isinstance(one, ContributionRecord | EvaluationRecord) or one.receipt is None:
            continue
        if isinstance(one, ContributionRecord) and not one.accepted:
            continue
        try:
            found[one.site] = Countersigned.from_dict(one.receipt).signed
        except Misfits:
            continue
    return found


def result_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a result that a seal names, by its name relative to the folder."""
    names = [layout.RECIPE, layout.GLOBAL_MODEL, layout.BEST_MODEL]
    names += [f"{layout.PICTURES}/{path.name}" for path in (folder / layout.PICTURES).glob("*.png")]
    return {name: file_sha256(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _refused(problem: str, code: str) -> ContributionRefused:
    return ContributionRefused(
        problem,
        "run the same version of fedfms in all containers of the site; if it is, ask the site "
        "what fedfms egress says there",
        code=code,
    )


def _pem(path: Path) -> str:
    """The one PEM certificate in a file, without what stands around it."""
    certificate = read_certificate(path)
    return certificate.public_bytes(Encoding.PEM).decode("ascii")
