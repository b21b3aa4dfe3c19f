"""The length of a line in FLARE's logs."""

from __future__ import annotations

import logging

LARGEST = 2000  # characters of a message


class ShortMessages(logging.Filter):
    """Shortens each message to `LARGEST` characters; of a handler, before it formats anything.

    At level debug FLARE 2.9 logs each message that it receives whole, tensors too: 48 million
    characters for 16 MiB, which its formatters then search and each of its files writes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change a record that is too long; every one is logged."""
        message = record.getMessage()
        if len(message) > LARGEST:
            rest = f" … ({len(message)} characters)"
            record.msg = message[: LARGEST - len(rest)] + rest  # short enough for the next handler
            record.args = None
        return True
