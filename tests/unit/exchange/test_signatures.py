"""Signatures, checked by OpenSSL's own command too, and what is no signature."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from fedfms.errors import ConfigError
from fedfms.exchange.signatures import (
    TrainerSigner,
    certificate_of,
    is_signed_by_certificate,
    is_signed_by_trainer,
    new_key,
    sign_by_certificate,
)
from sealed_run import make_kits


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_trainers_signature_is_ed25519_as_openssl_has_it(tmp_path: Path) -> None:
    pem = new_key()
    signer = TrainerSigner(pem)
    signature = signer.sign(b"what left")
    assert is_signed_by_trainer(signer.public, signature, b"what left")
    key = load_pem_private_key(pem, None).public_key()
    (tmp_path / "key.pem").write_bytes(
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "data").write_bytes(b"what left")
    (tmp_path / "signature").write_bytes(bytes.fromhex(signature))
    said = subprocess.run(
        [
            *("openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "key.pem"),
            *("-in", "data", "-sigfile", "signature"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Verified Successfully" in said.stdout


def test_a_certificates_signature_is_pss_as_openssl_has_it(kits: Path, tmp_path: Path) -> None:
    folder = kits / "site-1" / "startup"
    signature = sign_by_certificate((folder / "client.key").read_bytes(), b"what left")
    own = certificate(folder / "client.crt")
    assert is_signed_by_certificate(own, signature, b"what left")
    (tmp_path / "key.pem").write_bytes(
        own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "data").write_bytes(b"what left")
    (tmp_path / "signature").write_bytes(bytes.fromhex(signature))
    said = subprocess.run(
        [
            *("openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature"),
            *("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest", "data"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Verified OK" in said.stdout


def test_nothing_else_passes_for_a_signature(kits: Path) -> None:
    one, other = TrainerSigner(new_key()), TrainerSigner(new_key())
    signature = one.sign(b"a")
    assert one.public != other.public
    assert not is_signed_by_trainer(one.public, signature, b"b")
    assert not is_signed_by_trainer(other.public, signature, b"a")
    assert not is_signed_by_trainer(one.public, signature[:-2], b"a")
    assert not is_signed_by_trainer("no key", signature, b"a")
    folder = kits / "site-1" / "startup"
    signed = sign_by_certificate((folder / "client.key").read_bytes(), b"a")
    assert not is_signed_by_certificate(certificate(folder / "client.crt"), signed, b"b")
    theirs = certificate(kits / "site-2" / "startup" / "client.crt")
    assert not is_signed_by_certificate(theirs, signed, b"a")


def test_a_certificate_is_of_its_authority_and_of_its_name(kits: Path, tmp_path: Path) -> None:
    folder = kits / "site-1" / "startup"
    pem, authority = (folder / "client.crt").read_text(), certificate(folder / "rootCA.pem")
    assert certificate_of(pem, authority, "site-1") is not None
    assert certificate_of(pem, authority) is not None
    assert certificate_of(pem, authority, "site-2") is None
    others = make_kits(tmp_path)
    assert certificate_of(pem, certificate(others / "site-1/startup/rootCA.pem")) is None
    assert certificate_of(pem.replace("M", "N", 1), authority) is None
    assert certificate_of("-----BEGIN CERTIFICATE-----\n", authority) is None


def test_a_key_of_another_kind_is_refused_with_what_to_do(kits: Path) -> None:
    rsa = (kits / "site-1" / "startup" / "client.key").read_bytes()
    with pytest.raises(ConfigError, match=r"put trainer\.key back from a copy"):
        TrainerSigner(rsa)
    with pytest.raises(ConfigError, match="unzip the kit again"):
        sign_by_certificate(new_key(), b"a")
