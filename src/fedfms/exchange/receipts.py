"""What a receipt has to fit: its signatures, the answer that it came with, the one before it.

Asked by the server when an answer comes, and by whoever verifies the records of a run later.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence

from cryptography import x509
from torch import Tensor

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.receipt import (
    CLIENTS,
    TRAINERS,
    Countersigned,
    Receipt,
    SignedReceipt,
    report_sha256,
)
from fedfms.exchange.signatures import (
    certificate_of,
    is_signed_by_certificate,
    is_signed_by_trainer,
)
from fedfms.exchange.tensors import fingerprint, payload_bytes


def wrong_signature(
    receipt: Countersigned, site: str, authority: x509.Certificate, at: datetime.datetime
) -> str | None:
    """What is wrong with the signatures of a receipt, as the end of a sentence; None: nothing.

    Args:
        receipt: as it came.
        site: whose it has to be.
        authority: of the project's certificates.
        at: when the site's certificate has to be valid.
    """
    certificate = certificate_of(receipt.certificate, authority, site)
    signed = receipt.signed
    if certificate is None:
        return f"its certificate is not {site}'s"
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        return f"{site}'s certificate was not valid then"
    if not is_signed_by_certificate(certificate, receipt.signature, CLIENTS + signed.canonical):
        return "the countersignature does not fit"
    if not is_signed_by_trainer(signed.key, signed.signature, TRAINERS + signed.receipt.canonical):
        return "the trainer's signature does not fit"
    return None


def other_report(receipt: Receipt, report: Contribution, job: str | None) -> list[str]:
    """In what a receipt differs from a site's report of the same answer, by names of its fields."""
    expected = {
        "site": report.site,
        "job": job,
        "kind": report.kind,
        "role": report.role,
        "round": report.round,
        "model": report.model,
        "recipe_sha256": report.recipe_sha256,
        "backbone_sha256": report.backbone_sha256,
        "package_version": report.package_version,
        "report_sha256": report_sha256(report),
        "norm": report.update_norm,
    }
    return [name for name, value in expected.items() if getattr(receipt, name) != value]


def other_payload(
    receipt: Receipt, tensors: Mapping[str, Tensor], pictures: Sequence[bytes]
) -> list[str]:
    """In what a receipt differs from tensors and pictures as they came, by names of its fields."""
    expected = {
        "tensors_sha256": fingerprint(tensors) if tensors else None,
        "values": sum(one.numel() for one in tensors.values()),
        "payload_bytes": payload_bytes(tensors),
        "pictures": tuple(hashlib.sha256(picture).hexdigest() for picture in pictures),
    }
    return [name for name, value in expected.items() if getattr(receipt, name) != value]


def follows(later: SignedReceipt, before: SignedReceipt) -> bool:
    """Whether a receipt may come after another of its site.

    Between two that the server of a run sees there may be receipts of other runs. The same one may
    come twice, where FLARE sends a message again. A trainer with a new key begins a new chain.
    """
    one, other = later.receipt, before.receipt
    if later.key != before.key or later == before:
        return True
    if one.number == other.number + 1:
        return one.previous == other.sha256
    return one.number > other.number
