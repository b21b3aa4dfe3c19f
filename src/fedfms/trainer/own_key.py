"""The trainer's own key: made at its first start, kept in the site's private folder, never sent.

The site's certificate, and with it the FLARE client's key, come from the coordinator's authority.
This one does not: nobody but this trainer ever had it. It signs what leaves (receipts.py). Secure
sums of several sites may take their keys from the same secret.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedfms.errors import FedfmsError
from fedfms.exchange.signatures import TrainerSigner, new_key
from fedfms.files import read_whole, write_whole

log = logging.getLogger(__name__)

KEY = "trainer.key"  # in the private folder: Ed25519, PKCS 8 in PEM, mode 0600
SUMS = "sums"  # folder beside it: what was done of secure sums
_LARGEST = 4096  # bytes


def own_key(work: Path) -> TrainerSigner:
    """The key of this trainer; made where there is none yet.

    Raises:
        ConfigError: code trainer-key; the file is no key.
        OSError: it cannot be read or written.
    """
    path = work / KEY
    try:
        pem = read_whole(path, _LARGEST)
    except FileNotFoundError:
        work.mkdir(parents=True, exist_ok=True)
        pem = new_key()
        write_whole(path, pem, mode=0o600)
        log.info("a key of this trainer's own was made: %s", TrainerSigner(pem).public)
    return TrainerSigner(pem)


def public_key(work: Path) -> str | None:
    """What this trainer announces of its key; None where there is none that can be read."""
    try:
        return TrainerSigner(read_whole(work / KEY, _LARGEST)).public
    except (OSError, FedfmsError):  # what is wrong, the next task says
        return None
