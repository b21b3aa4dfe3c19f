"""The length of a line in FLARE's logs."""

from __future__ import annotations

import logging

LARGEST = 2000  # characters of a message


class ShortMessages(logging.Filter):
    """Shortens each message to `LARGEST` characters; of a handler, before it formats anything.

    At level debug FLARE 2.9 formats what it sends and receives into its messages, of any length
    (`fuel/f3/cellnet/cell.py`); its formatters search each by a regular expression, once a handler.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change a record that is too long; every one is logged."""
        message = record.getMessage()
        if len(message) > LARGEST:
            rest = f" … ({len(message)} characters)"
            record.msg = message[: LARGEST - len(rest)] + rest  # short enough for the next handler
            record.args = None
        return True
