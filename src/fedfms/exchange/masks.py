"""Masks of a secure sum: numbers that cancel where all of them are added, and shares of seeds.

Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning (ACM CCS,
doi 10.1145/3133956.3133982), on the integers: all sums are modulo 2^64, as an int64 adds, or modulo
2^32.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

SEED_BYTES = 32
SHARE_BYTES = 66
_PRIME = 2**521 - 1  # of the field that shares are of; larger than any seed
_BLOCK_VALUES = 2**17  # masked at a time: what stays in a processor's cache


def common_seed(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """The seed that two sites have in common: X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869).

    Args:
        private: of the one, 32 bytes.
        public: of the other, 32 bytes.
        purpose: what it is for; seeds of two purposes say nothing of each other.

    Returns:
        32 bytes.

    Raises:
        ValueError: the public key is none, or is one of those that make every secret 0.
    """
    key = X25519PrivateKey.from_private_bytes(private)
    secret = key.exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), SEED_BYTES, None, purpose).derive(secret)


def has_secrets(public: bytes) -> bool:
    """Whether a public key makes a secret with others: a few make the same one, 0, with all."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def public_of(private: bytes) -> bytes:
    """The public key of an X25519 private key; both have 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def add_mask(tensors: Mapping[str, Tensor], seed: bytes, sign: int) -> None:
    """Add a mask to integers in place, modulo 2^64, or 2^32 where they have 32 bits.

    Args:
        tensors: all int64 or all int32, contiguous, on the CPU. Their values are masked in the
            order of names.
        seed: 32 bytes, used for no other mask. The mask is the key stream of AES-256 in counter
            mode (NIST SP 800-38A) from counter 0, 8 bytes a value or 4, little-endian.
        sign: 1, or -1 to take it off.
    """
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    nothing = bytes(8 * _BLOCK_VALUES)
    room = bytearray(8 * _BLOCK_VALUES + 15)  # as update_into asks for
    for name in sorted(tensors):
        values = tensors[name].view(-1).numpy()
        size = values.itemsize
        mask = np.frombuffer(room, f"<i{size}", _BLOCK_VALUES)
        for start in range(0, len(values), _BLOCK_VALUES):
            part = values[start : start + _BLOCK_VALUES]
            stream.update_into(memoryview(nothing)[: size * len(part)], room)
            if sign > 0:
                np.add(part, mask[: len(part)], out=part)
            else:
                np.subtract(part, mask[: len(part)], out=part)


def split(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """Shares of a secret, of which `threshold` give it back and fewer say nothing.

    Shamir 1979, How to share a secret, over the integers modulo 2^521 - 1; the coefficients come
    from the operating system's random source.

    Args:
        secret: 32 bytes.
        holders: how many shares; the place of each, from 1, is where it was taken.
        threshold: from 1 to `holders`.

    Returns:
        shares of 66 bytes.
    """
    if not 1 <= threshold <= holders or len(secret) != SEED_BYTES:
        raise ValueError(f"no {threshold} of {holders} shares of {len(secret)} bytes")
    coefficients = [int.from_bytes(secret)] + [
        secrets.randbelow(_PRIME) for _ in range(threshold - 1)
    ]
    shares = []
    for place in range(1, holders + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % _PRIME
        shares.append(value.to_bytes(SHARE_BYTES))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret of as many shares as its threshold.

    Args:
        shares: by place, from 1.

    Returns:
        32 bytes.

    Raises:
        ValueError: they are of no secret, as where one of them is wrong.
    """
    places: Sequence[int] = sorted(shares)
    secret = 0
    for place in places:
        over = under = 1
        for other in places:
            if other != place:
                over = over * other % _PRIME
                under = under * (other - place) % _PRIME
        value = int.from_bytes(shares[place])
        secret = (secret + value * over * pow(under, -1, _PRIME)) % _PRIME
    if secret >= 2 ** (8 * SEED_BYTES):
        raise ValueError("the shares are of no secret")
    return secret.to_bytes(SEED_BYTES)
